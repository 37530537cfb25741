"""The schedules as autograd functions: rows are selected, scored, and their gradients put back in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fastalign.head import function
from fastalign.head.call import Call
from fastalign.head.function import FIELDS, Gradients, Operands
from fastalign.head.plan import Plan
from fastalign.types import HeadOutput, on_device

LossFn = Callable[[HeadOutput, slice], Tensor]
OperandGrads = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]  # hidden, weight, bias, u, B


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward that has no derivative itself, and says so to whoever asks for one.

    torch's once_differentiable refuses only where the incoming gradient requires one; after a plain `sum()` it does not, and a
    gradient penalty would silently be left out of the gradient.
    """
    once = torch.autograd.function.once_differentiable(backward)

    @wraps(backward)
    def refusing(ctx: Any, *upstream: Tensor) -> Any:
        if torch.is_grad_enabled():  # autograd enables it in a backward for create_graph=True alone
            raise RuntimeError(
                "the gradient of the head has no gradient of its own, which create_graph=True asks for; use impl='reference', which keeps "
                "the logits, or leave create_graph out"
            )
        return once(ctx, *upstream)

    return refusing


class LinearLogps(torch.autograd.Function):
    """(6, N) statistics; the schedule decides what is kept for the backward."""

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
    ) -> Tensor:
        operands = call.operands(hidden, weight, bias, u, b).take(live)
        with no_autocast(hidden):
            found, kept, kept_u = function.forward(operands, plan, call.outputs, call.grad_outputs, call.count(live))
        ctx.live, ctx.call, ctx.plan = live, call, plan
        if plan.schedule != "none":
            ctx.save_for_backward(hidden, weight, bias, u, b, found, kept, kept_u)
        return found.clone() if live is None else spread(found.T, live, call.target.shape[0]).T

    @staticmethod
    @first_order
    def backward(ctx: Any, d_stats: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, u, b, found, kept, kept_u = ctx.saved_tensors
        operands = ctx.call.operands(hidden, weight, bias, u, b)
        d_live = d_stats if ctx.live is None else d_stats.index_select(1, ctx.live)
        coefficients = {name: d_live[FIELDS.index(name)] for name in ctx.call.grad_outputs}
        with no_autocast(hidden):
            active = ctx.call.active_rows(ctx.live)
            needs, d_weight = ctx.needs_input_grad[:5], ctx.call.d_weight
            grads = pull_back(operands, ctx.plan, ctx.live, found, coefficients, kept, kept_u, needs, d_weight, active)
        return (*grads, None, None, None)


class LinearLoss(torch.autograd.Function):
    """The slab schedule: loss and gradients in the forward, scaled by the incoming gradient in the backward."""

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
        loss_fn: LossFn,
        bounds: Sequence[int] | None,
    ) -> Tensor:
        everything = call.operands(hidden, weight, bias, u, b)
        needs = ctx.needs_input_grad[:5] if plan.schedule == "slab" else (False,) * 5
        with no_autocast(hidden):
            total, grads = _run_slabs(everything, plan, live, call, loss_fn, bounds, needs)
        ctx.save_for_backward(*grads)
        ctx.added, ctx.used = call.d_weight is not None, False
        return total

    @staticmethod
    @first_order
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        on_host = d_loss.device.type == "cpu"
        if ctx.added:  # d_weight holds the gradient of this loss already
            if ctx.used:
                raise RuntimeError(
                    "linear_loss with d_weight was differentiated twice, but d_weight holds its gradient once: drop d_weight"
                )
            ctx.used = True
            if not on_host:
                torch._assert_async(d_loss == 1)
            elif float(d_loss) != 1.0:
                raise RuntimeError(
                    f"linear_loss with d_weight needs an incoming gradient of 1, got {float(d_loss)}: scale in loss_fn, or drop d_weight"
                )
        exact = on_host and float(d_loss) == 1.0
        return (*(g if g is None or exact else g * d_loss.to(g.dtype) for g in ctx.saved_tensors), *([None] * 5))


def pull_back(
    everything: Operands,  # all N rows
    plan: Plan,
    live: Tensor | None,  # (n,) rows with a target
    found: Tensor,  # (6, n) statistics
    coefficients: dict[str, Tensor],  # (n,) each
    kept: Tensor,
    kept_u: Tensor,
    needs: Sequence[bool],  # hidden, weight, bias, u, B
    d_weight: Tensor | None,
    active: Tensor | None = None,  # (a,) rows of the n whose coefficients may be other than 0, on the host
) -> OperandGrads:
    """Gradients of the operands under `frozen`, `keep` or `recompute`; rows without a coefficient never reach a GEMM."""
    rows, n = everything.hidden.shape[0], found.shape[1]
    if plan.schedule == "frozen":
        scale = torch.stack(list(coefficients.values())).unsqueeze(2)  # (k, n, 1)
        d_hidden, d_u = ((k[:, :n] * scale).sum(0).to(k.dtype) if need else None for k, need in ((kept, needs[0]), (kept_u, needs[3])))
        return spread(d_hidden, live, rows), None, None, spread(d_u, live, rows), None

    index = gradient_rows(coefficients, active)
    if index is not None:
        live = index if live is None else live[index]
        found = found[:, index]
        coefficients = {name: c[index] for name, c in coefficients.items()}
    operands = everything.take(live)
    grads = Gradients(operands, needs, d_weight)
    stats = {name: found[FIELDS.index(name)] for name in ("lse", "entropy")}
    function.backward(operands, plan, stats, coefficients, kept, index, grads)
    return full_size(grads, everything, live, needs, d_weight)


