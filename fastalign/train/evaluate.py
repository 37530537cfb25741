"""`fastalign eval`: how often a model prefers the chosen answer of held-out pairs, and by how much."""

from __future__ import annotations

import gc
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor

from fastalign.data.config import DataConfig
from fastalign.data.preferences import load_preferences
from fastalign.data.tokenizer import load_tokenizer
from fastalign.errors import ConfigError, ModelError
from fastalign.losses import PREFERENCE_LOSSES
from fastalign.models.config import ModelConfig
from fastalign.models.heads import head_spec
from fastalign.models.load import load_model
from fastalign.models.reference import sequence_logps
from fastalign.packing import collate, pack
from fastalign.train.config import write_text
from fastalign.train.step import check_lengths
from fastalign.types import Sample


@dataclass
class EvalConfig:
    """Preference accuracy, margins and loss of a model on held-out pairs.

    With a reference the accuracy is that of the implicit reward beta * (log p - log p_ref), as in training.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    """A run, its final/, a LoRA adapter, or a model."""
    data: DataConfig = field(default_factory=DataConfig)

    reference: str = "auto"
    """Model to compare with: a folder, none, or auto (the model that the run or adapter started from; none for a plain model)."""
    beta: float | None = None
    """Strength of the reward; none: that of the run, else 0.1."""
    loss_type: Literal["sigmoid", "ipo", "hinge"] | None = None
    """none: that of the run, else sigmoid."""
    max_tokens: int = 4096
    """Tokens per batch; bounds the memory, does not change the result."""
    output: str | None = None
    """JSON file for the figures."""

    def validate(self) -> None:
        """Raise ConfigError for the first option that is missing or out of range."""
        if not self.model.path:
            raise ConfigError("model.path: no model given; set --model.path to a run, an adapter or a model folder")
        if not self.data.path:
            raise ConfigError("data.path: no data given; set --data.path FILE")
        if self.beta is not None and not 0 < self.beta < math.inf:
            raise ConfigError(f"beta must be positive, got {self.beta}")
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens must be at least 1, got {self.max_tokens}")


@dataclass(frozen=True)
class Evaluated:
    """What `model.path` of an evaluation points at."""

    path: str  # folder or hub name that load_model takes
    start: str | None = None  # the model that training started from
    beta: float | None = None
    loss_type: str | None = None


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """The figures as one dict (see `measure`), beside the paths they belong to; written to `config.output` if that is set."""
    config.validate()
    found = locate(config.model.path)
    reference = found.start if config.reference == "auto" else None if config.reference == "none" else locate(config.reference).path
    beta = config.beta or found.beta or 0.1
    loss_type = config.loss_type or found.loss_type or "sigmoid"
    tokenizer = load_tokenizer(found.path, trust_remote_code=config.model.trust_remote_code)

    started = time.perf_counter()
    policy = _load(config.model, found.path)
    data = load_preferences(config.data, tokenizer, vocab_size=head_spec(policy).weight.shape[0])
    held_out = config.data.eval_fraction or config.data.eval_path or config.data.eval_split
    samples = data.eval_samples if held_out else data.samples
    check_lengths(samples, config.max_tokens)
    logps = completion_logps(policy, samples, config.max_tokens, label="model")
    del policy
    gc.collect()  # the policy makes room before the reference comes
    ref_logps = None
    if reference:
        ref_logps = completion_logps(_load_reference(config, reference), samples, config.max_tokens, label="reference")
    seconds = time.perf_counter() - started

    lengths = torch.tensor([s.scored for s in samples]).clamp(min=1)
    figures = measure(logps, ref_logps, lengths, beta=beta, loss_type=loss_type)
    result: dict[str, Any] = {"model": config.model.path, "reference": reference, "data": config.data.path, **figures}
    if reference:
        result |= {"beta": beta, "loss_type": loss_type}
    result["seconds"] = round(seconds, 3)
    if config.output:
        write_text(Path(config.output), json.dumps(result, ensure_ascii=False, indent=1) + "\n")
    return result


def measure(
    logps: Tensor,  # (P, 2) float32, nats: chosen, rejected
    ref_logps: Tensor | None,  # (P, 2)
    lengths: Tensor,  # (P, 2) scored tokens
    *,
    beta: float,
    loss_type: str,
) -> dict[str, Any]:
    """Means over the pairs, under TRL's names, and the accuracies with Wilson's 95 % interval.

    `logps/accuracy` says how often the chosen answer is the more probable one, `logps/accuracy_per_token` the same of the mean
    per token; with a reference `rewards/*` and `loss` are those of training. Ties count against the model, as in training.
    """
    pairs = len(logps)
    per_token = logps / lengths
    accuracies = {"logps/accuracy": logps, "logps/accuracy_per_token": per_token}
    means = {"logps/chosen": logps[:, 0], "logps/rejected": logps[:, 1]}
    means |= {"logps/chosen_per_token": per_token[:, 0], "logps/rejected_per_token": per_token[:, 1]}
    if ref_logps is not None:
        options: dict[str, Any] = {"beta": beta}
        if loss_type == "ipo":
            options |= {"chosen_lengths": lengths[:, 0], "rejected_lengths": lengths[:, 1]}
        outcome = PREFERENCE_LOSSES[loss_type](logps[:, 0], logps[:, 1], ref_logps[:, 0], ref_logps[:, 1], **options)
        rewards = torch.stack([outcome.chosen_rewards, outcome.rejected_rewards], 1)
        accuracies = {"rewards/accuracies": rewards, **accuracies}
        means = {
            "loss": outcome.loss,
            "rewards/chosen": outcome.chosen_rewards,
            "rewards/rejected": outcome.rejected_rewards,
            "rewards/margins": outcome.chosen_rewards - outcome.rejected_rewards,
            **means,
        }
    result: dict[str, Any] = {"pairs": pairs, "num_tokens": int(lengths.sum())}
    for name, scores in accuracies.items():
        right = int((scores[:, 0] > scores[:, 1]).sum())
        result |= {name: right / pairs, f"{name}_ci95": list(wilson(right, pairs))}
    result["ties"] = int((next(iter(accuracies.values())).diff(dim=1) == 0).sum())
    return result | {name: values.mean().item() for name, values in means.items()}


def completion_logps(model: Any, samples: Sequence[Sample], max_tokens: int, *, label: str = "") -> Tensor:
    """(P, 2) float32 on the host: log-probabilities of the completions of each sample, summed over their tokens, in nats.

    With a `label` a terminal shows a progress bar of that name.
    """
    from rich.console import Console
    from rich.progress import track

    head, device = head_spec(model), next(model.parameters()).device
    result = torch.empty(len(samples), 2)
    bins = pack([sample.num_tokens for sample in samples], max_tokens)
    for members in track(bins, label, console=Console(stderr=True), transient=True, disable=not (label and sys.stderr.isatty())):
        batch = collate([samples[i] for i in members]).to(device)
        result[members] = sequence_logps(model, batch, head=head).view(-1, 2).cpu()
    return result


def wilson(right: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a share, 95 % by default: honest also near 0 and 1 and for few trials.

    >>> [round(bound, 3) for bound in wilson(9, 10)]
    [0.596, 0.982]
    """
    if not trials:
        return 0.0, 1.0
    share, square = right / trials, z * z / trials
    centre = (share + square / 2) / (1 + square)
    spread = z / (1 + square) * math.sqrt(share * (1 - share) / trials + square / (4 * trials))
    return max(0.0, centre - spread), min(1.0, centre + spread)


