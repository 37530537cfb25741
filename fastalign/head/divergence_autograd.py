"""The schedules of the divergences as autograd functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastalign.head.autograd import (
    LinearLoss,
    OperandGrads,
    compact_rows_,
    first_order,
    full_size,
    gradient_rows,
    no_autocast,
    pull_back,
    rows_of_slab,
    slab_cuts,
    slab_loss,
    spread,
)
from fastalign.head.divergence_function import FIELDS, SCORES, DivergenceOutput, PairCall, Sides, forward, gradient_tiles, score_slab
from fastalign.head.function import Gradients
from fastalign.head.plan import Plan
from fastalign.head.products import slabs

LossFn = Callable[[DivergenceOutput, slice], Tensor]


class LinearDivergence(torch.autograd.Function):
    """(len(SCORES), N) scores; under `frozen` d output / d hidden is kept for the backward, under `recompute` only the scores."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        u: Tensor | None,
        b: Tensor | None,
        live: Tensor | None,
        call: PairCall,
        plan: Plan,
    ) -> Tensor:
        tensors = (hidden, weight, bias, u, b)
        with no_autocast(hidden):
            scores, kept, kept_u = forward(call.sides(tensors, live), plan)
        ctx.live, ctx.call, ctx.plan = live, call, plan
        if plan.schedule != "none":
            ctx.save_for_backward(*tensors, scores, kept, kept_u)
        return scores.clone() if live is None else spread(scores.T, live, call.student.target.shape[0]).T

    @staticmethod
    @first_order
    def backward(ctx: Any, d_scores: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, scores, kept, kept_u = ctx.saved_tensors
        call, plan, live, needs = ctx.call, ctx.plan, ctx.live, ctx.needs_input_grad[:5]
        d_live = d_scores if live is None else d_scores.index_select(1, live)
        coefficients = {name: d_live[SCORES.index(name)] for name in call.grad_outputs}
        with no_autocast(tensors[0]):
            if plan.schedule == "frozen":
                everything = call.student.operands(*tensors)
                grads = pull_back(everything, plan, live, scores, coefficients, kept, kept_u, needs, None)
            else:
                grads = _recompute(tensors, call, plan, live, scores, coefficients, needs)
        return (*grads, None, None, None)


class LinearDivergenceLoss(LinearLoss):
    """The slab schedule: loss and gradients in the forward, scaled by the incoming gradient in the backward of LinearLoss."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        u: Tensor | None,
        b: Tensor | None,
        live: Tensor | None,
        call: PairCall,
        plan: Plan,
        loss_fn: LossFn,
        _: None,
    ) -> Tensor:
        needs = ctx.needs_input_grad[:5] if plan.schedule == "slab" else (False,) * 5
        with no_autocast(hidden):
            total, grads = _run_slabs((hidden, weight, bias, u, b), call, plan, live, loss_fn, needs)
        ctx.save_for_backward(*grads)
        ctx.added, ctx.used = call.student.d_weight is not None, False
        return total


def _recompute(
    tensors: Sequence[Tensor | None],
    call: PairCall,
    plan: Plan,
    live: Tensor | None,
    scores: Tensor,
    coefficients: dict[str, Tensor],
    needs: Sequence[bool],
) -> OperandGrads:
    """Gradients of the student's operands from logits that are formed again; rows without a coefficient never reach a GEMM."""
    index = gradient_rows(coefficients, call.student.active_rows(live))
    if index is not None:
        live = index if live is None else live[index]
        scores = scores[:, index]
        coefficients = {name: c[index] for name, c in coefficients.items()}
    sides = call.sides(tensors, live)
    grads = Gradients(sides.student, needs, call.student.d_weight)
    scratch = sides.scratch(plan)
    for rows in slabs(scores.shape[1], plan.slab_rows):
        found = dict(zip(SCORES, scores[:, rows]))
        here = {name: c[rows] for name, c in coefficients.items()}
        grads.add(rows, gradient_tiles(sides, plan, rows, found, here, scratch))
    return full_size(grads, call.student.operands(*tensors), live, needs, call.student.d_weight)  # type: ignore[arg-type]


def _run_slabs(
    tensors: Sequence[Tensor | None],
    call: PairCall,
    plan: Plan,
    live: Tensor | None,
    loss_fn: LossFn,
    needs: Sequence[bool],
) -> tuple[Tensor, OperandGrads]:
    """The loss over slabs, each followed by its gradients."""
    sides, wants, d_weight = call.sides(tensors, live), plan.schedule == "slab", call.student.d_weight
    rows, active = call.student.target.shape[0], call.student.active_rows(live)
    grads = Gradients(sides.student, needs, d_weight if wants else None)
    scratch = sides.scratch(plan)
    total: Tensor | None = None
    for first, last, lo, hi in slab_cuts(rows, live, None, plan.slab_rows):
        at = slice(lo, hi)
        found, tiles = score_slab(sides, plan, at, scratch)
        place = None if live is None else live[at] - first
        leaves = {name: spread(found[name], place, last - first) for name in FIELDS if name in call.outputs}
        wanted = call.grad_outputs if wants else ()
        loss, coefficients = slab_loss(loss_fn, DivergenceOutput, slice(first, last), leaves, wanted, place, walk=total is None)
        total = loss if total is None else total + loss
        _add_slab(grads, sides, plan, at, found, coefficients, scratch, tiles, rows_of_slab(active, lo, hi))
    if total is None:
        nothing = dict.fromkeys(call.outputs, sides.student.hidden.new_zeros(rows, dtype=sides.student.work_dtype))
        total = loss_fn(DivergenceOutput(**nothing), slice(0, rows)).detach()
    return total, full_size(grads, call.student.operands(*tensors), live, needs, d_weight)  # type: ignore[arg-type]


def _add_slab(
    grads: Gradients,
    sides: Sides,
    plan: Plan,
    at: slice,
    found: dict[str, Tensor],
    coefficients: dict[str, Tensor],
    scratch: tuple[Tensor, Tensor],
    tiles: tuple[Tensor, Tensor] | None,
    active: Tensor | None,  # (a,) rows of the slab, on the host
) -> None:
    """Add a slab's gradients; rows with no coefficient are dropped before the GEMMs."""
    index = gradient_rows(coefficients, active)
    if coefficients and index is None:
        grads.add(at, gradient_tiles(sides, plan, at, found, coefficients, scratch, whole=tiles))
        return
    for rows in (grads.hidden, grads.u):
        if rows is not None:
            rows[at] = 0
    if index is None or index.numel() == 0:
        return
    some = sides.take(index + at.start)
    part = grads.over(some.student)
    found, coefficients = ({name: x[index] for name, x in given.items()} for given in (found, coefficients))
    whole = None if tiles is None else (compact_rows_(tiles[0], index), compact_rows_(tiles[1], index))
    every = slice(0, index.shape[0])
    part.add(every, gradient_tiles(some, plan, every, found, coefficients, scratch, whole=whole))
    for mine, theirs in ((grads.hidden, part.hidden), (grads.u, part.u)):
        if mine is not None and theirs is not None:
            mine[at][index] = theirs
