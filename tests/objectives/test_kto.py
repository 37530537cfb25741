"""The KTO objective: its mismatched rows, its KL over the step, one class, weights, and what it refuses."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import tiny_model

from fastalign.errors import ConfigError
from fastalign.models.load import load_model
from fastalign.models.reference import CachedReference, CopyReference, sequence_logps
from fastalign.objectives.kto import KTO, KTOConfig, mismatch
from fastalign.packing import collate
from fastalign.train.step import run_step
from fastalign.types import Sample

SAMPLES = [
    Sample(0, (5, 9, 2), ((7, 8, 3, 1),), labels=(1.0,)),
    Sample(1, (11,), ((6, 1),), weight=0.25, labels=(0.0,)),
    Sample(2, (11,), ((3, 3, 4, 1),), labels=(1.0,)),  # the prompt of row 1
    Sample(3, tuple(range(20, 30)), ((2,),), weight=2.0, labels=(0.0,)),
]
BETA = 0.3


def config(**options: Any) -> KTOConfig:
    return KTOConfig(**({"output": "run", "beta": BETA, "reference": "copy"} | options))


def data(samples: list[Sample]) -> Any:
    return SimpleNamespace(samples=samples, eval_samples=[], fingerprint="data")


def objective(folder: Path, samples: list[Sample] = SAMPLES, **options: Any) -> KTO:
    """The reference is the model before every weight moved."""
    model = load_model(tiny_model("qwen3"))
    found = config(**options).objective(model, data(samples), folder)
    with torch.no_grad():
        for seed, p in enumerate(model.parameters()):
            p.add_(-0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(100 + seed)))
    return found


def step(kto: KTO, bins: list[list[Sample]]) -> dict[str, float]:
    sums, denominators = run_step(kto, bins, device=torch.device("cpu"))
    return kto.metrics({name: value.item() for name, value in sums.items()}, denominators)


def log_ratio(kto: KTO, rows: list[Sample]) -> torch.Tensor:
    """One row at a time."""
    assert isinstance(kto.reference, CopyReference)
    batches = [collate([row]) for row in rows]
    return torch.cat([sequence_logps(kto.model, b) - sequence_logps(kto.reference.model, b) for b in batches]).double()


def test_rows_are_mismatched_by_index_with_another_prompt() -> None:
    rows = mismatch(SAMPLES[::-1], longest=11)
    assert [row.index for row in rows] == [3, 2, 1, 0]
    found = {row.index: (row.prompt, row.completions[0]) for row in rows}
    completion = [s.completions[0] for s in SAMPLES]
    assert found[0] == ((5, 9, 2), completion[3])
    assert found[1] == ((11,), completion[0])
    assert found[2] == ((11,), completion[0])  # not that of row 1, which answers the same prompt
    assert found[3] == (SAMPLES[3].prompt, completion[2][:1])  # cut to the longest sample


def test_rows_of_one_prompt_take_the_completion_before() -> None:
    same = [Sample(i, (4,), ((10 + i,),)) for i in range(3)]
    assert [row.completions[0] for row in mismatch(same, 9)] == [(12,), (10,), (11,)]
    assert mismatch([], 9) == []


@pytest.mark.parametrize("options", [{}, {"desirable_weight": 1.5, "undesirable_weight": 0.4}])
def test_loss_and_metrics_equal_their_definitions(tmp_path: Path, options: dict[str, float]) -> None:
    kto = objective(tmp_path, **options)
    found = step(kto, [SAMPLES[:1], SAMPLES[1:]])
    kl = max(0.0, log_ratio(kto, mismatch(SAMPLES, 11)).mean().item())
    ratio = log_ratio(kto, SAMPLES).tolist()
    assert kl > 0
    weights = options.get("desirable_weight", 1.0), options.get("undesirable_weight", 1.0)
    losses = [
        s.weight * (weights[0] / (1 + math.exp(BETA * (r - kl))) if s.labels[0] else weights[1] / (1 + math.exp(-BETA * (r - kl))))
        for s, r in zip(SAMPLES, ratio)
    ]
    rewards = BETA * (ratio[0] + ratio[2]) / 2, BETA * (ratio[1] + ratio[3]) / 2
    expected = {"loss": sum(losses) / 4, "kl": kl, "rewards/chosen": rewards[0], "rewards/rejected": rewards[1]}
    expected["rewards/margins"] = rewards[0] - rewards[1]
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_a_step_of_one_class_is_fine(tmp_path: Path, label: float) -> None:
    kto = objective(tmp_path)
    rows = [s for s in SAMPLES if s.labels[0] == label]
    found = step(kto, [rows])
    assert all(math.isfinite(value) for value in found.values())
    there, absent = ("chosen", "rejected") if label else ("rejected", "chosen")
    assert f"rewards/{there}" in found
    assert not {f"rewards/{absent}", f"logps/{absent}", f"logits/{absent}", "rewards/margins"} & found.keys()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in kto.model.parameters())
    assert any(p.grad.abs().max() > 0 for p in kto.model.parameters())


def test_rows_without_a_scored_token_do_not_count(tmp_path: Path) -> None:
    """A prompt as long as the longest sample leaves no room for another's completion."""
    samples = [Sample(0, (5, 9), ((7, 8, 3),), labels=(1.0,)), Sample(1, tuple(range(20, 24)), ((2,),), labels=(0.0,))]
    samples.append(Sample(2, (), ((9, 9, 9, 4, 1),), labels=(1.0,)))
    kto = objective(tmp_path, samples)
    rows = mismatch(samples, 5)
    full = [Sample(0, tuple(range(30, 35)), ((),))]
    assert [row.num_targets for row in rows] == [3, 1, 0]
    expected = log_ratio(kto, rows[:2]).mean().item()
    assert expected > 0
    assert float(kto._estimate([*rows, *full])) == pytest.approx(expected, rel=1e-4)


