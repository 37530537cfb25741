"""What an evaluation measures: accuracies with their intervals, calibration, perplexity. Functions of per-sequence numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

BINS = 10  # of confidence, from a half to one


def preference_figures(
    logps: Tensor,  # (P, 2) float32, nats: chosen, rejected
    lengths: Tensor,  # (P, 2) scored tokens
    rewards: Tensor | None = None,  # (P, 2), implicit ones; None: there is no reference
) -> dict[str, Any]:
    """Means over the pairs, under TRL's names, and the accuracies with Wilson's 95 % interval.

    `logps/accuracy` says how often the chosen answer is the more probable one, `logps/accuracy_per_token` the same of the mean
    per token; of rewards the calibration is told, too. Ties count against the model, as in training.
    """
    pairs = len(logps)
    per_token = logps / lengths
    accuracies = {"logps/accuracy": logps, "logps/accuracy_per_token": per_token}
    means = {"logps/chosen": logps[:, 0], "logps/rejected": logps[:, 1]}
    means |= {"logps/chosen_per_token": per_token[:, 0], "logps/rejected_per_token": per_token[:, 1]}
    calibrated: dict[str, Any] = {}
    if rewards is not None:
        chosen, rejected = rewards.unbind(1)
        accuracies = {"rewards/accuracies": rewards, **accuracies}
        means = {"rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/margins": chosen - rejected, **means}
        calibrated = calibration(chosen - rejected)
    result: dict[str, Any] = {"pairs": pairs, "num_tokens": int(lengths.sum())}
    for name, scores in accuracies.items():
        right = int((scores[:, 0] > scores[:, 1]).sum())
        result |= {name: right / pairs, f"{name}_ci95": list(wilson(right, pairs))}
    result["ties"] = int((next(iter(accuracies.values())).diff(dim=1) == 0).sum())
    return result | {name: values.mean().item() for name, values in means.items()} | calibrated


def reward_figures(rewards: Sequence[Tensor]) -> dict[str, Any]:
    """Of the scores of each sample's completions, best first: how often and by how much the better of two scores higher.

    A ranking counts once for every two of its completions. `loss` is the negative log-likelihood of these preferences, without
    a margin. Ties count against the model.
    """
    every, margins = torch.cat(list(rewards)), margins_of(rewards)
    right = int((margins > 0).sum())
    return {
        "samples": len(rewards),
        "pairs": len(margins),
        "accuracy": right / len(margins),
        "accuracy_ci95": list(wilson(right, len(margins))),
        "ties": int((margins == 0).sum()),
        "loss": softplus(-margins).mean().item(),
        "margin": margins.mean().item(),
        "margin_median": margins.median().item(),
        "min_reward": every.min().item(),
        "mean_reward": every.mean().item(),
        "max_reward": every.max().item(),
        **calibration(margins),
    }


def margins_of(rewards: Sequence[Tensor]) -> Tensor:
    """Better minus worse score of every two completions of each sample.

    >>> margins_of([torch.tensor([3.0, 1.0, 2.0])])
    tensor([ 2.,  1., -1.])
    """
    return torch.stack([a - b for scores in rewards for a, b in combinations(scores.unbind(), 2)])


def calibration(margins: Tensor) -> dict[str, Any]:
    """Whether sigmoid(|margin|) is the probability of being right, for (M,) margins of the better over the worse answer.

    `calibration` is the reliability table: by confidence, how many pairs there are and how many of them are right.
    `calibration/ece` is the expected calibration error, the mean distance of the two weighted by pairs (Guo 2017,
    arXiv:1706.04599 eq. 3), `calibration/brier` the mean squared error of sigmoid(margin) against 1.
    """
    confidence, right = margins.abs().sigmoid(), margins > 0
    bins = ((confidence - 0.5) * 2 * BINS).long().clamp(0, BINS - 1)
    table, error = [], 0.0
    for k in range(BINS):
        inside = bins == k
        count, hits = int(inside.sum()), int((inside & right).sum())
        if not count:
            continue
        mean = confidence[inside].mean().item()
        error += abs(hits / count - mean) * count / len(margins)
        row = {"from": 0.5 + k / (2 * BINS), "to": 0.5 + (k + 1) / (2 * BINS), "pairs": count, "confidence": mean}
        table.append(row | {"accuracy": hits / count, "accuracy_ci95": list(wilson(hits, count))})
    return {"calibration/ece": error, "calibration/brier": (1 - margins.sigmoid()).square().mean().item(), "calibration": table}


def text_figures(nll: Tensor, tokens: Tensor) -> dict[str, Any]:
    """Mean negative log-likelihood per token and perplexity of texts with (S,) summed `nll` and (S,) `tokens`, with 95 % intervals.

    The intervals take texts, not tokens, for independent (a ratio of means, by the delta method); of one text there are none.
    """
    count = tokens.sum().clamp(min=1)
    mean = nll.sum() / count
    result: dict[str, Any] = {"nll": mean.item(), "perplexity": _exp(mean.item())}
    if len(nll) > 1:
        spread = 1.959964 * (len(nll) / (len(nll) - 1) * (nll - mean * tokens).square().sum()).sqrt().item() / count.item()
        low, high = mean.item() - spread, mean.item() + spread
        result |= {"nll_ci95": [low, high], "perplexity_ci95": [_exp(low), _exp(high)]}
    return result


def wilson(right: float, trials: float, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a share, 95 % by default: honest also near 0 and 1 and for few trials.

    >>> [round(bound, 3) for bound in wilson(9, 10)]
    [0.596, 0.982]
    """
    if not trials:
        return 0.0, 1.0
    share, square = right / trials, z * z / trials
    centre = (share + square / 2) / (1 + square)
    spread = z / (1 + square) * math.sqrt(share * (1 - share) / trials + square / (4 * trials))
    return max(0.0, min(share, centre - spread)), min(1.0, max(share, centre + spread))  # holds the share in spite of rounding


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf
