"""The benchmark of TRL's trainers with and without the patch: its gate, its page, and a run on a toy model."""

from __future__ import annotations

from typing import Any

import pytest

from bench import patched, patched_page, results, table
from bench.__main__ import main
from bench.training_rows import Measurement
from bench.training_sides import Recording


def record(speed: float = 1.0, peak: float = 740.0, **more: Any) -> Recording:
    ends = [step / speed for step in (2.0, 3.0, 5.0, 7.0)]
    return Recording(**{"losses": [0.7] * 4, "grad_norms": [1.5] * 4, "tokens": [100, 100, 200, 200], "ends": ends, "rss_before": 500.0,
                        "rss_peak": peak, **more})  # fmt: skip


def rows(speed: float, peak: float) -> list[Measurement]:
    about = {"workload": "a model", "machine": "a machine", "command": "python -m bench patched"}
    return [
        Measurement.of(found, "DPO", side, repeat, **about)
        for repeat in (0, 1)
        for side, found in (("trl", record()), ("trl_patched", record(speed, peak)))
    ]


def test_page_has_ratios_and_says_where_the_patch_loses():
    page = patched_page.page(rows(0.5, 620.0))
    assert "| DPO | TRL | 100 | 240 |  |  |" in page
    assert "| DPO | TRL, patched | 50 | 120 | 0.50 | 2.00 |" in page
    assert page.endswith("Where the patch loses: DPO, tokens/s: 50 against 100.\n")
    assert "4 steps, 2 runs of each side" in page and "- machine: a machine" in page
    assert patched_page.page(rows(2.0, 980.0)).endswith("Where the patch loses: DPO, growth of memory, MiB: 480 against 240.\n")
    assert patched_page.page(rows(2.0, 620.0)).endswith("Where the patch loses: in none of these columns.\n")


def test_sides_take_turns():
    assert patched.turn(0) == patched.turn(2) == ["trl", "trl_patched"]
    assert patched.turn(1) == ["trl_patched", "trl"]


WRONG = {"losses": {"losses": [0.7, 0.7, 0.7, 0.7002]}, "gradient norms": {"grad_norms": [1.5] * 3}}


@pytest.mark.parametrize("what", WRONG)
def test_nothing_is_written_for_a_wrong_answer(tmp_path, monkeypatch, what):
    monkeypatch.setattr(patched, "run", lambda folder, spec: record(**WRONG[what]) if spec.patched else record())
    with pytest.raises(SystemExit, match=f"bench patched dpo: {what} differ, nothing is measured: trl "):
        main(["patched", "--quick", "--tasks", "dpo", "--output", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_steps_come_in_pairs(capsys):
    with pytest.raises(SystemExit):
        main(["patched", "--steps", "5"])
    assert "--steps 5: must be even" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("tasks", [["orpo"], ["sft", "dpo", "kto", "grpo"]], ids=",".join)
def test_a_quick_run(tmp_path, tasks):
    folder = tmp_path / "results"
    assert main(["patched", "--quick", "--tasks", *tasks, "--output", str(folder)]) == 0
    found = table.read(folder / "patched_cpu.csv", Measurement)
    assert [row.side for row in found] == ["trl", "trl_patched"] * len(tasks)
    assert all(row.steps == 4 and row.tokens_per_second_steps_only > 0 for row in found)
    for plain, other in zip(found[::2], found[1::2]):
        assert plain.tokens == other.tokens
    assert results.pages(folder)[folder / "patched_cpu.md"] == (folder / "patched_cpu.md").read_text()
    assert "## TRL's trainers with and without the patch, on a CPU" in results.pages(folder)[folder.parent / "RESULTS.md"]
