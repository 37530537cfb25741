"""Online DPO: the model answers a prompt several times, the answers are ranked, and the best and the worst are a preference pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastalign.data.config import DataConfig
from fastalign.data.prompts import Prompts
from fastalign.errors import ConfigError
from fastalign.models.reference import copied
from fastalign.objectives.base import Dataset
from fastalign.objectives.dpo import DPO, DPOConfig, loss_function
from fastalign.objectives.online import OnlineConfig
from fastalign.objectives.rollouts import ALIKE, Buffered, Rollout, Rollouts
from fastalign.packing import packed_tokens
from fastalign.rollout.rewards import Reward, Rewards
from fastalign.types import PackedBatch, Sample

LOSSES = (
    "sigmoid", "ipo", "hinge", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop", "sigmoid_norm"
)  # fmt: skip


@dataclass
class OnlineDPOConfig(OnlineConfig):
    """Online DPO: makes a model prefer the better of its own answers to the worse, as reward functions or a judge rank them."""

    name: ClassVar[str] = "online_dpo"

    num_generations: int = 2
    """Answers to each prompt; the best and the worst of them are the pair."""
    temperature: float = 1.0
    """Of sampling. Log-probs are those of the model itself, at temperature 1."""
    beta: float = 0.1
    """Strength of the pull towards the reference (IPO: its tau)."""
    loss_type: str = "sigmoid"
    """One of sigmoid (DPO), ipo (of summed log-ratios), hinge, robust, exo_pair, nca_pair, bco_pair, sppo_hard, apo_zero,
    apo_down, discopop, sigmoid_norm."""
    label_smoothing: float = 0.0
    """Probability that a ranking is wrong; sigmoid (cDPO), robust, exo_pair (more than 0, usually 0.001)."""
    missing_eos_penalty: float | None = None
    """Taken off the reward of an answer that reached max_completion_length; null: nothing."""

    def validate(self) -> None:
        super().validate()
        self._require("num_generations", self.num_generations >= 2, "at least 2: answers are compared with each other")
        self._require("beta", self.beta > 0, "positive")
        self._require_choice("loss_type", LOSSES)
        penalty = self.missing_eos_penalty
        self._require("missing_eos_penalty", penalty is None or penalty > 0, "positive, or null")
        self.pairwise().validate()

    def pairwise(self) -> DPOConfig:
        """The options of the loss on a pair."""
        return DPOConfig(
            model=self.model,
            data=DataConfig(path=self.data.path),
            output=self.output,
            beta=self.beta,
            loss_type=self.loss_type,
            label_smoothing=self.label_smoothing,
            max_tokens=self.max_tokens,
            share_prompts=self.share_prompts,
            metrics=self.metrics,
            logits_budget=self.logits_budget,
        )

    def longest(self, sample: Sample) -> list[Sample]:
        return [Sample(sample.index, sample.prompt, ((0,) * self.max_completion_length,) * 2)]

    def load_data(self, tokenizer: Any, vocab_size: int | None) -> Prompts:
        data = super().load_data(tokenizer, vocab_size)
        longest = max((*data.samples, *data.eval_samples), key=lambda sample: len(sample.prompt))
        (pair,) = self.longest(longest)
        if (needed := packed_tokens(pair, share=self.share_prompts)) > self.token_limit:
            raise ConfigError(
                f"max_tokens {self.max_tokens} is less than a pair of the longest answers ({self.max_completion_length}) to the longest "
                f"prompt (row {longest.index}, {len(longest.prompt)} tokens); set --max_tokens {needed} or more"
            )
        return data

    def objective(self, model: Any, data: Dataset, folder: Path) -> OnlineDPO:
        assert isinstance(data, Prompts)
        return OnlineDPO(self, model, data)


class RankedRollout(Rollout):
    """Rollouts where an answer without an end may be rewarded less."""

    def __init__(self, config: OnlineDPOConfig, model: Any, data: Prompts) -> None:
        super().__init__(config, model, data, needs_logps=False)
        self.opinions = len(self.rewards)
        if (penalty := config.missing_eos_penalty) is not None:
            end = data.tokenizer.eos_token_id

            def missing_eos(completion_ids: Sequence[Sequence[int]], **_: Any) -> Rewards:
                return [0.0 if ids and ids[-1] == end else -penalty for ids in completion_ids]

            self.rewards = [*self.rewards, Reward("missing_eos_penalty", missing_eos)]

    def total(self, rewards: Tensor) -> Tensor:
        """The penalty alone is no opinion of an answer."""
        return torch.where(rewards[:, : self.opinions].isnan().all(1), torch.nan, super().total(rewards))


class OnlineDPO(Buffered):
    """DPO on the best and the worst of the model's own answers to a prompt. Guo 2024, arXiv:2402.04792, algorithm 1.

    loss = sum_i w_i loss_i / (pairs of the step), w_i the prompt's weight in the data. Answers without a reward, and with
    mask_truncated_completions those that did not end, are in no pair; a prompt with fewer than two others, or whose answers were all
    rewarded alike, gives no pair and does not count, where TRL 1.16 takes the first answer of a tie as the better one. Of answers
    with the same reward the first is taken.

    Metrics are TRL's: rewards/*, logps/* and objective/* over the pairs, reward and val/contain_eos_token over all answers of the
    generation; frac_ties and frac_unranked are the shares of its prompts whose answers were rewarded alike, and that had fewer
    than two answers to rank. objective/kl, objective/entropy and what is made of them are of answers' tokens, where TRL 1.16 counts
    the padding behind them, too. A step without any pair changes nothing by its gradient, which is 0.
    """

    config: OnlineDPOConfig

    def __init__(self, config: OnlineDPOConfig, model: Any, data: Prompts) -> None:
        self.config = config
        self.rollout = RankedRollout(config, model, data)
        reference, self.rollout.reference = self.rollout.reference, None  # only pairs are scored by it
        self.dpo = DPO(config.pairwise(), model, reference)
        if config.loss_type == "ipo":  # of sums, as it is published; by its own name DPO would give it the lengths
            self.dpo.losses = [("summed ipo", 1.0, loss_function("ipo", self.dpo.config))]
        self.groups: range = range(0)  # of this step, the places of its prompts among those of the generation

    def samples(self, step: int, prompts: Sequence[Sample]) -> Sequence[Sample]:
        config = self.config
        if (generation := self._begin(step)) is not None:
            self.rollouts = self.rollout.roll(prompts, (config.seed, 1 + generation), refill=config.refill)
            self.rollouts.advantages = self._choose(self.rollouts)  # 1 of a chosen, -1 of a rejected answer, else 0
        assert self.rollouts is not None
        self.groups = config.groups_of(step, len(prompts))
        pairs, answers = self._pairs(self.rollouts, self.groups), self.rollout.samples(self.rollouts)
        if not pairs:  # a step needs a sample
            first = self.groups.start * config.num_generations
            return [_pair(answers[first], answers[first + 1], self.rollouts, weight=0.0)]
        return [_pair(answers[c], answers[r], self.rollouts) for c, r in pairs]

    @property
    def copies(self) -> list[nn.Module]:
        return copied(self.dpo.reference)

    def denominators(self, samples: Sequence[Sample]) -> dict[str, float]:
        return self.dpo.denominators(samples)

    def loss(self, batch: PackedBatch, denominators: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        return self.dpo.loss(batch, denominators)

    def metrics(self, sums: dict[str, float], denominators: dict[str, float]) -> dict[str, float]:
        assert self.rollouts is not None
        metrics = self._of_rollouts(self.rollouts)
        if not (pairs := self._pairs(self.rollouts, self.groups)):
            return {"loss": sums["loss"], **metrics}
        of_pairs = self.dpo.metrics(sums, denominators)
        kl = (of_pairs["rewards/chosen"] + of_pairs["rewards/rejected"]) / (2 * self.config.beta)
        total = self.rollout.total(self.rollouts.rewards)
        scores = torch.stack([total[[c for c, _ in pairs]], total[[r for _, r in pairs]]])
        objective = {
            "scores": float(scores.mean()),
            "scores_margin": float((scores[0] - scores[1]).mean()),
            "kl": kl,
            "non_score_reward": -self.config.beta * kl,
            "rlhf_reward": float(scores.mean()) - self.config.beta * kl,
            "entropy": -(of_pairs["logps/chosen"] + of_pairs["logps/rejected"]) / 2,
        }
        return {**of_pairs, **metrics, **{f"objective/{name}": value for name, value in objective.items()}}

    def evaluate(self, prompts: Sequence[Sample]) -> dict[str, float]:
        return self._of_rollouts(self.rollout.roll(prompts, (self.config.seed, 0)))

    def shown(self, step: int) -> list[dict[str, Any]]:
        """The pairs of the step's first two prompts, or two answers where there is none, when samples are due."""
        if not self._is_shown(step):
            return []
        assert self.rollouts is not None
        size = self.config.num_generations
        pairs = {chosen // size: (chosen, rejected) for chosen, rejected in self._pairs(self.rollouts, self.groups)}
        found = [pairs.get(g, (g * size, g * size + 1)) for g in self.groups[:2]]
        return self.rollout.shown(self.rollouts, [answer for pair in found for answer in pair])

    def _scores(self, rollouts: Rollouts) -> Tensor:
        """(G, size) rewards of the answers to each prompt; NaN of those that may be in no pair."""
        total = self.rollout.total(rollouts.rewards)
        if self.config.mask_truncated_completions:
            total = torch.where(rollouts.finished, total, torch.nan)
        return total.view(-1, self.config.num_generations)

    def _choose(self, rollouts: Rollouts) -> Tensor:
        """(B,) 1 for the best answer to a prompt, -1 for the worst, 0 for others and where there is no pair."""
        scores = self._scores(rollouts)
        best, best_at = scores.nan_to_num(nan=-torch.inf).max(1)
        worst, worst_at = scores.nan_to_num(nan=torch.inf).min(1)
        paired = (best - worst >= ALIKE).float()[:, None]
        signs = torch.zeros_like(scores).scatter_(1, best_at[:, None], paired)
        return torch.where(paired > 0, signs.scatter_(1, worst_at[:, None], -paired), 0.0).view(-1)

    def _pairs(self, rollouts: Rollouts, groups: range) -> list[tuple[int, int]]:
        """Places of the chosen and the rejected answer to those prompts that have them."""
        size = self.config.num_generations
        parts = rollouts.advantages.view(-1, size)
        return [(g * size + int(parts[g].argmax()), g * size + int(parts[g].argmin())) for g in groups if bool(parts[g].any())]

    def _of_rollouts(self, rollouts: Rollouts) -> dict[str, float]:
        scores = self._scores(rollouts)
        paired = self._choose(rollouts).view_as(scores).any(1)
        ranked = (~scores.isnan()).sum(1) >= 2
        return self.rollout.metrics(rollouts) | {
            "val/contain_eos_token": float(rollouts.finished.float().mean()),
            "frac_ties": float((ranked & ~paired).float().mean()),
            "frac_unranked": float((~ranked).float().mean()),
        }


def _pair(chosen: Sample, rejected: Sample, rollouts: Rollouts, weight: float | None = None) -> Sample:
    completions = (*chosen.completions, *rejected.completions)
    return Sample(int(rollouts.prompts[chosen.index]), chosen.prompt, completions, chosen.weight if weight is None else weight)
