"""Which tokens of a policy loss count, and how much: corrections for samples that another policy or engine drew. No gradient."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastalign.losses.kl import bounded_exp
from fastalign.segments import segment_expand, segment_mean, segment_sum


@torch.no_grad()
def importance_weights(
    old_logps: Tensor,  # (N,) by the trainer
    sampling_logps: Tensor,  # (N,) by the engine that sampled; NaN where it has none
    cu_seqlens: Tensor,  # (S+1,) int32
    mask: Tensor | None = None,  # (N,) bool
    *,
    mode: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = "sequence_mask",
    clip_min: float | None = None,
    clip_max: float | None = 3.0,
) -> Tensor:
    """(N,) pi_old / pi_sampler, of the token or of its whole sequence; out of [clip_min, clip_max] it is clamped (truncate) or 0 (mask).

    A token without a sampling log-prob has difference 0, as in TRL 1.16, whose `vllm_importance_sampling_mode` this is. Yao 2025.
    Masked tokens weigh 1 (token_*) or as their sequence does.

    >>> importance_weights(torch.tensor([-1.0, -1.0]), torch.tensor([-1.0, -3.0]), torch.tensor([0, 2]), mode="token_truncate")
    tensor([1., 3.])
    """
    if mode not in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"):
        raise ValueError(f"mode must be token_truncate, token_mask, sequence_truncate or sequence_mask, got {mode!r}")
    difference = _counted(old_logps - sampling_logps, mask)
    if mode.startswith("sequence"):
        difference = segment_expand(segment_sum(difference, cu_seqlens), cu_seqlens, difference.shape[0])
    ratio = bounded_exp(difference)
    if mode.endswith("truncate"):
        return ratio if clip_min is None and clip_max is None else ratio.clamp(clip_min, clip_max)
    inside = torch.ones_like(ratio, dtype=torch.bool)
    if clip_min is not None:
        inside &= ratio >= clip_min
    if clip_max is not None:
        inside &= ratio <= clip_max
    return ratio.masked_fill(~inside, 0.0)


@torch.no_grad()
def sampling_drift(
    old_logps: Tensor,  # (N,) by the trainer
    sampling_logps: Tensor,  # (N,) by the engine that sampled; NaN where it has none: not counted
    cu_seqlens: Tensor,  # (S+1,) int32
    mask: Tensor | None = None,  # (N,) bool
    *,
    mode: str = "sequence_mask",  # of `importance_weights`: says whose ratio
) -> dict[str, Tensor]:
    """What `importance_weights` starts from, before anything is clamped or masked: scalars to sum, or to take the min_ and max_ of.

    Absolute differences of tokens' log-probs, and the ratios pi_old / pi_sampler of tokens, or of sequences where `mode` is one of
    sequences. Where nothing counts, the least ratio is infinite and all else 0.

    >>> drift = sampling_drift(torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -2.0]), torch.tensor([0, 2]), mode="token_mask")
    >>> float(drift["sampling_difference"]), float(drift["max_sampling_difference"]), float(drift["min_sampling_ratio"])
    (0.5, 0.5, 1.0)
    """
    known = ~sampling_logps.isnan() if mask is None else mask & ~sampling_logps.isnan()
    difference = _counted(old_logps - sampling_logps, known)
    size, counted = difference.abs(), known
    if mode.startswith("sequence"):
        difference, counted = segment_sum(difference, cu_seqlens), segment_sum(known.float(), cu_seqlens) > 0
    ratio = bounded_exp(difference)
    counted_ratio = ratio.masked_fill(~counted, 0.0)
    return {
        "sampling_tokens": known.sum(),
        "sampling_difference": size.sum(),
        "max_sampling_difference": size.max(),
        "sampling_ratios": counted.sum(),
        "sampling_ratio": counted_ratio.sum(),
        "min_sampling_ratio": ratio.masked_fill(~counted, torch.inf).min(),
        "max_sampling_ratio": counted_ratio.max(),
    }


@torch.no_grad()
def off_policy_mask(
    logps: Tensor,  # (N,)
    sampling_logps: Tensor,  # (N,) by the policy that sampled; NaN where unknown
    advantages: Tensor,  # (N,)
    cu_seqlens: Tensor,
    mask: Tensor | None = None,
    *,
    threshold: float,  # nats per token
) -> Tensor:
    """(N,) bool, True keeps: A >= 0, or the sequence's mean of log pi_sampler - log pi is at most `threshold`.

    DeepSeek-V3.2, arXiv:2512.02556 (off-policy sequence masking). Unknown sampling log-probs are no evidence, difference 0.

    >>> off_policy_mask(torch.tensor([-3.0]), torch.tensor([-1.0]), torch.tensor([-1.0]), torch.tensor([0, 1]), threshold=0.5)
    tensor([False])
    """
    drift = segment_mean(_counted(sampling_logps - logps, mask), cu_seqlens, mask)
    return (advantages >= 0) | (segment_expand(drift, cu_seqlens, logps.shape[0]) <= threshold)


@torch.no_grad()
def top_entropy_mask(
    entropy: Tensor,  # (N,) nats, over all tokens of the step: a quantile of a part is not that of the whole
    mask: Tensor | None = None,
    *,
    quantile: float,  # share of the tokens to keep
) -> Tensor:
    """(N,) bool, the `quantile` of counted tokens with the highest entropy. Wang 2025, arXiv:2506.01939.

    >>> top_entropy_mask(torch.tensor([0.1, 0.4, 0.2, 0.3]), quantile=0.5)
    tensor([False,  True, False,  True])
    """
    if not 0.0 < quantile <= 1.0:
        raise ValueError(f"quantile is a share of the tokens, in (0, 1], got {quantile}")
    if entropy.numel() == 0:
        return torch.zeros_like(entropy, dtype=torch.bool)
    counted = entropy if mask is None else entropy.masked_fill(~mask, float("nan"))
    return counted >= torch.nanquantile(counted.float(), 1 - quantile)  # NaN is never >=


def _counted(difference: Tensor, mask: Tensor | None) -> Tensor:
    return (difference if mask is None else difference.masked_fill(~mask, 0.0)).nan_to_num(nan=0.0)
