"""The public operator for distillation: divergence of a student's head from a teacher's, per token, without their logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastalign.head.call import Call, Temperature
from fastalign.head.divergence_autograd import LinearDivergence, LinearDivergenceLoss, LossFn
from fastalign.head.divergence_function import DIFFERENTIABLE, FIELDS, DivergenceOutput, PairCall
from fastalign.head.divergence_torch import KINDS
from fastalign.head.reference import reference_divergence, reference_logits
from fastalign.types import IGNORE_INDEX


def linear_divergence(
    hidden: Tensor,  # (..., D) float16, bfloat16, float32 or float64; gradient
    weight: Tensor,  # (V, D), dtype of hidden; gradient
    ref_hidden: Tensor,  # (..., D2); no gradient
    ref_weight: Tensor,  # (V, D2), dtype of ref_hidden; no gradient
    *,
    kind: str = "forward_kl",
    beta: float = 0.5,
    temperature: Temperature = 1.0,  # of both; a number, or (...) per token; no gradient
    mask: Tensor | None = None,  # (...) bool, True counts
    **options: Any,
) -> Tensor:
    """Divergence (...) float32 in nats, over the full vocabulary, of the student p from the teacher q.

        forward_kl   KL(q || p)
        reverse_kl   KL(p || q)
        jsd          beta KL(q || m) + (1 - beta) KL(p || m),   m = (1 - beta) p + beta q

    jsd is the generalised Jensen-Shannon divergence of Agarwal 2024 (GKD), arXiv:2306.13649 eq. 1, with beta as TRL's
    GKD has it. It vanishes towards both ends (jsd / beta -> forward_kl as beta -> 0, jsd / (1 - beta) -> reverse_kl as
    beta -> 1); as in TRL, beta 0 and 1 themselves mean forward_kl and reverse_kl.

    The logits of both heads exist for one slab of rows at a time, `budget` bytes for both together. The gradient goes to
    the student's `hidden`, `weight`, `bias` and `lora`; the teacher's tensors are detached. FLOPs with n rows that count:
    4nVD without gradients, 6nVD with a frozen head, otherwise 12nVD, because the upstream gradient of each token is not
    known before the backward; `linear_divergence_loss` needs 8nVD. `divergence_function.plan_divergence` says them
    exactly, also for a budget below some whole rows.

    Rows outside `mask` are 0, reach no GEMM and may hold NaN, on both sides. A token that q excludes (logit -inf) and p
    does not makes reverse_kl infinite, and its row's gradient is not finite; likewise forward_kl where p excludes what q
    does not, but there the gradient p - q is finite. A token that both exclude does not count. jsd is always finite.

    Other options, and errors: `linear_divergence_outputs`.

    >>> import torch
    >>> hidden, weight = torch.ones(2, 1), torch.tensor([[0.0], [1.0]])
    >>> linear_divergence(hidden, weight, hidden, -weight)
    tensor([0.4621, 0.4621])
    >>> linear_divergence(hidden, weight, hidden, weight, kind="jsd", mask=torch.tensor([True, False]))
    tensor([0., 0.])
    """
    options |= {"kind": kind, "beta": beta, "temperature": temperature, "mask": mask}
    return linear_divergence_outputs(
        hidden, weight, ref_hidden, ref_weight, outputs=(), differentiable=("divergence",), **options
    ).divergence


def linear_divergence_outputs(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    target: Tensor | None = None,  # (...) int64
    *,
    schedule: str = "auto",
    budget: int | None = None,
    impl: str = "auto",
    **options: Any,
) -> DivergenceOutput:
    """`linear_divergence` with outputs of the student from the same pass, so that cross-entropy beside it costs no GEMM.

    target       makes `logps` an output; a row whose target is `ignore_index` does not count, beside those outside `mask`
    outputs      further fields of DivergenceOutput: entropy, lse, is_top1
    schedule     "none", "frozen", "recompute", "auto"; see `divergence_function.plan_divergence`
    impl         of the row kernels: "torch", "triton", "auto", or "reference": materialised logits, for tests. "native" is
                 the native library's products with the row kernels of torch

    bias, logit_scale, softcap, lora, d_weight, live_rows, active and differentiable are the student's and mean what they do
    in `linear_logps`; ref_bias, ref_logit_scale, ref_softcap and ref_lora are the teacher's.

    Raises ValueError where `linear_logps` does (messages about the teacher begin with "the reference"), and for an unknown
    kind, beta outside [0, 1], a mask that is not bool of the rows' shape, other rows, vocabulary or device of the teacher.

    >>> import torch
    >>> hidden, weight = torch.ones(2, 1), torch.tensor([[0.0], [1.0]])
    >>> linear_divergence_outputs(hidden, weight, hidden, -weight, torch.tensor([0, 1])).logps
    tensor([-1.3133, -0.3133])
    """
    call = _check(hidden, weight, ref_hidden, ref_weight, target, **options)
    return _score(call, schedule=schedule, budget=budget, impl=impl)


def linear_divergence_loss(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    loss_fn: LossFn,
    target: Tensor | None = None,  # (...) int64
    *,
    schedule: str = "auto",
    budget: int | None = None,
    impl: str = "auto",
    **options: Any,
) -> Tensor:
    """Sum of `loss_fn(out, rows)` over slabs of rows, the logits of both heads formed once for loss and gradients: 8NVD.

    `loss_fn` gets the DivergenceOutput of the flattened rows `rows.start:rows.stop` and returns a scalar, under the rules of
    `linear_loss`; any loss of single tokens will do, and per-token weights are just multiplied in. Options as in
    `linear_divergence_outputs`, and `kind`, `beta`, `temperature` and `mask` as in `linear_divergence`.

    Distillation with cross-entropy, averaged over `count` tokens:

    >>> import torch
    >>> hidden, weight = torch.ones(2, 1), torch.tensor([[0.0], [1.0]], requires_grad=True)
    >>> target, count = torch.tensor([0, 1]), 2
    >>> def loss_fn(out, rows):
    ...     return (out.divergence - 0.5 * out.logps).sum() / count
    >>> loss = linear_divergence_loss(hidden, weight, hidden, -weight, loss_fn, target, kind="reverse_kl")
    >>> round(loss.item(), 4)
    0.8687
    """
    call = _check(hidden, weight, ref_hidden, ref_weight, target, **options)
    if schedule not in ("auto", "slab") or impl == "reference":
        out = _score(call, schedule="auto" if schedule == "slab" else schedule, budget=budget, impl=impl)
        flat: dict[str, Any] = {name: x if x is None else x.reshape(-1) for name, x in out._asdict().items()}
        return loss_fn(DivergenceOutput(**flat), slice(0, call.student.target.shape[0]))
    live = call.student.live_index()
    pair = call.plan(call.student.count(live), schedule=schedule, budget=budget, impl=impl, local_loss=True)
    return LinearDivergenceLoss.apply(*call.student.tensors, live, call, pair.plan, loss_fn, None)


def _score(call: PairCall, *, schedule: str, budget: int | None, impl: str) -> DivergenceOutput:
    if impl == "reference":
        return _reference(call)
    live = call.student.live_index()
    pair = call.plan(call.student.count(live), schedule=schedule, budget=budget, impl=impl)
    return call.output(LinearDivergence.apply(*call.student.tensors, live, call, pair.plan))


def _check(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    target: Tensor | None,
    *,
    kind: str = "forward_kl",
    beta: float = 0.5,
    temperature: Temperature = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    outputs: Sequence[str] = (),
    differentiable: Sequence[str] = DIFFERENTIABLE,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    lora: tuple[Tensor, Tensor] | None = None,
    d_weight: Tensor | None = None,
    live_rows: int | None = None,
    active: Tensor | None = None,
    ref_bias: Tensor | None = None,
    ref_logit_scale: float = 1.0,
    ref_softcap: float | None = None,
    ref_lora: tuple[Tensor, Tensor] | None = None,
) -> PairCall:
    """A checked call; rows that do not count have the target `ignore_index`."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta must be in [0, 1], got {beta}")
    if kind == "jsd" and beta in (0.0, 1.0):
        kind = "reverse_kl" if beta else "forward_kl"
    rows = hidden.shape[:-1]
    if mask is not None and (mask.dtype != torch.bool or mask.shape != rows or mask.device != hidden.device):
        got = f"{mask.dtype} {tuple(mask.shape)} on {mask.device}"
        raise ValueError(f"mask must be bool of shape {tuple(rows)} on {hidden.device} to match hidden, got {got}")
    if ref_hidden.shape[:-1] != rows or ref_hidden.device != hidden.device:
        got = f"{tuple(ref_hidden.shape)} on {ref_hidden.device}"
        raise ValueError(f"ref_hidden must hold the rows {tuple(rows)} of hidden on {hidden.device}, got {got}")
    if ref_weight.shape[:1] != weight.shape[:1]:
        raise ValueError(
            f"weight and ref_weight must have one vocabulary, got {tuple(weight.shape)} and {tuple(ref_weight.shape)}: "
            "cut the rows that pad the longer one"
        )
    if (hidden.dtype == torch.float64) != (ref_hidden.dtype == torch.float64):
        raise ValueError(f"hidden is {hidden.dtype} and ref_hidden {ref_hidden.dtype}: cast one of them")
    allowed = FIELDS if target is not None else tuple(name for name in FIELDS if name not in ("logps", "is_top1"))
    wanted = {"divergence", *(("logps",) if target is not None else ()), *_names(outputs, allowed, "outputs")}
    grads = tuple(name for name in _names(differentiable, DIFFERENTIABLE, "differentiable") if name in wanted)
    if target is None:
        target = torch.zeros(rows, dtype=torch.int64, device=hidden.device)
    if mask is not None:
        target = target.masked_fill(~mask, ignore_index)

    some = ("logps", "entropy", "lse") if grads else ()
    common = (temperature, ignore_index, tuple(wanted - {"divergence"}))
    student = Call.of(hidden, weight, target, bias, lora, *common, some, d_weight, live_rows, active, logit_scale, softcap)
    try:
        given = [None if x is None else x.detach() for x in (ref_hidden, ref_weight, ref_bias, *(ref_lora or (None, None)))]
        ref_hidden, ref_weight, ref_bias, u, b = given  # type: ignore[assignment]
        pair = None if u is None or b is None else (u, b)
        ref = Call.of(ref_hidden, ref_weight, target, ref_bias, pair, *common, (), None, None, None, ref_logit_scale, ref_softcap)
    except ValueError as error:
        raise ValueError(f"the reference: {error}") from error
    return PairCall(student, ref, kind, beta, frozenset(wanted), grads)


