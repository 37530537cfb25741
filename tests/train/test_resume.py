"""Runs killed with SIGKILL at random moments continue to metrics and weights equal, bit for bit, to those of a run left alone."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from killing import ANYWHERE, GENERATING, REUSING, SAVING, TARGETS, config, no_report, rows, weights
from tiny import preference_rows, save_tiny

from fastalign import train
from fastalign.errors import CheckpointError

REWARDS = """
def likes_o(completions, **columns):
    return [float(c.count("o")) for c in completions]
"""


@pytest.fixture(autouse=True, scope="module")
def _no_report() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastalign.train.loop.write_report", no_report)
        yield


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny(folder / "model", "qwen3")
    found = preference_rows(24, seed=3)
    for name, part in {"pairs": found[:18], "heldout": found[18:]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in found[:7]))
    (folder / "rewards.py").write_text(REWARDS)
    return folder


@pytest.mark.parametrize("kills", [6, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_runs_resume_bit_for_bit(inputs: Path, tmp_path: Path, kills: int) -> None:
    report = killed(inputs, tmp_path, kills, "full", "lora")
    assert any(trial["half_written"] for trial in report["trials"]), report
    assert any(0 < trial["rows"] < report["rows"] for trial in report["trials"]), report


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_online_runs_resume_bit_for_bit(inputs: Path, tmp_path: Path, kills: int) -> None:
    """Four steps train on the answers of a generation, and a checkpoint comes after every third."""
    report = killed(inputs, tmp_path, kills, "grpo", "grpo-lora")
    for visits in report["visits"].values():
        assert visits[GENERATING] >= 4 and visits[REUSING] == 12 and visits[SAVING] == 7
    assert (tmp_path / "whole-grpo" / "completions.jsonl").exists()


def killed(inputs: Path, work: Path, kills: int, *kinds: str) -> dict[str, Any]:
    """Kill runs of these kinds, check that each ended as if it had not been, and give the report."""
    command = [sys.executable, str(Path(__file__).with_name("killing.py")), str(inputs), str(work), str(kills), *kinds]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}  # a tiny model needs no more
    done = subprocess.run(command, capture_output=True, text=True, timeout=1100, env=environment)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    trials = report["trials"]
    assert len(trials) == kills
    for trial in trials:
        assert trial["same_metrics"], trial
        assert trial["same_answers"], trial
        assert trial["same_weights"], trial
        assert trial["leftovers"] == [], trial
    assert sum(trial["killed"] for trial in trials) >= kills // 2
    for target in TARGETS[kinds[0]]:  # the moments were what they should be
        assert target == ANYWHERE or any(trial["target"] == trial["place"] == target and trial["killed"] for trial in trials), trials
    return report


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    train(config("lora", inputs, run, resume=False))
    return run


def interrupted_at(inputs: Path, run: Path, step: int, kind: str = "lora") -> None:
    """A run that ends, as if killed, right after the save of `step`; dropout makes it depend on the generator state."""

    class Killed(Exception):
        pass

    def stop(at: int, _: dict[str, Any]) -> None:
        if at == step + 1:
            raise Killed

    with pytest.raises(Killed):
        train(config(kind, inputs, run, resume=False), callbacks=[stop])


@pytest.mark.parametrize("step", [2, 8, 14])
def test_resume_after_any_checkpoint_restores_dropout_and_order(inputs: Path, whole: Path, tmp_path: Path, step: int) -> None:
    run = tmp_path / "run"
    interrupted_at(inputs, run, step)
    train(config("lora", inputs, run, resume=True))
    assert rows(run) == rows(whole)
    assert weights(run) == weights(whole)


def test_a_resume_without_the_generator_state_would_differ(
    inputs: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison above has power: leave out one part of the state and it fails."""
    run = tmp_path / "run"
    interrupted_at(inputs, run, 8)
    monkeypatch.setattr("fastalign.train.checkpoint.restore_rng", lambda saved: None)
    train(config("lora", inputs, run, resume=True))
    assert weights(run) != weights(whole)


def test_a_resume_without_the_answers_of_the_generation_would_differ(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor would the comparison of online runs pass if the model answered again, with the weights that it has by now."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    train(config("grpo", inputs, whole, resume=False))
    interrupted_at(inputs, run, 6, "grpo")  # two more steps are to be made with the same answers
    monkeypatch.setattr("fastalign.objectives.grpo.GRPO.load_state", lambda self, state: None)
    train(config("grpo", inputs, run, resume=True))
    assert rows(run) != rows(whole)
    assert weights(run) != weights(whole)


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_continued(
    inputs: Path, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    interrupted_at(inputs, run, 8)
    file = run / "checkpoints" / "step-000008" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with caplog.at_level(logging.WARNING, logger="fastalign"):
        train(config("lora", inputs, run, resume=True))
    assert any(
        "step-000008/optimizer.safetensors: truncated" in r.message and "continuing from step-000006" in r.message for r in caplog.records
    )
    assert rows(run) == rows(whole)
    assert weights(run) == weights(whole)
    assert (run / "checkpoints" / "step-000008.damaged").exists()


def test_when_every_checkpoint_is_damaged_the_run_stops_and_keeps_them(inputs: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    interrupted_at(inputs, run, 4)
    for path in (run / "checkpoints").iterdir():
        (path / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"step-000004.*step-000002.*No good checkpoint is left"):
        train(config("lora", inputs, run, resume=True))
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-000002", "step-000004"]


def test_resuming_a_finished_run_only_finishes_it_again(inputs: Path, whole: Path) -> None:
    before, exported = rows(whole), weights(whole)
    (whole / "final" / "adapter_model.safetensors").unlink()
    result = train(config("lora", inputs, whole, resume=True))
    assert result.step == max(row["step"] for row in before)
    assert rows(whole) == before
    assert weights(whole) == exported
