# mypy: disallow-untyped-defs=False
"""The policy losses of `policy` as one Triton kernel, for CUDA and ROCm: values, clip statistics and row coefficients together.

Each loss per token is a small function here that returns its value and its two derivatives; `TERMS` pairs it with its
definition in `policy`. Arithmetic is in float32, offsets are int64, nothing is shared between programs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastalign.losses import policy
from fastalign.losses.aggregate import sequence_mean
from fastalign.losses.kl import MAX_EXPONENT
from fastalign.losses.policy import LOWEST_LOG_WEIGHT

BLOCK = 1024  # tokens at a time
LAUNCH = {"num_warps": 8, "enable_fp_fusion": True}  # 4 tokens to a thread: the terms of 8 would not fit its registers
SUMS = tl.constexpr(5)  # loss and the other fields of PolicyOutput
LEVELS = {"token": 0, "sequence": 1, "product": 2}
KL = {"k1": 1, "k2": 2, "k3": 3}
LARGEST, LOWEST = tl.constexpr(MAX_EXPONENT), tl.constexpr(LOWEST_LOG_WEIGHT)


@triton.jit
def clamp(x, low, high):
    """x in [low, high]; NaN stays NaN, as in torch, which minimum and maximum would not keep."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def bounded_exp(x):
    """`kl.bounded_exp` and its derivative."""
    e = tl.exp(tl.where(x > LARGEST, LARGEST, x))
    return e * (1.0 + tl.where(x > LARGEST, x - LARGEST, 0.0)), e


# (ratio, logp, advantage, log_w, clip bounds, options) -> (loss, dloss/dlogp at a fixed ratio, dloss/dratio)


@triton.jit
def ppo_clip(ratio, logp, a, log_w, low, high, delta, p1, p2, p3):
    free, clipped = tl.where(ratio > delta, delta, ratio) * a, clamp(ratio, low, high) * a
    d_free = tl.where(ratio <= delta, a, 0.0)
    d_clipped = tl.where((ratio >= low) & (ratio <= high), a, 0.0)
    d = tl.where(free < clipped, d_free, tl.where(clipped < free, d_clipped, 0.5 * (d_free + d_clipped)))
    return -tl.where(free < clipped, free, clipped), tl.zeros_like(logp), -d


@triton.jit
def cispo(ratio, logp, a, log_w, low, high, p0, p1, p2, p3):
    direct = -tl.where(ratio > high, high, ratio) * a
    return direct * logp, direct, tl.zeros_like(logp)


@triton.jit
def sapo(ratio, logp, a, log_w, low, high, temperature_pos, temperature_neg, p2, p3):
    tau = tl.where(a > 0, temperature_pos, temperature_neg)
    gate = tl.sigmoid(tau * (ratio - 1.0))
    return -4.0 / tau * gate * a, tl.zeros_like(logp), -4.0 * gate * (1.0 - gate) * a


@triton.jit
def vespo(ratio, logp, a, log_w, low, high, k_pos, lambda_pos, k_neg, lambda_neg):
    k, scale = tl.where(a >= 0, k_pos, k_neg), tl.where(a >= 0, lambda_pos, lambda_neg)
    direct = -tl.exp(k * log_w + scale * (1.0 - tl.exp(log_w))) * a
    return direct * logp, direct, tl.zeros_like(logp)


@triton.jit
def reinforce(ratio, logp, a, log_w, low, high, p0, p1, p2, p3):
    return -a * logp, -a, tl.zeros_like(logp)


TERMS: dict[Callable[..., Tensor], tuple[Any, tuple[str, ...]]] = {  # definition: kernel function, options it is given
    policy.ppo_clip: (ppo_clip, ("delta",)),
    policy.cispo: (cispo, ()),
    policy.sapo: (sapo, ("temperature_pos", "temperature_neg")),
    policy.vespo: (vespo, ("k_pos", "lambda_pos", "k_neg", "lambda_neg")),
    policy.reinforce: (reinforce, ()),
}


@triton.jit
def kl_terms(logp, ref, KL: tl.constexpr):
    """An estimate of `kl` and its derivative by logp."""
    d = ref - logp
    if KL == 1:
        return -d, tl.zeros_like(d) + 1.0
    elif KL == 2:
        return 0.5 * d * d, -d
    else:
        e, slope = bounded_exp(d)
        return e - d - 1.0, 1.0 - slope


@triton.jit
def load_counted(mask_ptr, cols, n):
    counted = cols < n
    if mask_ptr is not None:
        counted = counted & (tl.load(mask_ptr + cols, mask=counted, other=0) != 0)
    return counted


