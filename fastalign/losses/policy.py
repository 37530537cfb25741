"""Policy-gradient losses per token, unreduced: pure functions of the log-probs of sampled tokens.

`logps` (policy, with gradient), `old_logps` (the policy that is being improved, no gradient) and `advantages` (no gradient) are
(N,), packed, in nats. The importance ratio is exp(`log_ratio`): None takes that of each token, logps - old_logps; with
`sequence_log_ratio` every token has the ratio of its sequence, which is TRL's importance_sampling_level="sequence". Ratios
beyond e^20 go on linearly (`kl.bounded_exp`). What a loss per token becomes a scalar by is in `aggregate`; `POLICY_LOSSES` pairs
the two under the names of TRL, and `policy_loss` adds masks, weights and the KL penalty in TRL's order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastalign.losses.aggregate import Count, fixed_length, sequence_mean, sequence_sum, token_mean
from fastalign.losses.kl import bounded_exp, kl_k1, kl_k2, kl_k3
from fastalign.segments import segment_expand, segment_mean, segment_sum

KL_ESTIMATES: dict[str, Callable[..., Tensor]] = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}
LOWEST_LOG_WEIGHT = math.log(1e-8)  # of VESPO


def sequence_log_ratio(
    logps: Tensor, old_logps: Tensor, cu_seqlens: Tensor, mask: Tensor | None = None, *, normalise: bool = True
) -> Tensor:
    """log pi(y) / pi_old(y) of each token's sequence, (N,), over its length (GSPO, Zheng 2025, arXiv:2507.18071 eq. 7) or not (RLOO).

    >>> sequence_log_ratio(torch.tensor([1.0, 3.0]), torch.zeros(2), torch.tensor([0, 2]))
    tensor([2., 2.])
    """
    reduce = segment_mean if normalise else segment_sum
    return segment_expand(reduce(logps - old_logps.detach(), cu_seqlens, mask), cu_seqlens, logps.shape[0])


def ppo_clip(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    delta: float | None = None,
    log_ratio: Tensor | None = None,
) -> Tensor:
    """Clipped surrogate. Schulman 2017, arXiv:1707.06347 eq. 7; two bounds: DAPO, arXiv:2503.14476; delta: arXiv:2505.07291.

    loss_t = -min(min(r, delta) A, clamp(r, 1 - clip_low, 1 + clip_high) A)_t

    `delta` bounds the branch that is not clipped, which for A < 0 has no other bound. A clipped token has zero gradient.

    >>> ppo_clip(torch.tensor([0.5, -0.5]), torch.zeros(2), torch.ones(2))
    tensor([-1.2000, -0.6065])
    """
    ratio, advantages = _ratio(logps, old_logps, log_ratio), advantages.detach()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    if delta is not None:
        ratio = ratio.clamp(max=delta)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def gspo(logps: Tensor, old_logps: Tensor, advantages: Tensor, cu_seqlens: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    """`ppo_clip` with the geometric mean of a sequence's ratios. Zheng 2025, arXiv:2507.18071 eq. 5 (which clips at 3e-4 and 4e-4).

    Every token of a sequence with one advantage has the same loss, and its gradient reaches all of them.
    """
    return ppo_clip(logps, old_logps, advantages, log_ratio=sequence_log_ratio(logps, old_logps, cu_seqlens, mask), **options)


def cispo(logps: Tensor, old_logps: Tensor, advantages: Tensor, *, clip_high: float = 5.0, log_ratio: Tensor | None = None) -> Tensor:
    """REINFORCE with a bounded importance weight; no token loses its gradient. MiniMax-M1 2025, arXiv:2506.13585 eq. 4.

    loss_t = -sg(min(r, clip_high)) A logps; `clip_high` bounds the ratio itself (ScaleRL, arXiv:2510.13786: 5).

    >>> cispo(torch.tensor([-1.0]), torch.tensor([-4.0]), torch.ones(1))
    tensor([5.])
    """
    weight = _ratio(logps, old_logps, log_ratio).detach().clamp(max=clip_high)
    return -weight * advantages.detach() * logps


def sapo(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    *,
    temperature_pos: float = 1.0,
    temperature_neg: float = 1.05,
    log_ratio: Tensor | None = None,
) -> Tensor:
    """A sigmoid gate in place of the clip. Gao 2025 (SAPO), arXiv:2511.20347.

    loss_t = -(4 / tau) sigmoid(tau (r - 1)) A, tau = temperature_pos where A > 0, else temperature_neg

    >>> sapo(torch.zeros(1), torch.zeros(1), torch.ones(1))
    tensor([-2.])
    """
    ratio, advantages = _ratio(logps, old_logps, log_ratio), advantages.detach()
    tau = torch.where(advantages > 0, temperature_pos, temperature_neg).to(ratio.dtype)
    return -4 / tau * torch.sigmoid(tau * (ratio - 1)) * advantages


def vespo(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
    mask: Tensor | None = None,
    *,
    k_pos: float = 2.0,
    lambda_pos: float = 3.0,
    k_neg: float = 3.0,
    lambda_neg: float = 2.0,
    importance_weights: Tensor | None = None,  # (N,) pi_old / pi_sampler of each token, a part of w
) -> Tensor:
    """REINFORCE with a smooth weight of the whole sequence's ratio. VESPO 2026, arXiv:2602.10693.

    loss_t = -sg(phi(w)) A logps, phi(w) = w^k exp(lambda (1 - w)), w = prod_t r_t in [1e-8, e^20]; (k, lambda) by the sign of A

    The log-ratio of a token is clamped to +-20.

    >>> vespo(torch.tensor([-1.0]), torch.tensor([-1.0]), torch.ones(1), torch.tensor([0, 1]))
    tensor([1.])
    """
    with torch.no_grad():
        log_w = (logps - old_logps).clamp(-20.0, 20.0)
        if importance_weights is not None:
            log_w = log_w + importance_weights.log().clamp(LOWEST_LOG_WEIGHT, 20.0)
        log_w = segment_sum(log_w, cu_seqlens, mask).clamp(LOWEST_LOG_WEIGHT, 20.0)
        log_w = segment_expand(log_w, cu_seqlens, logps.shape[0])
        k = torch.where(advantages >= 0, k_pos, k_neg)
        scale = torch.where(advantages >= 0, max(lambda_pos, 1e-4), max(lambda_neg, 1e-4))
        phi = (k * log_w + scale * (1 - log_w.exp())).exp().to(logps.dtype)
    return -phi * advantages.detach() * logps


def reinforce(logps: Tensor, old_logps: Tensor, advantages: Tensor, *, log_ratio: Tensor | None = None) -> Tensor:
    """-A logps: the score-function estimate, for samples of the policy itself. Williams 1992. Importance ratios have no part in it.

    >>> reinforce(torch.tensor([-1.5]), torch.zeros(1), torch.tensor([2.0]))
    tensor([3.])
    """
    return -advantages.detach() * logps


class PolicyLoss(NamedTuple):
    """A named algorithm: its loss per token, how that becomes a scalar, and whose importance ratio a token has by default."""

    token_loss: Callable[..., Tensor]
    aggregate: Callable[..., Tensor]
    level: str = "token"  # token; sequence: geometric mean; product: of the whole sequence


POLICY_LOSSES: dict[str, PolicyLoss] = {
    "grpo": PolicyLoss(ppo_clip, sequence_mean),
    "bnpo": PolicyLoss(ppo_clip, token_mean),  # with step-wide counts it is dapo; TRL counts a micro-batch
    "dr_grpo": PolicyLoss(ppo_clip, fixed_length),
    "dapo": PolicyLoss(ppo_clip, token_mean),
    "cispo": PolicyLoss(cispo, token_mean),
    "sapo": PolicyLoss(sapo, sequence_mean),
    "vespo": PolicyLoss(vespo, token_mean),
    "luspo": PolicyLoss(ppo_clip, sequence_sum, "sequence"),
    "gspo": PolicyLoss(ppo_clip, sequence_mean, "sequence"),
    "rloo": PolicyLoss(ppo_clip, sequence_mean, "product"),
    "reinforce": PolicyLoss(reinforce, token_mean),
}


class PolicyOutput(NamedTuple):
    """The loss, and detached sums over the counted tokens of each sequence, (S,), from which the metrics follow."""

    loss: Tensor  # scalar
    tokens: Tensor  # how many count
    clipped_low: Tensor  # r < 1 - clip_low and A < 0
    clipped_high: Tensor  # r > 1 + clip_high (cispo: r > clip_high) and A > 0
    kl: Tensor  # the penalty before its coefficient; 0 without a reference


def policy_loss(
    name: str | PolicyLoss,  # of POLICY_LOSSES, or one that is not there
    logps: Tensor,  # (N,) float32
    old_logps: Tensor,  # (N,)
    advantages: Tensor,  # (N,), or (S, 1): one per sequence
    cu_seqlens: Tensor,  # (S+1,) int32
    *,
    mask: Tensor | None = None,  # (N,) bool, tokens that count; the others may hold NaN
    denominator: Count | None = None,  # of the whole step, see `aggregate`
    level: str | None = None,  # token | sequence | product; None: that of `name`
    keep: Tensor | None = None,  # (N,) bool, tokens whose policy term counts (off-policy and entropy masks)
    importance_weights: Tensor | None = None,  # (N,) of the policy term: pi_old / pi_sampler, truncated
    ref_logps: Tensor | None = None,  # (N,)
    kl_coef: float = 0.0,
    kl: str = "k3",
    kl_correction: bool = True,  # times the importance ratio
    entropy: Tensor | None = None,  # (N,)
    entropy_coef: Count = 0.0,  # of a token: coefficient / tokens of the step
    entropy_mask: Tensor | None = None,  # (N,) bool, tokens with an entropy bonus
    length: int | None = None,  # of dr_grpo: the longest completion allowed
    **options: Any,  # of the token loss
) -> PolicyOutput:
    """The loss of a micro-batch: aggregate(weights * token_loss + kl_coef * KL) - entropy_coef * sum of entropies.

    The order is TRL 1.16's: policy term, times `keep`, times `importance_weights` (vespo takes them into its own weight), plus
    the penalty. Gradients go to `logps` and `entropy`. Raises ValueError for unknown names and tensors that do not fit together.
    """
    spec, level = resolve(name, level, length, kl)
    check_tokens(logps, cu_seqlens, old_logps=old_logps, mask=mask, keep=keep, importance_weights=importance_weights,
                 ref_logps=ref_logps, entropy=entropy, entropy_mask=entropy_mask)  # fmt: skip
    check_advantages(advantages, cu_seqlens, logps)
    per_token = advantages.detach()
    if advantages.dim() == 2:
        per_token = segment_expand(per_token[:, 0], cu_seqlens, logps.shape[0])
    if mask is not None:  # a masked NaN has no gradient either
        logps, old_logps, per_token = (x.masked_fill(~mask, 0.0) for x in (logps, old_logps, per_token))
        importance_weights = None if importance_weights is None else importance_weights.masked_fill(~mask, 1.0)
    log_ratio = logps - old_logps.detach()
    if level != "token":
        log_ratio = sequence_log_ratio(logps, old_logps, cu_seqlens, mask, normalise=level == "sequence")
    if spec.token_loss is vespo:
        values = vespo(logps, old_logps, per_token, cu_seqlens, mask, importance_weights=importance_weights, **options)
    else:
        values = spec.token_loss(logps, old_logps, per_token, log_ratio=log_ratio, **options)
        if importance_weights is not None:
            values = values * importance_weights.detach()
    if keep is not None:
        values = values.masked_fill(~keep, 0.0)
    penalty = None
    if ref_logps is not None:
        ref_logps = ref_logps if mask is None else ref_logps.masked_fill(~mask, 0.0)
        penalty = KL_ESTIMATES[kl](logps, ref_logps, ratio=bounded_exp(log_ratio) if kl_correction else None)
        values = values + kl_coef * penalty
    fixed = {} if length is None else {"length": length}
    loss = spec.aggregate(values, cu_seqlens, mask, denominator=denominator, **fixed)
    if entropy is not None:
        for tokens in (mask, entropy_mask):
            entropy = entropy if tokens is None else entropy.masked_fill(~tokens, 0.0)
        loss = loss - entropy_coef * entropy.sum()
    return PolicyOutput(loss, *_statistics(spec, log_ratio, per_token, penalty, cu_seqlens, mask, options))


def resolve(name: str | PolicyLoss, level: str | None, length: int | None, kl: str) -> tuple[PolicyLoss, str]:
    """The entry of `POLICY_LOSSES`, or the one given, and the level of its importance ratio; ValueError for what does not exist."""
    if not isinstance(name, PolicyLoss) and name not in POLICY_LOSSES:
        raise ValueError(f"no policy loss is called {name!r}; there are {', '.join(POLICY_LOSSES)}")
    spec = name if isinstance(name, PolicyLoss) else POLICY_LOSSES[name]
    level = spec.level if level is None else level
    if level not in ("token", "sequence", "product"):
        raise ValueError(f"level must be token, sequence or product, got {level!r}")
    if kl not in KL_ESTIMATES:
        raise ValueError(f"no KL estimate is called {kl!r}; there are {', '.join(KL_ESTIMATES)}")
    if (spec.aggregate is fixed_length) != (length is not None):
        raise ValueError(f"length, the longest completion allowed, belongs to dr_grpo and to no other loss: got {length} for {name}")
    return spec, level


def options_of(token_loss: Callable[..., Tensor], given: dict[str, Any]) -> dict[str, Any]:
    """The options of a token loss, defaults filled in from its signature; TypeError names one that it does not have.

    >>> options_of(cispo, {})["clip_high"]
    5.0
    """
    bound = signature(token_loss).bind_partial(**given)
    bound.apply_defaults()
    return dict(bound.arguments)


def clip_bounds(token_loss: Callable[..., Tensor], given: dict[str, Any]) -> tuple[float, float]:
    """Outside of which ratios a token counts as clipped: none, for a loss that does not clip."""
    options = options_of(token_loss, given)
    if "clip_low" in options:  # ppo_clip, and others of its kind
        return 1 - options["clip_low"], 1 + options.get("clip_high", math.inf)
    return -math.inf, options.get("clip_high", math.inf)


def check_tokens(logps: Tensor, cu_seqlens: Tensor, **per_token: Tensor | None) -> None:
    """Raise ValueError unless all given tensors are (N,) as `logps` is; masks are told by their names and must be bool."""
    if logps.dim() != 1 or cu_seqlens.dim() != 1:
        raise ValueError(
            f"logps must be (N,) and cu_seqlens (S+1,), got {tuple(logps.shape)} and {tuple(cu_seqlens.shape)}: no padding here"
        )
    for name, x in per_token.items():
        if x is not None and x.shape != logps.shape:
            raise ValueError(f"{name} must be {tuple(logps.shape)}, one per token, got {tuple(x.shape)}")
        if x is not None and name in ("mask", "keep", "entropy_mask") and x.dtype != torch.bool:
            raise ValueError(f"{name} must be bool (True counts), got {x.dtype}")


def check_advantages(advantages: Tensor, cu_seqlens: Tensor, logps: Tensor) -> None:
    """Raise ValueError unless there is one per token, (N,), or one per sequence, (S, 1)."""
    per_sequence = (cu_seqlens.numel() - 1, 1)
    if advantages.shape not in (logps.shape, per_sequence):
        shapes = f"{tuple(logps.shape)}, one per token, or {per_sequence}, one per sequence"
        raise ValueError(f"advantages must be {shapes}: got {tuple(advantages.shape)}")


def _ratio(logps: Tensor, old_logps: Tensor, log_ratio: Tensor | None) -> Tensor:
    return bounded_exp(logps - old_logps.detach() if log_ratio is None else log_ratio)


@torch.no_grad()
def _statistics(
    spec: PolicyLoss, log_ratio: Tensor, advantages: Tensor, penalty: Tensor | None, cu_seqlens: Tensor, mask: Tensor | None, options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ratio, none = bounded_exp(log_ratio), torch.zeros_like(log_ratio)
    low, high = clip_bounds(spec.token_loss, options)
    clipped = (ratio < low) & (advantages < 0), (ratio > high) & (advantages > 0)
    sums = (torch.ones_like(none), *(x.to(none) for x in clipped), none if penalty is None else penalty)
    tokens, clipped_low, clipped_high, kl = (segment_sum(x, cu_seqlens, mask) for x in sums)
    return tokens, clipped_low, clipped_high, kl
