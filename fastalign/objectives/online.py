"""The options that the online objectives share, and the reward functions that they name.

A generation takes `batch_size` prompts for each of its `steps_per_generation` optimizer steps and draws `num_generations` answers
to each; its steps are repeated `num_iterations` times.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fastalign.data.config import PromptDataConfig
from fastalign.data.prompts import Prompts, load_prompts
from fastalign.errors import ConfigError
from fastalign.objectives.answers import AnswerConfig
from fastalign.rollout.engine import Sampling
from fastalign.rollout.judging import JudgeConfig, JudgeReward, build_judge
from fastalign.rollout.reward_model import RewardModel
from fastalign.rollout.rewards import Reward, built_in, load_rewards
from fastalign.types import Sample


@dataclass
class OnlineConfig(AnswerConfig):
    """Options of every algorithm that trains on the model's own answers."""

    data: PromptDataConfig = field(default_factory=PromptDataConfig)
    batch_size: int = 8
    """Prompts per optimizer step."""
    rewards: list[str] = field(default_factory=list)
    """Reward functions: built in (exact_match, numeric_match, tagged_format, repetition[:N], soft_overlong:LENGTH:MARGIN),
    FILE.py:FUNCTION, folders of reward models, or judge, which judge.* names."""
    reward_weights: list[float] | None = None
    """Weight of each in the sum; null: 1."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    reward_timeout: float | None = None
    """Seconds that one call of a reward function may take; null: any."""
    num_generations: int = 8
    """Answers to each prompt."""
    temperature: float = 1.0
    """Of sampling; log-probs are those of the tempered distribution."""
    top_k: int = 0
    """Only the so many most probable tokens are drawn; 0: all."""
    top_p: float = 1.0
    """Only the fewest most probable tokens that together have this probability are drawn."""
    min_p: float = 0.0
    """Only tokens with at least this share of the probability of the most probable one are drawn."""
    steps_per_generation: int = 1
    """Optimizer steps whose prompts are answered together."""
    num_iterations: int = 1
    """Times that each of these steps is made."""
    mask_truncated_completions: bool = False
    """Answers that reached max_completion_length do not count in the loss."""
    refill: int = 0
    """How often prompts whose answers were all rewarded alike are answered anew, with other random numbers (dynamic sampling)."""
    beta: float = 0.0
    """Weight of the KL penalty to the reference; 0: there is no reference."""
    reference: Literal["auto", "adapter", "copy", "stream"] = "auto"
    """adapter: the model with its adapter off; copy: a second model; stream: a second model in host memory, whose layers come to
    the device one by one. auto: adapter when training LoRA, else copy."""

    def validate(self) -> None:
        super().validate()
        for option in ("num_generations", "steps_per_generation", "num_iterations"):
            self._require(option, getattr(self, option) >= 1, "at least 1")
        self._require("refill", self.refill >= 0, "0 or more")
        self._require("temperature", 0 < self.temperature < math.inf, "positive and finite")
        self._require_drawable("temperature")
        self._require("top_k", self.top_k >= 0, "0 or more")
        self._require("top_p", 0 < self.top_p <= 1, "in (0, 1]")
        self._require("min_p", 0 <= self.min_p <= 1, "in [0, 1]")
        self._require("beta", 0 <= self.beta < math.inf, "0 or more and finite")
        self._require(
            "rewards", bool(self.reward_names), "at least one reward function, such as numeric_match or my_rewards.py:good, or a judge"
        )
        self._require_judge()
        self._require("reward_timeout", self.reward_timeout is None or self.reward_timeout > 0, "positive, or null")
        self._require_choice("reference", ("auto", "adapter", "copy", "stream"))
        if self.reference == "adapter" and not self.adapts:
            self._require("reference", False, "copy or auto when all weights are trained (lora.r 0)")

    @property
    def copies_model(self) -> bool:
        return bool(self.beta) and (super().copies_model or (self.reference == "auto" and not self.adapts))

    def named_code(self) -> dict[str, str | list[str]]:
        found = super().named_code()
        if any(":" in name and built_in(name) is None and not Path(name).is_dir() for name in self.rewards):
            found["rewards"] = self.rewards
        return found | ({"judge.function": self.judge.function} if self.judge.function else {})

    def _require_judge(self) -> None:
        if "judge" not in self.reward_names:
            self._require("rewards", not self.judge.is_named, "left out, or contain judge, which judge.* names")
            if self.judge != JudgeConfig():
                raise ConfigError("judge: options of a judge, but none is named; set --judge.function, --judge.url or --judge.model")
            return
        self.judge.validate()
        if self.judge.url and self.judge.mode == "compare":
            self._require("num_generations", self.num_generations >= 2, "at least 2 for a judge that compares; or set --judge.mode rate")

    @property
    def reward_names(self) -> list[str]:
        """`rewards`; a judge that is named is one of them, and the only one where there is none."""
        return self.rewards or (["judge"] if self.judge.is_named else [])

    @property
    def unpredicted(self) -> str | None:
        if any(Path(name).is_dir() for name in self.rewards) or (self.judge.model and not self.judge.url):
            return "the model that rewards lies on the device, too"
        return super().unpredicted

    def longest(self, sample: Sample) -> list[Sample]:
        return [Sample(sample.index, sample.prompt, ((0,) * self.max_completion_length,))] * self.num_generations

    @property
    def truncated_sampling(self) -> bool:
        """Whether answers are not drawn from the distribution that training computes."""
        return self.sampling(0).truncated

    def sampling(self, eos_token_id: int) -> Sampling:
        """How answers are drawn."""
        options = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p}
        return Sampling(self.max_completion_length, eos_token_id, **options)  # type: ignore[arg-type]

    @property
    def steps_per_draw(self) -> int:
        return self.steps_per_generation * self.num_iterations

    @property
    def draw_size(self) -> int:
        return self.batch_size * self.steps_per_generation

    def groups_of(self, step: int, asked: int) -> range:
        """Which of the `asked` prompts of its generation optimizer step `step`, counted from 0, trains on: one at least."""
        part, parts = step % self.steps_per_generation, self.steps_per_generation
        first = part * asked // parts
        return range(first, max((part + 1) * asked // parts, first + 1))

    def load_data(self, tokenizer: Any, vocab_size: int | None) -> Prompts:
        reward_functions(self, models=False)  # mistakes in names show before anything is loaded or written
        self.check_engine()
        data = load_prompts(self.data, tokenizer, vocab_size=vocab_size)
        longest = max((*data.samples, *data.eval_samples), key=lambda sample: len(sample.prompt))
        self._require_room(longest.index, len(longest.prompt))
        return data


def reward_functions(config: OnlineConfig, *, models: bool = True) -> list[Reward]:
    """What `config.rewards` names: functions, a judge, and reward models where a name is that of a folder.

    Without `models` those are left out that need a model or an endpoint.
    """
    names = config.reward_names
    weights = [1.0] * len(names) if config.reward_weights is None else config.reward_weights
    if len(weights) != len(names):
        raise ConfigError(f"reward_weights: {len(weights)} weights for {len(names)} reward functions; give one for each")
    found = []
    for name, weight in zip(names, weights):
        if name == "judge":
            if models or config.judge.function:
                judge = JudgeReward(build_judge(config.judge), config.num_generations, config.judge.workers)
                found.append(Reward("judge", judge, weight))
        elif Path(name).is_dir():
            if not models:
                continue
            model = RewardModel(name, max_tokens=config.token_limit)
            found.append(Reward(model.name, model, weight))
        else:
            found += load_rewards([name], [weight])
    if len({reward.name for reward in found}) < len(found):
        raise ConfigError(f"rewards: two of them have the same name, which their metrics could not tell apart: {', '.join(names)}")
    return found
