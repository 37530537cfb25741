"""Advantages from rewards: how much better an answer, or a token, was than expected. No gradients here.

Groups are answers to one prompt, laid end to end with boundaries `cu_groups` (G+1,) int32. A reward of NaN could not be scored:
it takes no part in any mean, and its advantage is 0.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastalign.segments import segment_expand, segment_sum


@torch.no_grad()
def gae(
    rewards: Tensor,  # (N,) per token, packed
    values: Tensor,  # (N,) the critic's, of the state before the token
    cu_seqlens: Tensor,  # (S+1,) int32
    mask: Tensor | None = None,  # (N,) bool, the policy's own tokens
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns, each (N,). Generalised advantage estimation, Schulman 2015, arXiv:1506.02438 eq. 16.

    A_t = d_t + gamma lam A_{t+1},  d_t = r_t + gamma v_{t+1} - v_t,  returns = A + v; after the last token v and A are 0.

    Masked tokens (a tool's output, a user's turn) are stepped over: the next state of a token is before the next one of the
    policy. They get 0, and may hold NaN. Log2(N) vectorised passes, no loop over time, no device sync.

    >>> gae(torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.5]), torch.tensor([0, 2]), lam=1.0)[0]
    tensor([0.5000, 0.5000])
    """
    if rewards.shape != values.shape or rewards.dim() != 1:
        raise ValueError(f"rewards and values must both be (N,), got {tuple(rewards.shape)} and {tuple(values.shape)}")
    counts = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    rewards, values = rewards.masked_fill(~counts, 0.0), values.masked_fill(~counts, 0.0)
    last = segment_expand(cu_seqlens[1:], cu_seqlens, rewards.shape[0]) - 1 == torch.arange(rewards.shape[0], device=rewards.device)
    skip = torch.where(counts, 0.0, 1.0).to(rewards)
    following = _backward_recurrence(skip, values, last)  # value of the first counted token from here on
    following = torch.cat([following[1:], following[:1]]).masked_fill(last, 0.0)
    errors = (rewards + gamma * following - values).masked_fill(~counts, 0.0)
    advantages = _backward_recurrence(torch.where(counts, gamma * lam, 1.0).to(rewards), errors, last).masked_fill(~counts, 0.0)
    return advantages, advantages + values


def _backward_recurrence(decay: Tensor, x: Tensor, last: Tensor) -> Tensor:
    """y_t = x_t + decay_t y_{t+1} within each sequence, whose last tokens are `last`: a scan of affine maps by doubling."""
    decay = decay.masked_fill(last, 0.0)
    step, n = 1, x.shape[0]
    while step < n:
        shifted = torch.zeros_like(x), torch.zeros_like(x)
        shifted[0][:-step], shifted[1][:-step] = x[step:], decay[step:]
        x, decay = x + decay * shifted[0], decay * shifted[1]
        step *= 2
    return x


@torch.no_grad()
def group_relative(
    rewards: Tensor,  # (B,)
    cu_groups: Tensor,  # (G+1,) int32
    *,
    scale: Literal["group", "batch", "none"] = "group",
    eps: float = 1e-4,
) -> Tensor:
    """(B,) reward less the mean of its group, over a standard deviation + eps. GRPO, Shao 2024, arXiv:2402.03300.

    `scale` is whose deviation (unbiased): the group's, the batch's (arXiv:2508.08221), or none (Dr. GRPO, arXiv:2503.20783). A
    group of equal rewards, or with one scored answer, has advantage 0; rewards are in any unit.

    >>> group_relative(torch.tensor([0.0, 1.0, 3.0, 3.0]), torch.tensor([0, 2, 4]), scale="none")
    tensor([-0.5000,  0.5000,  0.0000,  0.0000])
    """
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"scale must be group, batch or none, got {scale!r}")
    centred, scored, count = _centred(rewards, cu_groups)
    if scale == "group":
        variance = segment_sum(centred**2, cu_groups) / (count - 1).clamp(min=1)
        return centred / (segment_expand(variance.sqrt(), cu_groups, rewards.shape[0]) + eps)
    if scale == "batch":
        return centred / (_deviation(rewards, scored) + eps)
    return centred


