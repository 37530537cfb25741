"""One training run of one side, in a process of its own: `python -m bench.dpo_sides SPEC.json` writes the spec's `result` file.

Both sides are called as a user would call them. What is timed:
    steps      from the end of one optimizer step to the end of the next, data loading and logging included
    reference  a pass over the data before training, where the side makes one
What is weighed: peak resident memory up to the end of the last step, less that when model and data had been loaded. For
TRL this is after the trainer's constructor, which also loads the reference model; for fastalign before the reference pass.
Tokens are those of the sequences (the prompt once per completion), padding not counted.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.machine import peak_rss_mib, reset_peak_rss, rss_mib

STARTED = time.perf_counter()


@dataclass(frozen=True)
class Spec:
    side: str  # fastalign or trl
    model: str
    pairs: str
    output: str
    result: str
    options: dict[str, Any] = field(default_factory=dict)  # of the side's own config
    lora_rank: int = 0
    adapter: str | None = None  # an existing adapter to train further
    epochs: int = 1
    batch_size: int = 8
    learning_rate: float = 1e-4
    beta: float = 0.1
    seed: int = 42


@dataclass
class Recording:
    """What a run leaves behind; times in seconds, memory in MiB."""

    losses: list[float] = field(default_factory=list)  # per optimizer step
    tokens: list[int] = field(default_factory=list)  # per optimizer step
    ends: list[float] = field(default_factory=list)  # clock at the end of each optimizer step
    reference_seconds: float = 0.0
    startup_seconds: float = 0.0  # from the first import to the first optimizer step, without the reference pass
    rss_before: float = 0.0
    rss_peak: float = 0.0

    def loaded(self) -> None:
        """Model and data are in memory."""
        self.startup_seconds = time.perf_counter() - STARTED
        self.rss_before = rss_mib()
        reset_peak_rss()

    def step_ended(self) -> None:
        self.ends.append(time.perf_counter())
        self.rss_peak = peak_rss_mib()


def run_fastalign(spec: Spec) -> Recording:
    from fastalign import DPOConfig, train
    from fastalign.data.config import DataConfig
    from fastalign.models.config import LoraConfig, ModelConfig

    record = Recording()

    class TimedConfig(DPOConfig):
        def objective(self, model: Any, data: Any, folder: Any) -> Any:
            record.loaded()
            started = time.perf_counter()
            objective = super().objective(model, data, folder)
            record.reference_seconds = time.perf_counter() - started
            return objective

    def on_step(_: int, metrics: dict[str, float]) -> None:
        record.step_ended()
        record.losses.append(metrics["loss"])
        record.tokens.append(int(metrics["num_tokens"]) - sum(record.tokens))

    config = TimedConfig(
        model=ModelConfig(path=spec.model, dtype="float32"),
        data=DataConfig(path=spec.pairs),
        lora=LoraConfig(adapter=spec.adapter) if spec.adapter else LoraConfig(r=spec.lora_rank),
        output=spec.output,
        batch_size=spec.batch_size,
        epochs=spec.epochs,
        learning_rate=spec.learning_rate,
        beta=spec.beta,
        seed=spec.seed,
        save_every=0,
        **spec.options,
    )
    train(config, callbacks=[on_step])
    return record


def run_trl(spec: Spec) -> Recording:
    import torch
    from datasets import load_dataset
    from peft import LoraConfig, PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    record = Recording()

    class TimedTrainer(DPOTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            record.losses.append((loss[0] if isinstance(loss, tuple) else loss).item())
            record.tokens.append(int(inputs["attention_mask"].sum()))
            return loss

        def _precompute_ref_logps(self, *args: Any) -> Any:
            started = time.perf_counter()
            dataset = super()._precompute_ref_logps(*args)
            record.reference_seconds += time.perf_counter() - started
            return dataset

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            record.step_ended()

    arguments = DPOConfig(
        output_dir=spec.output,
        per_device_train_batch_size=spec.batch_size,
        num_train_epochs=spec.epochs,
        learning_rate=spec.learning_rate,
        beta=spec.beta,
        seed=spec.seed,
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **spec.options,
    )
    model: Any = spec.model
    if spec.adapter:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), spec.adapter, is_trainable=True)
    lora = LoraConfig(task_type="CAUSAL_LM", r=spec.lora_rank, lora_alpha=2 * spec.lora_rank, target_modules="all-linear")
    trainer = TimedTrainer(
        model=model,
        args=arguments,
        train_dataset=load_dataset("json", data_files=spec.pairs, split="train"),
        processing_class=AutoTokenizer.from_pretrained(spec.model),
        peft_config=lora if spec.lora_rank and not spec.adapter else None,
        callbacks=[Clock()],
    )
    record.loaded()
    record.startup_seconds -= record.reference_seconds
    trainer.train()
    return record


if __name__ == "__main__":
    task = Spec(**json.loads(Path(sys.argv[1]).read_text()))
    done = {"fastalign": run_fastalign, "trl": run_trl}[task.side](task)
    Path(task.result).write_text(json.dumps(asdict(done)))
