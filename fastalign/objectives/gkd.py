"""On-policy distillation: a model learns a teacher's distributions on answers of its own, where its own mistakes lead it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from fastalign.data.config import PromptDataConfig, SupervisedDataConfig
from fastalign.data.prompts import Prompts, load_prompts
from fastalign.data.samples import Samples
from fastalign.data.supervised import load_supervised
from fastalign.errors import ConfigError
from fastalign.models.load import load_model
from fastalign.models.trunk import evaluation
from fastalign.objectives.answers import AnswerConfig, is_due
from fastalign.objectives.base import Dataset
from fastalign.objectives.distill import Distill, DistillConfig
from fastalign.packing import batches
from fastalign.rollout.engine import Engine, Sampling, TransformersEngine
from fastalign.rollout.generate import Completion
from fastalign.types import Sample

_OF_ANSWERS = ("max_completion_length", "sampling_temperature", "completions_every", "generation_tokens")


@dataclass
class GKDConfig(AnswerConfig, DistillConfig):
    """On-policy distillation (GKD): a model learns a frozen teacher's distributions, in part or always on answers of its own."""

    name: ClassVar[str] = "gkd"
    divides_head: ClassVar[bool] = False

    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "jsd"
    """From the teacher q: forward_kl KL(q || p) covers all that it does, reverse_kl KL(p || q) keeps to what it does most, jsd is
    in between."""
    lmbda: float = 0.5
    """Share of the steps on the model's own answers; the others take the completions of the data. 1: the data is prompts alone."""
    seq_kd: bool = False
    """Those others take the teacher's answers; the data is prompts alone."""
    sampling_temperature: float = 1.0
    """Of the answers; that of the divergence is `temperature`."""
    data: SupervisedDataConfig = field(default_factory=SupervisedDataConfig)

    @property
    def prompts_only(self) -> bool:
        """Whether no completion of the data is ever trained on."""
        return self.lmbda == 1 or self.seq_kd

    @property
    def generates_itself(self) -> bool:
        """A teacher always does."""
        return super().generates_itself or self.seq_kd

    def validate(self) -> None:
        super().validate()
        self._require("lmbda", 0 <= self.lmbda <= 1, "in [0, 1]")
        self._require_use("seq_kd", self.lmbda < 1, "lmbda below 1")
        self._require("nll_weight", not self.nll_weight, "0: the model's own answers are no texts to imitate (`fastalign distill` has it)")
        for option in _OF_ANSWERS:
            self._require_use(option, self.lmbda > 0 or self.seq_kd, "answers: lmbda above 0, or seq_kd")
        self._require_drawable("sampling_temperature")
        self._require("sampling_temperature", 0 < self.sampling_temperature < float("inf"), "positive and finite")
        self._require_use("engine", self.lmbda > 0, "answers of the model's own: lmbda above 0")
        if self.prompts_only:
            for option in ("completion_only", "assistant_only"):
                if getattr(self.data, option):
                    raise ConfigError(
                        f"data.{option} is of completions, and with lmbda 1 or seq_kd the data is prompts alone; leave it out"
                    )

    def load_data(self, tokenizer: Any, vocab_size: int | None) -> Prompts:
        if self.prompts_only:
            data = load_prompts(_prompts_of(self.data), tokenizer, vocab_size=vocab_size)
        else:
            loaded = load_supervised(self.data, tokenizer, vocab_size=vocab_size)
            data = Prompts(**{f.name: getattr(loaded, f.name) for f in fields(Samples)}, tokenizer=tokenizer)
        if self.lmbda:
            self.check_engine()
        if self.lmbda or self.seq_kd:
            self._check_prompts([*data.samples, *data.eval_samples])
        return data

    def objective(self, model: Any, data: Dataset, folder: Path) -> GKD:
        assert isinstance(data, Prompts)
        return GKD(self, model, load_model(self.teacher.on(self.model.device)), data.tokenizer)

    def _check_prompts(self, samples: Sequence[Sample]) -> None:
        """Raise ConfigError where an answer cannot be begun, or may not fit."""
        if bare := next((sample for sample in samples if not _asked(sample)), None):
            raise ConfigError(
                f"data: row {bare.index} has no prompt to answer; give rows with prompt and completion, or conversations with "
                "--data.assistant_only, or train on texts with --lmbda 0"
            )
        longest = max(samples, key=lambda sample: len(_asked(sample)))
        self._require_room(longest.index, len(_asked(longest)))