# Sequences begin anywhere, so how tensors are aligned makes no better code: slices of a batch need no kernels of their own.
@triton.jit(do_not_specialize_on_alignment=[*range(12), "d_logps_ptr", "d_entropy_ptr"])
def policy_kernel(
    logps_ptr,  # (N,) float32
    old_ptr,  # (N,), as all that follow
    advantages_ptr,  # or (S,)
    cu_ptr,  # (S+1,)
    mask_ptr,  # bool or None
    keep_ptr,  # bool or None
    weights_ptr,  # or None
    ref_ptr,  # or None
    entropy_ptr,  # or None
    entropy_mask_ptr,  # bool or None
    denominator_ptr,  # (1,) or None
    entropy_coef_ptr,  # (1,) or None
    divisor,  # of the sum of all sequences; times the denominator behind the pointer, if there is one
    kl_coef,
    entropy_coef,
    low,
    high,
    p0,
    p1,
    p2,
    p3,
    d_logps_ptr,  # (N,) float32
    d_entropy_ptr,  # (N,) float32 or None
    sums_ptr,  # (S, 5) float32: the loss's share, tokens, clipped low, clipped high, KL
    TOKEN_LOSS: tl.constexpr,  # a function of TERMS
    WHOLE_WEIGHT: tl.constexpr,  # vespo: importance weights belong to the sequence's weight
    LEVEL: tl.constexpr,
    PER_SEQUENCE: tl.constexpr,  # advantages
    SEQUENCE_MEAN: tl.constexpr,  # divide by the sequence's counted tokens as well
    KL: tl.constexpr,
    CORRECTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Loss, statistics and dL/dlogps of one sequence.

    Grid (S,). A program owns the sequence `program_id(0)`, its rows of d_logps and d_entropy, and its row of `sums`. It walks
    the sequence in blocks: once where each token stands alone; where a ratio, a weight or a mean belongs to the sequence, once
    before for their sums; and where the ratio has a gradient that all tokens share, once after, with the sum of its
    derivatives. Later walks find the tokens in cache. Reads 4 bytes per token and float argument, 1 per mask; writes 4 per
    result. Sums in float32, lane by lane and then by a tree: the same bits on every run.
    """
    s = tl.program_id(0).to(tl.int64)
    first = tl.load(cu_ptr + s).to(tl.int64)
    n = (tl.load(cu_ptr + s + 1).to(tl.int64) - first).to(tl.int32)
    logps_ptr += first
    old_ptr += first
    d_logps_ptr += first
    advantages_ptr += s if PER_SEQUENCE else first
    if mask_ptr is not None:
        mask_ptr += first
    if keep_ptr is not None:
        keep_ptr += first
    if weights_ptr is not None:
        weights_ptr += first
    if ref_ptr is not None:
        ref_ptr += first
    if entropy_ptr is not None:
        entropy_ptr += first
        d_entropy_ptr += first
        if entropy_coef_ptr is not None:
            entropy_coef = tl.load(entropy_coef_ptr).to(tl.float32)
    if entropy_mask_ptr is not None:
        entropy_mask_ptr += first
    if denominator_ptr is not None:
        denominator = tl.load(denominator_ptr).to(tl.float32)
        divisor *= tl.where(denominator < 1.0, 1.0, denominator)

    zero = tl.zeros([BLOCK], tl.float32)
    tokens = n.to(tl.float32)
    log_ratio, log_w = 0.0, 0.0
    if LEVEL != 0 or WHOLE_WEIGHT or (SEQUENCE_MEAN and mask_ptr is not None):
        count, total, total_w = zero, zero, zero
        for start in range(0, n, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            counted = load_counted(mask_ptr, cols, n)
            count += counted.to(tl.float32)
            x = tl.load(logps_ptr + cols, mask=counted, other=0.0) - tl.load(old_ptr + cols, mask=counted, other=0.0).to(tl.float32)
            total += x
            if WHOLE_WEIGHT:
                total_w += clamp(x, -20.0, 20.0)
                if weights_ptr is not None:
                    total_w += clamp(tl.log(tl.load(weights_ptr + cols, mask=counted, other=1.0).to(tl.float32)), LOWEST, 20.0)
        tokens = tl.sum(count, 0)
        log_ratio = tl.sum(total, 0)
        log_w = clamp(tl.sum(total_w, 0), LOWEST, 20.0)
    spread = 1.0  # dlog_ratio / dlogp of a counted token
    if LEVEL == 1:
        spread = 1.0 / tl.maximum(tokens, 1.0)
        log_ratio *= spread
    if SEQUENCE_MEAN:
        divisor *= tl.maximum(tokens, 1.0)

    loss, count, clipped_low, clipped_high, kl, bonus, via_ratio = zero, zero, zero, zero, zero, zero, zero
    shared = 0.0
    PHASES: tl.constexpr = 1 if LEVEL == 0 else 2
    for phase in tl.static_range(PHASES):
        for start in range(0, n, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            counted = load_counted(mask_ptr, cols, n)
            logp = tl.load(logps_ptr + cols, mask=counted, other=0.0)
            x = log_ratio + zero
            if LEVEL == 0:
                x = logp - tl.load(old_ptr + cols, mask=counted, other=0.0).to(tl.float32)
            if PER_SEQUENCE:
                a = tl.load(advantages_ptr).to(tl.float32) + zero
            else:
                a = tl.load(advantages_ptr + cols, mask=counted, other=0.0).to(tl.float32)
            ratio, slope = bounded_exp(x)
            value, direct, via = TOKEN_LOSS(ratio, logp, a, log_w, low, high, p0, p1, p2, p3)
            if weights_ptr is not None and not WHOLE_WEIGHT:
                weight = tl.load(weights_ptr + cols, mask=counted, other=0.0).to(tl.float32)
                value, direct, via = value * weight, direct * weight, via * weight
            if keep_ptr is not None:
                kept = tl.load(keep_ptr + cols, mask=counted, other=0) != 0
                value, direct, via = tl.where(kept, value, 0.0), tl.where(kept, direct, 0.0), tl.where(kept, via, 0.0)
            if ref_ptr is not None:
                penalty, d_penalty = kl_terms(logp, tl.load(ref_ptr + cols, mask=counted, other=0.0).to(tl.float32), KL)
                if CORRECTED:
                    via += kl_coef * penalty
                    penalty, d_penalty = penalty * ratio, d_penalty * ratio
                value += kl_coef * penalty
                direct += kl_coef * d_penalty
                if phase == 0:
                    kl += tl.where(counted, penalty, 0.0)
            via *= slope
            if LEVEL == 0:
                direct += via
            if phase == 0:
                loss += tl.where(counted, value, 0.0)
                via_ratio += tl.where(counted, via, 0.0)
                count += counted.to(tl.float32)
                clipped_low += (counted & (ratio < low) & (a < 0)).to(tl.float32)
                clipped_high += (counted & (ratio > high) & (a > 0)).to(tl.float32)
                if entropy_ptr is not None:
                    rewarded = counted
                    if entropy_mask_ptr is not None:
                        rewarded = counted & (tl.load(entropy_mask_ptr + cols, mask=counted, other=0) != 0)
                    bonus += tl.load(entropy_ptr + cols, mask=rewarded, other=0.0).to(tl.float32)
                    tl.store(d_entropy_ptr + cols, tl.where(rewarded, -entropy_coef, 0.0), mask=cols < n)
            if phase == PHASES - 1:
                tl.store(d_logps_ptr + cols, tl.where(counted, (direct + shared) / divisor, 0.0), mask=cols < n)
        shared = tl.sum(via_ratio, 0) * spread

    sums_ptr += s * SUMS
    tl.store(sums_ptr, tl.sum(loss, 0) / divisor - entropy_coef * tl.sum(bonus, 0))
    tl.store(sums_ptr + 1, tl.sum(count, 0))
    tl.store(sums_ptr + 2, tl.sum(clipped_low, 0))
    tl.store(sums_ptr + 3, tl.sum(clipped_high, 0))
    tl.store(sums_ptr + 4, tl.sum(kl, 0))


def launch(
    spec: policy.PolicyLoss,
    level: str,
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
    *,
    mask: Tensor | None,
    denominator: float | Tensor,
    length: int,
    keep: Tensor | None,
    importance_weights: Tensor | None,
    ref_logps: Tensor | None,
    kl_coef: float,
    kl: str,
    kl_correction: bool,
    entropy: Tensor | None,
    entropy_coef: float | Tensor,
    entropy_mask: Tensor | None,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(sums (S, 5), dL/dlogps (N,), dL/dentropy (N,) or None) by one launch; arguments as of `policy.policy_loss`, checked."""
    token_loss, names = TERMS[spec.token_loss]
    given = policy.options_of(spec.token_loss, options)
    numbers = [math.inf if given[name] is None else float(given[name]) for name in names]
    sequences = cu_seqlens.numel() - 1
    tensors = [
        None if x is None else x.detach().contiguous()
        for x in (logps, old_logps, advantages, cu_seqlens, mask, keep, importance_weights, ref_logps, entropy, entropy_mask)
    ]
    d_logps = torch.empty_like(logps, memory_format=torch.contiguous_format)
    d_entropy = None if entropy is None else torch.empty_like(d_logps)
    sums = torch.empty(sequences, SUMS.value, dtype=torch.float32, device=logps.device)
    if sequences:
        with torch.cuda.device_of(logps):
            policy_kernel[(sequences,)](
                *tensors,
                denominator if isinstance(denominator, Tensor) else None,
                entropy_coef if isinstance(entropy_coef, Tensor) else None,
                float(length) if isinstance(denominator, Tensor) else float(length * max(denominator, 1.0)),
                float(kl_coef),
                0.0 if isinstance(entropy_coef, Tensor) else float(entropy_coef),
                *policy.clip_bounds(spec.token_loss, options),
                *numbers,
                *[0.0] * (4 - len(numbers)),
                d_logps,
                d_entropy,
                sums,
                TOKEN_LOSS=token_loss,
                WHOLE_WEIGHT=spec.token_loss is policy.vespo,
                LEVEL=LEVELS[level],
                PER_SEQUENCE=advantages.dim() == 2,
                SEQUENCE_MEAN=spec.aggregate is sequence_mean,
                KL=KL[kl],
                CORRECTED=kl_correction,
                BLOCK=BLOCK,
                **LAUNCH,
            )
    return sums, d_logps, d_entropy
