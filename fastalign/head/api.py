"""The public operator: per-token log-probs, entropies and losses of a language-model head, without its logits."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from fastalign.head import function, ops
from fastalign.head.function import DIFFERENTIABLE, FIELDS, Gradients, Operands
from fastalign.head.plan import Plan, make_plan
from fastalign.head.reference import reference_logps
from fastalign.types import IGNORE_INDEX, HeadOutput

Temperature = float | Tensor
LossFn = Callable[[HeadOutput, slice], Tensor]


def linear_logps(
    hidden: Tensor,  # (..., D) float16, bfloat16, float32 or float64; gradient
    weight: Tensor,  # (V, D), dtype of hidden; gradient
    target: Tensor,  # (...) int64
    *,
    bias: Tensor | None = None,  # (V,); gradient
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: Temperature = 1.0,  # a number, or (...) per token; no gradient
    ignore_index: int = IGNORE_INDEX,
    outputs: Sequence[str] = ("logps",),
    differentiable: Sequence[str] = DIFFERENTIABLE,
    lora: tuple[Tensor, Tensor] | None = None,  # u (..., r) and B (V, r); gradient in both
    d_weight: Tensor | None = None,  # (V, D) float32 or dtype of weight
    live_rows: int | None = None,
    schedule: str = "auto",
    budget: int | None = None,
    impl: str = "auto",
) -> HeadOutput:
    """Log-probabilities of `target` under softmax(logits) and other per-token statistics, each of the shape of `target`.

        y = logit_scale (hidden weight^T + u B^T + bias),   logits = softcap tanh(y / softcap) / temperature

    The (N, V) logits never exist: at most `budget` bytes of them do (None: 2 % of the device's memory, see
    `head.plan.default_budget`). `head.plan` chooses between four backward schedules; `head.plan.explain` says why.

    outputs         fields of HeadOutput to compute; logps always is
    differentiable  which of them may get a gradient; under the `frozen` schedule each costs a (N, D) buffer and 2NVD, so
                    name only what the loss uses when others are logged
    lora            low-rank update of the head: u = scaling * dropout(hidden) A^T, computed by the caller, and B
    d_weight        buffer to which the gradient of `weight` is added in place, usually `weight.grad`; autograd then gets no
                    gradient for `weight`, and no second (V, D) tensor exists
    live_rows       number of targets that are not `ignore_index`, if known: saves one device sync on CUDA
    impl            "auto": torch rows. "torch", or "reference": materialised logits, for tests

    Rows whose target is `ignore_index` never reach a GEMM, are 0 in every output, and may hold NaN; neither do rows whose
    incoming gradient is 0 reach a gradient GEMM (on CUDA counting them would sync, so there they do).
    Log-probs are float32 whatever the input dtype (float64 for float64). Results are bitwise reproducible.

    Raises ValueError when shapes, dtypes or devices do not fit, or, on a CPU, a target is outside the vocabulary (on CUDA
    such a row's log-prob is NaN).

    >>> import torch
    >>> hidden, weight = torch.zeros(2, 4), torch.zeros(8, 4)
    >>> linear_logps(hidden, weight, torch.tensor([3, -100])).logps   # uniform over 8 tokens: -log 8
    tensor([-2.0794,  0.0000])
    """
    call = _Call.of(hidden, weight, target, bias, lora, temperature, ignore_index, outputs, differentiable, d_weight, live_rows)
    options = {"logit_scale": float(logit_scale), "softcap": _softcap(softcap)}
    if impl == "reference":
        return call.reference(**options)
    if torch.compiler.is_compiling():
        stats = ops.traced(call, schedule=schedule, budget=budget, impl=impl, **options)
    else:
        live = call.live_index()
        plan = call.plan(call.count(live), schedule=schedule, budget=budget, impl=impl)
        stats = _LinearLogps.apply(*call.tensors, call.temperature, live, call, plan, options)
    return call.output(stats)


def linear_loss(
    hidden: Tensor,  # (..., D); gradient
    weight: Tensor,  # (V, D); gradient
    target: Tensor,  # (...) int64
    loss_fn: LossFn,
    *,
    groups: Sequence[int] | Tensor | None = None,  # (G+1,) row boundaries, from 0 to N
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: Temperature = 1.0,
    ignore_index: int = IGNORE_INDEX,
    outputs: Sequence[str] = ("logps",),
    differentiable: Sequence[str] = DIFFERENTIABLE,
    lora: tuple[Tensor, Tensor] | None = None,
    d_weight: Tensor | None = None,
    live_rows: int | None = None,
    schedule: str = "auto",
    budget: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """Sum of `loss_fn(out, rows)` over slabs of rows, with the logits of a slab formed once for loss and gradients: 6NVD.

    `loss_fn` gets the HeadOutput of the flattened rows `rows.start:rows.stop` and returns a scalar; it may read anything it
    closes over, but tensors there get no gradient (one that requires it is an error). A loss that couples rows, such as
    a preference pair, names its `groups`: no slab splits rows `groups[g]:groups[g+1]`. Normalise inside `loss_fn` with
    denominators of the whole batch, since a slab sees only its rows. With no slab boundary to respect the loss equals
    `loss_fn(linear_logps(...), slice(0, N))`.

    With `d_weight` the gradient of the weight is added when the loss is computed, so the loss must be differentiated
    with an incoming gradient of exactly 1 (checked), once. Other options and errors: `linear_logps`.

    >>> import torch
    >>> hidden, weight = torch.zeros(3, 4), torch.zeros(8, 4, requires_grad=True)
    >>> loss = linear_loss(hidden, weight, torch.tensor([1, 2, 3]), lambda out, rows: -out.logps.sum() / 3)
    >>> round(float(loss), 4)
    2.0794
    """
    call = _Call.of(hidden, weight, target, bias, lora, temperature, ignore_index, outputs, differentiable, d_weight, live_rows)
    n = call.target.shape[0]
    bounds = _group_bounds(groups, n)
    if schedule in ("auto", "slab") and impl != "reference" and not torch.compiler.is_compiling():
        options = {"logit_scale": float(logit_scale), "softcap": _softcap(softcap)}
        live = call.live_index()
        largest = 1 if bounds is None else max((b - a for a, b in itertools.pairwise(bounds)), default=1)
        wants = call.hidden_grad or call.head_grad
        chosen = call.plan(
            call.count(live), schedule="slab" if wants else "none", budget=budget, impl=impl, local_loss=True, group_rows=largest
        )
        return _LinearLoss.apply(*call.tensors, call.temperature, live, call, chosen, options, loss_fn, bounds)
    out = linear_logps(
        call.tensors[0],
        weight,
        call.target,
        bias=bias,
        logit_scale=logit_scale,
        softcap=softcap,
        temperature=call.temperature,
        ignore_index=ignore_index,
        outputs=outputs,
        differentiable=differentiable,
        lora=None if lora is None else (call.tensors[3], lora[1]),
        d_weight=d_weight,
        live_rows=live_rows,
        schedule="auto" if schedule == "slab" else schedule,
        budget=budget,
        impl=impl,
    )
    return loss_fn(out, slice(0, n))


def linear_cross_entropy(
    hidden: Tensor,  # (..., D); gradient
    weight: Tensor,  # (V, D); gradient
    target: Tensor,  # (...) int64
    *,
    reduction: Literal["mean", "sum", "none"] = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = IGNORE_INDEX,
    **options: Any,
) -> Tensor:
    """Cross-entropy of the head: scalar, or (...) for reduction "none". "mean" divides by the targets that are not ignored.

        loss_i = (1 - label_smoothing) (-logp_i) + label_smoothing mean_v(-log p_iv) + z_loss lse_i^2

    z-loss: Chowdhery 2022 (PaLM), arXiv:2204.02311 section 5. Options: the head options of `linear_logps`.
    Raises ValueError for another reduction or label_smoothing outside [0, 1).

    >>> import torch
    >>> round(float(linear_cross_entropy(torch.zeros(3, 4), torch.zeros(8, 4), torch.tensor([1, 2, 3]))), 4)
    2.0794
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    wanted = ["logps"] + ["lse"] * bool(z_loss or label_smoothing) + ["mean_logits"] * bool(label_smoothing)
    shared = dict(options, ignore_index=ignore_index, outputs=wanted, differentiable=wanted)

    def token_loss(out: HeadOutput) -> Tensor:
        loss = -out.logps
        if label_smoothing and out.lse is not None and out.mean_logits is not None:
            loss = (1 - label_smoothing) * loss + label_smoothing * (out.lse - out.mean_logits)
        if z_loss and out.lse is not None:
            loss = loss + z_loss * out.lse.square()
        return loss

    if reduction == "none":
        return token_loss(linear_logps(hidden, weight, target, **shared))
    count = (target != ignore_index).sum().clamp(min=1) if reduction == "mean" else 1
    return linear_loss(hidden, weight, target, lambda out, rows: token_loss(out).sum() / count, **shared)


@dataclass(frozen=True)
class _Call:
    """One checked call: flattened operands and what is wanted of them."""

    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]  # hidden (N, D), weight, bias, u (N, r), B
    target: Tensor  # (N,)
    temperature: Temperature  # number or (N,)
    ignore_index: int
    shape: torch.Size
    outputs: frozenset[str]
    grad_outputs: tuple[str, ...]
    d_weight: Tensor | None
    live_rows: int | None
    hidden_grad: bool
    head_grad: bool

    @staticmethod
    def of(
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None,
        lora: tuple[Tensor, Tensor] | None,
        temperature: Temperature,
        ignore_index: int,
        outputs: Sequence[str],
        differentiable: Sequence[str],
        d_weight: Tensor | None,
        live_rows: int | None,
    ) -> _Call:
        u, b = (None, None) if lora is None else lora
        _check_operands(hidden, weight, target, bias, u, b, d_weight)
        wanted = frozenset(_names(outputs, FIELDS, "outputs")) | {"logps"}
        grads = tuple(f for f in _names(differentiable, DIFFERENTIABLE, "differentiable") if f in wanted)
        if isinstance(temperature, Tensor):
            if temperature.numel() not in (1, target.numel()):
                raise ValueError(
                    f"temperature must be a number or have the shape of target {tuple(target.shape)}, got {tuple(temperature.shape)}"
                )
            temperature = temperature.detach().to(hidden.device).expand(target.shape).reshape(-1)
        elif not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        enabled = torch.is_grad_enabled() and bool(grads)
        head_grad = enabled and any(x is not None and x.requires_grad for x in (weight, bias, b))
        if d_weight is not None and not (enabled and (weight.requires_grad or hidden.requires_grad)):
            raise ValueError("d_weight asks for the gradient of weight, but no gradient is being recorded: make weight require one")
        flat_u = None if u is None else u.reshape(-1, u.shape[-1])
        return _Call(
            tensors=(hidden.reshape(-1, hidden.shape[-1]), weight, bias, flat_u, b),
            target=target.reshape(-1),
            temperature=temperature,
            ignore_index=ignore_index,
            shape=target.shape,
            outputs=wanted,
            grad_outputs=grads,
            d_weight=d_weight,
            live_rows=live_rows,
            hidden_grad=enabled and (hidden.requires_grad or (u is not None and u.requires_grad)),
            head_grad=head_grad or d_weight is not None,
        )

    def live_index(self) -> Tensor | None:
        """(n,) rows with a target, or None for all of them; checks the targets where that costs no sync."""
        target, live_rows = self.target, self.live_rows
        if live_rows == target.shape[0]:
            live = None
        elif live_rows is not None:
            live = torch.nonzero_static(target != self.ignore_index, size=live_rows).squeeze(1)
        else:
            live = torch.nonzero(target != self.ignore_index).squeeze(1)
            live = None if live.shape[0] == target.shape[0] else live
        if target.device.type == "cpu":
            vocabulary = self.tensors[1].shape[0]
            bad = (target != self.ignore_index) & ((target < 0) | (target >= vocabulary))
            if bad.any():
                row = int(bad.nonzero()[0])
                raise ValueError(
                    f"target[{row}] = {int(target[row])} is outside the vocabulary of weight, 0..{vocabulary - 1}; "
                    f"rows without a target take ignore_index = {self.ignore_index}"
                )
        return live

    def count(self, live: Tensor | None) -> int:
        return self.target.shape[0] if live is None else live.shape[0]

    def plan(self, rows: int, **request: Any) -> Plan:
        hidden, weight = self.tensors[:2]
        return make_plan(
            rows,
            weight.shape[0],
            hidden.shape[1],
            dtype=hidden.dtype,
            device=hidden.device,
            hidden_grad=self.hidden_grad,
            head_grad=self.head_grad,
            grad_outputs=max(1, len(self.grad_outputs)),
            **request,
        )

    def output(self, stats: Tensor) -> HeadOutput:
        """Fields of HeadOutput from the (6, N) statistics."""

        def one(i: int, name: str) -> Tensor | None:
            if name not in self.outputs:
                return None
            value = stats[i] if name in self.grad_outputs else stats[i].detach()
            return (value != 0 if name == "is_top1" else value).view(self.shape)

        logps, *others = (one(i, name) for i, name in enumerate(FIELDS))
        assert logps is not None
        return HeadOutput(logps, *others)

    def reference(self, **options: Any) -> HeadOutput:
        hidden, weight, bias, u, b = self.tensors
        lora = None if u is None or b is None else (u, b)
        full = reference_logps(
            hidden,
            weight,
            self.target,
            bias=bias,
            lora=lora,
            temperature=self.temperature,
            ignore_index=self.ignore_index,
            **options,
        )
        chosen = (x if name in self.outputs else None for name, x in zip(FIELDS, full))
        fields = [x if x is None or name in self.grad_outputs else x.detach() for name, x in zip(FIELDS, chosen)]
        return HeadOutput(*(x if x is None else x.view(self.shape) for x in fields))  # type: ignore[arg-type]


