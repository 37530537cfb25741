"""`fastalign eval`: what a model makes of held-out pairs, rankings or texts, beside the model that it started from."""

from __future__ import annotations

import gc
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
import yaml
from torch import Tensor

from fastalign.data.config import DataConfig, PromptDataConfig, RankedDataConfig, SupervisedDataConfig
from fastalign.data.preferences import load_preferences
from fastalign.data.prompts import load_prompts
from fastalign.data.ranked import load_ranked
from fastalign.data.samples import Samples
from fastalign.data.sources import read_rows
from fastalign.data.supervised import load_supervised
from fastalign.data.tokenizer import head_vocab_size, load_tokenizer
from fastalign.errors import ConfigError, ModelError
from fastalign.losses import PREFERENCE_LOSSES
from fastalign.models.config import ModelConfig
from fastalign.models.heads import head_spec
from fastalign.models.load import load_model
from fastalign.models.reference import sequence_logps
from fastalign.models.trunk import causal_lm, evaluation, trunk
from fastalign.models.value_head import is_reward_model, load_reward_model, scores
from fastalign.objectives.dpo import DPOConfig
from fastalign.objectives.pairs import PairSlab, log_likelihood_weights
from fastalign.packing import collate, pack
from fastalign.pausing import pause
from fastalign.segments import segment_sum
from fastalign.train.config import write_text
from fastalign.train.evaluation_page import RELIABILITY, figure_rows, reliability_rows, write_page
from fastalign.train.label import JudgeConfig, build_judge
from fastalign.train.measures import margins_of, preference_figures, reward_figures, text_figures
from fastalign.train.pair_loss import changed, mean_loss, options_of_run, options_told
from fastalign.train.step import check_lengths
from fastalign.train.win_rate import generated, win_figures, written
from fastalign.types import PackedBatch, Sample

Data = TypeVar("Data", bound=DataConfig)


@dataclass
class EvalDataConfig(SupervisedDataConfig):
    """Options of the data set, of any of the kinds that can be trained on."""

    column_names: ClassVar[tuple[str, ...]] = tuple(
        dict.fromkeys((*DataConfig.column_names, *SupervisedDataConfig.column_names, *RankedDataConfig.column_names))
    )


