"""The page and the trace of `profile`: that their parts add up, and that a run is the same with it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from killing import no_report
from tiny import preference_rows, save_tiny, tiny_model
from torch.autograd import DeviceType

from fastalign import train
from fastalign.data.config import DataConfig
from fastalign.errors import ConfigError
from fastalign.models.config import LoraConfig, ModelConfig
from fastalign.models.load import load_model
from fastalign.objectives.dpo import DPOConfig
from fastalign.train.flops import model_flops, peak_flops
from fastalign.train.metrics import read_metrics
from fastalign.train.profile import PARTS, parts_of


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Path:
    monkeypatch.setattr("fastalign.train.loop.write_report", no_report)
    if not (tmp_path / "model").exists():
        save_tiny(tmp_path / "model", "qwen3")
        (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in preference_rows(20)))
    output = tmp_path / f"run-{len(list(tmp_path.glob('run-*')))}"
    model, data = ModelConfig(path=str(tmp_path / "model")), DataConfig(path=str(tmp_path / "pairs.jsonl"))
    train(DPOConfig(model=model, data=data, output=str(output), batch_size=4, max_tokens=512, learning_rate=1e-3, save_every=0, **options))
    return output


def test_shares_add_up_and_the_run_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, profiled = run(tmp_path, monkeypatch), run(tmp_path, monkeypatch, profile=2)
    assert not {"profile.md", "profile.json"} & {file.name for file in plain.iterdir()}
    rows = [read_metrics(folder / "metrics.jsonl") for folder in (plain, profiled)]
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]
    assert [row["grad_norm"] for row in rows[0]] == [row["grad_norm"] for row in rows[1]]
    assert [row["step"] for row in rows[1] if "perf/mfu" in row] == [4]  # two of warm-up, two profiled
    assert not [row for row in rows[0] if "perf/mfu" in row]

    page = (profiled / "profile.md").read_text()
    shares = {name: float(share) for name, share in re.findall(r"^\| ([^|]+) \| ([\d.]+)% \|", page, re.MULTILINE)}
    assert list(shares) == list(PARTS)
    assert sum(shares.values()) == pytest.approx(100, abs=0.5)
    assert min(shares[name] for name in ("trunk GEMMs", "attention", "head GEMMs", "head, rest", "optimizer", "other operators")) > 0
    last = rows[1][3]
    assert last["perf/head_share"] == pytest.approx((shares["head GEMMs"] + shares["head, rest"]) / 100, abs=2e-3)
    assert 0 < last["perf/mfu"] < 1
    events = json.loads((profiled / "profile.json").read_text())["traceEvents"]
    assert sum(event.get("name") == "LinearLoss" for event in events) >= 2


def test_a_run_of_fewer_steps_is_profiled_from_its_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = run(tmp_path, monkeypatch, profile=9, max_steps=2)
    assert "2 steps of" in (output / "profile.md").read_text()
    assert "perf/mfu" in read_metrics(output / "metrics.jsonl")[-1]
    with pytest.raises(ConfigError, match="profile must be 0 or more"):
        run(tmp_path, monkeypatch, profile=-1)


def event(name: str, microseconds: float, caller: Any = None, device: Any = DeviceType.CPU) -> Any:
    times = {"self_cpu_time_total": microseconds, "self_device_time_total": 10 * microseconds}
    return SimpleNamespace(name=name, cpu_parent=caller, device_type=device, **times)


@pytest.mark.parametrize("cuda", [False, True])
def test_an_operator_belongs_to_who_called_it(cuda: bool) -> None:
    head = event("LinearLogpsBackward", 1e6)
    attention = event("aten::scaled_dot_product_attention", 2e6)
    update = event("Optimizer.step#AdamW.step", 3e6)
    events = [head, attention, update, event("aten::mm", 4e6, head), event("aten::mm", 5e6), event("aten::bmm", 6e6, attention)]
    events += [event("aten::mul", 7e6), event("aten::add_", 8e6, update), event("a kernel", 1e9, None, DeviceType.CUDA)]
    expected = {"trunk GEMMs": 5, "attention": 8, "head GEMMs": 4, "head, rest": 1, "optimizer": 11, "other operators": 7, "no operator": 0}
    assert parts_of(events, cuda=cuda) == {name: (10 if cuda else 1) * value for name, value in expected.items()}


@pytest.mark.parametrize("lora", [LoraConfig(), LoraConfig(r=4)], ids=["full", "lora"])
def test_flops_are_those_that_torch_counts(lora: LoraConfig) -> None:
    """Against the counter of torch over a forward and backward with plain logits; attention apart, which it counts in full."""
    from torch.utils.flop_counter import FlopCounterMode

    model = load_model(tiny_model("qwen3"), lora=lora)
    model.set_attn_implementation("eager") if not lora.enabled else model.get_base_model().set_attn_implementation("eager")
    tokens = 24
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.arange(1, tokens + 1)[None]).logits.sum().backward()
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counts.items() if "bmm" not in str(op))
    found = model_flops(model, tokens, [tokens], tokens)
    assert found.trunk + found.head == pytest.approx(products, rel=0.02 if not lora.enabled else 0.1)
    assert 2 * found.attention == pytest.approx(sum(n for op, n in counts.items() if "bmm" in str(op)), rel=0.02)


def test_a_peak_is_measured_where_none_is_known() -> None:
    peak, source = peak_flops(torch.device("cpu"), torch.float32)
    assert 1e8 < peak < 1e15
    assert "measured" in source