def _run_slabs(
    everything: Operands,
    plan: Plan,
    live: Tensor | None,
    call: Call,
    loss_fn: LossFn,
    bounds: Sequence[int] | None,
    needs: Sequence[bool],
) -> tuple[Tensor, OperandGrads]:
    rows = call.target.shape[0]
    operands = everything.take(live)
    wants = plan.schedule == "slab"
    active = call.active_rows(live)
    grads = Gradients(operands, needs, call.d_weight if wants else None)
    cuts = slab_cuts(rows, live, bounds, plan.slab_rows)
    longest = max((hi - lo for _, _, lo, hi in cuts), default=0)
    scratch = function.scratch_tile(operands, replace(plan, slab_rows=longest))
    total: Tensor | None = None
    for first, last, lo, hi in cuts:
        at = slice(lo, hi)
        found, tile = function.score_slab(operands, plan, at, call.outputs, scratch)
        place = None if live is None else live[at] - first
        leaves = {name: spread(found[name], place, last - first) for name in FIELDS if name in call.outputs}
        wanted = call.grad_outputs if wants else ()
        loss, coefficients = slab_loss(loss_fn, HeadOutput, slice(first, last), leaves, wanted, place, walk=total is None)
        total = loss if total is None else total + loss
        _add_slab(grads, operands, plan, at, found, coefficients, scratch, tile, rows_of_slab(active, lo, hi))
    if total is None:  # no rows at all
        nothing = operands.hidden.new_zeros(0, dtype=operands.work_dtype)
        total = loss_fn(HeadOutput(**dict.fromkeys(call.outputs, nothing)), slice(0, 0)).detach()
    return total, full_size(grads, everything, live, needs, call.d_weight)


def _add_slab(
    grads: Gradients,
    operands: Operands,
    plan: Plan,
    at: slice,
    found: dict[str, Tensor],
    coefficients: dict[str, Tensor],
    scratch: Tensor,
    tile: Tensor | None,
    active: Tensor | None,  # (a,) rows of the slab, on the host
) -> None:
    """Add a slab's gradients; rows with no coefficient are dropped before the GEMMs."""
    index = gradient_rows(coefficients, active)
    if coefficients and index is None:
        grads.add(at, function.gradient_tiles(operands, plan, at, found, coefficients, scratch, whole=tile))
        return
    for rows in (grads.hidden, grads.u):
        if rows is not None:
            rows[at] = 0
    if index is None or index.numel() == 0:
        return
    some = operands.take(index + at.start)
    part = grads.over(some)
    every = slice(0, index.shape[0])
    found, coefficients = ({name: x[index] for name, x in given.items()} for given in (found, coefficients))
    whole = None if tile is None else compact_rows_(tile, index)
    part.add(every, function.gradient_tiles(some, plan, every, found, coefficients, scratch, whole=whole))
    for mine, theirs in ((grads.hidden, part.hidden), (grads.u, part.u)):
        if mine is not None and theirs is not None:
            mine[at][index] = theirs


def compact_rows_(tile: Tensor, index: Tensor) -> Tensor:
    """tile[index] in the tile's own storage; `index` rises, so a block reads no row that an earlier block wrote."""
    for block in function.slabs(index.shape[0], 16):
        tile[block] = tile[index[block]]
    return tile[: index.shape[0]]


def gradient_rows(coefficients: dict[str, Tensor], active: Tensor | None) -> Tensor | None:
    """Rows that the gradient GEMMs need, or None for all: the `active` ones, else those with any coefficient.

    On a device counting coefficients would be a sync, so there it is all. A row outside `active` with a coefficient is an
    error, on a device at the next sync.
    """
    some = next(iter(coefficients.values()), None)
    if some is None or (active is None and some.device.type != "cpu"):
        return None
    mask = torch.stack([c != 0 for c in coefficients.values()]).any(0)
    if active is None:
        return None if mask.all() else mask.nonzero().squeeze(1)
    index = on_device(active, some.device)
    lost = mask.index_fill(0, index, False).any()
    if some.is_cuda:
        torch._assert_async(~lost, "a row outside `active` has a gradient")
    elif lost:
        row = int(mask.index_fill(0, index, False).nonzero()[0])
        raise ValueError(f"active leaves out live row {row}, but the loss gives it a gradient: name it in active, or drop active")
    return None if index.shape[0] == some.shape[0] else index