def _names(given: Sequence[str], allowed: Sequence[str], argument: str) -> list[str]:
    names = [given] if isinstance(given, str) else list(given)
    for name in names:
        if name not in allowed:
            hint = ": it needs a target" if name in FIELDS else ""
            raise ValueError(f"{argument} takes names out of {tuple(allowed)}, got {name!r}{hint}")
    return names


def _reference(call: PairCall) -> DivergenceOutput:
    """The same outputs by definition; live rows only, for the others may hold NaN."""
    live = call.student.target != call.student.ignore_index
    log_probs = []
    for side in (call.student, call.ref):
        hidden, weight, bias, u, b = side.tensors
        lora = None if u is None or b is None else (u, b)
        logits = reference_logits(hidden, weight, live, bias, side.logit_scale, side.softcap, side.temperature, lora)
        log_probs.append(logits.log_softmax(1))
    divergence = reference_divergence(log_probs[0], log_probs[1], call.kind, call.beta).masked_fill(~live, 0)
    head = call.student.reference()._asdict()
    fields = {name: head.get(name) if name in call.outputs else None for name in FIELDS} | {"divergence": divergence}
    kept = {name: x if x is None or name in call.grad_outputs else x.detach() for name, x in fields.items()}
    return DivergenceOutput(**{name: x if x is None else x.view(call.student.shape) for name, x in kept.items()})  # type: ignore[arg-type]