class GKD(Distill):
    """Distillation on texts that the model itself writes. Agarwal 2024, arXiv:2306.13649 algorithm 1.

    A step takes the model's own answers to its prompts with probability lmbda, drawn from (seed, step), else the completions of
    the data, or with seq_kd answers of the teacher. Its loss is `Distill`'s over whichever it takes: no gradient goes through the
    sampling, and the scored tokens of the step are what it is divided by. TRL 1.16 divides by the tokens of the data's completions
    also where it trains on answers, and its temperature is one of sampling alone: here it is `sampling_temperature`, and
    `temperature` is that of the divergence.

    Beside Distill's metrics on_policy says whether the answers are the model's own, and completions/* are of answers. Held-out
    metrics are of the data's completions, where there are any, and under on_policy/ of the model's own answers, if it learns from
    such or there is nothing else to measure.
    """

    config: GKDConfig

    def __init__(self, config: GKDConfig, model: Any, teacher: Any, tokenizer: Any) -> None:
        super().__init__(config, model, teacher)
        self.config, self.tokenizer = config, tokenizer
        self.engine: Engine = config.make_engine(model)
        self.teachers: Engine = TransformersEngine(teacher, max_tokens=config.generation_tokens)
        self.sampling = Sampling(config.max_completion_length, tokenizer.eos_token_id, temperature=config.sampling_temperature)
        self.asked: Sequence[Sample] = ()
        self.answers: list[Completion] = []  # of this step, in the order of `asked`; none of a step on the data
        self.on_policy = False

    def samples(self, step: int, prompts: Sequence[Sample]) -> Sequence[Sample]:
        config = self.config
        self.on_policy = random.Random(f"{config.seed}/on policy/{step}").random() < config.lmbda
        self.asked, self.answers = prompts, []
        if not self.on_policy and not config.seq_kd:
            return prompts
        self.answers = self._answers(self.engine if self.on_policy else self.teachers, prompts, 1 + step)
        return _answered(prompts, self.answers)

    def metrics(self, sums: dict[str, float], denominators: dict[str, float]) -> dict[str, float]:
        own = {"on_policy": float(self.on_policy)} | (_lengths(self.answers) if self.answers else {})
        return super().metrics(sums, denominators) | own

    def shown(self, step: int) -> list[dict[str, Any]]:
        """The answers to the step's first two prompts, at the first step and every `completions_every`, if it took answers."""
        if not is_due(step, self.config.completions_every):
            return []
        return [
            {
                "row": sample.index,
                "prompt": self.tokenizer.decode(list(_asked(sample)), skip_special_tokens=True),
                "completion": self.tokenizer.decode(list(answer.tokens), skip_special_tokens=True),
                "tokens": len(answer.tokens),
                "finished": answer.finished,
                "by": "model" if self.on_policy else "teacher",
                "rewards": {},
            }
            for sample, answer in zip(self.asked[:2], self.answers)
        ]

    def evaluate(self, prompts: Sequence[Sample]) -> dict[str, float]:
        found = {} if self.config.prompts_only else self._measure(prompts)
        if found and not self.config.lmbda:
            return found
        answers = self._answers(self.engine, prompts, 0)
        own = self._measure(_answered(prompts, answers))
        return found | {f"on_policy/{name}": value for name, value in own.items()} | _lengths(answers)

    def _answers(self, engine: Engine, prompts: Sequence[Sample], draw: int) -> list[Completion]:
        engine.sync()
        answers = engine.generate([_asked(sample) for sample in prompts], self.sampling, seed=(self.config.seed, draw))
        engine.rest()
        return [_before(answer, len(self.head.weight)) for answer in answers]

    def _measure(self, samples: Sequence[Sample]) -> dict[str, float]:
        """Metrics of these samples, as if they were one step, without gradient or dropout."""
        denominators, totals = self.denominators(samples), dict[str, float]()
        with evaluation(self.model):
            for _, batch in batches(samples, self.config.token_limit, share=self.config.share_prompts):
                for name, value in self.loss(batch.to(self.head.weight.device), denominators)[1].items():
                    totals[name] = totals.get(name, 0.0) + float(value)
        return super().metrics(totals, denominators)


def _prompts_of(data: SupervisedDataConfig) -> PromptDataConfig:
    """The same source, read for its prompts; those over max_length are left out."""
    shared = {f.name: getattr(data, f.name) for f in fields(PromptDataConfig)} | {"truncation": "drop"}
    columns = {name: column for name, column in data.columns.items() if name in PromptDataConfig.column_names}
    return PromptDataConfig(**shared | {"columns": columns})


def _asked(sample: Sample) -> tuple[int, ...]:
    """What an answer follows: all before the first scored token."""
    return sample.contexts[0] if sample.completions else sample.prompt


def _answered(prompts: Sequence[Sample], answers: Sequence[Completion]) -> list[Sample]:
    return [Sample(sample.index, _asked(sample), (answer.tokens,), sample.weight) for sample, answer in zip(prompts, answers)]


def _before(answer: Completion, rows: int) -> Completion:
    """The answer up to the first token that the model has no row for, as a teacher's padding may hold some."""
    length = next((i for i, token in enumerate(answer.tokens) if token >= rows), len(answer.tokens))
    return answer if length == len(answer.tokens) else Completion(answer.tokens[:length], answer.logps[:length], False)


def _lengths(answers: Sequence[Completion]) -> dict[str, float]:
    """Of the answers, under the names of TRL's GRPOTrainer."""
    lengths = torch.tensor([float(len(answer.tokens)) for answer in answers])
    return {
        "completions/mean_length": lengths.mean().item(),
        "completions/min_length": lengths.min().item(),
        "completions/max_length": lengths.max().item(),
        "completions/clipped_ratio": sum(not answer.finished for answer in answers) / len(answers),
    }
