"""Whole runs on a tiny model: what they write, what they refuse, and how they end."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import no_report
from safetensors.torch import load_file
from tiny import preference_rows, save_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastalign import train
from fastalign.data.config import DataConfig
from fastalign.errors import CheckpointError, ConfigError, FastalignError, NumericsError, OutputError
from fastalign.models.config import LoraConfig, ModelConfig
from fastalign.objectives.dpo import DPO, DPOConfig
from fastalign.train.metrics import read_metrics


@pytest.fixture(autouse=True)
def _report_in_one_test_only(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "writes_its_folder" not in request.node.name:
        monkeypatch.setattr("fastalign.train.loop.write_report", no_report)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny(folder / "model", "qwen3")
    save_tiny(folder / "other", "qwen3", seed=1)
    rows = preference_rows(24)
    for name, part in {"pairs": rows[:18], "heldout": rows[18:]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


def config(inputs: Path, output: Path, **options: Any) -> DPOConfig:
    base: dict[str, Any] = {
        "model": ModelConfig(path=str(inputs / "model")),
        "data": DataConfig(path=str(inputs / "pairs.jsonl"), eval_path=str(inputs / "heldout.jsonl")),
        "output": str(output),
        "batch_size": 4,
        "max_tokens": 512,
        "learning_rate": 1e-3,
        "save_every": 2,
        "eval_every": 3,
    }
    return DPOConfig(**(base | options))


def without_clock(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if not name.startswith(("perf/", "mem/"))}


@pytest.mark.parametrize("lora", [LoraConfig(), LoraConfig(r=4)], ids=["full", "lora"])
def test_a_run_learns_and_writes_its_folder(inputs: Path, tmp_path: Path, lora: LoraConfig) -> None:
    run = tmp_path / "run"
    seen: list[int] = []
    rate = 1e-3 if lora.r == 0 else 1e-2
    settings = config(inputs, run, lora=lora, epochs=4, learning_rate=rate, lr_schedule="constant")
    result = train(settings, callbacks=[lambda step, metrics: seen.append(step)])
    assert result.step == 20 == len(seen)
    assert {p.name for p in run.iterdir()} >= {"config.yaml", "metrics.jsonl", "checkpoints", "final", "report.html"}
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-000018", "step-000020"]
    assert not [p for p in run.rglob("*") if p.suffix in (".bin", ".pt", ".pkl", ".pth")]

    rows = read_metrics(run / "metrics.jsonl")
    training = [row for row in rows if "loss" in row]
    assert [row["step"] for row in training] == list(range(1, 21))
    assert [row["step"] for row in rows if "eval_loss" in row] == [3, 6, 9, 12, 15, 18, 20]
    assert training[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)  # the policy is still the reference
    assert training[-1]["loss"] < 0.9 * math.log(2)
    assert training[-1]["rewards/accuracies"] == 1.0
    assert training[-1]["epoch"] == 4.0
    assert training[4]["epoch"] == 1.0
    trl = {"loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected"}
    trl |= {"logits/chosen", "logits/rejected", "entropy", "mean_token_accuracy", "num_tokens", "grad_norm", "learning_rate", "epoch"}
    assert trl | {"perf/tokens_per_second", "perf/step_seconds", "mem/peak_rss_gib"} <= training[0].keys()
    assert result.eval_metrics.keys() == {k for k in rows[-1] if k.startswith("eval_")}

    if lora.r == 0:
        before = load_file(inputs / "model" / "model.safetensors")
        model = AutoModelForCausalLM.from_pretrained(run / "final")
        moved = [name for name, value in before.items() if name in model.state_dict() and not torch.equal(model.state_dict()[name], value)]
        assert len(moved) > 10
    else:
        assert (run / "final" / "adapter_model.safetensors").exists()
    assert AutoTokenizer.from_pretrained(run / "final").eos_token_id is not None


def test_step_metrics_count_tokens_and_rates(inputs: Path, tmp_path: Path) -> None:
    train(config(inputs, tmp_path / "run", learning_rate=0.01))
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert [row["learning_rate"] for row in rows] == pytest.approx([0.01 * (5 - k) / 5 for k in range(5)])
    assert len(rows) == 5
    from fastalign.data.preferences import load_preferences
    from fastalign.data.tokenizer import load_tokenizer

    data = load_preferences(config(inputs, tmp_path).data, load_tokenizer(inputs / "model"))
    assert rows[-1]["num_tokens"] == sum(sample.num_tokens for sample in data.samples)


def test_max_tokens_does_not_change_the_run(inputs: Path, tmp_path: Path) -> None:
    for name, size in {"large": 4096, "small": 80}.items():
        train(config(inputs, tmp_path / name, max_tokens=size, data=DataConfig(path=str(inputs / "pairs.jsonl"), max_length=40)))
    for large, small in zip(*(read_metrics(tmp_path / name / "metrics.jsonl") for name in ("large", "small")), strict=True):
        assert without_clock(small) == pytest.approx(without_clock(large), rel=1e-3, abs=1e-4)


def test_bfloat16_with_master_weights_follows_float32(inputs: Path, tmp_path: Path) -> None:
    losses = {}
    for dtype in ("float32", "bfloat16"):
        model = ModelConfig(path=str(inputs / "model"), dtype=dtype)
        train(config(inputs, tmp_path / dtype, model=model, learning_rate=3e-4, epochs=4))
        losses[dtype] = [row["loss"] for row in read_metrics(tmp_path / dtype / "metrics.jsonl") if "loss" in row]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], abs=0.08)
    assert losses["float32"][-1] < 0.6
    final = load_file(tmp_path / "bfloat16" / "final" / "model.safetensors")
    assert {value.dtype for value in final.values()} == {torch.bfloat16}


def test_another_run_in_the_folder_is_refused_or_overwritten(inputs: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(config(inputs, run, max_steps=1))
    before = (run / "metrics.jsonl").read_text()
    with pytest.raises(OutputError, match=r"holds another run.*--resume.*--overwrite"):
        train(config(inputs, run, max_steps=1))
    assert (run / "metrics.jsonl").read_text() == before
    train(config(inputs, run, max_steps=2, overwrite=True))
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl") if "loss" in row] == [1, 2]
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-000002"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"beta": 0.0}, ConfigError, "beta must be positive"),
        ({"max_tokens": 20}, ConfigError, r"max_tokens 20 is less than the longest sample \(row \d+, \d+ tokens"),
        ({"data": DataConfig(path="nowhere.jsonl")}, FastalignError, "nowhere.jsonl"),
        ({"model": ModelConfig(path="no/such/model")}, FastalignError, "no/such/model"),
        ({"loggers": ["tensorbord"]}, ConfigError, "tensorboard"),
    ],
)
def test_bad_input_leaves_nothing_behind(
    inputs: Path, tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        train(config(inputs, tmp_path / "run", **options))
    assert list(tmp_path.iterdir()) == []


def test_a_failed_overwrite_keeps_the_old_run(inputs: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(config(inputs, run, max_steps=1))
    with pytest.raises(ConfigError):
        train(config(inputs, run, overwrite=True, max_tokens=20))
    assert (run / "final").is_dir()


class Poisoned:
    """Makes the loss of chosen steps not finite, by way of the objective."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, steps: set[int], value: float) -> None:
        self.step = 0
        original = DPO.loss

        def loss(objective: DPO, batch: Any, denominators: Any) -> Any:
            found, sums = original(objective, batch, denominators)
            if torch.is_grad_enabled():
                self.step += 1
                if self.step in steps:
                    parameter = next(p for p in objective.model.parameters() if p.requires_grad)
                    return found + parameter.sum() * value, sums | {"loss": sums["loss"] * value}
            return found, sums

        monkeypatch.setattr(DPO, "loss", loss)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_skipped_counted_and_named(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, value: float
) -> None:
    Poisoned(monkeypatch, {2, 4}, value)
    with caplog.at_level(logging.WARNING, logger="fastalign"):
        train(config(inputs, tmp_path / "run", save_every=1, keep_checkpoints=9, eval_every=0))
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert [row["skipped_steps"] for row in rows] == [0, 1, 1, 2, 2]
    assert [math.isfinite(row["loss"]) for row in rows] == [True, False, True, False, True]
    named = [record.message for record in caplog.records if "skipped" in record.message]
    assert [message.split(":")[0] for message in named] == ["step 2", "step 4"]
    assert "gradient not finite in 1 weights, first model.embed_tokens.weight" in named[0]
    weights = {k: load_file(tmp_path / "run" / "checkpoints" / f"step-{k:06d}" / "weights.safetensors") for k in (1, 2, 3)}
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[2].items())
    assert not all(torch.equal(value, weights[3][name]) for name, value in weights[2].items())


