"""The benchmark's arithmetic, its gate and its page; one slow test runs it on a toy model."""

from __future__ import annotations

import csv
import mmap

import pytest

from bench import training
from bench.__main__ import main
from bench.machine import peak_rss_mib, reset_peak_rss, rss_mib
from bench.training_sides import Recording
from bench.workload import QUICK, write_pairs

RECORD = Recording(
    losses=[0.7] * 4,
    tokens=[100, 100, 200, 300],
    ends=[10.0, 12.0, 13.0, 16.0],
    reference_seconds=1.4,
    startup_seconds=5.0,
    rss_before=500.0,
    rss_peak=740.0,
)


def test_throughput_leaves_out_the_first_steps_and_counts_the_reference():
    found = training.Measurement.of(RECORD, "full", "fastalign", 0)
    assert found.tokens == 700
    assert found.tokens_per_second_steps_only == 125.0  # 500 tokens in the 4 s after step 2
    assert found.tokens_per_second == 100.0  # 4/500 s per token of the steps, 1.4/700 s per token of the reference
    assert found.rss_growth_mib == 240.0


def test_page_says_where_fastalign_is_behind():
    ours = training.Measurement.of(RECORD, "full", "fastalign", 0)
    faster = Recording(**{**vars(RECORD), "ends": [10.0, 11.0, 11.5, 12.0], "rss_peak": 980.0})
    page = training.page("dpo", [ours, training.Measurement.of(faster, "full", "trl_default", 0)], QUICK, "python -m bench dpo")
    behind = page.split("Where fastalign is behind: ")[1]
    assert "full, tokens/s: 100 against 250" in behind
    assert "memory" not in behind
    assert "| 0.40 | 2.00 |" in page  # 100 / 250 and 480 / 240
    for word in ("machine", "versions", "commit", "python -m bench dpo", "torch"):
        assert word in page


def test_no_speed_for_a_wrong_answer(tmp_path, monkeypatch):
    losses = {"fastalign": [0.693, 0.5, 0.4, 0.3], "trl": [0.693, 0.5, 0.4, 0.3001]}
    monkeypatch.setattr(training, "run", lambda folder, spec: Recording(losses=losses[spec.side]))
    with pytest.raises(SystemExit, match="losses differ"):
        training.check_losses("dpo", tmp_path, tmp_path, tmp_path, None)
    losses["trl"][3] = 0.300001
    training.check_losses("dpo", tmp_path, tmp_path, tmp_path, None)


def test_peak_memory_is_of_what_came_after_the_reset():
    touch(64 << 20)
    reset_peak_rss()
    before = rss_mib()
    assert peak_rss_mib() - before < 16
    touch(64 << 20)
    assert 56 < peak_rss_mib() - before < 80


def touch(size: int) -> None:
    """Hold `size` bytes for a moment, straight from the system: the heap may have as much to spare."""
    with mmap.mmap(-1, size) as block:
        for page in range(0, size, 4096):
            block[page] = 1


def test_unknown_benchmark_is_refused(capsys):
    assert main(["nonsense"]) == 2
    assert "usage: python -m bench {head,dpo,kto,orpo,simpo,plan}" in capsys.readouterr().err


def test_pairs_are_the_same_on_every_call(tmp_path):
    first, second = (write_pairs(tmp_path / name, 16, QUICK).read_text() for name in ("a", "b"))
    assert first == second
    assert len(first.splitlines()) == 16


@pytest.mark.slow
def test_quick_benchmark_runs(tmp_path):
    assert main(["dpo", "--quick", "--output", str(tmp_path)]) == 0
    with (tmp_path / "dpo_cpu.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["training"], row["side"]) for row in rows] == [
        (training, side) for training in ("full", "lora") for side in ("fastalign", "trl_fastest")
    ]
    assert len({row["tokens"] for row in rows}) == 1, "both sides count the same tokens"
    assert all(float(row["tokens_per_second"]) > 0 for row in rows)
