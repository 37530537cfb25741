"""Policy, preference and unpaired losses in one launch each on a GPU: value, statistics and the coefficient of every row.

Written with torch operators such a loss is dozens of launches over a few thousand numbers, each with a row of the graph. Here
the forward computes the gradient too, and the backward scales it by what comes from above. The functions take the arguments of
their definitions and give the same results to rounding; nothing needs them. Deterministic, without a device sync, and
capturable in a CUDA graph where shapes stay. Float32 only; Triton is imported by the first call.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastalign.errors import DependencyError
from fastalign.losses.aggregate import Count, count_sequences, count_tokens, sequence_mean, token_mean
from fastalign.losses.policy import PolicyOutput, check_advantages, check_tokens, options_of, resolve
from fastalign.losses.preference import PREFERENCE_LOSSES
from fastalign.losses.reference_free import REFERENCE_FREE_LOSSES
from fastalign.losses.unpaired import UNPAIRED_LOSSES, apo_zero_unpaired


def available(tensor: Tensor) -> bool:
    """Whether the kernels can run on `tensor`: float32 on a CUDA or ROCm device, and Triton is installed."""
    return tensor.is_cuda and tensor.dtype == torch.float32 and _has_triton()


def policy_loss(
    name: str,
    logps: Tensor,  # (N,) float32
    old_logps: Tensor,  # (N,)
    advantages: Tensor,  # (N,), or (S, 1): one per sequence
    cu_seqlens: Tensor,  # (S+1,) int32
    *,
    mask: Tensor | None = None,
    denominator: Count | None = None,
    level: str | None = None,
    keep: Tensor | None = None,
    importance_weights: Tensor | None = None,
    ref_logps: Tensor | None = None,
    kl_coef: float = 0.0,
    kl: str = "k3",
    kl_correction: bool = True,
    entropy: Tensor | None = None,
    entropy_coef: Count = 0.0,
    entropy_mask: Tensor | None = None,
    length: int | None = None,
    **options: Any,
) -> PolicyOutput:
    """`policy.policy_loss`, arguments and results, by one kernel whose programs own a sequence each, and a sum over (S, 5) floats.

    `denominator` and `entropy_coef` may be tensors on the device, so that a captured graph follows them. Gradients go to
    `logps` and `entropy`, once differentiable. Raises what the definition raises, and ValueError where the kernel cannot run.
    """
    spec, level = resolve(name, level, length, kl)
    check_tokens(logps, cu_seqlens, old_logps=old_logps, mask=mask, keep=keep, importance_weights=importance_weights,
                 ref_logps=ref_logps, entropy=entropy, entropy_mask=entropy_mask)  # fmt: skip
    check_advantages(advantages, cu_seqlens, logps)
    _check_device(logps, old_logps, advantages, cu_seqlens, mask, keep, importance_weights, ref_logps, entropy, entropy_mask,
                  denominator, entropy_coef)  # fmt: skip
    if denominator is None:
        denominator = cu_seqlens.numel() - 1
        if spec.aggregate in (token_mean, sequence_mean):
            denominator = (count_tokens if spec.aggregate is token_mean else count_sequences)(cu_seqlens, mask)
    from fastalign.losses import policy_triton

    sums, d_logps, d_entropy = policy_triton.launch(
        spec, level, logps.detach(), old_logps, advantages, cu_seqlens, mask=mask, denominator=denominator, length=length or 1,
        keep=keep, importance_weights=importance_weights, ref_logps=ref_logps, kl_coef=kl_coef, kl=kl, kl_correction=kl_correction,
        entropy=entropy, entropy_coef=entropy_coef, entropy_mask=entropy_mask, options=options,
    )  # fmt: skip
    return PolicyOutput(_Known.apply(sums[:, 0].sum(), (d_logps, d_entropy), logps, entropy), *sums[:, 1:].unbind(1))


class FusedPreference(NamedTuple):
    """What a preference loss gives: its share of the step's loss, and for each pair (P,), detached, what the metrics need."""

    loss: Tensor  # scalar
    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    chosen_logps: Tensor  # sums over the completion
    rejected_logps: Tensor


class FusedUnpaired(NamedTuple):
    """The same of single completions, (S,)."""

    loss: Tensor  # scalar
    losses: Tensor
    rewards: Tensor
    logps: Tensor