def test_too_many_such_steps_in_a_row_end_the_run(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Poisoned(monkeypatch, {1, 3, 4, 5}, math.nan)
    with pytest.raises(NumericsError, match=r"step 5: loss or gradient not finite in 3 steps in a row .*--learning_rate"):
        train(config(inputs, tmp_path / "run", max_nonfinite=3, epochs=3, save_every=2))
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]  # the last one is on record
    assert not (tmp_path / "run" / "final").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint(inputs: Path, tmp_path: Path, number: signal.Signals) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    result = train(config(inputs, run), callbacks=[lambda step, _: os.kill(os.getpid(), number) if step == 3 else None])
    assert (result.interrupted, result.step) == (number.name, 3)
    assert not (run / "final").exists()
    assert (run / "checkpoints" / "step-000003").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

    assert train(config(inputs, run, resume=True)).interrupted is None
    train(config(inputs, whole))
    rows = [[without_clock(row) for row in read_metrics(path / "metrics.jsonl")] for path in (run, whole)]
    assert rows[0] == rows[1]


def test_resume_refuses_other_options_data_and_model(inputs: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(config(inputs, run, max_steps=2))
    with pytest.raises(CheckpointError, match=r"beta was 0.1 and is 0.2, max_steps was 2 and is 3"):
        train(config(inputs, run, max_steps=3, beta=0.2, resume=True))

    copies = tmp_path / "copies"
    copies.mkdir()
    os.symlink(inputs / "model", copies / "model")
    (copies / "pairs.jsonl").write_text((inputs / "pairs.jsonl").read_text())
    (copies / "heldout.jsonl").write_text((inputs / "heldout.jsonl").read_text())
    run = tmp_path / "second"
    train(config(copies, run, max_steps=2))
    (copies / "model").unlink()
    os.symlink(inputs / "other", copies / "model")
    with pytest.raises(CheckpointError, match="of another model"):
        train(config(copies, run, max_steps=2, resume=True))
    (copies / "model").unlink()
    os.symlink(inputs / "model", copies / "model")
    (copies / "pairs.jsonl").write_text((inputs / "heldout.jsonl").read_text())
    with pytest.raises(CheckpointError, match="of another data"):
        train(config(copies, run, max_steps=2, resume=True))


def test_a_full_disk_while_saving_keeps_the_last_good_checkpoint(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastalign.train import checkpoint

    run, whole, real = tmp_path / "run", tmp_path / "whole", checkpoint.save_file

    def save_file(tensors: dict[str, Any], path: Path) -> None:
        real(tensors, path)
        if "step-000004" in str(path) and path.name.startswith("optimizer"):
            raise OSError(28, os.strerror(28))

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    with pytest.raises(OutputError, match=r"step-000004: cannot write \(No space left on device\).*--resume"):
        train(config(inputs, run))
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-000002"]
    monkeypatch.setattr(checkpoint, "save_file", real)
    train(config(inputs, run, resume=True))
    train(config(inputs, whole))
    assert (run / "final" / "model.safetensors").read_bytes() == (whole / "final" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("first", ["import fastalign", "import fastalign.train.metrics", "import fastalign.train.loop; fastalign.train"])
def test_train_is_callable_whatever_was_imported_first(first: str) -> None:
    """The package `fastalign.train` and the function of that name are one object to the user."""
    code = f"{first}\nimport fastalign\nfrom fastalign import train\nassert train is fastalign.train\ntrain(fastalign.DPOConfig())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ConfigError: output: no folder given" in done.stderr