@torch.no_grad()
def normalise_then_sum(
    rewards: Tensor,  # (B, F), a column for each reward function
    weights: Tensor,  # (F,)
    cu_groups: Tensor,  # (G+1,) int32
    *,
    eps: float = 1e-4,
) -> Tensor:
    """(B,) each reward function scaled within its group, then weighted, summed, and scaled over the batch. GDPO, arXiv:2601.05242.

    Keeps a function whose scale is small from drowning. A row whose every reward is NaN gets 0.

    >>> normalise_then_sum(torch.tensor([[0.0], [1.0]]), torch.ones(1), torch.tensor([0, 2])).round(decimals=2)
    tensor([-0.7100,  0.7100])
    """
    columns = torch.stack([group_relative(column, cu_groups, eps=eps) for column in rewards.unbind(1)], 1)
    scored = ~rewards.isnan().all(1)
    total = (columns * weights).sum(1)
    mean = total.masked_fill(~scored, 0.0).sum() / scored.sum().clamp(min=1)
    return ((total - mean) / (_deviation(total, scored) + eps)).masked_fill(~scored, 0.0)


@torch.no_grad()
def leave_one_out(
    rewards: Tensor,  # (B,), less the KL penalty where there is one
    cu_groups: Tensor,  # (G+1,) int32
) -> Tensor:
    """(B,) reward less the mean of the other scored answers of its group. RLOO, Ahmadian 2024, arXiv:2402.14740.

    The only scored answer of a group has nothing to be compared with: 0.

    >>> leave_one_out(torch.tensor([0.0, 1.0, 5.0]), torch.tensor([0, 3]))
    tensor([-3.0000, -1.5000,  4.5000])
    """
    centred, _, count = _centred(rewards, cu_groups)
    return centred * segment_expand(count / (count - 1).clamp(min=1), cu_groups, rewards.shape[0])


@torch.no_grad()
def whiten(values: Tensor, mask: Tensor | None = None, *, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """Values of variance 1 (unbiased) and, with `shift_mean`, mean 0 over the counted ones; the others become 0 and may hold NaN.

    Give it all tokens of the step: the statistics of a part are not those of the whole. TRL 1.12 PPOTrainer's `masked_whiten`,
    which raises for fewer than two counted values where this leaves a deviation of 0.

    >>> whiten(torch.tensor([1.0, 2.0, 3.0]))
    tensor([-1.,  0.,  1.])
    """
    counts = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    mean = values.masked_fill(~counts, 0.0).sum() / counts.sum().clamp(min=1)
    whitened = (values - mean) * torch.rsqrt(_deviation(values, counts) ** 2 + eps)
    return (whitened if shift_mean else whitened + mean).masked_fill(~counts, 0.0)


def _centred(rewards: Tensor, cu_groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(rewards less the mean of their group, which are scored, how many of each group are), 0 where not scored.

    Measured from the group's largest, so that equal rewards are exactly 0: their rows then need no gradient.
    """
    if rewards.dim() != 1:
        raise ValueError(f"rewards must be (B,), one per answer, got {tuple(rewards.shape)}")
    scored = ~rewards.isnan()
    count = segment_sum(scored.to(rewards), cu_groups)
    largest = torch.segment_reduce(rewards.masked_fill(~scored, -torch.inf), "max", lengths=cu_groups.diff(), unsafe=True)
    below = (rewards - segment_expand(largest, cu_groups, rewards.shape[0])).masked_fill(~scored, 0.0)
    mean = segment_expand(segment_sum(below, cu_groups) / count.clamp(min=1), cu_groups, rewards.shape[0])
    return (below - mean).masked_fill(~scored, 0.0), scored, count


def _deviation(values: Tensor, counts: Tensor) -> Tensor:
    """Unbiased standard deviation of the counted values, a scalar; 0 for fewer than two."""
    n = counts.sum()
    mean = values.masked_fill(~counts, 0.0).sum() / n.clamp(min=1)
    return ((values - mean).masked_fill(~counts, 0.0).square().sum() / (n - 1).clamp(min=1)).sqrt()