class _LinearLogps(torch.autograd.Function):
    """(6, N) statistics; the schedule decides what is kept for the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        u: Tensor | None,
        b: Tensor | None,
        temperature: Temperature,
        live: Tensor | None,
        call: _Call,
        plan: Plan,
        options: dict[str, Any],
    ) -> Tensor:
        operands = Operands(hidden, weight, call.target, bias, u, b, temperature, **options).take(live)
        with _no_autocast(hidden):
            found, kept, kept_u = function.forward(operands, plan, call.outputs, call.grad_outputs, operands.hidden.shape[0])
        stats = found if live is None else found.new_zeros(len(FIELDS), call.target.shape[0]).index_copy_(1, live, found)
        ctx.call, ctx.plan, ctx.options, ctx.live = call, plan, options, live
        ctx.temperature = temperature
        if plan.schedule != "none":
            ctx.save_for_backward(hidden, weight, bias, u, b, found.clone() if live is None else found, kept, kept_u)
        return stats

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_stats: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, u, b, found, kept, kept_u = ctx.saved_tensors
        call, plan, live = ctx.call, ctx.plan, ctx.live
        d_live = d_stats if live is None else d_stats.index_select(1, live)
        with _no_autocast(hidden):
            grads = function_backward(
                Operands(hidden, weight, call.target, bias, u, b, ctx.temperature, **ctx.options),
                plan,
                live,
                found,
                {name: d_live[FIELDS.index(name)] for name in call.grad_outputs},
                kept,
                kept_u,
                ctx.needs_input_grad,
                call.d_weight,
            )
        return (*grads, *([None] * 5))


def function_backward(
    operands: Operands,  # all N rows
    plan: Plan,
    live: Tensor | None,
    found: Tensor,  # (6, n)
    coefficients: dict[str, Tensor],  # (n,) each
    kept: Tensor,
    kept_u: Tensor,
    needs: Sequence[bool],  # hidden, weight, bias, u, B
    d_weight: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Gradients of (hidden, weight, bias, u, B), full size, from the compact statistics and coefficients."""
    everything, n = operands, found.shape[1]
    rows = operands.hidden.shape[0]
    if plan.schedule == "frozen":
        scale = torch.stack(list(coefficients.values())).unsqueeze(2)  # (k, n, 1)
        d_hidden = (kept[:, :n] * scale).sum(0).to(kept.dtype) if needs[0] else None
        d_u = (kept_u[:, :n] * scale).sum(0).to(kept_u.dtype) if needs[3] else None
        return _spread(d_hidden, live, rows), None, None, _spread(d_u, live, rows), None

    index = _nonzero_rows(coefficients)
    if index is not None:
        live = index if live is None else live[index]
        found = found[:, index]
        coefficients = {k: v[index] for k, v in coefficients.items()}
        kept = kept[index] if plan.schedule == "keep" else kept
    operands = everything.take(live)
    head = any(needs[i] for i in (1, 2, 4))
    grads = Gradients(operands, hidden=needs[0] or needs[3], head=head, d_weight=d_weight, weight=needs[1])
    stats = {name: found[FIELDS.index(name)] for name in ("lse", "entropy")}
    function.backward(operands, plan, stats, coefficients, kept, grads)
    return _results(grads, everything, live, needs, d_weight)


