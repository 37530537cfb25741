"""What a candidate is worth beside the version that it was trained from: does it win, how far has it moved, what has it forgotten.

All versions are adapters on one base model in memory (or whole models beside it), and scored by the fused head, without logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastalign.data.config import DataConfig, PromptDataConfig, SupervisedDataConfig, UnpairedDataConfig
from fastalign.data.preferences import load_preferences
from fastalign.data.prompts import Prompts, load_prompts
from fastalign.data.samples import Samples
from fastalign.data.sources import read_rows
from fastalign.data.supervised import load_supervised
from fastalign.data.unpaired import load_unpaired
from fastalign.errors import ConfigError
from fastalign.models.heads import HeadSpec, head_spec
from fastalign.models.reference import sequence_logps
from fastalign.models.trunk import evaluation, trunk
from fastalign.rollout.generate import Completion, generate
from fastalign.rollout.judging import JudgeConfig, build_judge
from fastalign.segments import segment_sum
from fastalign.serve.loop.agreement import Agreement, of_labels, of_pairs
from fastalign.serve.loop.collect import HELD_OUT_LABELS, HELD_OUT_PAIRS, PROMPTS
from fastalign.serve.loop.shares import draw_key
from fastalign.serve.models import Installed, Models
from fastalign.train.evaluate import by_sample
from fastalign.train.measures import wilson
from fastalign.train.win_rate import Answers, win_figures
from fastalign.types import PackedBatch, Sample


@dataclass
class MeasureConfig:
    """How a candidate is measured. Without a judge the held-out feedback says whether it is better."""

    judge: JudgeConfig = field(default_factory=JudgeConfig)
    """Who compares the candidate's answers to the held-out conversations with those of the version before."""
    prompts: int = 128
    """Most held-out conversations that are answered."""
    comparisons: int = 2048
    """Most rows of held-out feedback that are read."""
    max_new_tokens: int = 256
    """Longest answer, in tokens; at most half of the model's window."""
    temperature: float = 1.0
    """Of the answers that a judge compares. The KL is measured on answers drawn at temperature 1 whatever this is."""
    max_tokens: int = 16384
    """Tokens per batch; bounds the memory. Rows of feedback longer than half of it are cut, longer conversations left out."""
    regression: str = ""
    """File of texts, conversations or prompts with completions on which the candidate's loss may not rise."""

    def validate(self) -> None:
        """Raises ConfigError for the first option that is out of range, or would change nothing."""
        if self.judge.is_named:
            self.judge.validate()
        elif self.judge != JudgeConfig():
            raise ConfigError("measure.judge: options of a judge, but none is named; name one by judge.function, judge.url or judge.model")
        elif self.temperature != 1.0:
            raise ConfigError("measure.temperature counts only with a judge; name one by measure.judge, or leave it at 1")
        for name in ("prompts", "comparisons", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"measure.{name} must be 1 or more, got {getattr(self, name)}")
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"measure.temperature must be 0 or more, got {self.temperature}")
        if self.max_tokens < 2 * self.max_new_tokens:
            raise ConfigError(
                f"measure.max_tokens must be at least twice max_new_tokens ({self.max_new_tokens}), so that a conversation and its answer "
                f"fit, got {self.max_tokens}"
            )
        if self.regression and not Path(self.regression).exists():
            raise ConfigError(f"measure.regression {self.regression!r}: no such file; name a file of texts, or leave it out")


def measure(models: Models, candidate: str, parent: str, first: str, folder: Path, config: MeasureConfig, *, seed: int) -> dict[str, Any]:
    """Figures of the version in folder `candidate` beside the one in `parent`, that it was trained from, and the `first` of all.

    `folder` holds what `collect` wrote. A figure that nothing is there for is left out.

        win_rate, win_rate_ci95     share of the comparisons that the candidate wins, ties half, and Wilson's interval
        comparisons                 how many independent comparisons that is worth
        win_by                      who says so: "judge", "held-out pairs" or "held-out labels", see `agreement`
        kl, kl_parent               KL(candidate || first) and KL(candidate || parent), nats per token, on answers of the candidate's own
                                    to held-out conversations, each token's over the whole vocabulary: unbiased for the KL of whole
                                    answers (up to max_new_tokens) over their mean length, with less variance than an estimate from the
                                    log-probs of the drawn tokens alone
        regression_nll              nats per token on the regression file; regression_nll_before and regression_nll_first: of the others

    The same figures for the same seed. Raises ModelError for a version that cannot be used, DataError for a file, JudgeError when
    the judge reaches no verdict.
    """
    config.validate()
    prompts = _prompts(models, folder / PROMPTS, config, seed)
    figures: dict[str, Any] = {}
    with installed(models, candidate, parent, first) as (ours, before, start):
        if not config.judge.is_named:
            figures |= _agreed(models, ours, before, folder, config, seed)
        if prompts is not None:
            figures |= _answered(models, ours, before, start, prompts, config, seed)
        if config.regression:
            samples = _regression(models, config)
            for name, version in (("", ours), ("_before", before), ("_first", start)):
                figures[f"regression_nll{name}"] = nll(models, version, samples, config.max_tokens)
    return figures