def locate(path: str) -> Evaluated:
    """What a path given to eval is: a run (its `final/` is taken), an adapter, or a model."""
    folder = Path(path)
    if (folder / "config.yaml").is_file():
        options = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")) or {}
        if not (folder / "final").is_dir():
            raise ModelError(f"{path}: the run has no final/ yet; finish it with `fastalign dpo --resume --output {path}`")
        start = (options.get("lora") or {}).get("adapter") or (options.get("model") or {}).get("path")
        return Evaluated(str(folder / "final"), start, options.get("beta"), options.get("loss_type"))
    if (folder / "adapter_config.json").is_file():
        adapter = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        return Evaluated(path, adapter.get("base_model_name_or_path"))
    return Evaluated(path)


def show(result: dict[str, Any]) -> None:
    """Print the figures as a table."""
    from rich.console import Console
    from rich.table import Table

    against = f", reference {result['reference']}" if result["reference"] else ", no reference"
    table = Table(title=f"{result['model']} on {result['data']}{against}", title_justify="left")
    table.add_column("metric")
    table.add_column("value", justify="right")
    table.add_column("95 % interval", justify="right")
    for name, value in result.items():
        if name in ("model", "reference", "data") or name.endswith("_ci95"):
            continue
        interval = result.get(f"{name}_ci95")
        shown = f"{value:.4f}" if isinstance(value, float) else str(value)
        table.add_row(name, shown, f"{interval[0]:.4f} – {interval[1]:.4f}" if interval else "")
    Console(markup=False).print(table)


def _load(options: ModelConfig, path: str) -> Any:
    return load_model(replace(options, path=path))


def _load_reference(config: EvalConfig, path: str) -> Any:
    try:
        return _load(config.model, path)
    except ModelError as error:
        raise ModelError(f"reference: {error}; name another one with --reference DIR, or compare with nothing: --reference none") from error