class _LinearLoss(torch.autograd.Function):
    """The slab schedule: loss and gradients in the forward, scaled by the incoming gradient in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        u: Tensor | None,
        b: Tensor | None,
        temperature: Temperature,
        live: Tensor | None,
        call: _Call,
        plan: Plan,
        options: dict[str, Any],
        loss_fn: LossFn,
        bounds: Sequence[int] | None,
    ) -> Tensor:
        needs = ctx.needs_input_grad if plan.schedule == "slab" else (False,) * 5
        everything = Operands(hidden, weight, call.target, bias, u, b, temperature, **options)
        with _no_autocast(hidden):
            total, grads, owned = _run_slabs(everything, plan, live, call, loss_fn, bounds, needs)
        ctx.save_for_backward(*grads)
        ctx.spent = owned  # d_weight already holds this loss's gradient
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.spent is not None:
            if ctx.spent == "used":
                raise RuntimeError("linear_loss with d_weight was differentiated twice; d_weight holds its gradient once: drop d_weight")
            if d_loss.device.type == "cpu" and float(d_loss) != 1.0:
                raise RuntimeError(
                    f"linear_loss with d_weight needs an incoming gradient of 1, got {float(d_loss)}: scale inside loss_fn, or drop d_weight"
                )
            if d_loss.device.type != "cpu":
                torch._assert_async(d_loss == 1)
            ctx.spent = "used"
        exact = d_loss.device.type == "cpu" and float(d_loss) == 1.0
        return (*(g if g is None or exact else g * d_loss.to(g.dtype) for g in ctx.saved_tensors), *([None] * 7))


def _run_slabs(
    everything: Operands,
    plan: Plan,
    live: Tensor | None,
    call: _Call,
    loss_fn: LossFn,
    bounds: Sequence[int] | None,
    needs: Sequence[bool],
) -> tuple[Tensor, tuple[Tensor | None, ...], str | None]:
    rows = call.target.shape[0]
    operands = everything.take(live)
    wants = any(needs[:5]) or (plan.schedule == "slab" and call.d_weight is not None)
    head = any(needs[i] for i in (1, 2, 4))
    grads = Gradients(operands, hidden=needs[0] or needs[3], head=head, d_weight=call.d_weight if wants else None, weight=needs[1])
    cuts = _slab_cuts(rows, live, bounds, plan.slab_rows)
    longest = max((hi - lo for _, _, lo, hi in cuts), default=0)
    scratch = function.scratch_tile(operands, replace(plan, slab_rows=max(1, longest)))
    outputs = call.outputs | {"entropy"} if "entropy" in call.grad_outputs else call.outputs
    total: Tensor | None = None
    for first, last, lo, hi in cuts:
        at = slice(lo, hi)
        found, tile = function.score_slab(operands, plan, at, outputs, scratch)
        place = None if live is None else live[at] - first
        leaves = {name: _spread(found[name], place, last - first) for name in FIELDS if name in call.outputs}
        for name in call.grad_outputs if wants else ():
            leaves[name] = leaves[name].detach().requires_grad_()
        with torch.enable_grad():
            loss = loss_fn(HeadOutput(**leaves), slice(first, last))
        _check_loss(loss, leaves, first_call=total is None)
        total = loss.detach() if total is None else total + loss.detach()
        if not (wants and loss.requires_grad):
            _zero_rows(grads, at)
            continue
        names = [n for n in call.grad_outputs if leaves[n].requires_grad]
        slopes = torch.autograd.grad(loss, [leaves[n] for n in names], allow_unused=True)
        coefficients = {n: (g if place is None else g[place]) for n, g in zip(names, slopes) if g is not None}
        _add_slab(grads, operands, plan, at, found, coefficients, scratch, tile)
    if total is None:
        with torch.enable_grad():
            empty = {n: operands.hidden.new_zeros(0, dtype=operands.work_dtype) for n in FIELDS if n in call.outputs}
            total = loss_fn(HeadOutput(**empty), slice(0, 0)).detach()
    owned = "added" if call.d_weight is not None and wants else None
    return total, _results(grads, everything, live, needs, call.d_weight), owned


def _add_slab(
    grads: Gradients,
    operands: Operands,
    plan: Plan,
    at: slice,
    found: dict[str, Tensor],
    coefficients: dict[str, Tensor],
    scratch: Tensor,
    tile: Tensor | None,
) -> None:
    """Add a slab's gradients; rows with no coefficient are dropped before the GEMMs."""
    index = _nonzero_rows(coefficients)
    if not coefficients:
        _zero_rows(grads, at)
    elif index is None:
        grads.add(at, function.gradient_tiles(operands, plan, at, found, coefficients, scratch, tile))
    else:
        _zero_rows(grads, at)
        some = operands.take(index + at.start)
        part = Gradients(
            some, hidden=grads.hidden is not None or grads.u is not None, head=False, d_weight=grads.weight, weight=grads.weight is not None
        )
        part.bias, part.lora_weight = grads.bias, grads.lora_weight
        every = slice(0, index.shape[0])
        c = {k: v[index] for k, v in coefficients.items()}
        stats = {k: v[index] for k, v in found.items()}
        part.add(every, function.gradient_tiles(some, plan, every, stats, c, scratch, None if tile is None else tile[index]))
        for mine, theirs in ((grads.hidden, part.hidden), (grads.u, part.u)):
            if mine is not None and theirs is not None:
                mine[at][index] = theirs


