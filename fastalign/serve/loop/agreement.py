"""Whether a model moved the way people judge: a share of comparisons, and how many independent ones it is worth.

Both functions take (S or P,) samples and what the log-probs of their completions, summed over the tokens, gained from one model to
the next, in nats. Comparisons of one conversation count together, as they say much the same, and rows count by their weights.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastalign.types import Sample


class Agreement(NamedTuple):
    """A share and what it rests on."""

    share: float  # in [0, 1]; 0.5 says nothing, 0.5 also for no rows
    comparisons: float  # so many independent ones have a share as uncertain as this, or a more uncertain one


def of_pairs(samples: Sequence[Sample], moved: Sequence[Tensor]) -> Agreement:
    """Share of the pairs on which the chosen completion gained more than the rejected one: where a choice between the two would now
    fall on the chosen one more often than before. Ties count half.

    samples    with the completions (chosen, rejected)
    moved      (2,) of each

    It is the accuracy of the implicit reward of DPO with the model before as its reference (Rafailov 2023, arXiv:2305.18290 eq. 5).
    """
    if not samples:
        return Agreement(0.5, 0.0)
    gains = torch.stack(list(moved)).double()
    agreed = _win(gains[:, 0] - gains[:, 1])
    weight = torch.tensor([sample.weight for sample in samples], dtype=torch.float64)
    return Agreement(((agreed * weight).sum() / weight.sum()).item(), effective(samples))


def of_labels(samples: Sequence[Sample], moved: Sequence[Tensor]) -> Agreement:
    """The probability that a good answer gained more per token than a bad one, ties half: the area under the ROC curve.

    samples    with one completion and its label each
    moved      (1,) of each

    Answers to different conversations are compared here, by a measure that no common shift changes: neither a model that finds every
    text likelier than before, per token, nor one that learnt that most labels are good, gets more than a half. The variance of this
    share is at most that of min(good, bad) independent comparisons, each of another good with another bad answer (Hoeffding 1963,
    section 5), so these are what it counts for. Of one class alone there are no comparisons.
    """
    good, bad = ([i for i, sample in enumerate(samples) if (sample.labels[0] > 0.5) == way] for way in (True, False))
    if not (good and bad):
        return Agreement(0.5, 0.0)
    lengths = torch.tensor([max(1, sample.num_targets) for sample in samples], dtype=torch.float64)
    gains = torch.stack(list(moved)).double()[:, 0] / lengths
    weight = torch.tensor([sample.weight for sample in samples], dtype=torch.float64)
    both = _win(gains[good][:, None] - gains[bad][None]) * weight[good][:, None] * weight[bad][None]
    share = both.sum() / (weight[good].sum() * weight[bad].sum())
    return Agreement(share.item(), min(effective([samples[i] for i in side]) for side in (good, bad)))


def effective(samples: Iterable[Sample]) -> float:
    """(sum of w)^2 / sum of w^2 over conversations, w the weight of a conversation's samples: Kish's effective sample size.

    >>> effective([Sample(0, (1,), ((2,),)), Sample(1, (1,), ((3,),)), Sample(2, (5,), ((2,),), weight=2.0)])
    2.0
    """
    weights: dict[tuple[int, ...], float] = defaultdict(float)
    for sample in samples:
        weights[sample.prompt] += sample.weight
    return sum(weights.values()) ** 2 / sum(weight * weight for weight in weights.values()) if weights else 0.0


def _win(differences: Tensor) -> Tensor:
    return (differences.sign() + 1) / 2
