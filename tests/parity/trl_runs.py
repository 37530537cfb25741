"""Runs of TRL's own trainers, as the oracle, and of ours: every metric, the loss in full precision, and the weights they end with."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import load_dataset
from safetensors.torch import load_file
from tiny import save_tiny, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastalign import train
from fastalign.models.config import LoraConfig, ModelConfig

# Adam divides by the root of the squared gradient: an epsilon above float32 noise keeps coordinates whose gradient is only
# rounding error from moving by a full learning rate in a random direction, in both trainers alike.
SETTINGS = {"learning_rate": 1e-3, "max_steps": 3, "adam_epsilon": 1e-6, "max_grad_norm": 0.5}
BATCH = 8
RELATIVE = 1e-4


@dataclass
class Run:
    steps: list[dict[str, float]]  # metrics of each optimizer step
    weights: dict[str, torch.Tensor]  # the trained ones, by the names that Transformers or PEFT save them under


def write_inputs(folder: Path, files: dict[str, list[dict[str, Any]]]) -> Path:
    """A model, an adapter whose update is not zero, and JSONL files of these rows."""
    save_tiny(folder / "model", "qwen3")
    torch.manual_seed(1)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    peft.get_peft_model(tiny_model("qwen3"), config).save_pretrained(folder / "adapter")
    write_rows(folder, files)
    return folder


def write_rows(folder: Path, files: dict[str, list[dict[str, Any]]]) -> None:
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def with_adapter(folder: Path) -> Any:
    """The policy of a LoRA run, for TRL."""
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    return peft.PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True)


def starting_weights(folder: Path, lora: bool, model: str = "model") -> dict[str, torch.Tensor]:
    return load_file(folder / ("adapter/adapter_model.safetensors" if lora else f"{model}/model.safetensors"))


def run_ours(config_class: Any, folder: Path, output: Path, data: Any, *, lora: bool, model: str = "model", **options: Any) -> Run:
    """The same three steps in ours, cut into several micro-batches."""
    steps: list[dict[str, float]] = []
    config = config_class(
        model=ModelConfig(path=str(folder / model)),
        data=data,
        lora=LoraConfig(adapter=str(folder / "adapter")) if lora else LoraConfig(),
        output=str(output),
        **{"batch_size": BATCH, "max_tokens": 150, **SETTINGS, **options},
    )
    result = train(config, callbacks=[lambda step, metrics: steps.append(dict(metrics))])
    return Run(steps, load_file(result.output / "final" / ("adapter_model.safetensors" if lora else "model.safetensors")))


def run_trl(folder: Path, trainer_class: Any, config_class: Any, model: Any, data: Path, *, tokenizer: Path, **options: Any) -> Run:
    """Three optimizer steps of `BATCH` samples, all of them in one micro-batch, on the CPU in float32."""

    class RecordingTrainer(trainer_class):  # type: ignore[misc]
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            losses.append(loss.item())  # before the log rounds it
            return loss

    losses: list[float] = []
    arguments = config_class(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=BATCH,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        **{**SETTINGS, **options},
    )
    trainer = RecordingTrainer(
        model=model,
        args=arguments,
        train_dataset=load_dataset("json", data_files=str(data), split="train", cache_dir=str(folder / "cache")),
        processing_class=AutoTokenizer.from_pretrained(tokenizer),
    )
    trainer.train()
    steps = [{**row, "loss": loss} for row, loss in zip(trainer.state.log_history, losses, strict=False)]
    return Run(steps, {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad})


def assert_same_run(
    ours: Run, trl: Run, start: dict[str, torch.Tensor], metrics: tuple[str, ...], absolute: Callable[[str], float] = lambda name: 2e-6
) -> None:
    """Every metric of three steps, the weights at the end, and how far they moved, to `RELATIVE`, metrics near 0 to `absolute`."""
    assert len(ours.steps) == 3
    assert len(trl.steps) >= 3
    for step, (mine, theirs) in enumerate(zip(ours.steps, trl.steps), 1):
        for name in metrics:
            assert mine[name] == pytest.approx(theirs[name], rel=RELATIVE, abs=absolute(name)), f"step {step}: {name}"
    assert all(step["grad_norm"] > 0 for step in trl.steps[:2]), "no gradient in step 2: the comparison would prove nothing"
    weights = {_saved_name(name): value for name, value in trl.weights.items()}
    assert weights.keys() <= ours.weights.keys()
    for name, theirs in weights.items():
        moved = (theirs - start[name]).norm()
        assert moved > 0, f"{name} never moved in TRL"
        difference = (ours.weights[name] - theirs).norm()
        assert difference <= RELATIVE * theirs.norm(), name
        assert difference <= 10 * RELATIVE * moved, f"{name}: the update itself differs"


def _saved_name(name: str) -> str:
    return name.replace(".modules_to_save.default.", ".").replace(".default.", ".")