def _zero_rows(grads: Gradients, at: slice) -> None:
    for g in (grads.hidden, grads.u):
        if g is not None:
            g[at] = 0


def _nonzero_rows(coefficients: dict[str, Tensor]) -> Tensor | None:
    """Rows with any coefficient, or None for all; on a device the count would be a sync, so there it is all."""
    some = next(iter(coefficients.values()), None)
    if some is None or some.device.type != "cpu":
        return None
    mask = torch.stack([c != 0 for c in coefficients.values()]).any(0)
    return None if mask.all() else mask.nonzero().squeeze(1)


def _results(
    grads: Gradients, everything: Operands, live: Tensor | None, needs: Sequence[bool], d_weight: Tensor | None
) -> tuple[Tensor | None, ...]:
    """(hidden, weight, bias, u, B) gradients at full size, in the dtypes of the operands."""
    rows = everything.hidden.shape[0]

    def rounded(total: Tensor | None, like: Tensor | None) -> Tensor | None:
        return None if total is None or like is None else total.to(like.dtype)

    return (
        _spread(grads.hidden, live, rows) if needs[0] else None,
        rounded(grads.weight, everything.weight) if needs[1] and d_weight is None else None,
        rounded(grads.bias, everything.bias) if needs[2] else None,
        _spread(grads.u, live, rows) if needs[3] else None,
        rounded(grads.lora_weight, everything.lora_weight) if needs[4] else None,
    )


