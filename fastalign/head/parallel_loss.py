"""The head with its vocabulary divided among processes each of which has rows of its own: the head of a data-parallel trainer.

A round takes a slab of every process's rows. Their hidden states are gathered, every process forms its columns of their logits, the
statistics are joined as in `parallel`, each process computes the loss of its own rows, and its derivatives by the outputs are
gathered. Then every process adds to the gradient of its rows of the weight, which stays, and the gradient of the hidden states is
summed to where they came from. Logits never travel; those of a round fit the budget.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, zip_longest
from typing import Any

import torch
from torch import Tensor

from fastalign.head import function
from fastalign.head.autograd import (
    LossFn,
    compact_rows_,
    first_order,
    full_size,
    gradient_rows,
    group_bounds,
    no_autocast,
    rows_of_slab,
    slab_cuts,
    slab_loss,
    spread,
)
from fastalign.head.call import Call, Temperature
from fastalign.head.exchange import Exchange
from fastalign.head.function import DIFFERENTIABLE, FIELDS, Gradients, Operands
from fastalign.head.parallel import join, sizes_of
from fastalign.head.plan import Plan, make_plan
from fastalign.head.products import slabs
from fastalign.head.rows import rows_of
from fastalign.types import IGNORE_INDEX, HeadOutput


@dataclass(frozen=True)
class Request:
    """What a process asks of the others: all but the two counts must be the same on all of them."""

    rows: int  # live rows
    longest: int  # rows of the largest group that no slab may split
    outputs: tuple[str, ...]
    gradients: tuple[str, ...]  # outputs that get one; (): none is wanted
    needs: tuple[bool, ...]  # of hidden, weight, bias, u, B
    temperature: float | None  # None: one for each row
    logit_scale: float
    softcap: float | None
    rank: int  # of the LoRA; 0: none
    active: bool  # the rows with a gradient are named
    budget: int | None
    impl: str
    which: tuple[int, str | None] = (0, None)  # of several heads, and whose B, for a process that only serves the others

    def alike(self) -> Request:
        return replace(self, rows=0, longest=0)


def parallel_linear_loss(
    hidden: Tensor,  # (..., D), rows of this process's own; gradient
    weight: Tensor,  # (v, D), this process's rows of the whole (V, D) weight; gradient
    target: Tensor,  # (...) int64 in 0..V-1
    loss_fn: LossFn,
    *,
    group: Any = None,
    sizes: Sequence[int] | None = None,
    groups: Sequence[int] | Tensor | None = None,  # (G+1,) row boundaries, from 0 to N
    bias: Tensor | None = None,  # (v,), this process's part; gradient
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: Temperature = 1.0,
    ignore_index: int = IGNORE_INDEX,
    outputs: Sequence[str] = ("logps",),
    differentiable: Sequence[str] = DIFFERENTIABLE,
    lora: tuple[Tensor, Tensor] | None = None,  # u (..., r) of the own rows, and this process's rows of B, (v, r); gradient in both
    d_weight: Tensor | None = None,  # (v, D)
    live_rows: int | None = None,
    active: Tensor | None = None,  # (...) bool, on the CPU
    budget: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """`linear_loss` of rows that each process of `group` has for itself, under a weight whose rows are divided among them.

    The result, a scalar, is the loss of this process's rows. Differentiated on all processes, with an incoming gradient of 1 (checked),
    the sum of their losses gives each the gradient of its own rows of hidden states (and u), and of its own rows of weight, bias and
    B. All processes call it equally often, with the same options; how many rows they have, even none, differs as it will.
    The logits of a round are formed once, over the columns here, for the rows of all processes: 6NVD / (processes) each, where N
    counts them all, or 8 where the budget holds no 64 rows. Shoeybi 2019, arXiv:1909.08053 section 3 (the parallel cross-entropy),
    with the rows divided as well.

    group       a process group of torch.distributed; None: all processes
    sizes       rows of the weight that each process of the group has; None: they are exchanged, which is a device sync

    Other options: `linear_loss`. Raises ValueError as that does, and where `sizes` or the options do not fit those of the group.
    """
    call = Call.of(
        hidden, weight, target, bias, lora, temperature, ignore_index, outputs, differentiable, d_weight, live_rows, active,
        logit_scale, softcap,
    )  # fmt: skip
    exchange = Exchange(group, sizes_of(weight, group, sizes))
    return divided_loss(call, loss_fn, group_bounds(groups, call.target.shape[0]), exchange, budget, impl)


def divided_loss(
    call: Call,
    loss_fn: LossFn,
    bounds: Sequence[int] | None,
    exchange: Exchange,
    budget: int | None,
    impl: str,
    which: tuple[int, str | None] = (0, None),
) -> Tensor:
    """`parallel_linear_loss` of a checked call."""
    live = call.live_index(exchange.vocabulary)
    longest = 1 if bounds is None else max((b - a for a, b in pairwise(bounds)), default=1)
    request = _request(call, live, longest, budget, impl, which)
    found: Tensor = _ParallelLoss.apply(*call.tensors, live, call, loss_fn, bounds, exchange, request)
    return found


@torch.no_grad()
def divided_logps(call: Call, exchange: Exchange, budget: int | None, impl: str, which: tuple[int, str | None] = (0, None)) -> HeadOutput:
    """`linear_logps`, without gradient, of rows that each process has for itself."""
    live = call.live_index(exchange.vocabulary)
    request = _request(call, live, 1, budget, impl, which)
    own = call.operands(*call.tensors).take(live)
    with no_autocast(own.hidden):
        rounds = Rounds(own, request, exchange, exchange.words(request))
        found = torch.zeros(len(FIELDS), len(own.target), dtype=own.work_dtype, device=own.hidden.device)
        for at, stats in rounds.scores([(part.start, part.stop) for part in slabs(len(own.target), rounds.share)]):
            for name, value in stats.items():
                found[FIELDS.index(name), at] = value.to(found.dtype)
    return call.output(found if live is None else spread(found.T, live, call.target.shape[0]).T)


def serve(own: Operands, exchange: Exchange, requests: Sequence[Request | None]) -> None:
    """Take part, with no row in `own`, in what others ask for without gradient."""
    request = next(filter(None, requests))
    for _ in Rounds(own, replace(request, rows=0, longest=1), exchange, requests).scores([]):
        pass


def _request(call: Call, live: Tensor | None, longest: int, budget: int | None, impl: str, which: tuple[int, str | None]) -> Request:
    u, b = call.tensors[3:]
    head_grad = call.head_grad and bool(call.grad_outputs)
    return Request(
        rows=call.count(live),
        longest=longest,
        outputs=tuple(sorted(call.outputs)),
        gradients=call.grad_outputs if call.hidden_grad or head_grad else (),
        needs=tuple(x is not None and x.requires_grad for x in call.tensors) if call.hidden_grad or head_grad else (False,) * 5,
        temperature=None if isinstance(call.temperature, Tensor) else float(call.temperature),
        logit_scale=call.logit_scale,
        softcap=call.softcap,
        rank=0 if u is None or b is None else b.shape[1],
        active=call.active is not None,
        budget=budget,
        impl=impl,
        which=which,
    )


class _ParallelLoss(torch.autograd.Function):
    """Loss and gradients in the forward; the incoming gradient is 1."""

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
        loss_fn: LossFn,
        bounds: Sequence[int] | None,
        exchange: Exchange,
        request: Request,
    ) -> Tensor:
        everything = call.operands(hidden, weight, bias, u, b)
        needs = ctx.needs_input_grad[:5] if request.gradients else (False,) * 5
        own = everything.take(live)
        with no_autocast(hidden):
            rounds = Rounds(own, request, exchange, exchange.words(request))
            grads = Gradients(own, needs, call.d_weight if request.gradients else None)
            total = _run(rounds, grads, call, live, loss_fn, bounds)
            ctx.save_for_backward(*full_size(grads, everything, live, needs, call.d_weight))
        return total

    @staticmethod
    @first_order
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        if d_loss.device.type != "cpu":
            torch._assert_async(d_loss == 1)
        elif float(d_loss) != 1.0:
            raise RuntimeError(
                f"parallel_linear_loss needs an incoming gradient of 1, got {float(d_loss)}: the gradient of the weight is of the losses "
                "of all processes; scale in loss_fn"
            )
        return (*ctx.saved_tensors, *([None] * 6))


class Rounds:
    """The rounds of one call, in step with the other processes: statistics forward, gradients back."""

    def __init__(self, own: Operands, request: Request, exchange: Exchange, requests: Sequence[Request | None]) -> None:
        others = [other for other in requests if other is not None]
        for index, other in enumerate(requests):
            if other is not None and other.alike() != request.alike():
                raise ValueError(f"process {index} of the group calls the head with other options: {other} there, {request} here")
        self.own, self.request, self.exchange = own, request, exchange
        rows, longest = sum(other.rows for other in others), max(other.longest for other in others)
        self.share = max(1, self._plan(rows, longest).slab_rows // exchange.size)  # rows of each process in a round

    def scores(self, cuts: Sequence[tuple[int, int]]) -> Iterator[tuple[slice, dict[str, Tensor]]]:
        """For every round the own rows in it, `cuts` one by one and then none, and their statistics."""
        everyone = self.exchange.words([hi - lo for lo, hi in cuts])
        rounds = [list(counts) for counts in zip_longest(*everyone, fillvalue=0)]
        most = max(map(sum, rounds), default=1)
        self.plan = replace(self._plan(most, most), slab_rows=most)
        scratch = function.scratch_tile(self.own, self.plan)
        for k, counts in enumerate(rounds):
            at = slice(*cuts[k]) if k < len(cuts) else slice(0, 0)
            self.counts = counts
            if not any(counts):  # whole groups without a target
                yield at, {name: self.own.hidden.new_zeros(0, dtype=self.own.work_dtype) for name in self.request.outputs}
                continue
            self.all, self.scratch = self._gathered(at, counts), scratch
            self.stats, self.tile = self._score()
            before = sum(counts[: self.exchange.index])
            yield at, {name: value[before : before + counts[self.exchange.index]] for name, value in self.stats.items()}

    def pull_back(self, at: slice, coefficients: dict[str, Tensor], grads: Gradients, active: Tensor | None) -> None:
        """Add the gradient of the round: `coefficients` are dL/d output of the own rows `at`; those of the others are fetched."""
        if not any(self.counts):
            return
        names, work = self.request.gradients, self.own.work_dtype
        mine = self.own.hidden.new_zeros(at.stop - at.start, len(names), dtype=work)
        for i, name in enumerate(names):
            if name in coefficients:
                mine[:, i] = coefficients[name]
        found = dict(zip(names, self.exchange.gather(mine, self.counts).unbind(1)))
        index = gradient_rows(found, self._active(rows_of_slab(active, at.start, at.stop)))
        if "mean_logits" in found:  # the row kernels divide by the columns here
            found["mean_logits"] = found["mean_logits"] * (self.all.weight.shape[0] / self.exchange.vocabulary)
        some, stats, tile = self.all, self.stats, self.tile
        if index is not None:
            some, tile = some.take(index), None if tile is None else compact_rows_(tile, index)
            found, stats = ({name: value[index] for name, value in given.items()} for given in (found, stats))
        part = Gradients(some, (False,) * 5, None)
        part.weight, part.bias, part.lora_weight = grads.weight, grads.bias, grads.lora_weight
        for name in ("hidden", "u"):
            if getattr(grads, name) is not None:
                setattr(part, name, torch.zeros_like(getattr(some, name), dtype=work))
        every = slice(0, len(some.target))
        if len(some.target):
            part.add(every, function.gradient_tiles(some, self.plan, every, stats, found, self.scratch, whole=tile))
        for name in ("hidden", "u"):
            if (kept := getattr(grads, name)) is not None:
                sums = self.exchange.sums(spread(getattr(part, name), index, len(self.all.target)), self.counts)
                kept[at] = sums.to(kept.dtype)

    def _plan(self, rows: int, together: int) -> Plan:
        """For `rows` rows over the widest part of the weight, of which so many may not be split."""
        hidden, weight = self.own.hidden, self.own.weight
        return make_plan(
            rows,
            max(self.exchange.sizes),
            weight.shape[1],
            dtype=hidden.dtype,
            device=hidden.device,
            hidden_grad=self.request.needs[0] or self.request.needs[3],
            head_grad=any(self.request.needs[i] for i in (1, 2, 4)),
            local_loss=True,
            group_rows=together,
            grad_outputs=max(1, len(self.request.gradients)),
            budget=self.request.budget,
            impl=self.request.impl,
        )

    def _gathered(self, at: slice, counts: Sequence[int]) -> Operands:
        """The head's part here over the rows of all processes, their targets counted from the first column here."""
        own, exchange = self.own, self.exchange
        temperature = own.temperature
        return own._replace(
            hidden=exchange.gather(own.hidden[at], counts),
            target=exchange.gather(own.target[at], counts) - exchange.first,
            u=None if own.u is None else exchange.gather(own.u[at], counts),
            temperature=exchange.gather(temperature[at], counts) if isinstance(temperature, Tensor) else temperature,
        )

    def _score(self) -> tuple[dict[str, Tensor], Tensor | None]:
        """Statistics of the rows of all processes over the whole vocabulary, and the raw products here if they were not tiled."""
        operands, kernels = self.all, rows_of(self.plan.impl)
        rows, columns = len(operands.target), operands.weight.shape[0]
        every = slice(0, rows)
        state = kernels.start(rows, frozenset(self.request.outputs), dtype=operands.work_dtype, device=operands.target.device)
        tile: Tensor | None = None
        for cols in slabs(columns, self.plan.tile_cols):
            tile = function.products(operands, every, cols, self.scratch, self.plan.impl)
            kernels.update(state, tile, operands.target, cols.start, operands.logit_map(every, cols))
        join(state, operands.target, columns, self.exchange.vocabulary, self.exchange.first, self.exchange.group)
        return kernels.finish(state), tile if columns <= self.plan.tile_cols else None

    def _active(self, own: Tensor | None) -> Tensor | None:
        """Of all rows of the round those that may have a gradient, on the host; None: not known."""
        if not self.request.active:
            return None
        parts = self.exchange.words([] if own is None else own.tolist())
        starts = [sum(self.counts[:i]) for i in range(self.exchange.size)]
        return torch.tensor([start + row for start, part in zip(starts, parts) for row in part], dtype=torch.int64)


