"""Runs on a device that has no room for more than so many tokens: the same result in smaller micro-batches, or a named error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import no_report
from safetensors.torch import load_file
from tiny import preference_rows, save_tiny

from fastalign import train
from fastalign.data.config import DataConfig, UnpairedDataConfig
from fastalign.errors import DeviceMemoryError
from fastalign.models.config import LoraConfig, ModelConfig
from fastalign.models.trunk import trunk
from fastalign.objectives import dpo
from fastalign.objectives.dpo import DPOConfig
from fastalign.objectives.kto import KTOConfig
from fastalign.train import loop
from fastalign.train.metrics import read_metrics
from fastalign.train.step import Order


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("fastalign.train.loop.write_report", no_report)
    save_tiny(tmp_path / "model", "qwen3")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in preference_rows(32)))
    return tmp_path


def config(inputs: Path, name: str, **options: Any) -> DPOConfig:
    base: dict[str, Any] = {
        "model": ModelConfig(path=str(inputs / "model")),
        "data": DataConfig(path=str(inputs / "pairs.jsonl"), eval_fraction=0.2),
        "output": str(inputs / name),
        "batch_size": 8,
        "max_tokens": 1024,
        "share_prompts": False,
        "learning_rate": 1e-2,
        "adam_epsilon": 1e-3,  # so that the update is smooth where a gradient is next to nothing
        "save_every": 2,
        "keep_checkpoints": 9,
    }
    return DPOConfig(**(base | options))


class Device:
    """Raises as CUDA does once a micro-batch of more than `room` tokens has drawn random numbers and left gradients behind."""

    def __init__(self, room: int) -> None:
        self.room, self.tokens, self.failures = room, [], 0

    def __call__(self, model: Any, batch: Any) -> Any:
        tokens = len(batch.input_ids)
        out = trunk(model, batch)
        if torch.is_grad_enabled() and not hasattr(batch.input_ids, "fake_mode"):
            self.tokens.append(tokens)
            if tokens > self.room:
                self.failures += 1
                torch.rand(3)
                out.hidden.sum().backward()
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return out


def weights(result: Any) -> dict[str, torch.Tensor]:
    return load_file(next((result.output / "final").glob("*.safetensors")))


@pytest.mark.parametrize("kind", ["full", "lora", "bfloat16"])
def test_the_result_is_that_of_a_run_with_room(kind: str, inputs: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    options: dict[str, Any] = {"lora": LoraConfig(r=4)} if kind == "lora" else {}
    if kind == "bfloat16":
        options["model"] = ModelConfig(path=str(inputs / "model"), dtype="bfloat16")
    plain = train(config(inputs, "plain", **options))
    drawn = torch.rand(2)
    device = Device(300)
    monkeypatch.setattr(dpo, "trunk", device)
    small = train(config(inputs, "small", **options))
    assert torch.equal(torch.rand(2), drawn)  # not a number more than without
    assert device.failures == 2  # 1024, 512; then 256 for the rest of the run
    assert max(device.tokens[device.failures :]) <= 256
    assert "out of memory with micro-batches of 512 tokens: going on with --max_tokens 256" in caplog.text

    tolerance = 1e-5 if kind != "bfloat16" else 2e-2
    rows = [read_metrics(result.output / "metrics.jsonl") for result in (plain, small)]
    for ours, theirs in zip(*rows, strict=True):
        assert set(ours) == set(theirs)
        for name in {"loss", "grad_norm", "eval_loss", "rewards/margins", "logps/chosen"} & set(ours):
            assert ours[name] == pytest.approx(theirs[name], rel=tolerance, abs=tolerance), name
    expected, found = weights(plain), weights(small)
    assert set(expected) == set(found)
    moved = max((value.float() - load_start(inputs, name)).abs().max() for name, value in expected.items()) if kind == "full" else 1.0
    assert moved > 1e-4  # the weights that agree were trained
    for name, value in expected.items():
        assert (found[name].float() - value.float()).abs().max() <= tolerance * max(1.0, value.abs().max()), name


def load_start(inputs: Path, name: str) -> torch.Tensor:
    return load_file(inputs / "model" / "model.safetensors")[name]


def test_a_resumed_run_goes_on_with_the_smaller_batches(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(300)
    monkeypatch.setattr(dpo, "trunk", device)
    whole = train(config(inputs, "whole"))
    cut = config(inputs, "cut")

    class Stop(Exception):
        pass

    def stop(step: int, metrics: dict[str, float]) -> None:
        if step == 3:
            raise Stop

    with pytest.raises(Stop):
        train(cut, callbacks=[stop])
    failures = device.failures
    cut.resume = True
    resumed = train(cut)
    assert device.failures == failures
    expected, found = weights(whole), weights(resumed)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("kind", ["kto", "aot"])
def test_what_is_scored_before_the_first_micro_batch_is_cut_smaller_too(
    kind: str, inputs: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """The KL of KTO, and the ranks of all pairs, are estimated without gradient from all samples of the step."""

    def run(name: str) -> Any:
        pairs = config(inputs, name, lora=LoraConfig(r=4), max_steps=3, **({"loss_type": "aot"} if kind == "aot" else {}))
        if kind == "aot":
            return train(pairs)
        same = ("model", "output", "batch_size", "max_tokens", "share_prompts", "learning_rate", "adam_epsilon", "lora", "max_steps")
        data = UnpairedDataConfig(path=pairs.data.path, eval_fraction=0.2)
        return train(KTOConfig(data=data, **{option: getattr(pairs, option) for option in same}))

    plain, seen = run("plain"), []

    def scores(model: Any, batch: Any) -> Any:
        seen.append(len(batch.input_ids))
        if seen[-1] > 150:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return trunk(model, batch)

    monkeypatch.setattr("fastalign.models.reference.trunk", scores)
    small = run("small")
    failures = caplog.text.count("out of memory with micro-batches of")
    assert failures and sum(tokens > 150 for tokens in seen) == failures  # once for every size, and never again
    expected, found = weights(plain), weights(small)
    assert max(value.abs().max() for name, value in expected.items() if "lora_B" in name) > 1e-4
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= 1e-5 * max(1.0, value.abs().max()), name


def test_a_longer_sample_of_a_later_step_has_a_micro_batch_that_holds_it(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = preference_rows(24, completion_words=(1, 3))
    late = Order(24, 4, 0, 1.0).samples_of(5)[0]
    short[late]["chosen"] = " ".join(["stone"] * 40)
    (inputs / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in short))
    device = Device(120)
    monkeypatch.setattr(dpo, "trunk", device)

    def goes_on(step: int, metrics: dict[str, float]) -> None:
        device.room = 400  # as when another program has left the device

    made = config(inputs, "run", batch_size=4, max_tokens=512, data=DataConfig(path=str(inputs / "pairs.jsonl")), epochs=1.0)
    assert train(made, callbacks=[goes_on]).step == 6
    assert device.failures and max(device.tokens[device.failures :]) > 150 > sorted(device.tokens[device.failures :])[-2]


def test_a_sample_that_does_not_fit_is_named(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dpo, "trunk", Device(4))
    with pytest.raises(DeviceMemoryError, match=r"step 1: out of memory on cpu .* row \d+, \d+ tokens.*gradient_checkpointing.*lora\.r 16"):
        train(config(inputs, "run"))


def test_nothing_else_is_tried_again(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fails(*args: Any, **options: Any) -> Any:
        calls.append(1)
        raise RuntimeError("a bug")

    monkeypatch.setattr(loop, "run_step", fails)
    with pytest.raises(RuntimeError, match="a bug"):
        train(config(inputs, "run"))
    assert len(calls) == 1