def _spread(values: Any, index: Tensor | None, rows: int) -> Any:
    """Rows of `values` at `index` among `rows` rows of zeros; None index: as they are."""
    if values is None or index is None:
        return values
    return values.new_zeros(rows, *values.shape[1:]).index_copy_(0, index, values)


def _slab_cuts(rows: int, live: Tensor | None, bounds: Sequence[int] | None, slab_rows: int) -> list[tuple[int, int, int, int]]:
    """Slabs as (first, last) of all rows and (lo, hi) of the live rows; at most `slab_rows` live rows, groups whole."""
    if live is None:
        counts = bounds if bounds is not None else None
    else:
        edges = torch.arange(rows + 1) if bounds is None else torch.tensor(list(bounds))
        counts = torch.searchsorted(live.cpu(), edges).tolist()
    if bounds is None and counts is None:
        return [(s.start, s.stop, s.start, s.stop) for s in function.slabs(rows, slab_rows)]
    edges_list = list(range(rows + 1)) if bounds is None else list(bounds)
    assert counts is not None
    cuts, start = [], 0
    for g in range(1, len(edges_list)):
        if g + 1 == len(edges_list) or counts[g + 1] - counts[start] > slab_rows:
            cuts.append((edges_list[start], edges_list[g], counts[start], counts[g]))
            start = g
    return cuts


