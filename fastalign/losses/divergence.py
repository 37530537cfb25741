"""What else than the reverse KL can hold a policy to its reference: scores of a log-ratio. Wang 2023 (f-DPO), arXiv:2309.16240 table 1.

A score is f'(t) at t = pi / pi_ref, up to a constant, as a function of D = log t (any shape): elementwise, increasing, with a
gradient. Exponentials go on as their tangent above e^20, so that values and gradients stay finite at any log-ratio; TRL 1.16 goes
on exactly up to e^80 (alpha) or until it overflows (forward KL).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastalign.losses.kl import bounded_exp

Score = Callable[[Tensor], Tensor]


def reverse_kl(log_ratio: Tensor) -> Tensor:
    """D: the score of DPO itself.

    >>> reverse_kl(torch.tensor([2.0]))
    tensor([2.])
    """
    return log_ratio


def forward_kl(log_ratio: Tensor) -> Tensor:
    """1 - e^(-D).

    >>> forward_kl(torch.tensor([0.0, -1.0]))
    tensor([ 0.0000, -1.7183])
    """
    return -_bounded_expm1(-log_ratio)


def js_divergence(log_ratio: Tensor) -> Tensor:
    """log 2 + log sigmoid(D) = log(2t / (1 + t)).

    >>> js_divergence(torch.tensor([0.0]))
    tensor([0.])
    """
    return math.log(2) + logsigmoid(log_ratio)


def alpha_divergence(log_ratio: Tensor, *, alpha: float = 0.5) -> Tensor:
    """(e^((alpha-1) D) - 1) / (alpha - 1); D at alpha = 1, and 1 - e^(-D) at 0.

    >>> alpha_divergence(torch.tensor([2.0]), alpha=2.0)
    tensor([6.3891])
    """
    a = alpha - 1
    return log_ratio if abs(a) < 1e-6 else _bounded_expm1(a * log_ratio) / a


SCORES: dict[str, Callable[..., Tensor]] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "js_divergence": js_divergence,
    "alpha_divergence": alpha_divergence,
}


def _bounded_expm1(x: Tensor) -> Tensor:
    return torch.where(x < 1, x.clamp(max=1).expm1(), bounded_exp(x.clamp(min=1)) - 1)
