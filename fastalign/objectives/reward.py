"""Reward models: a score per sequence, learnt from pairs (Bradley-Terry) or from rankings (Plackett-Luce)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, combinations
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fastalign.data.config import RankedDataConfig
from fastalign.data.ranked import load_ranked
from fastalign.data.samples import Samples
from fastalign.errors import ConfigError
from fastalign.losses.reward import bradley_terry, plackett_luce
from fastalign.models.value_head import check_scores, load_reward_model, scores
from fastalign.objectives.base import Dataset, RunConfig
from fastalign.types import PackedBatch, Sample, on_device


@dataclass
class RewardConfig(RunConfig):
    """Reward model: a score head on a causal LM that rates the better answer higher."""

    name: ClassVar[str] = "reward"
    divides_head: ClassVar[bool] = False

    data: RankedDataConfig = field(default_factory=RankedDataConfig)
    learning_rate: float = 1e-4
    """Peak of the schedule."""
    loss_type: Literal["bradley_terry", "plackett_luce"] = "bradley_terry"
    """bradley_terry: preference pairs, with a margin where the data has one; plackett_luce: rankings of two and more completions."""
    center_coef: float = 0.0
    """Pulls the scores of a pair towards a sum of 0 (Eisenstein 2023, eq. 2; 0.01 is usual); bradley_terry only."""

    def validate(self) -> None:
        super().validate()
        self._require_choice("loss_type", ("bradley_terry", "plackett_luce"))
        self._require("center_coef", 0 <= self.center_coef < float("inf"), "0 or more and finite")
        if self.center_coef and self.loss_type != "bradley_terry":
            self._require("center_coef", False, f"0 with loss_type={self.loss_type}: only bradley_terry centres its scores")

    def load_model(self, tokenizer: Any) -> Any:
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        return load_reward_model(self.model, pad_token_id=pad, lora=self.lora)

    def check_model(self, model: Any, batch: PackedBatch) -> None:
        check_scores(model, batch)

    def load_data(self, tokenizer: Any, vocab_size: int | None) -> Samples:
        data = load_ranked(self.data, tokenizer, vocab_size=vocab_size)
        longest = max((*data.samples, *data.eval_samples), key=lambda sample: len(sample.completions))
        if self.loss_type == "bradley_terry" and len(longest.completions) > 2:
            raise ConfigError(
                f"loss_type bradley_terry takes pairs, but row {longest.index} ranks {len(longest.completions)} completions; "
                "set --loss_type plackett_luce, or convert the rankings to pairs"
            )
        return data

    def objective(self, model: Any, data: Dataset, folder: Path) -> Reward:
        return Reward(self, model)


class Reward:
    """loss = sum_i w_i loss_i / (samples of the step), a sample being a pair or a ranking and w_i its weight (1 where it has none).

    A sequence longer than data.max_length drops its sample, as in TRL: what ends early has no score of its own. Metrics are
    those of TRL's RewardTrainer: min_reward, mean_reward and max_reward over all sequences of the step, accuracy and margin
    over its pairs, in a ranking over every two completions of different rank.
    """

    def __init__(self, config: RewardConfig, model: Any) -> None:
        self.model = model
        self.listwise = config.loss_type == "plackett_luce"
        self.center_coef = config.center_coef

    def denominators(self, samples: Sequence[Sample]) -> dict[str, float]:
        counts = [len(sample.completions) for sample in samples]
        return {
            "samples": float(len(samples)),
            "sequences": float(sum(counts)),
            "pairs": float(sum(count * (count - 1) // 2 for count in counts)),
        }

    def loss(self, batch: PackedBatch, denominators: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        rewards = scores(self.model, batch)  # (S,), best first in every sample
        if self.listwise:
            assert batch.labels is not None, "rankings carry labels"
            groups = on_device(torch.tensor((0, *accumulate(batch.completions)), dtype=torch.int32), rewards.device)
            losses = plackett_luce(rewards, batch.labels, groups)
        else:
            losses = bradley_terry(rewards[0::2], rewards[1::2], margin=batch.margin, center_coef=self.center_coef)
        loss = (losses * batch.weight).sum() / denominators["samples"]
        return loss, {"loss": loss.detach(), **_metric_sums(rewards.detach(), batch.completions)}

    def metrics(self, sums: dict[str, float], denominators: dict[str, float]) -> dict[str, float]:
        count = {"mean_reward": denominators["sequences"], "accuracy": denominators["pairs"], "margin": denominators["pairs"]}
        return {name: total / count.get(name, 1.0) for name, total in sums.items()}


def _metric_sums(rewards: Tensor, counts: Sequence[int]) -> dict[str, Tensor]:
    margins = pair_margins(rewards, counts)
    return {
        "min_reward": rewards.min(),
        "mean_reward": rewards.sum(),
        "max_reward": rewards.max(),
        "accuracy": (margins > 0).float().sum(),
        "margin": margins.sum(),
    }


def pair_margins(rewards: Tensor, counts: Sequence[int]) -> Tensor:
    """Better minus worse reward of every two completions of the same sample, whose `counts` completions come best first.

    >>> import torch
    >>> pair_margins(torch.tensor([5.0, 3.0, 4.0, 1.0, 2.0]), (3, 2))
    tensor([ 2.,  1., -1., -1.])
    """
    starts = accumulate(counts, initial=0)
    pairs = [pair for start, count in zip(starts, counts) for pair in combinations(range(start, start + count), 2)]
    better, worse = torch.tensor(pairs, dtype=torch.int64, device=rewards.device).view(-1, 2).T
    return rewards[better] - rewards[worse]