def _group_bounds(groups: Sequence[int] | Tensor | None, rows: int) -> list[int] | None:
    if groups is None:
        return None
    bounds = groups.tolist() if isinstance(groups, Tensor) else list(groups)
    if not bounds or bounds[0] != 0 or bounds[-1] != rows or any(b < a for a, b in itertools.pairwise(bounds)):
        raise ValueError(f"groups must rise from 0 to the number of rows {rows}, got {bounds[:3]}...{bounds[-1:]}")
    return bounds


def _check_loss(loss: Any, leaves: dict[str, Tensor], *, first_call: bool) -> None:
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(type(loss))
        raise ValueError(f"loss_fn must return a scalar tensor, got {what}: sum its tokens or sequences")
    if not first_call or loss.grad_fn is None:
        return
    own = {id(x) for x in leaves.values()}
    seen, todo = set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in own:
            raise ValueError(
                f"loss_fn uses a tensor of shape {tuple(leaf.shape)} that requires a gradient and would get none: "
                "detach it, or compute the loss from linear_logps"
            )
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                todo.append(following)


def _names(given: Sequence[str], allowed: Sequence[str], argument: str) -> list[str]:
    names = [given] if isinstance(given, str) else list(given)
    for name in names:
        if name not in allowed:
            raise ValueError(f"{argument} takes names out of {tuple(allowed)}, got {name!r}")
    return [name for name in allowed if name in names]


