"""Runs of TRL's own trainers, as the oracle: every metric they log, the loss in full precision, and the weights they end with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_dataset
from transformers import AutoTokenizer

# Adam divides by the root of the squared gradient: an epsilon above float32 noise keeps coordinates whose gradient is only
# rounding error from moving by a full learning rate in a random direction, in both trainers alike.
SETTINGS = {"learning_rate": 1e-3, "max_steps": 3, "adam_epsilon": 1e-6, "max_grad_norm": 0.5}
BATCH = 8
RELATIVE = 1e-4


@dataclass
class Run:
    steps: list[dict[str, float]]  # metrics of each optimizer step
    weights: dict[str, torch.Tensor]  # the trained ones, by the names that Transformers or PEFT save them under


def run_trl(folder: Path, trainer_class: Any, config_class: Any, model: Any, data: Path, *, tokenizer: Path, **options: Any) -> Run:
    """Three optimizer steps of `BATCH` samples, all of them in one micro-batch, on the CPU in float32."""

    class RecordingTrainer(trainer_class):  # type: ignore[misc]
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            losses.append((loss[0] if isinstance(loss, tuple) else loss).item())  # before the log rounds it
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


def assert_same_run(ours: Run, trl: Run, start: dict[str, torch.Tensor], metrics: tuple[str, ...]) -> None:
    """Every metric of three steps, the weights at the end, and how far they moved, to `RELATIVE`."""
    assert len(ours.steps) == 3
    assert len(trl.steps) >= 3
    for step, (mine, theirs) in enumerate(zip(ours.steps, trl.steps), 1):
        for name in metrics:
            assert mine[name] == pytest.approx(theirs[name], rel=RELATIVE, abs=2e-6), f"step {step}: {name}"
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