@contextmanager
def installed(models: Models, *folders: str) -> Iterator[list[Installed]]:
    """The versions in `folders` ready in memory, each folder once, and gone afterwards. Raises ModelError."""
    with ExitStack() as stack:
        ready: dict[Path, Installed] = {}
        for folder in folders:
            path = Path(folder).resolve()
            if path not in ready:
                ready[path] = models.install(f"measured {len(ready)}", folder, models.read(folder))
                stack.callback(models.remove, ready[path])
        yield [ready[Path(folder).resolve()] for folder in folders]


def log_probs(models: Models, version: Installed, samples: Sequence[Sample], max_tokens: int) -> list[Tensor]:
    """Of each sample (its completions,) float32 log-probs in nats, summed over the scored tokens, under `version`."""
    with models.serving(version) as model:
        head = head_spec(model)
        return by_sample(lambda batch: sequence_logps(model, batch, head=head), samples, max_tokens, _device(model))


def nll(models: Models, version: Installed, samples: Sequence[Sample], max_tokens: int) -> float:
    """Mean negative log-likelihood per scored token of `samples` under `version`, in nats."""
    total = torch.cat(log_probs(models, version, samples, max_tokens)).double().sum().item()
    return -total / max(1, sum(sample.num_targets for sample in samples))


def kl_per_token(models: Models, version: Installed, other: Installed, samples: Sequence[Sample], max_tokens: int) -> float:
    """KL(version || other) of the next token, over the whole vocabulary, mean over the scored tokens of `samples`, in nats."""
    heads: list[HeadSpec] = []
    for one in (version, other):
        with models.serving(one) as model:
            heads.append(head_spec(model))

    def score(batch: PackedBatch) -> Tensor:
        hidden = []
        for one in (version, other):
            with models.serving(one) as model, evaluation(model):
                hidden.append(trunk(model, batch).hidden.index_select(0, batch.live))
        with torch.no_grad():
            kl = heads[0].divergence(hidden[0], heads[1], hidden[1], kind="reverse_kl")
            return segment_sum(kl, batch.live_cu_seqlens)

    device = next(models.base.parameters()).device
    with models.turn():
        total = torch.cat(by_sample(score, samples, max_tokens, device)).double().sum().item()
    return total / max(1, sum(sample.num_targets for sample in samples))


def answers(
    models: Models, version: Installed, samples: Sequence[Sample], config: MeasureConfig, *, seed: int, temperature: float = 1.0
) -> list[Completion]:
    """What `version` says to the prompts of `samples`; the random numbers are the same ones for every version."""
    with models.serving(version) as model:
        return generate(
            model,
            [sample.prompt for sample in samples],
            max_new_tokens=_longest(models, config),
            eos_token_id=sorted(models.eos),
            temperature=temperature,
            seed=seed,
            max_tokens=config.max_tokens,
        )


def _answered(
    models: Models, ours: Installed, before: Installed, start: Installed, data: Prompts, config: MeasureConfig, seed: int
) -> dict[str, Any]:
    """What the answers to held-out conversations show: how far the candidate went, and what the judge says, if there is one."""

    def said(version: Installed, temperature: float) -> list[Completion]:
        return answers(models, version, data.samples, config, seed=seed, temperature=temperature)

    own = said(ours, 1.0)
    samples = [Sample(sample.index, sample.prompt, (one.tokens,)) for sample, one in zip(data.samples, own)]
    figures: dict[str, Any] = {"prompts": len(samples), "kl_tokens": sum(sample.num_targets for sample in samples)}
    figures["kl"] = kl_per_token(models, ours, start, samples, config.max_tokens)
    figures["kl_parent"] = figures["kl"] if before == start else kl_per_token(models, ours, before, samples, config.max_tokens)
    if config.judge.is_named:
        compared = own if config.temperature == 1.0 else said(ours, config.temperature)
        figures |= _judged(models, data, compared, said(before, config.temperature), config)
    return figures