def preference_loss(
    name: str,  # of PREFERENCE_LOSSES or REFERENCE_FREE_LOSSES
    logps: Tensor,  # (N,) float32, scored tokens of chosen, rejected, chosen, ...
    cu_seqlens: Tensor,  # (2P+1,) int32
    ref_logps: Tensor | None = None,  # (2P,) sums; None for a loss without a reference
    *,
    weight: Tensor | None = None,  # (P,)
    denominator: Count | None = None,  # pairs of the step; None: P
    **options: Any,  # of the loss; lengths are known
) -> FusedPreference:
    """sum_i weight_i loss_i / denominator over pairs of sums (of means: ipo, sigmoid_norm, orpo, simpo, alphapo), by one kernel.

    A program owns a pair; a sum over P floats follows. aot and aot_unpaired sort the pairs of a step, which no program sees: they
    have no kernel. Gradients go to `logps`, once differentiable. Raises what the definition raises for its options, and ValueError.
    """
    losses = PREFERENCE_LOSSES | REFERENCE_FREE_LOSSES
    if name not in losses:
        raise ValueError(f"no preference loss is called {name!r}; there are {', '.join(losses)}")
    pairs, odd = divmod(cu_seqlens.numel() - 1, 2)
    check_tokens(logps, cu_seqlens)
    if odd:
        raise ValueError(f"cu_seqlens must be (2P+1,), chosen and rejected in turn, got {tuple(cu_seqlens.shape)}")
    if (ref_logps is None) != (name in REFERENCE_FREE_LOSSES):
        raise ValueError(
            f"ref_logps must be given for a loss with a reference, and for no other: {name} got {'none' if ref_logps is None else 'them'}"
        )
    _check_shapes({"ref_logps": (ref_logps, 2 * pairs), "weight": (weight, pairs)})
    _check_device(logps, cu_seqlens, ref_logps, weight, denominator)
    from fastalign.losses import preference_triton

    definition = losses[name]
    if definition not in preference_triton.PAIR_LOSSES:
        raise ValueError(f"{name} has no kernel: use the functions of losses.preference")
    given = _checked(definition, tuple(options.items()))
    sums, d_logps = preference_triton.launch_pairs(
        definition, logps.detach(), cu_seqlens, ref_logps, weight, pairs if denominator is None else denominator, given
    )
    return FusedPreference(_Known.apply(sums[:, 0].sum(), (d_logps,), logps), *sums[:, 1:].unbind(1))


def unpaired_loss(
    name: str,  # of UNPAIRED_LOSSES
    logps: Tensor,  # (N,) float32, scored tokens
    cu_seqlens: Tensor,  # (S+1,) int32
    ref_logps: Tensor,  # (S,) sums
    desirable: Tensor,  # (S,) bool
    *,
    kl: float | Tensor = 0.0,  # of kto; a tensor may be on the device
    weight: Tensor | None = None,  # (S,)
    denominator: Count | None = None,  # sequences of the step; None: S
    **options: Any,
) -> FusedUnpaired:
    """sum_i weight_i loss_i / denominator of single completions, by one kernel whose programs own a sequence each.

    Gradients go to `logps`, once differentiable; `kl` has none. Raises what the definition raises for its options, and ValueError.
    """
    if name not in UNPAIRED_LOSSES:
        raise ValueError(f"no unpaired loss is called {name!r}; there are {', '.join(UNPAIRED_LOSSES)}")
    if UNPAIRED_LOSSES[name] is apo_zero_unpaired and not (isinstance(kl, float) and kl == 0):
        raise ValueError(f"kl belongs to kto: {name} has no reference point")
    sequences = cu_seqlens.numel() - 1
    check_tokens(logps, cu_seqlens)
    _check_shapes({"ref_logps": (ref_logps, sequences), "desirable": (desirable, sequences), "weight": (weight, sequences)})
    if desirable.dtype != torch.bool:
        raise ValueError(f"desirable must be bool, got {desirable.dtype}")
    _check_device(logps, cu_seqlens, ref_logps, desirable, kl, weight, denominator)
    from fastalign.losses import preference_triton

    given = _checked(UNPAIRED_LOSSES[name], tuple(options.items()))
    sums, d_logps = preference_triton.launch_unpaired(
        logps.detach(), cu_seqlens, ref_logps, desirable, kl, weight, sequences if denominator is None else denominator, given
    )
    return FusedUnpaired(_Known.apply(sums[:, 0].sum(), (d_logps,), logps), *sums[:, 1:].unbind(1))


@lru_cache
def _checked(definition: Callable[..., Any], options: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    """All options of a loss, which the definition has checked: it is called on no pairs."""
    none, given = torch.zeros(0), dict(options)
    required = [p.name for p in signature(definition).parameters.values() if p.default is p.empty]
    values = {"desirable": none.bool(), "kl": 0.0}
    definition(**{name: values.get(name, none) for name in required}, **given)
    return options_of(definition, given)


class _Known(torch.autograd.Function):
    """A scalar whose derivatives by `inputs` are known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, derivatives: tuple[Tensor | None, ...], *inputs: Tensor | None) -> Tensor:
        ctx.save_for_backward(*derivatives)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(None if d is None else grad * d for d in ctx.saved_tensors)


def _check_shapes(given: dict[str, tuple[Tensor | None, int]]) -> None:
    for name, (x, size) in given.items():
        if x is not None and x.shape != (size,):
            raise ValueError(f"{name} must be ({size},), got {tuple(x.shape)}")


def _check_device(logps: Tensor, *others: object) -> None:
    if not _has_triton():
        raise DependencyError("the fused losses need Triton, which is not installed: pip install 'fastalign[triton]', or use losses.policy")
    if logps.dtype != torch.float32 or not (logps.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        raise ValueError(
            f"the fused losses compute in float32 on a CUDA or ROCm device, got {logps.dtype} on {logps.device}: "
            "use the functions of losses.policy and losses.preference"
        )
    elsewhere = {str(x.device) for x in others if isinstance(x, Tensor)} - {str(logps.device)}
    if elsewhere:
        raise ValueError(f"all tensors must be on the device of logps, {logps.device}, got some on {', '.join(sorted(elsewhere))}")


@lru_cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
