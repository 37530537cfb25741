"""`fastalign sft` and TRL 1.16's SFTTrainer give the same three optimizer steps: same model folder, same JSONL file, float32.

Ours cuts each step into several packed micro-batches, TRL pads it into one. Steps 2 and 3 see weights that earlier steps moved,
so they are right only if loss, gradient, clipping, schedule and AdamW were.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import preference_rows, save_tiny, tiny_model

from fastalign import train
from fastalign.data.config import SupervisedDataConfig
from fastalign.models.config import LoraConfig, ModelConfig
from fastalign.objectives.sft import SFTConfig

pytest.importorskip("trl", reason="TRL is the oracle; without it the equality of a step with TRL's is unproven")
import peft
import trl
from transformers import AutoModelForCausalLM
from trl_runs import BATCH, SETTINGS, Run, assert_same_run, run_trl

METRICS = ("loss", "grad_norm", "learning_rate", "entropy", "mean_token_accuracy", "num_tokens")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, an adapter whose update is not zero, and files of exactly one step's samples."""
    folder = tmp_path_factory.mktemp("parity")
    save_tiny(folder / "model", "qwen3")
    torch.manual_seed(1)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    peft.get_peft_model(tiny_model("qwen3"), config).save_pretrained(folder / "adapter")
    plain, chat = preference_rows(BATCH), preference_rows(BATCH, conversational=True)
    files: dict[str, list[dict[str, Any]]] = {
        "completion": [{"prompt": row["prompt"], "completion": row["chosen"]} for row in plain],
        "text": [{"text": row["prompt"] + row["chosen"]} for row in plain],
        "messages": [{"messages": row["prompt"] + row["chosen"]} for row in chat],
    }
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def trl_run(folder: Path, data: str, lora: bool, **options: Any) -> Run:
    model: Any = str(folder / "model")
    if lora:
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        model = peft.PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True)
    file = folder / f"{data}.jsonl"
    return run_trl(folder, trl.SFTTrainer, trl.SFTConfig, model, file, tokenizer=folder / "model", **options)


def our_run(folder: Path, output: Path, data: str, lora: bool, max_length: int | None = 1024, **options: Any) -> Run:
    steps: list[dict[str, float]] = []
    config = SFTConfig(
        model=ModelConfig(path=str(folder / "model")),
        data=SupervisedDataConfig(path=str(folder / f"{data}.jsonl"), max_length=max_length),
        lora=LoraConfig(adapter=str(folder / "adapter")) if lora else LoraConfig(),
        output=str(output),
        batch_size=BATCH,
        max_tokens=150,
        **SETTINGS,
        **options,
    )
    result = train(config, callbacks=[lambda step, metrics: steps.append(dict(metrics))])
    return Run(steps, load_file(result.output / "final" / ("adapter_model.safetensors" if lora else "model.safetensors")))


def start(folder: Path, lora: bool) -> dict[str, torch.Tensor]:
    return load_file(folder / ("adapter/adapter_model.safetensors" if lora else "model/model.safetensors"))


CASES: dict[str, tuple[str, bool, dict[str, Any], dict[str, Any]]] = {  # data, adapter, options of TRL, ours
    "nll of completions": ("completion", False, {}, {}),
    "dft of completions": ("completion", False, {"loss_type": "dft"}, {"loss_type": "dft"}),
    "nll of texts": ("text", False, {}, {}),
    "nll of conversations": ("messages", False, {}, {}),
    "label smoothing": ("completion", False, {"label_smoothing_factor": 0.2}, {"label_smoothing": 0.2}),
    "dft with an adapter": ("completion", True, {"loss_type": "dft"}, {"loss_type": "dft"}),
    "truncated": ("text", False, {"max_length": 30}, {"max_length": 30}),
}


@pytest.mark.parametrize("case", CASES)
def test_three_steps_equal_trl(folder: Path, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastalign.train.loop.write_report", lambda run: run)
    data, lora, theirs, mine = CASES[case]
    oracle = trl_run(folder, data, lora, **theirs)
    ours = our_run(folder, tmp_path / "run", data, lora, **mine)
    assert_same_run(ours, oracle, start(folder, lora), METRICS)
    if case == "nll of completions":  # the comparison has the power to fail
        other = our_run(folder, tmp_path / "other", data, lora, z_loss=1e-4)
        with pytest.raises(AssertionError, match="step"):
            assert_same_run(other, oracle, start(folder, lora), METRICS)