def _softcap(softcap: float | None) -> float | None:
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive or None, got {softcap}")
    return None if softcap is None else float(softcap)


def _no_autocast(like: Tensor) -> torch.autocast:
    return torch.autocast(like.device.type, enabled=False)


def _check_operands(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, u: Tensor | None, b: Tensor | None, d_weight: Tensor | None
) -> None:
    if not hidden.is_floating_point():
        raise ValueError(f"hidden must be floating point, got {hidden.dtype}")
    if weight.dim() != 2 or weight.shape[0] == 0 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"hidden (..., D) and weight (V, D) must share D, got {tuple(hidden.shape)} and {tuple(weight.shape)}")
    if target.shape != hidden.shape[:-1] or target.dtype != torch.int64:
        raise ValueError(
            f"target must be int64 of shape {tuple(hidden.shape[:-1])} to match hidden, got {target.dtype} {tuple(target.shape)}"
        )
    if (u is None) != (b is None) or (
        u is not None and b is not None and (u.shape != (*hidden.shape[:-1], b.shape[1]) or len(b) != len(weight))
    ):
        raise ValueError("lora must be a pair (u (..., r), B (V, r)) that matches hidden and weight")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({weight.shape[0]},) to match weight, got {tuple(bias.shape)}")
    if d_weight is not None and (d_weight.shape != weight.shape or d_weight.dtype not in (weight.dtype, torch.float32)):
        raise ValueError(
            f"d_weight must be {tuple(weight.shape)} in float32 or {weight.dtype}, got {tuple(d_weight.shape)} {d_weight.dtype}"
        )
    for name, x in (("weight", weight), ("target", target), ("bias", bias), ("lora u", u), ("lora B", b), ("d_weight", d_weight)):
        if x is None:
            continue
        if x.device != hidden.device:
            raise ValueError(f"{name} is on {x.device}, hidden on {hidden.device}: move them to one device")
        if name not in ("target", "d_weight", "bias") and x.dtype != hidden.dtype:
            raise ValueError(f"{name} is {x.dtype}, hidden {hidden.dtype}: cast one of them (under autocast too)")
