# mypy: disallow-untyped-defs=False
"""The losses of `preference`, `reference_free` and `unpaired` from packed tokens, as Triton kernels for CUDA and ROCm.

A program sums the log-probs of its sequences, forms their loss and its derivatives, and gives every row its coefficient. Each
loss is a small function here, of what its definition calls D+ and D-; `PAIR_LOSSES` pairs it with its definition. Float32
throughout, offsets are int64, nothing is shared between programs. A few numbers per program are worth care: `expm1` and
`log1p` are formed without cancellation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastalign.losses import divergence, preference, reference_free
from fastalign.losses.policy_triton import bounded_exp

BLOCK = 1024  # tokens at a time
LAUNCH = {"num_warps": 4, "enable_fp_fusion": True}
PAIR_SUMS = tl.constexpr(6)  # weighted loss, loss, chosen and rejected reward, chosen and rejected log-prob
UNPAIRED_SUMS = tl.constexpr(4)  # weighted loss, loss, reward, log-prob
LN2 = tl.constexpr(0.6931471805599453)
EPS = tl.constexpr(torch.finfo(torch.float32).eps)


@triton.jit
def expm1(x):
    """e^x - 1, by its series between -log 2 and log 2."""
    series = 1.0 + x / 10.0
    for k in tl.static_range(9, 1, -1):
        series = 1.0 + x / k * series
    return tl.where(tl.abs(x) < LN2, x * series, tl.exp(x) - 1.0)


@triton.jit
def bounded_expm1(x):
    value, slope = bounded_exp(x)
    return tl.where(x < 1.0, expm1(tl.where(x < 1.0, x, 1.0)), value - 1.0), slope


@triton.jit
def log1p(x):
    """log(1 + x) of 0 <= x <= 1, by the series of 2 atanh(x / (2 + x))."""
    s = x / (2.0 + x)
    s2 = s * s
    series = 1.0 / 15.0 + 0.0 * s
    for k in tl.static_range(13, 0, -2):
        series = 1.0 / k + s2 * series
    return 2.0 * s * series


@triton.jit
def logsigmoid(z):
    return tl.where(z < 0, z, 0.0) - log1p(tl.exp(-tl.abs(z)))


@triton.jit
def log1mexp(x):
    """`reference_free.log1mexp` and its derivative."""
    bounded = tl.where(x > -EPS, -EPS, x)
    e = expm1(bounded)
    return tl.log(-e), tl.where(x > -EPS, 0.0, (1.0 + e) / e)


@triton.jit
def bell(z):
    """The derivative of sigmoid."""
    return tl.sigmoid(z) * tl.sigmoid(-z)


# Scores of a log-ratio: (D, alpha) -> (s(D), its derivative)


@triton.jit
def reverse_kl(d, alpha):
    return d, 1.0 + 0.0 * d


@triton.jit
def forward_kl(d, alpha):
    value, slope = bounded_expm1(-d)
    return -value, slope


@triton.jit
def js_divergence(d, alpha):
    return LN2 + logsigmoid(d), tl.sigmoid(-d)


@triton.jit
def alpha_divergence(d, alpha):
    value, slope = bounded_expm1((alpha - 1.0) * d)
    return value / (alpha - 1.0), slope


# Losses of a pair: (s(D+), s(D-), beta, options) -> (loss, its derivatives by both)


@triton.jit
def logistic(c, r, beta, label_smoothing, gamma):
    z = beta * (c - r) - gamma
    d = beta * (label_smoothing * tl.sigmoid(z) - (1.0 - label_smoothing) * tl.sigmoid(-z))
    return -(1.0 - label_smoothing) * logsigmoid(z) - label_smoothing * logsigmoid(-z), d, -d


@triton.jit
def hinge(c, r, beta, p0, p1):
    z = 1.0 - beta * (c - r)
    d = tl.where(z > 0, -beta, 0.0)
    return tl.where(z < 0, 0.0, z), d, -d


@triton.jit
def ipo(c, r, beta, p0, p1):
    gap = c - r - 0.5 / beta
    return gap * gap, 2.0 * gap, -2.0 * gap


@triton.jit
def exo(c, r, beta, label_smoothing, p1):
    z = beta * (c - r)
    win = logsigmoid(z) - tl.log(1.0 - label_smoothing)
    lose = logsigmoid(-z) - tl.log(label_smoothing)
    d = beta * bell(z) * (win - lose)
    return tl.sigmoid(z) * win + tl.sigmoid(-z) * lose, d, -d


@triton.jit
def robust(c, r, beta, label_smoothing, p1):
    z, scale = beta * (c - r), 1.0 / (1.0 - 2.0 * label_smoothing)
    d = -beta * scale * (label_smoothing * tl.sigmoid(z) + (1.0 - label_smoothing) * tl.sigmoid(-z))
    return scale * (label_smoothing * logsigmoid(-z) - (1.0 - label_smoothing) * logsigmoid(z)), d, -d


@triton.jit
def discopop(c, r, beta, tau, p1):
    z = beta * (c - r)
    away = tl.sigmoid(-z / tau)
    value, slope = bounded_exp(logsigmoid(z / tau) - z)
    d = beta * (slope * (away / tau - 1.0) + bell(z / tau) / tau * logsigmoid(z) - away * tl.sigmoid(-z))
    return value - away * logsigmoid(z), d, -d


@triton.jit
def nca(c, r, beta, p0, p1):
    a, b = beta * c, beta * r
    loss = -logsigmoid(a) - 0.5 * logsigmoid(-a) - 0.5 * logsigmoid(-b)
    return loss, beta * (0.5 * tl.sigmoid(a) - tl.sigmoid(-a)), 0.5 * beta * tl.sigmoid(b)


@triton.jit
def bco(c, r, beta, p0, p1):
    a, b = beta * c, beta * r
    return -logsigmoid(a) - logsigmoid(-b), -beta * tl.sigmoid(-a), beta * tl.sigmoid(b)


@triton.jit
def sppo(c, r, beta, p0, p1):
    above, below = c - 0.5 / beta, r + 0.5 / beta
    return above * above + below * below, 2.0 * above, 2.0 * below


@triton.jit
def apo_zero(c, r, beta, p0, p1):
    a, b = beta * c, beta * r
    return tl.sigmoid(-a) + tl.sigmoid(b), -beta * bell(a), beta * bell(b)


@triton.jit
def apo_down(c, r, beta, p0, p1):
    a, z = beta * c, beta * (r - c)
    return tl.sigmoid(a) + tl.sigmoid(z), beta * (bell(a) - bell(z)), beta * bell(z)


@triton.jit
def orpo(c, r, beta, p0, p1):
    log_no_c, d_no_c = log1mexp(c)
    log_no_r, d_no_r = log1mexp(r)
    z = (c - r) - (log_no_c - log_no_r)
    d = -beta * tl.sigmoid(-z)
    return -beta * logsigmoid(z), d * (1.0 - d_no_c), -d * (1.0 - d_no_r)


class Pair(NamedTuple):
    """A kernel function, the options of its definition that it takes, and whether its arguments are per token."""

    loss: Any
    options: tuple[str, ...] = ()
    per_token: bool = False


PAIR_LOSSES: dict[Callable[..., Any], Pair] = {
    preference.dpo: Pair(logistic, ("label_smoothing",)),
    preference.hinge: Pair(hinge),
    preference.ipo: Pair(ipo, (), True),
    preference.exo: Pair(exo, ("label_smoothing",)),
    preference.robust: Pair(robust, ("label_smoothing",)),
    preference.nca: Pair(nca),
    preference.bco: Pair(bco),
    preference.sppo: Pair(sppo),
    preference.apo_zero: Pair(apo_zero),
    preference.apo_down: Pair(apo_down),
    preference.discopop: Pair(discopop, ("tau",)),
    preference.sigmoid_norm: Pair(logistic, (), True),
    reference_free.cpo: Pair(logistic, ("label_smoothing",)),
    reference_free.orpo: Pair(orpo, (), True),
    reference_free.simpo: Pair(logistic, ("label_smoothing", "gamma"), True),
    reference_free.alphapo: Pair(logistic, ("label_smoothing", "gamma"), True),
}
SCORES: dict[Callable[..., Tensor], Any] = {
    divergence.reverse_kl: reverse_kl,
    divergence.forward_kl: forward_kl,
    divergence.js_divergence: js_divergence,
    divergence.alpha_divergence: alpha_divergence,
}


@triton.jit
def sum_rows(x_ptr, n, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        total += tl.load(x_ptr + cols, mask=cols < n, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def fill_rows(x_ptr, n, value, BLOCK: tl.constexpr):
    for start in range(0, n, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        tl.store(x_ptr + cols, value + tl.zeros([BLOCK], tl.float32), mask=cols < n)


@triton.jit
def bounds(cu_ptr, s):
    """(first token, how many) of sequence s."""
    first = tl.load(cu_ptr + s).to(tl.int64)
    return first, (tl.load(cu_ptr + s + 1).to(tl.int64) - first).to(tl.int32)


@triton.jit
def share(i, weight_ptr, denominator_ptr, scale):
    """What the loss of pair or sequence i is multiplied by."""
    if denominator_ptr is not None:
        denominator = tl.load(denominator_ptr).to(tl.float32)
        scale /= tl.where(denominator < 1.0, 1.0, denominator)
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr + i).to(tl.float32)
    return scale


# Sequences begin anywhere, so how tensors are aligned makes no better code: slices of a batch need no kernels of their own.
@triton.jit(do_not_specialize_on_alignment=[*range(5), "d_logps_ptr"])
def pair_kernel(
    logps_ptr,  # (N,) float32
    cu_ptr,  # (2P+1,)
    ref_ptr,  # (2P,) sums of the reference, or None
    weight_ptr,  # (P,) or None
    denominator_ptr,  # (1,) or None
    scale,  # 1 / denominator
    beta,
    p0,
    p1,
    alpha,
    d_logps_ptr,  # (N,) float32
    sums_ptr,  # (P, 6) float32
    PAIR_LOSS: tl.constexpr,  # a function of PAIR_LOSSES
    SCORE: tl.constexpr,  # a function of SCORES
    PER_TOKEN: tl.constexpr,  # means in place of sums
    BLOCK: tl.constexpr,
):
    """Sums, loss, rewards and dL/dlogps of one pair.

    Grid (P,). A program owns sequences 2i (chosen) and 2i + 1 (rejected), their rows of d_logps and row i of `sums`. It reads
    its rows once, 4 bytes a token, and writes 4 a token. With a reference, s(D) is divided by the length; without one, the
    log-prob is, and then scored. Sums in float32, lane by lane and then by a tree: the same bits on every run.
    """
    pair = tl.program_id(0).to(tl.int64)
    first_c, n_c = bounds(cu_ptr, 2 * pair)
    first_r, n_r = bounds(cu_ptr, 2 * pair + 1)
    length_c, length_r = tl.maximum(n_c, 1).to(tl.float32), tl.maximum(n_r, 1).to(tl.float32)
    sum_c, sum_r = sum_rows(logps_ptr + first_c, n_c, BLOCK), sum_rows(logps_ptr + first_r, n_r, BLOCK)
    if ref_ptr is not None:
        ratio_c = sum_c - tl.load(ref_ptr + 2 * pair).to(tl.float32)
        ratio_r = sum_r - tl.load(ref_ptr + 2 * pair + 1).to(tl.float32)
        reward_c, reward_r = ratio_c, ratio_r
        c, slope_c = SCORE(ratio_c, alpha)
        r, slope_r = SCORE(ratio_r, alpha)
        if PER_TOKEN:
            c, r = c / length_c, r / length_r
    else:
        ratio_c, ratio_r = sum_c, sum_r
        if PER_TOKEN:
            ratio_c, ratio_r = sum_c / length_c, sum_r / length_r
        c, slope_c = SCORE(ratio_c, alpha)
        r, slope_r = SCORE(ratio_r, alpha)
        reward_c, reward_r = c, r
    loss, d_c, d_r = PAIR_LOSS(c, r, beta, p0, p1)
    scale = share(pair, weight_ptr, denominator_ptr, scale)
    d_c, d_r = scale * d_c * slope_c, scale * d_r * slope_r
    if PER_TOKEN:
        d_c, d_r = d_c / length_c, d_r / length_r
    fill_rows(d_logps_ptr + first_c, n_c, d_c, BLOCK)
    fill_rows(d_logps_ptr + first_r, n_r, d_r, BLOCK)
    sums_ptr += pair * PAIR_SUMS
    tl.store(sums_ptr, scale * loss)
    tl.store(sums_ptr + 1, loss)
    tl.store(sums_ptr + 2, beta * reward_c)
    tl.store(sums_ptr + 3, beta * reward_r)
    tl.store(sums_ptr + 4, sum_c)
    tl.store(sums_ptr + 5, sum_r)


@triton.jit(do_not_specialize_on_alignment=[*range(7), "d_logps_ptr"])
def unpaired_kernel(
    logps_ptr,  # (N,) float32
    cu_ptr,  # (S+1,)
    ref_ptr,  # (S,)
    desirable_ptr,  # (S,) bool
    kl_ptr,  # (1,) or None
    weight_ptr,  # (S,) or None
    denominator_ptr,  # (1,) or None
    scale,
    beta,
    kl,
    desirable_weight,
    undesirable_weight,
    d_logps_ptr,  # (N,) float32
    sums_ptr,  # (S, 4) float32
    BLOCK: tl.constexpr,
):
    """Sum, KTO loss, reward and dL/dlogps of one sequence. Grid (S,); a program owns sequence `program_id(0)`, as in `pair_kernel`."""
    s = tl.program_id(0).to(tl.int64)
    first, n = bounds(cu_ptr, s)
    total = sum_rows(logps_ptr + first, n, BLOCK)
    ratio = total - tl.load(ref_ptr + s).to(tl.float32)
    if kl_ptr is not None:
        kl = tl.load(kl_ptr).to(tl.float32)
    z = beta * (ratio - kl)
    sign = tl.where(tl.load(desirable_ptr + s) != 0, 1.0, -1.0)
    own = tl.where(sign > 0, desirable_weight, undesirable_weight)
    loss = own * tl.sigmoid(-sign * z)
    scale = share(s, weight_ptr, denominator_ptr, scale)
    fill_rows(d_logps_ptr + first, n, -scale * own * sign * beta * bell(z), BLOCK)
    sums_ptr += s * UNPAIRED_SUMS
    tl.store(sums_ptr, scale * loss)
    tl.store(sums_ptr + 1, loss)
    tl.store(sums_ptr + 2, beta * ratio)
    tl.store(sums_ptr + 3, total)


def launch_pairs(
    pair_loss: Callable[..., Any],
    logps: Tensor,
    cu_seqlens: Tensor,
    ref_logps: Tensor | None,
    weight: Tensor | None,
    denominator: float | Tensor,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """(sums (P, 6), dL/dlogps (N,)) by one launch; `options` are all of the definition's."""
    loss, names, per_token = PAIR_LOSSES[pair_loss]
    score, alpha = _score(pair_loss, options)
    numbers = [float(options[name]) for name in names]
    pairs = (cu_seqlens.numel() - 1) // 2
    sums = torch.empty(pairs, PAIR_SUMS.value, dtype=torch.float32, device=logps.device)
    d_logps = torch.empty_like(logps, memory_format=torch.contiguous_format)
    if pairs:
        with torch.cuda.device_of(logps):
            pair_kernel[(pairs,)](
                *_contiguous(logps, cu_seqlens, ref_logps, weight),
                *_divided(denominator),
                float(options["beta"]),
                *numbers,
                *[0.0] * (2 - len(numbers)),
                alpha,
                d_logps,
                sums,
                PAIR_LOSS=loss,
                SCORE=SCORES[score],
                PER_TOKEN=per_token,
                BLOCK=BLOCK,
                **LAUNCH,
            )
    return sums, d_logps


