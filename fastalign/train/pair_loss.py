"""What `fastalign eval` tells of the loss of held-out pairs: whose it is, and its mean over them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from fastalign.losses import PREFERENCE_LOSSES
from fastalign.objectives.dpo import PER_TOKEN, DPOConfig, loss_function

_OF_LOSS = (
    "beta",
    "loss_type",
    "loss_weights",
    "label_smoothing",
    "f_divergence_type",
    "f_alpha_divergence_coef",
    "discopop_tau",
    "ld_alpha",
    "use_weighting",
    "rpo_alpha",
    "reference_free",
)
_EXO_SMOOTHING = 1e-3  # its loss is infinite without


def options_of_run(content: Mapping[str, Any]) -> DPOConfig | None:
    """The loss that the config.yaml of a run describes; None of a run without a reference, whose beta scales something else.

    Of a run with a reference and a loss that is not one of pairs (KTO, GRPO) only beta counts.
    """
    if "reference" not in content:
        return None
    given = {name: content[name] for name in _OF_LOSS if content.get(name) is not None}
    names = given.get("loss_type", "sigmoid")
    names = [names] if isinstance(names, str) else list(names)
    if not set(names) <= {*PREFERENCE_LOSSES, "sft"}:
        given = {"beta": given["beta"]} if given.get("beta") else {}
    elif len(names) == 1:
        given["loss_type"] = names[0]
    return DPOConfig(**given)


def options_told(run: DPOConfig | None, beta: float | None, loss_type: str | None) -> DPOConfig:
    """The options of the loss to tell: the run's, with another `beta`; those of another `loss_type` keep their defaults."""
    options = run or DPOConfig()
    if loss_type is not None and loss_type != options.loss_type:
        smoothing = _EXO_SMOOTHING if loss_type == "exo_pair" else 0.0
        free = options.reference_free
        options = DPOConfig(beta=options.beta, loss_type=loss_type, label_smoothing=smoothing, reference_free=free)
    return options if beta is None else replace(options, beta=beta)


def changed(options: DPOConfig) -> dict[str, Any]:
    """beta and the loss, and every other option of the loss that is not at its default.

    >>> changed(DPOConfig(ld_alpha=0.5))
    {'beta': 0.1, 'loss_type': 'sigmoid', 'ld_alpha': 0.5}
    """
    default = DPOConfig()
    values = {name: getattr(options, name) for name in _OF_LOSS}
    return {name: value for name, value in values.items() if name in ("beta", "loss_type") or value != getattr(default, name)}


def mean_loss(
    options: DPOConfig,
    logps: Tensor,  # (P, 2) float32, nats: chosen, rejected; with ld_alpha LD-DPO's
    ref_logps: Tensor,  # (P, 2)
    sums: Tensor,  # (P, 2) log-probs summed over all tokens
    weight: Tensor,  # (P,) WPO's, else 1
    lengths: Tensor,  # (P, 2) scored tokens
) -> float:
    """The loss of training as `DPO` has it, were these pairs one step and did each count once, whatever its weight in the data.

    So aot and aot_unpaired compare a pair with all others, where training compares those of a step.
    """
    four = (logps[:, 0], logps[:, 1], ref_logps[:, 0], ref_logps[:, 1])
    total = 0.0
    for name, factor in options.losses:
        loss = loss_function(name, options)
        if loss is None:
            total -= factor * ((sums[:, 0] * weight).sum() / lengths[:, 0].sum()).item()
            continue
        known = {"chosen_lengths": lengths[:, 0], "rejected_lengths": lengths[:, 1]} if name in PER_TOKEN else {}
        total += factor * (loss(*four, **known).loss * weight).mean().item()
    return total
