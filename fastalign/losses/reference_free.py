"""Preference losses without a reference: pure functions of the log-probs of a chosen and a rejected completion.

`chosen_logps` and `rejected_logps` are (P,) in nats with gradient: summed over the completion for `cpo`, averaged over its tokens
for the others. All return an unreduced `PreferenceLoss` with detached rewards, and raise ValueError when shapes differ or beta is
not positive. The likelihood term that ORPO and CPO add is `supervised.nll` of the chosen tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastalign.losses.divergence import alpha_divergence
from fastalign.losses.preference import smoothed_logistic
from fastalign.types import PreferenceLoss


def orpo(
    chosen_logps: Tensor,  # (P,) float32, nats per token
    rejected_logps: Tensor,  # (P,)
    *,
    beta: float = 0.1,
) -> PreferenceLoss:
    """Odds ratio preference optimisation, without its likelihood term. Hong 2024, arXiv:2403.07691 eq. 6 and 7.

    loss_i = -beta log sigmoid(log_odds_ratio_i); rewards beta times the log-probs

    >>> a = torch.tensor([0.8, 0.5]).log()
    >>> round(float(orpo(a[:1], a[1:], beta=1.0).loss), 6)  # odds 4 against 1: -log(4/5)
    0.223144
    """
    _check(chosen_logps, rejected_logps, beta)
    loss = -beta * logsigmoid(log_odds_ratio(chosen_logps, rejected_logps))
    return PreferenceLoss(loss, beta * chosen_logps.detach(), beta * rejected_logps.detach())


def log_odds_ratio(chosen_logps: Tensor, rejected_logps: Tensor) -> Tensor:
    """log of odds(chosen) / odds(rejected), odds = p / (1 - p), of log-probs <= 0 of one shape; the same shape.

    >>> round(float(log_odds_ratio(torch.tensor(0.8).log(), torch.tensor(0.5).log()).exp()), 5)
    4.0
    """
    return (chosen_logps - rejected_logps) - (log1mexp(chosen_logps) - log1mexp(rejected_logps))


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x <= 0, accurate at both ends (Maechler 2012). x counts as -eps of its dtype at least, with zero gradient there.

    A probability that rounds to 1 so has odds of 1 / eps, and a gradient of at most 1 / eps; TRL 1.16 gives NaN.

    >>> log1mexp(torch.tensor([-0.6931472]))
    tensor([-0.6931])
    """
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    near = x > -math.log(2)  # each branch is kept off the other's side, where its gradient would be infinite
    return torch.where(
        near,
        (-torch.where(near, x, -1.0).expm1()).log(),
        (-torch.where(near, -1.0, x).exp()).log1p(),
    )


def cpo(
    chosen_logps: Tensor,  # (P,) float32, nats, summed over the completion
    rejected_logps: Tensor,  # (P,)
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> PreferenceLoss:
    """Contrastive preference optimisation, without its likelihood term: DPO with a uniform reference. Xu 2024, arXiv:2401.08417 eq. 3.

    loss_i = -(1-e) log sigmoid(z_i) - e log sigmoid(-z_i),  z_i = beta (c - r)_i; rewards beta times the log-probs

    Raises ValueError when label_smoothing is not in [0, 0.5).

    >>> round(float(cpo(torch.zeros(1), torch.zeros(1)).loss), 6)
    0.693147
    """
    _check(chosen_logps, rejected_logps, beta)
    loss = smoothed_logistic(beta * (chosen_logps - rejected_logps), label_smoothing)
    return PreferenceLoss(loss, beta * chosen_logps.detach(), beta * rejected_logps.detach())


def simpo(
    chosen_logps: Tensor,  # (P,) float32, nats per token
    rejected_logps: Tensor,  # (P,)
    *,
    beta: float = 2.0,
    gamma: float = 1.0,
    label_smoothing: float = 0.0,
) -> PreferenceLoss:
    """Simple preference optimisation: a margin on the mean log-probs. Meng 2024, arXiv:2405.14734 eq. 6.

    loss_i = -(1-e) log sigmoid(z_i) - e log sigmoid(-z_i),  z_i = beta (c - r)_i - gamma; rewards beta times the log-probs

    The defaults are the paper's (beta 2 to 2.5, gamma half of it); those of TRL's CPOTrainer, 0.1 and 0.5, are for sums.
    Raises ValueError when label_smoothing is not in [0, 0.5).

    >>> round(float(simpo(torch.zeros(1), torch.zeros(1), gamma=0.0).loss), 6)
    0.693147
    """
    _check(chosen_logps, rejected_logps, beta)
    loss = smoothed_logistic(beta * (chosen_logps - rejected_logps) - gamma, label_smoothing)
    return PreferenceLoss(loss, beta * chosen_logps.detach(), beta * rejected_logps.detach())


def alphapo(
    chosen_logps: Tensor,  # (P,) float32, nats per token
    rejected_logps: Tensor,  # (P,)
    *,
    beta: float = 2.0,
    gamma: float = 1.0,
    alpha: float = 0.25,
    label_smoothing: float = 0.0,
) -> PreferenceLoss:
    """SimPO with the reward shaped by alpha. Gupta 2025, arXiv:2501.03884 eq. 4.

    `simpo` with (1 - p^(-alpha)) / alpha in place of log p, p = e^c the length-normalised probability; alpha = 0 is SimPO.
    Rewards are beta times that. p^(-alpha) goes on as its tangent above e^20, where TRL 1.16 overflows.

    >>> round(float(alphapo(torch.zeros(1), torch.zeros(1), gamma=0.0).loss), 6)
    0.693147
    """
    return simpo(
        alpha_divergence(chosen_logps, alpha=1 - alpha),
        alpha_divergence(rejected_logps, alpha=1 - alpha),
        beta=beta,
        gamma=gamma,
        label_smoothing=label_smoothing,
    )


REFERENCE_FREE_LOSSES: dict[str, Callable[..., PreferenceLoss]] = {"orpo": orpo, "cpo": cpo, "simpo": simpo, "alphapo": alphapo}


def _check(chosen: Tensor, rejected: Tensor, beta: float) -> None:
    if chosen.shape != rejected.shape:
        raise ValueError(f"chosen_logps and rejected_logps must have one shape (P,), got {tuple(chosen.shape)} and {tuple(rejected.shape)}")
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}")
