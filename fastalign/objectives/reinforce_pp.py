"""REINFORCE++: every token is credited with what its answer earned from there on, compared with all tokens of the generation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fastalign.advantages import gae, group_relative, whiten
from fastalign.data.prompts import Prompts
from fastalign.losses.policy import KL_ESTIMATES
from fastalign.objectives.base import Dataset
from fastalign.objectives.grpo import GRPO, GRPOConfig
from fastalign.objectives.rollouts import Rollouts


@dataclass
class ReinforcePPConfig(GRPOConfig):
    """REINFORCE++: makes the tokens more likely that were followed by more reward than those of the other answers; no critic."""

    name: ClassVar[str] = "reinforce_pp"

    baseline: bool = False
    """REINFORCE++-baseline: an answer's reward less the mean of the answers to its prompt, and the penalty in the loss."""
    beta: float = 0.01
    """Weight of the KL penalty, in the reward of every token or (baseline) in the loss; 0: there is no reference."""
    kl_estimator: Literal["auto", "k1", "k2", "k3"] = "auto"  # type: ignore[assignment]
    """Estimate of the KL divergence from the reference; auto: k1 in the reward, k2 in the loss."""
    use_bias_correction_kl: bool = False
    """Multiply it by the importance ratio; in the loss only."""

    def validate(self) -> None:
        super().validate()
        self._require_use("scale_rewards", False, "grpo")
        self._require_use("refill", self.baseline, "baseline: else answers that were all rewarded alike are learned from, too")

    def _require_penalty(self) -> None:
        self._require_use("kl_estimator", self.beta > 0, "a KL penalty (beta above 0)")
        self._require_use(
            "use_bias_correction_kl", self.beta > 0 and self.baseline, "a KL penalty in the loss (baseline with beta above 0)"
        )

    @property
    def compares(self) -> bool:
        return self.baseline

    def objective(self, model: Any, data: Dataset, folder: Path) -> ReinforcePP:
        assert isinstance(data, Prompts)
        return ReinforcePP(self, model, data)


class ReinforcePP(GRPO):
    """GRPO's loop with the advantages of Hu 2025, arXiv:2501.03262, whitened over the generation's tokens: of answers that count and
    that a reward function judged; an answer that none judged has advantage 0.

    A_t = score - beta sum_{s >= t} KL_s, the KL of the tokens from the reference; the penalty is no term of the loss.
    baseline: A_t = score - mean score of the answers to the prompt, the same for all tokens of an answer; beta KL is in the loss.

    From a prompt's only judged answer verl takes nothing away; here its A_t is 0 before whitening.
    """

    config: ReinforcePPConfig

    def __init__(self, config: ReinforcePPConfig, model: Any, data: Prompts) -> None:
        super().__init__(config, model, data)
        if not config.baseline:
            self.kl_coef = 0.0
        if config.kl_estimator == "auto":
            self.kl = "k2" if config.baseline else "k1"

    @staticmethod
    def needs_logps(config: GRPOConfig) -> bool:
        assert isinstance(config, ReinforcePPConfig)
        return config.beta > 0 and not config.baseline

    def penalties(self, rollouts: Rollouts) -> Tensor:
        return KL_ESTIMATES[self.kl](rollouts.logps, rollouts.ref_logps)

    def advantages(self, rollouts: Rollouts) -> Tensor:
        """(T,)"""
        scores = self.rollout.total(rollouts.rewards)
        mask = self.counted(rollouts) & ~scores.isnan().repeat_interleave(rollouts.lengths)
        if self.config.baseline:
            above = group_relative(scores, self.rollout.groups(rollouts), scale="none")
            return whiten(above.repeat_interleave(rollouts.lengths), mask)
        rewards = torch.zeros(len(rollouts.tokens))
        if self.config.beta:
            rewards -= self.config.beta * self.penalties(rollouts)
        rewards[rollouts.lengths.cumsum(0) - 1] += scores.nan_to_num(0.0)
        returns, _ = gae(rewards, torch.zeros_like(rewards), rollouts.boundaries, gamma=1.0, lam=1.0)  # of no values: sums of what follows
        return whiten(returns, mask)
