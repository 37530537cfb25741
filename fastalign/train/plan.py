"""`fastalign plan`: what a training run will hold in memory, before anything of it is downloaded, loaded or run.

It takes the options of the run. Of the model only config.json is read; the step is run without storage (`footprint`).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastalign import attention
from fastalign.errors import ConfigError, ModelError
from fastalign.models.adapters import add_adapter, check_adapter_folder
from fastalign.models.architecture import check_config
from fastalign.models.config import LoraConfig
from fastalign.models.load import prepare
from fastalign.objectives.base import RunConfig
from fastalign.train.flops import Flops, model_flops
from fastalign.train.footprint import PARTS, Footprint, footprint, head_plan, keeps_copy

GIB = 1 << 30
SIZES = (8, 16, 24, 48, 80, 141)  # GB of devices, 10^9 bytes
CONTEXT = 1.0e9  # bytes that a CUDA context and its libraries take
WASTE = 0.05  # of what is allocated, lost between blocks
GRID = (512, 2048, 8192, 32768, 131072)  # tokens at which memory is computed; between them it is at most on the line


@dataclass(frozen=True)
class Outlook:
    """What `plan` found out."""

    now: Footprint
    flops: Flops  # of one micro-batch, the reference's forward included
    head: str  # how the head is computed
    fits: list[tuple[int, int]]  # GB of a device, the largest max_tokens that fits (0: none)
    remedies: list[tuple[str, int]]  # options, bytes at the peak with them


def plan(config: RunConfig, *, scored: float = 1.0) -> Outlook:
    """Predict the run that `config` describes. `scored` is the share of tokens that are scored; 1 is the most that can be.

    Micro-batches are full (`max_tokens`) and several to a step. Raises ConfigError for an objective whose memory is not that of one model
    and its head (distill), ModelError for a model that cannot run without storage.
    """
    if config.name == "distill":
        raise ConfigError("plan does not know the memory of distill, which holds a teacher as well; plan sft for the student's part")
    if config.max_tokens == "auto":
        raise ConfigError(
            "max_tokens auto is what a run asks the device that it finds; give plan a number, its table says the largest for each size"
        )
    if not 0 < scored <= 1:
        raise ConfigError(f"scored must be a share in (0, 1], got {scored}")
    device = torch.device("cpu" if config.model.device == "cpu" else "cuda")  # a device that need not be here
    model = empty_model(config)

    def at(tokens: int, changed: RunConfig | None = None) -> int:
        chosen = config if changed is None else changed
        rows = max(1, round(scored * tokens))
        return footprint(model if changed is None else empty_model(changed), chosen, tokens=tokens, rows=rows, device=device).peak

    rows = max(1, round(scored * config.token_limit))
    now = footprint(model, config, tokens=config.token_limit, rows=rows, device=device)
    lengths = _lengths(config)
    flops = model_flops(model, config.token_limit, lengths, rows)
    if forwards_reference(config):
        flops = Flops(*(a + b for a, b in zip(flops, model_flops(model, config.token_limit, lengths, rows, backward=False))))
    chosen = head_plan(model, config, rows, device)
    points = [(tokens, at(tokens)) for tokens in GRID]
    fits = [(size, largest(points, room(size))) for size in SIZES]
    remedies = [(text, at(changed.token_limit, changed)) for text, changed in _remedies(config)]
    return Outlook(now, flops, "scores, without a vocabulary" if chosen is None else str(chosen).splitlines()[0], fits, remedies)


def room(size: float) -> float:
    """Bytes that a run may hold on a device of `size` GB."""
    return (size * 1e9 - CONTEXT) / (1 + WASTE)


def proposal(outlook: Outlook, size: float) -> str | None:
    """The options that let a run fit a device of `size` GB and change least: of those that fit, the ones that save least; None: none does.

    Options that only cut the micro-batch smaller, which the table of what fits says already, are left out.
    """
    good = [(peak, text) for text, peak in outlook.remedies if peak <= room(size) and not text.startswith("--max_tokens")]
    return max(good)[1] if good else None


def empty_model(config: RunConfig) -> Any:
    """The model of the run on the meta device: its config alone is read."""
    from transformers import AutoConfig, AutoModelForCausalLM

    options, lora = replace(config.model, device="meta"), config.lora
    if (Path(options.path) / "adapter_config.json").is_file():
        options, lora = replace(options, path=_adapter(options.path)["base_model_name_or_path"]), LoraConfig(adapter=options.path)
    try:
        read = AutoConfig.from_pretrained(options.path, trust_remote_code=options.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(f"{options.path}: cannot read the model's config: {error}") from error
    check_config(read, options.path)
    attention.register()
    dtype = getattr(torch, options.dtype) if options.dtype != "auto" else read.dtype or torch.float32
    if config.name == "reward":
        read.tie_word_embeddings = False
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(read, dtype=dtype, attn_implementation=attention.NAME)
        if config.name == "reward":  # another head, of one row
            model.lm_head = nn.Linear(read.get_text_config().hidden_size, 1, bias=False, dtype=dtype)
        if lora.adapter is None:
            return prepare(model, options, lora)
        saved = _adapter(lora.adapter)
        same = LoraConfig(r=saved["r"], alpha=saved.get("lora_alpha"), targets=saved["target_modules"])
        same.modules_to_save = saved.get("modules_to_save") or []
        return add_adapter(prepare(model, options, None), same)


def forwards_reference(config: Any) -> bool:
    """Whether every micro-batch goes through a reference, too."""
    kind = getattr(config, "reference", None)
    if kind is None or getattr(config, "reference_free", False):
        return False
    return kind in ("adapter", "copy") or keeps_copy(config) or (kind == "auto" and config.lora.enabled)


def largest(points: Sequence[tuple[int, float]], room: float) -> int:
    """The most tokens that fit into `room`, a multiple of 64; memory between the points lies on lines, and after the last on its line.

    >>> largest([(100, 1000), (300, 3000)], 2000), largest([(100, 1000), (300, 3000)], 5000), largest([(100, 1000), (300, 3000)], 999)
    (192, 448, 0)
    """
    if points[0][1] > room:
        return 0
    (x0, y0), (x1, y1) = points[0], points[1]
    for after in points[1:]:
        (x0, y0), (x1, y1) = (x1, y1) if after is not points[1] else (x0, y0), after
        if y1 > room:
            break
    return int(x0 + (room - y0) * (x1 - x0) / (y1 - y0)) // 64 * 64


def show(config: RunConfig, outlook: Outlook, console: Any, *, tflops: float | None = None) -> None:
    """Print the tables."""
    from rich.table import Table

    now, tokens = outlook.now, config.token_limit
    table = Table(title=f"{config.name} of {config.model.path}, {tokens:,} tokens a micro-batch", title_justify="left")
    for name, side in (("memory", "left"), ("GiB", "right"), ("share", "right")):
        table.add_column(name, justify=side)  # type: ignore[arg-type]
    for part in PARTS:
        if size := now.parts[part]:
            table.add_row(part, _gib(size), f"{size / now.peak:.0%}")
    table.add_section()
    table.add_row(f"peak ({now.moment})", _gib(now.peak), "100%", style="bold")
    console.print(table)
    if now.on_host:
        console.print(f"in the host's memory: {_gib(now.on_host)} GiB of moments and copies of weights", highlight=False)
    console.print(f"head: {outlook.head}", highlight=False)
    total = outlook.flops.total
    speed = f"; at {tflops:g} TFLOP/s {total / tflops / 1e12:.3g} s, {tokens * tflops * 1e12 / total:,.0f} tokens/s" if tflops else ""
    console.print(
        f"arithmetic: {total / 1e12:.3g} TFLOP a micro-batch, {outlook.flops.head / total:.0%} in the head{speed}", highlight=False
    )
    table = Table(title="what fits", title_justify="left")
    for name in ("device, GB", "largest --max_tokens", ""):
        table.add_column(name, justify="right" if name else "left")
    for size, most in outlook.fits:
        table.add_row(str(size), f"{most:,}" if most else "none", "" if most >= tokens else f"not {tokens:,}: see below")
    console.print(table)
    console.print("A sample must fit with all its completions: it may be as long as the largest --max_tokens.", highlight=False)
    for size, most in outlook.fits:
        if most < tokens and (text := proposal(outlook, size)):
            command = f"fastalign {config.name} --model.path {config.model.path} --max_tokens {tokens} {text}"
            console.print(f"{size} GB, besides your other options:\n  {command}", highlight=False, soft_wrap=True)
    table = Table(title="what to set for less", title_justify="left")
    for name, side in (("options", "left"), ("peak, GiB", "right"), ("saved", "right")):
        table.add_column(name, justify=side)  # type: ignore[arg-type]
    for text, peak in sorted(outlook.remedies, key=lambda remedy: remedy[1]):
        table.add_row(text, _gib(peak), f"{1 - peak / now.peak:.0%}")
    console.print(table)
    if config.name in ("grpo", "rloo"):
        console.print("The keys and values of sampling are not counted.", highlight=False)


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}" if size >= GIB / 4 else f"{size / GIB:.4f}"


def _lengths(config: RunConfig) -> list[int]:
    """Sequences as long as the data may have, that fill a micro-batch."""
    longest = min(getattr(config.data, "max_length", None) or 1024, config.token_limit)
    return [longest] * (config.token_limit // longest)


def _remedies(config: Any) -> list[tuple[str, RunConfig]]:
    """Options that the run does not have yet, and the run with them."""

    def changed(change: Callable[[Any], None]) -> RunConfig:
        other = copy.deepcopy(config)
        change(other)
        return other

    found: list[tuple[str, RunConfig]] = []
    if not config.model.gradient_checkpointing:
        found.append(("--model.gradient_checkpointing true", changed(lambda c: setattr(c.model, "gradient_checkpointing", True))))
    if config.optimizer == "adamw":
        found.append(("--optimizer adamw_8bit", changed(lambda c: setattr(c, "optimizer", "adamw_8bit"))))
        if config.model.device != "cpu" and not config.stochastic_rounding:
            found.append(("--optimizer adamw_offload", changed(lambda c: setattr(c, "optimizer", "adamw_offload"))))
    if config.model.dtype == "bfloat16" and config.master_weights and config.optimizer != "adamw_offload":
        found.append((f"{_SMALLEST} --model.gradient_checkpointing true", changed(_smallest)))
    if not config.lora.enabled and not (Path(config.model.path) / "adapter_config.json").is_file():
        found.append(("--lora.r 16", changed(lambda c: setattr(c.lora, "r", 16))))
        if not config.model.gradient_checkpointing:
            found.append(("--lora.r 16 --model.gradient_checkpointing true", changed(_both)))
            if config.model.device != "cpu" and config.model.quantization is None:
                found.append((f"--lora.r 16 --model.gradient_checkpointing true {_PACKED}", changed(_packed)))
    if keeps_copy(config) and not getattr(config, "sync_ref_model", False):
        found.append(("--reference cache", changed(lambda c: setattr(c, "reference", "cache"))))
    if config.model.dtype != "bfloat16":
        found.append(("--model.dtype bfloat16", changed(lambda c: setattr(c.model, "dtype", "bfloat16"))))
    found.append((f"--max_tokens {config.token_limit // 2}", changed(lambda c: setattr(c, "max_tokens", c.token_limit // 2))))
    if config.logits_budget is None or config.logits_budget > 32 << 20:
        found.append((f"--logits_budget {32 << 20}", changed(lambda c: setattr(c, "logits_budget", 32 << 20))))
    return found


def _both(config: Any) -> None:
    config.lora.r, config.model.gradient_checkpointing = 16, True


_PACKED = "--model.quantization nf4"


def _packed(config: Any) -> None:
    _both(config)
    config.model.quantization = "nf4"


_SMALLEST = "--optimizer adamw_8bit --master_weights false --stochastic_rounding true"


def _smallest(config: Any) -> None:
    config.optimizer, config.master_weights, config.stochastic_rounding = "adamw_8bit", False, True
    config.model.gradient_checkpointing = True


def _adapter(path: str) -> dict[str, Any]:
    check_adapter_folder(path)
    return json.loads((Path(path) / "adapter_config.json").read_text())