def full_size(grads: Gradients, everything: Operands, live: Tensor | None, needs: Sequence[bool], d_weight: Tensor | None) -> OperandGrads:
    rows = everything.hidden.shape[0]

    def rounded(total: Tensor | None, like: Tensor | None) -> Tensor | None:
        return None if total is None or like is None else total.to(like.dtype)

    return (
        spread(grads.hidden, live, rows) if needs[0] else None,
        rounded(grads.weight, everything.weight) if d_weight is None else None,
        rounded(grads.bias, everything.bias),
        spread(grads.u, live, rows) if needs[3] else None,
        rounded(grads.lora_weight, everything.lora_weight),
    )


def spread(values: Any, index: Tensor | None, rows: int) -> Any:
    """Rows of `values` at `index` among `rows` rows of zeros; without an index, or without values, as they are."""
    if values is None or index is None:
        return values
    return values.new_zeros(rows, *values.shape[1:]).index_copy_(0, index, values)


def slab_cuts(rows: int, live: Tensor | None, bounds: Sequence[int] | None, slab_rows: int) -> list[tuple[int, int, int, int]]:
    """Slabs as (first, last) of all rows and (lo, hi) of the live rows; at most `slab_rows` live rows, groups whole."""
    if bounds is None and live is None:
        return [(s.start, s.stop, s.start, s.stop) for s in function.slabs(rows, slab_rows)]
    edges = list(range(rows + 1)) if bounds is None else list(bounds)
    counts = edges if live is None else torch.searchsorted(live.cpu(), torch.tensor(edges)).tolist()
    cuts, start = [], 0
    for g in range(1, len(edges)):
        if g + 1 == len(edges) or counts[g + 1] - counts[start] > slab_rows:
            cuts.append((edges[start], edges[g], counts[start], counts[g]))
            start = g
    return cuts


def slab_loss(
    loss_fn: Callable[[Any, slice], Tensor],
    output: Callable[..., Any],  # what `loss_fn` takes, made from `leaves`
    rows: slice,
    leaves: dict[str, Tensor],  # outputs of the slab's rows
    wanted: Sequence[str],  # those that get a gradient
    place: Tensor | None,  # (n,) live rows among the slab's rows; None: all
    *,
    walk: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The slab's loss, detached, and dL/d output of its live rows, (n,) each, for the outputs that it depends on."""
    leaves = leaves | {name: leaves[name].detach().requires_grad_() for name in wanted}
    with torch.enable_grad():
        loss = loss_fn(output(**leaves), rows)
    check_loss(loss, leaves, walk=walk)
    coefficients: dict[str, Tensor] = {}
    if wanted and loss.requires_grad:
        slopes = torch.autograd.grad(loss, [leaves[name] for name in wanted], allow_unused=True)
        coefficients = {name: g if place is None else g[place] for name, g in zip(wanted, slopes) if g is not None}
    return loss.detach(), coefficients


def rows_of_slab(active: Tensor | None, lo: int, hi: int) -> Tensor | None:
    """The part of `active` in lo:hi, counted from lo; None is any row."""
    return None if active is None else active[slice(*torch.searchsorted(active, torch.tensor([lo, hi])).tolist())] - lo


def check_loss(loss: Any, leaves: dict[str, Tensor], *, walk: bool) -> None:
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(type(loss))
        raise ValueError(f"loss_fn must return a scalar tensor, got {what}: sum its tokens or sequences")
    if not walk or loss.grad_fn is None:
        return
    own = {id(x) for x in leaves.values()}
    seen, todo = {loss.grad_fn}, [loss.grad_fn]
    while todo:
        node = todo.pop()
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in own:
            raise ValueError(
                f"loss_fn uses a tensor of shape {tuple(leaf.shape)} that requires a gradient and would get none: "
                "detach it, or compute the loss from linear_logps"
            )
        fresh = {following for following, _ in node.next_functions if following is not None} - seen
        seen |= fresh
        todo.extend(fresh)


def group_bounds(groups: Sequence[int] | Tensor | None, rows: int) -> list[int] | None:
    """Group boundaries as integers, checked."""
    if groups is None:
        return None
    bounds = groups.tolist() if isinstance(groups, Tensor) else list(groups)
    if not bounds or bounds[0] != 0 or bounds[-1] != rows or any(b < a for a, b in pairwise(bounds)):
        raise ValueError(f"groups must rise from 0 to the number of rows {rows}, got {bounds[:3]}...{bounds[-1:]}")
    return bounds


def no_autocast(like: Tensor) -> torch.autocast:
    return torch.autocast(like.device.type, enabled=False)