def launch_unpaired(
    logps: Tensor,
    cu_seqlens: Tensor,
    ref_logps: Tensor,
    desirable: Tensor,
    kl: float | Tensor,
    weight: Tensor | None,
    denominator: float | Tensor,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """(sums (S, 4), dL/dlogps (N,)) by one launch."""
    sequences = cu_seqlens.numel() - 1
    sums = torch.empty(sequences, UNPAIRED_SUMS.value, dtype=torch.float32, device=logps.device)
    d_logps = torch.empty_like(logps, memory_format=torch.contiguous_format)
    if sequences:
        with torch.cuda.device_of(logps):
            unpaired_kernel[(sequences,)](
                *_contiguous(logps, cu_seqlens, ref_logps, desirable),
                kl if isinstance(kl, Tensor) else None,
                *_contiguous(weight),
                *_divided(denominator),
                float(options["beta"]),
                0.0 if isinstance(kl, Tensor) else float(kl),
                float(options["desirable_weight"]),
                float(options["undesirable_weight"]),
                d_logps,
                sums,
                BLOCK=BLOCK,
                **LAUNCH,
            )
    return sums, d_logps


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.detach().contiguous() for x in tensors]


def _divided(denominator: float | Tensor) -> tuple[Tensor | None, float]:
    return (denominator, 1.0) if isinstance(denominator, Tensor) else (None, 1.0 / max(denominator, 1.0))


def _score(pair_loss: Callable[..., Any], options: dict[str, Any]) -> tuple[Callable[..., Tensor], float]:
    """The score of a log-ratio and its alpha; alpha 1 is the reverse KL."""
    score: Any = options.get("score", divergence.reverse_kl)
    alpha = 0.0
    if pair_loss is reference_free.alphapo:
        score, alpha = divergence.alpha_divergence, 1 - options["alpha"]
    elif isinstance(score, partial):
        score, alpha = score.func, score.keywords.get("alpha", 0.5)
    elif score is divergence.alpha_divergence:
        alpha = 0.5
    if score is divergence.alpha_divergence and abs(alpha - 1) < 1e-6:
        score = divergence.reverse_kl
    if score not in SCORES:
        raise ValueError(f"no kernel scores a log-ratio by {score}: use the functions of losses.preference")
    return score, float(alpha)
