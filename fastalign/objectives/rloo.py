"""REINFORCE with a leave-one-out baseline: an answer is compared with the other answers to its prompt."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor

from fastalign.advantages import leave_one_out, whiten
from fastalign.data.prompts import Prompts
from fastalign.objectives.base import Dataset
from fastalign.objectives.grpo import GRPO, GRPOConfig
from fastalign.objectives.rollouts import Rollouts
from fastalign.segments import segment_sum


@dataclass
class RLOOConfig(GRPOConfig):
    """RLOO: makes the answers more likely that are rewarded above the others to the same prompt, each answer one action."""

    name: ClassVar[str] = "rloo"
    penalty_in_loss: ClassVar[bool] = False

    loss_type: Literal["rloo"] = "rloo"  # type: ignore[assignment]
    """The clipped ratio of a whole answer, averaged over answers."""
    num_generations: int = 2
    """Answers to each prompt."""
    beta: float = 0.05
    """Weight of the KL penalty in the reward; 0: there is no reference."""
    normalize_advantages: bool = False
    """Shift and scale the advantages of a generation to mean 0 and variance 1."""

    def validate(self) -> None:
        super().validate()
        self._require_use("scale_rewards", False, "grpo")

    def objective(self, model: Any, data: Dataset, folder: Path) -> RLOO:
        assert isinstance(data, Prompts)
        return RLOO(self, model, data)


class RLOO(GRPO):
    """GRPO's loop with Ahmadian 2024's advantages, arXiv:2402.14740: reward - beta sum_t (log pi - log pi_ref), less the mean of the
    other answers' to the same prompt. The penalty is part of the reward, and no term of the loss."""

    config: RLOOConfig

    def __init__(self, config: RLOOConfig, model: Any, data: Prompts) -> None:
        super().__init__(config, model, data)
        self.kl_coef = 0.0

    @staticmethod
    def needs_logps(config: GRPOConfig) -> bool:
        return config.beta > 0

    def advantages(self, rollouts: Rollouts) -> Tensor:
        rewards = self.rollout.total(rollouts.rewards)
        if self.config.beta:
            rewards = rewards - self.config.beta * segment_sum(self.penalties(rollouts), rollouts.boundaries)
        advantages = leave_one_out(rewards, self.rollout.groups(rollouts))
        return whiten(advantages) if self.config.normalize_advantages else advantages
