"""The public operator: per-token log-probs, entropies and losses of a language-model head, without its logits."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from fastalign.head import ops
from fastalign.head.autograd import LinearLogps, LinearLoss, LossFn, group_bounds
from fastalign.head.call import Call, Temperature
from fastalign.head.function import DIFFERENTIABLE
from fastalign.types import IGNORE_INDEX, HeadOutput


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
    active: Tensor | None = None,  # (...) bool, on the CPU
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
    active          rows whose incoming gradient may be other than 0, such as the tokens with a non-zero advantage; the others
                    reach no gradient GEMM. On a CPU such rows are found without it; on CUDA finding them would sync
    impl            of the passes over logits between the GEMMs. "auto": "triton" on a CUDA or ROCm device if Triton is
                    installed, "native" on a CPU if the native library is there, else, and for float64, "torch".
                    "reference": materialised logits, for tests

    Rows whose target is `ignore_index` never reach a GEMM, are 0 in every output, and may hold NaN; neither do rows whose
    incoming gradient is 0 reach a gradient GEMM (on CUDA: those that `active` names).
    Log-probs are float32 whatever the input dtype (float64 for float64). Results are bitwise reproducible.

    Gradients are of first order: create_graph=True raises RuntimeError (impl "reference" has higher ones).

    Raises ValueError when shapes, dtypes or devices do not fit, or, on a CPU, a target is outside the vocabulary (on CUDA
    such a row's log-prob is NaN), or impl "triton" or "native" is asked of float64 or of another device; DependencyError
    where Triton or the native library is absent.

    >>> import torch
    >>> hidden, weight = torch.zeros(2, 4), torch.zeros(8, 4)
    >>> linear_logps(hidden, weight, torch.tensor([3, -100])).logps   # uniform over 8 tokens: -log 8
    tensor([-2.0794,  0.0000])
    """
    call = Call.of(
        hidden,
        weight,
        target,
        bias,
        lora,
        temperature,
        ignore_index,
        outputs,
        differentiable,
        d_weight,
        live_rows,
        active,
        logit_scale,
        softcap,
    )
    return _score(call, schedule=schedule, budget=budget, impl=impl)


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
    active: Tensor | None = None,  # (...) bool, on the CPU
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
    >>> round(loss.item(), 4)
    2.0794
    """
    call = Call.of(
        hidden,
        weight,
        target,
        bias,
        lora,
        temperature,
        ignore_index,
        outputs,
        differentiable,
        d_weight,
        live_rows,
        active,
        logit_scale,
        softcap,
    )
    bounds = group_bounds(groups, call.target.shape[0])
    if schedule not in ("auto", "slab") or impl == "reference" or torch.compiler.is_compiling():
        out = _score(call, schedule="auto" if schedule == "slab" else schedule, budget=budget, impl=impl)
        flat: dict[str, Any] = {name: x if x is None else x.reshape(-1) for name, x in out._asdict().items()}
        return loss_fn(HeadOutput(**flat), slice(0, call.target.shape[0]))
    live = call.live_index()
    plan = call.plan(
        call.count(live),
        schedule=schedule,
        budget=budget,
        impl=impl,
        local_loss=True,
        group_rows=1 if bounds is None else max((b - a for a, b in pairwise(bounds)), default=1),
    )
    return LinearLoss.apply(*call.tensors, live, call, plan, loss_fn, bounds)


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


def _score(call: Call, *, schedule: str, budget: int | None, impl: str) -> HeadOutput:
    """The outputs of a checked call, with all rows differentiable at once."""
    if impl == "reference":
        return call.reference()
    if torch.compiler.is_compiling():
        return call.output(ops.traced(call, schedule=schedule, budget=budget, impl=impl))
    live = call.live_index()
    plan = call.plan(call.count(live), schedule=schedule, budget=budget, impl=impl)
    return call.output(LinearLogps.apply(*call.tensors, live, call, plan))
