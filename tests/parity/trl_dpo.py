"""Runs of TRL's own DPOTrainer, as the oracle: every metric it logs, in full precision, and the weights it ends with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

# Adam divides by the root of the squared gradient: an epsilon above float32 noise keeps coordinates whose gradient is only
# rounding error from moving by a full learning rate in a random direction, in both trainers alike.
SETTINGS = {"learning_rate": 1e-3, "beta": 0.1, "max_steps": 3, "adam_epsilon": 1e-6, "max_grad_norm": 0.5}
BATCH = 8


@dataclass
class Run:
    steps: list[dict[str, float]]  # metrics of each optimizer step
    weights: dict[str, torch.Tensor]  # the trained ones, by the names that Transformers or PEFT save them under


class RecordingTrainer(DPOTrainer):
    """DPOTrainer that keeps the loss of each step before the log rounds it."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        self.exact_losses.append((loss[0] if isinstance(loss, tuple) else loss).item())
        return loss


def run_trl(folder: Path, model: Path, pairs: Path, *, loss_type: str, adapter: Path | None = None, **options: Any) -> Run:
    """Three optimizer steps of `BATCH` pairs, all of them in one micro-batch, on the CPU in float32."""
    policy: Any = str(model)
    if adapter is not None:
        policy = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), adapter, is_trainable=True)
    arguments = DPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=BATCH,
        loss_type=[loss_type],
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        **SETTINGS,
        **options,
    )
    trainer = RecordingTrainer(
        model=policy,
        args=arguments,
        train_dataset=load_dataset("json", data_files=str(pairs), split="train", cache_dir=str(folder / "cache")),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    trainer.exact_losses = []
    trainer.train()
    steps = [{**row, "loss": loss} for row, loss in zip(trainer.state.log_history, trainer.exact_losses, strict=False)]
    return Run(steps, {k: v.detach().clone() for k, v in trainer.model.named_parameters() if v.requires_grad})
