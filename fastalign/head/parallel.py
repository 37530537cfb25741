"""The head with its vocabulary divided among processes: hidden states on all of them, rows of the weight on each.

Every process forms tiles of its own columns of the logits; the online statistics of a row (`rows.RowState`) are joined over the group
by one maximum and one sum of (k, N) numbers, and the gradient of the hidden states, (N, D), by another sum. Logits never travel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastalign.head import function
from fastalign.head.autograd import OperandGrads, first_order, full_size, gradient_rows, no_autocast, spread
from fastalign.head.call import Call, Temperature
from fastalign.head.function import DIFFERENTIABLE, FIELDS, Gradients, Operands
from fastalign.head.plan import Plan
from fastalign.head.products import slabs
from fastalign.head.rows import RowState, rows_of
from fastalign.types import IGNORE_INDEX, HeadOutput


def parallel_linear_logps(
    hidden: Tensor,  # (..., D), the same on every process of the group; gradient
    weight: Tensor,  # (v, D), this process's rows of the whole (V, D) weight; gradient
    target: Tensor,  # (...) int64 in 0..V-1, the same on every process
    *,
    group: Any = None,
    sizes: Sequence[int] | None = None,
    bias: Tensor | None = None,  # (v,), this process's part; gradient
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: Temperature = 1.0,
    ignore_index: int = IGNORE_INDEX,
    outputs: Sequence[str] = ("logps",),
    differentiable: Sequence[str] = DIFFERENTIABLE,
    lora: tuple[Tensor, Tensor] | None = None,  # u (..., r), the same everywhere, and this process's rows of B, (v, r); gradient in both
    d_weight: Tensor | None = None,  # (v, D)
    live_rows: int | None = None,
    active: Tensor | None = None,
    budget: int | None = None,
    impl: str = "auto",
) -> HeadOutput:
    """`linear_logps` under a weight whose rows lie, in the order of the ranks of `group`, on several processes.

    All processes call it with the same hidden states, targets and options, and get the same outputs; a loss of these is to be the
    same on all of them, and is differentiated on all of them. Then the gradients of `hidden` and `u` are whole and the same
    everywhere, and each process has the gradient of its own rows of weight, bias and B. The parts may have different numbers of rows.
    The logits are formed again in the backward: 8NVD / (processes) each. Shoeybi 2019, arXiv:1909.08053 section 3 (the parallel
    cross-entropy), with every statistic of HeadOutput.

    group       a process group of torch.distributed; None: all processes
    sizes       rows that each process of the group has; None: they are exchanged, which is a device sync

    Other options: `linear_logps`. Raises ValueError as that does, and where `sizes` do not fit the group or the weight here, or a
    process has no row.
    """
    call = Call.of(
        hidden, weight, target, bias, lora, temperature, ignore_index, outputs, differentiable, d_weight, live_rows, active,
        logit_scale, softcap,
    )  # fmt: skip
    sizes = sizes_of(weight, group, sizes)
    first, vocabulary = sum(sizes[: dist.get_rank(group)]), sum(sizes)
    live = call.live_index(vocabulary)
    wants = call.hidden_grad or call.head_grad
    plan = call.plan(call.count(live), schedule="recompute" if wants else "none", budget=budget, impl=impl)
    return call.output(_ParallelLogps.apply(*call.tensors, live, call, plan, group, first, vocabulary))


class _ParallelLogps(torch.autograd.Function):
    """(6, N) statistics of whole rows of logits."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        u: Tensor | None,
        b: Tensor | None,
        live: Tensor | None,
        call: Call,
        plan: Plan,
        group: Any,
        first: int,
        vocabulary: int,
    ) -> Tensor:
        operands = _own_columns(call.operands(hidden, weight, bias, u, b), first).take(live)
        with no_autocast(hidden):
            state = _local_state(operands, plan, call.outputs)
            join(state, operands.target, weight.shape[0], vocabulary, first, group)
            stats = rows_of(plan.impl).finish(state)
        found = torch.zeros(len(FIELDS), len(operands.target), dtype=operands.work_dtype, device=hidden.device)
        for name, value in stats.items():
            found[FIELDS.index(name)] = value.to(found.dtype)
        ctx.live, ctx.call, ctx.plan, ctx.group, ctx.first, ctx.vocabulary = live, call, plan, group, first, vocabulary
        ctx.save_for_backward(hidden, weight, bias, u, b, found)
        return found.clone() if live is None else spread(found.T, live, call.target.shape[0]).T

    @staticmethod
    @first_order
    def backward(ctx: Any, d_stats: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, u, b, found = ctx.saved_tensors
        call: Call = ctx.call
        d_live = d_stats if ctx.live is None else d_stats.index_select(1, ctx.live)
        coefficients = {name: d_live[FIELDS.index(name)] for name in call.grad_outputs}
        everything = _own_columns(call.operands(hidden, weight, bias, u, b), ctx.first)
        with no_autocast(hidden):
            needs = ctx.needs_input_grad[:5]
            grads = _pull_back(everything, ctx, found, coefficients, needs)
        return (*grads, *([None] * 6))


def _pull_back(everything: Operands, ctx: Any, found: Tensor, coefficients: dict[str, Tensor], needs: Sequence[bool]) -> OperandGrads:
    """Gradients of the operands here, those of hidden states and u summed over the group before they are rounded."""
    live = ctx.live
    index = gradient_rows(coefficients, ctx.call.active_rows(live))
    if index is not None:
        live = index if live is None else live[index]
        found = found[:, index]
        coefficients = {name: c[index] for name, c in coefficients.items()}
    if "mean_logits" in coefficients:  # the row kernels divide by the columns here
        coefficients["mean_logits"] = coefficients["mean_logits"] * (everything.weight.shape[0] / ctx.vocabulary)
    operands = everything.take(live)
    grads = Gradients(operands, needs, ctx.call.d_weight)
    for name, like in (("hidden", operands.hidden), ("u", operands.u)):
        if getattr(grads, name) is not None and like is not None:
            setattr(grads, name, torch.empty(like.shape, dtype=operands.work_dtype, device=like.device))
    stats = {name: found[FIELDS.index(name)] for name in ("lse", "entropy")}
    function.backward(operands, ctx.plan, stats, coefficients, found.new_empty(0), index, grads)
    for name, like in (("hidden", operands.hidden), ("u", operands.u)):
        if (total := getattr(grads, name)) is not None and like is not None:
            dist.all_reduce(total, group=ctx.group)
            setattr(grads, name, total.to(like.dtype))
    return full_size(grads, everything, live, needs, ctx.call.d_weight)


def _local_state(operands: Operands, plan: Plan, outputs: frozenset[str]) -> RowState:
    """Statistics of all rows over the columns here."""
    kernels, scratch = rows_of(plan.impl), function.scratch_tile(operands, plan)
    rows = len(operands.target)
    whole = kernels.start(rows, outputs, dtype=operands.work_dtype, device=operands.target.device)
    for at in slabs(rows, plan.slab_rows):
        target = operands.target[at]
        state = kernels.start(len(target), outputs, dtype=operands.work_dtype, device=target.device)
        for cols in slabs(operands.weight.shape[0], plan.tile_cols):
            tile = function.products(operands, at, cols, scratch, plan.impl)
            kernels.update(state, tile, target, cols.start, operands.logit_map(at, cols))
        for name in ("target_logit", "m", "s", "t", "q", "z_sum"):
            if (value := getattr(state, name)) is not None:
                getattr(whole, name)[at] = value
    return whole


def join(state: RowState, target: Tensor, columns: int, vocabulary: int, first: int, group: Any) -> None:
    """Make statistics of the columns here those of all columns, on every process, in the same bits."""
    own = state.m
    state.m = own.clone()
    dist.all_reduce(state.m, op=dist.ReduceOp.MAX, group=group)
    shift = torch.where(own == state.m, 0.0, own - state.m)  # (-inf) - (-inf) is no shift
    decay = shift.exp()
    here = (target >= 0) & (target < columns)
    sums = {"target_logit": torch.where(here, state.target_logit, 0.0), "s": state.s * decay}
    if state.t is not None:
        # a rank all of whose logits are -inf has s = 0, and no part in t
        sums["t"] = torch.where(own.isneginf(), 0.0, decay * (state.t + shift.clamp(min=-1e4) * state.s))
    if state.q is not None:
        sums["q"] = state.q * decay.square()
    if state.z_sum is not None:
        sums["z_sum"] = state.z_sum
    joined = torch.stack(list(sums.values()))
    dist.all_reduce(joined, group=group)
    for name, value in zip(sums, joined):
        setattr(state, name, value)
    outside = (target + first < 0) | (target + first >= vocabulary)
    state.target_logit = state.target_logit.masked_fill(outside, float("nan"))  # as a weight that is whole would have it
    state.columns = vocabulary


def _own_columns(operands: Operands, first: int) -> Operands:
    """The targets counted from the first column here; those of others are negative or too large."""
    return operands._replace(target=operands.target - first)


def sizes_of(weight: Tensor, group: Any, sizes: Sequence[int] | None) -> list[int]:
    """The rows of the weight that each process has: the given ones, checked, or exchanged."""
    size, index = dist.get_world_size(group), dist.get_rank(group)
    if sizes is None:
        found = torch.zeros(size, dtype=torch.int64, device=weight.device)
        found[index] = weight.shape[0]
        dist.all_reduce(found, group=group)
        sizes = found.tolist()
    if min(sizes) < 1:
        raise ValueError(f"every process of the group needs a row of the weight at least, got {list(sizes)}; use a smaller group")
    if len(sizes) != size or sizes[index] != weight.shape[0]:
        raise ValueError(
            f"sizes must name the rows of each of the {size} processes, {weight.shape[0]} for process {index}; got {list(sizes)}"
        )
    return list(sizes)