def _run(rounds: Rounds, grads: Gradients, call: Call, live: Tensor | None, loss_fn: LossFn, bounds: Sequence[int] | None) -> Tensor:
    """The loss of the own rows; adds to `grads` what the losses of all processes make."""
    wanted, active = rounds.request.gradients, call.active_rows(live)
    cuts = slab_cuts(call.target.shape[0], live, bounds, rounds.share)
    total: Tensor | None = None
    for k, (at, found) in enumerate(rounds.scores([(lo, hi) for _, _, lo, hi in cuts])):
        coefficients: dict[str, Tensor] = {}
        if k < len(cuts):
            first, last, _, _ = cuts[k]
            place = None if live is None else live[at] - first
            leaves = {name: spread(found[name], place, last - first) for name in FIELDS if name in call.outputs}
            loss, coefficients = slab_loss(loss_fn, HeadOutput, slice(first, last), leaves, wanted, place, walk=total is None)
            total = loss if total is None else total + loss
        if wanted:
            rounds.pull_back(at, coefficients, grads, active)
    if total is None:  # no rows at all
        nothing = rounds.own.hidden.new_zeros(0, dtype=rounds.own.work_dtype)
        total = loss_fn(HeadOutput(**dict.fromkeys(call.outputs, nothing)), slice(0, 0)).detach()
    return total