def _judged(models: Models, data: Prompts, own: Sequence[Completion], other: Sequence[Completion], config: MeasureConfig) -> dict[str, Any]:
    def shown(side: Sequence[Completion]) -> Answers:
        texts = [models.tokenizer.decode(list(one.tokens), skip_special_tokens=True) for one in side]
        return Answers([[{"role": "assistant", "content": text}] for text in texts], [len(one.tokens) for one in side])

    workers = config.judge.workers if config.judge.url else 1
    found = win_figures(build_judge(config.judge), data, data.samples, shown(own), shown(other), workers=workers)
    return found | {"win_by": "judge", "comparisons": found["prompts"] - found["without_verdict"]}


def _agreed(models: Models, ours: Installed, before: Installed, folder: Path, config: MeasureConfig, seed: int) -> dict[str, Any]:
    """By the kind of held-out feedback that is worth more comparisons."""

    def moved(samples: Sequence[Sample]) -> list[Tensor]:
        sides = [log_probs(models, one, samples, config.max_tokens) for one in (ours, before)]
        return [mine - other for mine, other in zip(*sides)]

    found: list[tuple[str, Agreement]] = []
    limits: dict[str, Any] = {"max_length": config.max_tokens // 2, "truncation": "keep_start"}
    pairs, labels = str(folder / HELD_OUT_PAIRS), str(folder / HELD_OUT_LABELS)
    if samples := _held_out(models, DataConfig(path=pairs, **limits), load_preferences, config, seed):
        found.append(("held-out pairs", of_pairs(samples, moved(samples))))
    if samples := _held_out(models, UnpairedDataConfig(path=labels, one_class=True, **limits), load_unpaired, config, seed):
        found.append(("held-out labels", of_labels(samples, moved(samples))))
    if not found:
        return {"comparisons": 0}
    name, best = max(found, key=lambda one: one[1].comparisons)
    if not best.comparisons:
        return {"comparisons": 0}
    interval = wilson(best.share * best.comparisons, best.comparisons)
    return {"win_rate": best.share, "win_rate_ci95": list(interval), "comparisons": best.comparisons, "win_by": name}


def _prompts(models: Models, path: Path, config: MeasureConfig, seed: int) -> Prompts | None:
    """A draw of the held-out conversations that leave room for an answer; None where there are none."""
    if not _has_rows(path):
        return None
    options = PromptDataConfig(path=str(path), max_length=_window(models, config) - _longest(models, config))
    data = load_prompts(options, models.tokenizer, vocab_size=_vocabulary(models))
    data.samples = _drawn(data.samples, config.prompts, seed)
    return data if data.samples else None


def _held_out(models: Models, options: DataConfig, load: Callable[..., Samples], config: MeasureConfig, seed: int) -> list[Sample]:
    if not _has_rows(Path(options.path)):
        return []
    data = load(options, models.tokenizer, vocab_size=_vocabulary(models))
    return _drawn(data.samples, config.comparisons, seed)


def _regression(models: Models, config: MeasureConfig) -> list[Sample]:
    first = next((row for _, row in islice(read_rows(config.regression, "train", None), 1)), {})
    columns = {"completion": "chosen"} if "chosen" in first and not {"completion", "text", "messages"} & set(first) else {}
    options = SupervisedDataConfig(
        path=config.regression, columns=columns, max_length=min(models.window or config.max_tokens, config.max_tokens)
    )
    samples = load_supervised(options, models.tokenizer, vocab_size=_vocabulary(models)).samples
    if not samples:
        raise ConfigError(f"measure.regression {config.regression!r}: no row is left to measure on; name a file of texts, or leave it out")
    return samples


def _drawn(samples: Sequence[Sample], most: int, seed: int) -> list[Sample]:
    """At most `most` of them, in their order; which ones depends on the seed and what they are, not on what else there is."""
    if len(samples) <= most:
        return list(samples)
    keys = [draw_key(seed, repr((sample.prompt, sample.completions)).encode()) for sample in samples]
    return [samples[i] for i in sorted(sorted(range(len(samples)), key=keys.__getitem__)[:most])]


def _has_rows(path: Path) -> bool:
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; it is written when a round collects its data, so collect again")
    return path.stat().st_size > 0


def _window(models: Models, config: MeasureConfig) -> int:
    """Tokens of the longest sequence."""
    return min(models.window or config.max_tokens, config.max_tokens)


def _longest(models: Models, config: MeasureConfig) -> int:
    return min(config.max_new_tokens, _window(models, config) // 2)


def _vocabulary(models: Models) -> int:
    with models.serving() as model:
        return len(head_spec(model).weight)


def _device(model: Any) -> torch.device:
    return next(model.parameters()).device