@dataclass
class EvalConfig:
    """Figures of a model on held-out data: of preference pairs accuracy, margins and loss, of texts the perplexity, and what a
    reward model makes of pairs and rankings; with a judge how often its answers win.

    With a reference the accuracy of pairs is that of the implicit reward beta * (log p - log p_ref), as in training, and the
    loss is that of the DPO run with all its options, but unweighted: every pair counts once, whatever its weight in the data.
    The reference is the model that training started from, also where sync_ref_model moved it.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    """A run, its final/, a LoRA adapter, or a model; a reward model, too."""
    data: EvalDataConfig = field(default_factory=EvalDataConfig)

    reference: str = "auto"
    """Model to compare with: a folder, none, or auto (the model that the run or adapter started from; none for a plain model)."""
    beta: float | None = None
    """Strength of the reward of pairs; none: that of the run, else 0.1."""
    loss_type: str | None = None
    """Whose loss to tell of pairs: sigmoid, ipo, ...; none: that of the run, else sigmoid. One that is not the run's is told
    with its defaults, not with the run's label_smoothing, ld_alpha, ...; exo_pair with label_smoothing 0.001."""
    kl: bool = False
    """Also the divergence KL(model || reference) per scored token, exact over the vocabulary; holds both models in memory."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    """With a judge: the model answers the data's prompts, and the answers are judged against the reference's (none: against the
    data's own, its column completion or chosen)."""
    max_new_tokens: int = 256
    """Longest answer, in tokens, with a judge."""
    temperature: float = 0.0
    """Of the answers; 0: the most probable token every time."""
    max_tokens: int = 4096
    """Tokens per batch; bounds the memory, does not change the result."""
    output: str | None = None
    """JSON file for the figures; a page of the same name with .html shows them with plots."""

    def validate(self) -> None:
        """Raise ConfigError for the first option that is missing or out of range."""
        if not self.model.path:
            raise ConfigError("model.path: no model given; set --model.path to a run, an adapter or a model folder")
        if not self.data.path:
            raise ConfigError("data.path: no data given; set --data.path FILE")
        if self.beta is not None and not 0 < self.beta < math.inf:
            raise ConfigError(f"beta must be positive, got {self.beta}")
        if self.loss_type is not None and self.loss_type not in PREFERENCE_LOSSES:
            raise ConfigError(f"loss_type must be one of {', '.join(PREFERENCE_LOSSES)}, got {self.loss_type!r}")
        if self.kl and self.reference == "none":
            raise ConfigError("kl is a divergence from the reference, which --reference none leaves out; name one")
        if self.kl and self.judge.is_named:
            raise ConfigError(
                "kl is measured on the data's own answers, a judge compares the model's; run eval once with kl and once with judge"
            )
        if self.reference == "none":
            self.require_no_loss("with a reference, which --reference none leaves out")
        if self.judge.is_named:
            self.judge.validate()
            self.require_no_loss("for the data's own pairs, not with a judge")
        else:
            for option in ("max_new_tokens", "temperature"):
                default = getattr(type(self), option)
                if getattr(self, option) != default:
                    raise ConfigError(f"{option} must be left at {default}, which counts only with a judge; name one by --judge....")
            if self.judge != JudgeConfig():
                raise ConfigError("judge: options of a judge, but none is named; name one by --judge.function, judge.url or judge.model")
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature must be 0 or more, got {self.temperature}")
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens must be at least 1, got {self.max_tokens}")

    def require_no_loss(self, where: str) -> None:
        """Raise ConfigError if an option of the loss is given that would change nothing, as it counts only `where`."""
        for option in ("beta", "loss_type"):
            if getattr(self, option) is not None:
                raise ConfigError(f"{option} counts only {where}; leave it out")


@dataclass(frozen=True)
class Evaluated:
    """What `model.path` of an evaluation points at."""

    path: str  # folder or hub name that load_model takes
    start: str | None = None  # the model that training started from
    run: DPOConfig | None = None  # the loss that it was trained by, see `options_of_run`


@dataclass(frozen=True)
class Figures:
    """What an evaluation found: numbers for a table, and distributions for plots."""

    values: dict[str, Any]
    margins: Tensor | None = None  # (M,) better minus worse reward
    scores: tuple[Tensor, Tensor] | None = None  # rewards of the better and of the worse completions
    nll: dict[str, Tensor] | None = None  # whose: (S,) nats per token of each text
    samples: Sequence[Sample] = ()


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """The figures as one dict (see `measures`), beside the paths they belong to; written to `config.output` if that is set.

    What is measured follows from the model (a reward model scores) and else from the columns of the data: pairs or texts.
    """
    config.validate()
    found = locate(config.model.path)
    started = time.perf_counter()
    if is_reward_model(found.path):
        if config.kl or config.judge.is_named or config.reference not in ("auto", "none"):
            raise ConfigError(
                f"{found.path} is a reward model, which scores without a reference and answers nothing; leave out reference, kl, judge"
            )
        config.require_no_loss(f"with a model that answers, and {found.path} is a reward model")
        reference, figures = None, _of_reward_model(config, found)
    else:
        reference = found.start if config.reference == "auto" else None if config.reference == "none" else locate(config.reference).path
        if config.kl and not reference:
            raise ConfigError(
                f"kl is a divergence from the reference, and {found.path} says of no model that it began with; set --reference DIR"
            )
        measure = _of_answers if config.judge.is_named else _of_pairs if _holds_pairs(config.data) else _of_texts
        figures = measure(config, found, reference)
        if config.kl and reference:
            figures.values.update(_kl_figures(config, _load(config, found.path), _load_reference(config, reference), figures.samples))
    result: dict[str, Any] = {"model": config.model.path, "reference": reference, "data": config.data.path, **figures.values}
    result["seconds"] = round(time.perf_counter() - started, 3)
    if config.output:
        write_text(Path(config.output), json.dumps(result, ensure_ascii=False, indent=1) + "\n")
        write_page(Path(config.output).with_suffix(".html"), result, figures.margins, figures.scores, figures.nll)
    return result


def _of_pairs(config: EvalConfig, found: Evaluated, reference: str | None) -> Figures:
    options = options_told(found.run, config.beta, config.loss_type)
    uniform = options.reference_free and config.reference == "auto"
    if uniform and config.kl:
        raise ConfigError(f"kl is a divergence from the reference, and {found.path} was trained reference_free; set --reference DIR")
    if not (reference or uniform):
        config.require_no_loss(f"with a reference, and {found.path} says of no model that it began with; set --reference DIR")
    policy = _load(config, found.path)
    tokenizer = load_tokenizer(found.path, trust_remote_code=config.model.trust_remote_code)
    data = load_preferences(_options_for(DataConfig, config.data), tokenizer, vocab_size=head_spec(policy).weight.shape[0])
    samples = _held_out(config, data)
    sums, logps, aligned = _pair_sums(config, policy, samples, options, "model").unbind(2)
    del policy
    gc.collect()  # the policy makes room before the reference comes
    lengths = torch.tensor([sample.scored for sample in samples]).clamp(min=1)
    if uniform:
        ref_logps = torch.zeros_like(logps)
    elif reference:
        plain = replace(options, use_weighting=False)
        ref_logps = _pair_sums(config, _load_reference(config, reference), samples, plain, "reference")[..., 1]
    else:
        return Figures(preference_figures(sums, lengths))
    rewards = options.beta * (logps - ref_logps)
    values = preference_figures(sums, lengths, rewards)
    values["loss"] = mean_loss(options, logps, ref_logps, sums, aligned.sum(1).exp(), lengths)
    values |= changed(replace(options, reference_free=uniform))
    if uniform:
        values["reference"] = None
    chosen, rejected = rewards.unbind(1)
    return Figures(values, chosen - rejected, (chosen, rejected), samples=samples)


def _of_reward_model(config: EvalConfig, found: Evaluated) -> Figures:
    tokenizer = load_tokenizer(found.path, trust_remote_code=config.model.trust_remote_code)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    model = load_reward_model(replace(config.model, path=found.path), pad_token_id=pad)
    options = _options_for(RankedDataConfig, config.data)
    data = load_ranked(options, tokenizer, vocab_size=len(causal_lm(model).get_input_embeddings().weight))
    samples = _held_out(config, data)

    def score(batch: PackedBatch) -> Tensor:
        with evaluation(model):
            return scores(model, batch)

    rewards = by_sample(score, samples, config.max_tokens, _device(model), label="rewards")
    values = reward_figures(rewards)
    margins = margins_of(rewards)
    better, worse = torch.cat([found[:-1] for found in rewards]), torch.cat([found[1:] for found in rewards])
    return Figures(values, margins, (better, worse))


def _of_texts(config: EvalConfig, found: Evaluated, reference: str | None) -> Figures:
    config.require_no_loss(f"with preference pairs, and {config.data.path} has no column 'chosen'")
    policy = _load(config, found.path)
    tokenizer = load_tokenizer(found.path, trust_remote_code=config.model.trust_remote_code)
    options = _options_for(SupervisedDataConfig, config.data)
    samples = _held_out(config, load_supervised(options, tokenizer, vocab_size=head_spec(policy).weight.shape[0]))
    tokens = torch.tensor([float(sample.num_targets) for sample in samples])
    sums = _text_sums(config, policy, samples)
    del policy
    gc.collect()
    count = tokens.sum().clamp(min=1)
    values: dict[str, Any] = {"samples": len(samples), "num_tokens": int(count), **text_figures(sums[:, 0], tokens)}
    values |= {"entropy": (sums[:, 1].sum() / count).item(), "mean_token_accuracy": (sums[:, 2].sum() / count).item()}
    nll = {"model": sums[:, 0] / tokens.clamp(min=1)}
    if reference:
        own = _load_reference(config, reference)
        logps = by_sample(lambda batch: sequence_logps(own, batch), samples, config.max_tokens, _device(own), label="reference")
        ref_nll = -torch.cat(logps)
        values |= {f"reference/{name}": value for name, value in text_figures(ref_nll, tokens).items()}
        nll["reference"] = ref_nll / tokens.clamp(min=1)
    return Figures(values, nll=nll, samples=samples)


def _of_answers(config: EvalConfig, found: Evaluated, reference: str | None) -> Figures:
    judge = build_judge(config.judge)
    tokenizer = load_tokenizer(found.path, trust_remote_code=config.model.trust_remote_code)
    data = load_prompts(_options_for(PromptDataConfig, config.data), tokenizer, vocab_size=head_vocab_size(found.path))
    samples = _held_out(config, data)
    how: dict[str, Any] = {"max_new_tokens": config.max_new_tokens, "temperature": config.temperature, "max_tokens": config.max_tokens}
    ours = generated(_load(config, found.path), data, samples, **how)
    theirs = generated(_load_reference(config, reference), data, samples, **how) if reference else written(data, samples)
    workers = config.judge.workers if config.judge.url else 1
    output = Path(config.output).with_suffix(".answers.jsonl") if config.output else None
    return Figures(win_figures(judge, data, samples, ours, theirs, workers=workers, output=output))


def _text_sums(config: EvalConfig, model: Any, samples: Sequence[Sample]) -> Tensor:
    """(S, 3) float32 on the host: negative log-likelihood, entropy and number of first choices, summed over each text's scored tokens."""
    head = head_spec(model)

    def score(batch: PackedBatch) -> Tensor:
        with evaluation(model):
            hidden = trunk(model, batch).hidden.index_select(0, batch.live)
            out = head.logps(hidden, batch.live_target, outputs=("logps", "entropy", "is_top1"), live_rows=len(batch.live_target))
            assert out.entropy is not None
            assert out.is_top1 is not None
            columns = (-out.logps, out.entropy, out.is_top1.float())
            return torch.stack([segment_sum(column, batch.live_cu_seqlens) for column in columns], 1)

    return torch.cat(by_sample(score, samples, config.max_tokens, _device(model), label="model"))


def _kl_figures(config: EvalConfig, policy: Any, reference: Any, samples: Sequence[Sample]) -> dict[str, float]:
    """KL(model || reference) over the whole vocabulary, mean over the scored tokens: how far training went, where the data is."""
    head, ref_head = head_spec(policy), head_spec(reference)

    def score(batch: PackedBatch) -> Tensor:
        with evaluation(policy), evaluation(reference):
            hidden, ref_hidden = (trunk(model, batch).hidden.index_select(0, batch.live) for model in (policy, reference))
            kl = head.divergence(hidden, ref_head, ref_hidden, kind="reverse_kl")
            return segment_sum(kl, batch.live_cu_seqlens)

    total = torch.cat(by_sample(score, samples, config.max_tokens, _device(policy), label="KL")).sum().item()
    return {"kl": total / max(1, sum(sample.num_targets for sample in samples))}


def by_sample(
    score: Callable[[PackedBatch], Tensor], samples: Sequence[Sample], max_tokens: int, device: torch.device, *, label: str = ""
) -> list[Tensor]:
    """What `score` gives for packed sequences, (S, ...), as one tensor on the host per sample, (its completions, ...).

    With a `label` a terminal shows a progress bar of that name.
    """
    from rich.console import Console
    from rich.progress import track

    check_lengths(samples, max_tokens)
    result: dict[int, Tensor] = {}
    bins: Iterable[list[int]] = pack([sample.num_tokens for sample in samples], max_tokens)
    for members in track(bins, label, console=Console(stderr=True), transient=True, disable=not (label and sys.stderr.isatty())):
        pause()
        inside = [samples[i] for i in members]
        parts = score(collate(inside).to(device)).cpu().split([len(sample.completions) for sample in inside])
        result.update(zip(members, parts))
    return [result[i] for i in range(len(samples))]


def locate(path: str) -> Evaluated:
    """What a path given to eval is: a run (its `final/` is taken), an adapter, or a model."""
    folder = Path(path)
    if (folder / "config.yaml").is_file():
        options = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")) or {}
        if not (folder / "final").is_dir():
            raise ModelError(f"{path}: the run has no final/ yet; finish it with --resume --output {path}")
        start = (options.get("lora") or {}).get("adapter") or (options.get("model") or {}).get("path")
        return Evaluated(str(folder / "final"), start, options_of_run(options))
    if (folder / "adapter_config.json").is_file():
        adapter = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        return Evaluated(path, adapter.get("base_model_name_or_path"))
    return Evaluated(path)


def show(result: dict[str, Any]) -> None:
    """Print the figures as a table, and the reliability table where there is one."""
    from rich.console import Console
    from rich.table import Table

    against = f", reference {result['reference']}" if result["reference"] else ""
    table = Table(title=f"{result['model']} on {result['data']}{against}", title_justify="left")
    for heading in ("metric", "value", "95 % interval"):
        table.add_column(heading, justify="left" if heading == "metric" else "right")
    for row in figure_rows(result):
        table.add_row(*row)
    console = Console(markup=False)
    console.print(table)
    if bins := result.get("calibration"):
        table = Table(title="calibration: are pairs with a margin of that confidence right that often?", title_justify="left")
        for heading in RELIABILITY:
            table.add_column(heading, justify="right")
        for cells in reliability_rows(bins):
            table.add_row(*cells)
        console.print(table)


def _held_out(config: EvalConfig, data: Samples) -> list[Sample]:
    options = config.data
    samples = data.eval_samples if options.eval_fraction or options.eval_path or options.eval_split else data.samples
    check_lengths(samples, config.max_tokens)
    return samples


def _holds_pairs(options: DataConfig) -> bool:
    """Whether the first row of the data is a preference pair; else it is one that supervised data can make sense of, or not."""
    chosen = options.columns.get("chosen", "chosen")
    return any(chosen in row for _, row in islice(read_rows(options.path, options.split, options.subset), 1))


def _options_for(kind: type[Data], options: EvalDataConfig) -> Data:
    """The options of `options` that data of one kind has."""
    given = {f.name: getattr(options, f.name) for f in fields(kind) if hasattr(options, f.name)}
    if kind is PromptDataConfig or (kind is RankedDataConfig and options.truncation == "keep_start"):
        given["truncation"] = "drop"  # as in training: a reward is read at the last token, and a prompt is not cut
    return kind(**given)


def _pair_sums(config: EvalConfig, model: Any, samples: Sequence[Sample], options: DPOConfig, label: str) -> Tensor:
    """(P, 2, 3) float32 on the host, of the completions of each pair: log-probs summed over their tokens, the same in the form of
    ld_alpha, and with use_weighting the log of WPO's weight (else 0); all in nats."""
    head = head_spec(model)
    outputs = ("logps", "log_sum_sq_probs") if options.use_weighting else ("logps",)

    def score(batch: PackedBatch) -> Tensor:
        with evaluation(model):
            hidden = trunk(model, batch).hidden.index_select(0, batch.live)
            out = head.logps(hidden, batch.live_target, outputs=outputs, live_rows=len(batch.live_target))
            slab = PairSlab(out, batch.live_cu_seqlens, 0, len(batch.index), options.ld_alpha)
            weight = log_likelihood_weights(slab) if options.use_weighting else torch.zeros_like(slab.sums)
            return torch.stack([slab.sums, slab.logps, weight], 1).float()

    return torch.stack(by_sample(score, samples, config.max_tokens, _device(model), label=label))


def _device(model: Any) -> torch.device:
    return next(model.parameters()).device


def _load(config: EvalConfig, path: str) -> Any:
    return load_model(replace(config.model, path=path))


def _load_reference(config: EvalConfig, path: str) -> Any:
    try:
        return _load(config, path)
    except ModelError as error:
        raise ModelError(f"reference: {error}; name another one with --reference DIR, or compare with nothing: --reference none") from error
