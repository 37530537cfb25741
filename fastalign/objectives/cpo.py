"""Contrastive preference optimisation and SimPO: preferences without a reference, from sums or means of log-probs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fastalign.data.preferences import load_preferences
from fastalign.data.samples import Samples
from fastalign.losses import alphapo, cpo, hinge, ipo, simpo
from fastalign.models.heads import head_spec
from fastalign.models.trunk import trunk
from fastalign.objectives.base import Dataset, RunConfig
from fastalign.objectives.pairs import (
    METRIC_OUTPUTS,
    PairSlab,
    Sums,
    add_aux_loss,
    add_sums,
    count_pairs,
    mean_metrics,
    pair_loss,
    pair_metrics,
)
from fastalign.types import PackedBatch, PreferenceLoss, Sample

_SMOOTHED = ("sigmoid", "simpo", "alphapo")
_OF_MEANS = ("simpo", "alphapo", "ipo")


@dataclass
class CPOConfig(RunConfig):
    """Contrastive preference optimisation: DPO without a reference, held in place by the likelihood of the chosen answers."""

    name: ClassVar[str] = "cpo"

    beta: float = 0.1
    """Scale of the rewards (ipo: its tau)."""
    loss_type: Literal["sigmoid", "hinge", "ipo", "simpo", "alphapo"] = "sigmoid"
    """sigmoid: CPO (Xu 2024); hinge: SLiC; ipo; simpo: log-probs per token and a margin (Meng 2024); alphapo: simpo with a
    shaped reward (Gupta 2025)."""
    cpo_alpha: float = 1.0
    """Weight of the negative log-likelihood per token of the chosen answers; 0: none."""
    label_smoothing: float = 0.0
    """Probability that a preference label is wrong; sigmoid, simpo and alphapo."""
    simpo_gamma: float = 0.5
    """Margin by which the chosen reward should win; simpo and alphapo."""
    alpha: float = 0.0
    """Shape of alphapo's reward (1 - p^-alpha) / alpha; towards 0 it is simpo's log p."""

    def validate(self) -> None:
        super().validate()
        self._require_choice("loss_type", ("sigmoid", "hinge", "ipo", "simpo", "alphapo"))
        self._require("beta", self.beta > 0, "positive")
        self._require("cpo_alpha", 0 <= self.cpo_alpha < float("inf"), "0 or more and finite")
        self._require("label_smoothing", 0 <= self.label_smoothing < 0.5, "in [0, 0.5)")
        if self.label_smoothing and self.loss_type not in _SMOOTHED:
            self._require("label_smoothing", False, f"0 with loss_type={self.loss_type}: {', '.join(_SMOOTHED)} have a smoothed form")
        self._require_use("simpo_gamma", self.loss_type in ("simpo", "alphapo"), "loss_type=simpo or alphapo")
        if self.loss_type == "alphapo" and not self.alpha:
            self._require("alpha", False, "other than 0 with loss_type=alphapo, which is simpo at 0; the paper has 0.25")
        if self.alpha and self.loss_type != "alphapo":
            self._require("alpha", False, f"0 with loss_type={self.loss_type}: only alphapo shapes its reward")

    def load_data(self, tokenizer: Any, vocab_size: int | None) -> Samples:
        return load_preferences(self.data, tokenizer, vocab_size=vocab_size)

    def objective(self, model: Any, data: Dataset, folder: Path) -> CPO:
        return CPO(self, model)


@dataclass
class SimPOConfig(CPOConfig):
    """Simple preference optimisation: the chosen answer is likelier per token, by a margin; no reference."""

    name: ClassVar[str] = "simpo"

    beta: float = 2.0
    """Scale of the rewards, which are log-probs per token."""
    loss_type: Literal["sigmoid", "hinge", "ipo", "simpo", "alphapo"] = "simpo"
    """simpo (Meng 2024), alphapo: simpo with a shaped reward (Gupta 2025); the others are those of cpo."""
    cpo_alpha: float = 0.0
    """Weight of the negative log-likelihood per token of the chosen answers; 0: none."""
    simpo_gamma: float = 1.0
    """Margin by which the chosen reward should win."""


class CPO:
    """loss = sum_i w_i loss_i / (pairs of the step) + cpo_alpha sum_i w_i NLL_i / (chosen tokens of the step), w_i the pair's weight.

    Log-probs are summed over the completion for sigmoid and hinge, averaged over its tokens for the others. Metrics are those of
    TRL's CPOTrainer, unweighted means over the step: rewards/*, logps/* (summed or averaged as the loss takes them), nll_loss where
    it counts; logits/* and entropy count the completions' tokens (TRL's logits/* the prompts' and the padding's too).
    """

    def __init__(self, config: CPOConfig, model: Any) -> None:
        self.model = model
        self.head = head_spec(model)
        self.config = config
        self.outputs = ("logps", *(METRIC_OUTPUTS if config.metrics == "full" else ()))

    def denominators(self, samples: Sequence[Sample]) -> dict[str, float]:
        return count_pairs(samples)

    def loss(self, batch: PackedBatch, denominators: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        policy = trunk(self.model, batch)
        alpha, tokens = self.config.cpo_alpha, max(1.0, denominators["chosen_tokens"])
        sums: Sums = {}

        def loss_of_slab(slab: PairSlab) -> Tensor:
            logps = slab.means if self.config.loss_type in _OF_MEANS else slab.sums
            weight = slab.of_pairs(batch.weight)
            pairs = self._pair_loss(logps[0::2], logps[1::2])
            loss = (pairs.loss * weight).sum() / denominators["samples"]
            rewards = torch.stack([pairs.chosen_rewards, pairs.rejected_rewards], dim=1).flatten()
            add_sums(sums, pair_metrics(rewards, logps, slab))
            if alpha:
                nll = -slab.sums[0::2]
                loss = loss + alpha * (nll * weight).sum() / tokens
                add_sums(sums, {"nll_loss": nll.detach().sum() / tokens})
            return loss

        loss = pair_loss(self.head, policy.hidden, batch, loss_of_slab, outputs=self.outputs, budget=self.config.logits_budget)
        loss = add_aux_loss(loss, policy.aux_loss, batch, denominators, sums)
        sums["loss"] = loss.detach()
        return loss, sums

    def metrics(self, sums: dict[str, float], denominators: dict[str, float]) -> dict[str, float]:
        return mean_metrics(sums, denominators)

    def _pair_loss(self, chosen: Tensor, rejected: Tensor) -> PreferenceLoss:
        config, smoothing = self.config, self.config.label_smoothing
        uniform = torch.zeros_like(chosen), torch.zeros_like(rejected)
        if config.loss_type == "hinge":
            return hinge(chosen, rejected, *uniform, beta=config.beta)
        if config.loss_type == "ipo":
            return ipo(chosen, rejected, *uniform, beta=config.beta)
        if config.loss_type == "simpo":
            return simpo(chosen, rejected, beta=config.beta, gamma=config.simpo_gamma, label_smoothing=smoothing)
        if config.loss_type == "alphapo":
            return alphapo(chosen, rejected, beta=config.beta, gamma=config.simpo_gamma, alpha=config.alpha, label_smoothing=smoothing)
        return cpo(chosen, rejected, beta=config.beta, label_smoothing=smoothing)