def test_the_cached_reference_covers_the_mismatched_rows(tmp_path: Path) -> None:
    cached = objective(tmp_path, reference="cache")
    assert isinstance(cached.reference, CachedReference)
    assert len(list((tmp_path / "reference").glob("*.safetensors"))) == 2
    assert step(cached, [SAMPLES]) == pytest.approx(step(objective(tmp_path), [SAMPLES]), rel=1e-5, abs=1e-6)


def test_the_scope_of_the_kl(tmp_path: Path) -> None:
    """TRL's estimate is that of each micro-batch, and its loss depends on the cut; ours is the same for every cut."""
    cuts = [[SAMPLES], [SAMPLES[:2], SAMPLES[2:]], [[s] for s in SAMPLES]]
    by_step = [step(objective(tmp_path), cut)["kl"] for cut in cuts]
    by_micro_batch = [step(objective(tmp_path, kl_scope="microbatch"), cut)["kl"] for cut in cuts]
    assert by_step[0] > 0
    assert by_step == pytest.approx([by_step[0]] * 3, rel=1e-5)
    assert abs(by_micro_batch[0] - by_micro_batch[1]) > 1e-3
    assert by_micro_batch[2] == 0  # a sample alone has no other's completion


def test_without_a_kl_no_row_is_scored_for_it(tmp_path: Path) -> None:
    kto = objective(tmp_path, loss_type="apo_zero_unpaired", reference="cache")
    assert len(list((tmp_path / "reference").glob("*.safetensors"))) == 1
    assert "kl" not in step(kto, [SAMPLES])


def test_weights_out_of_the_recommended_range_are_reported(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("fastalign.objectives.kto.load_unpaired", lambda *_, **__: data(SAMPLES))
    with caplog.at_level(logging.WARNING, logger="fastalign"):
        config(desirable_weight=1.3).load_data(None, None)
        assert not caplog.records
        config(desirable_weight=3.0).load_data(None, None)
    assert "KTO recommends 1 to 4/3, here a desirable_weight between 1 and 1.33" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "beta must be positive, got 0.0"),
        ({"loss_type": "bco"}, "loss_type must be one of kto, apo_zero_unpaired, got 'bco'"),
        ({"kl_scope": "epoch"}, "kl_scope must be one of step, microbatch"),
        ({"desirable_weight": -1.0}, "desirable_weight must be 0 or more and finite"),
        ({"kl_scope": "microbatch", "loss_type": "apo_zero_unpaired"}, "kl_scope must be left at 'step', .* only with loss_type=kto"),
        ({"kl_scope": "microbatch", "reference": "cache"}, "reference must be auto, adapter, copy or stream with kl_scope=microbatch"),
        ({"reference": "adapter"}, "reference must be cache, copy or auto when all weights are trained"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    good = config()
    good.model.path, good.data.path = "model", "rows.jsonl"
    good.validate()
    for name, value in options.items():
        setattr(good, name, value)
    with pytest.raises(ConfigError, match=message):
        good.validate()
