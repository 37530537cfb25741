"""The training benchmarks' arithmetic, gate and pages; slow tests run two of them on a toy model."""

from __future__ import annotations

import json
import math
import mmap
import statistics
import subprocess
from dataclasses import replace

import pytest
import torch

from bench import base, results, table, training, training_page
from bench.__main__ import main
from bench.machine import peak_rss_mib, reset_peak_rss, rss_mib
from bench.plot import draw_training
from bench.training_rows import Measurement
from bench.training_sides import SIDES, TASKS, Recording, real_tokens
from bench.workload import QUICK, Shape, write_model, write_pairs, write_rollouts

RECORD = Recording(
    losses=[0.7] * 4,
    grad_norms=[1.5] * 4,
    tokens=[100, 100, 200, 300],
    ends=[10.0, 12.0, 13.0, 16.0],
    reference_seconds=1.4,
    startup_seconds=5.0,
    rss_before=500.0,
    rss_peak=740.0,
)


ABOUT = {
    "workload": "a model and pairs",
    "checked": "losses",
    "machine": "a machine",
    "system": "Linux",
    "versions": "torch 2",
    "commit": "abc",
    "command": "python -m bench dpo",
}


def test_throughput_leaves_out_the_first_steps_and_counts_the_reference():
    found = Measurement.of(RECORD, "full", "fastalign", 0)
    assert found.tokens == 700
    assert found.tokens_per_second_steps_only == 125.0  # 500 tokens in the 4 s after step 2
    assert found.tokens_per_second == 100.0  # 4/500 s per token of the steps, 1.4/700 s per token of the reference
    assert found.rss_growth_mib == 240.0


def test_page_says_where_fastalign_is_behind():
    ours = Measurement.of(RECORD, "full", "fastalign", 0, **ABOUT)
    faster = Recording(**{**vars(RECORD), "ends": [10.0, 11.0, 11.5, 12.0], "rss_peak": 980.0})
    page = training_page.page("dpo", [ours, Measurement.of(faster, "full", "trl_default", 0, **ABOUT)])
    behind = page.split("Where fastalign is behind: ")[1]
    assert "full, tokens/s: 100 against 250" in behind
    assert "memory" not in behind
    assert "| 0.40 | 2.00 |" in page  # 100 / 250 and 480 / 240
    for word in ("- machine: a machine", "torch 2", "- commit: abc", "- command: `python -m bench dpo`", "agreed to 1e-4 in their losses."):
        assert word in page
    assert "- full: a model and pairs; 4 steps, 700 tokens, 1 run\n" in page


def test_no_speed_for_a_wrong_answer(tmp_path, monkeypatch):
    losses = {"fastalign": [0.693, 0.5, 0.4, 0.3], "trl": [0.693, 0.5, 0.4, 0.3001]}
    norms = {"fastalign": [2.0, 1.0, 1.0, 1.0], "trl": [2.0, 1.0, 1.0, 1.001]}
    monkeypatch.setattr(training, "run", lambda folder, spec, package: Recording(losses=losses[spec.side], grad_norms=norms[spec.side]))
    with pytest.raises(SystemExit, match="losses differ"):
        training.check_steps("dpo", tmp_path, tmp_path, tmp_path, None)
    losses["trl"][3] = 0.300001
    with pytest.raises(SystemExit, match="gradient norms differ"):
        training.check_steps("dpo", tmp_path, tmp_path, tmp_path, None)
    norms["trl"][3] = 1.00001
    training.check_steps("dpo", tmp_path, tmp_path, tmp_path, None)
    losses["fastalign"].pop()
    with pytest.raises(SystemExit, match="losses differ"):
        training.check_steps("dpo", tmp_path, tmp_path, tmp_path, None)


def test_a_packing_side_must_agree_too(tmp_path, monkeypatch):
    packed = [1.0, 1.0, 1.0, 1.001]
    monkeypatch.setattr(
        training, "run", lambda _, spec, package: Recording(losses=packed if "packing" in spec.options else [1.0] * 4, grad_norms=[1.0] * 4)
    )
    with pytest.raises(SystemExit, match=r"losses differ.*TRL, packed"):
        training.check_steps("sft", tmp_path, tmp_path, tmp_path, None)
    packed[3] = 1.00001
    training.check_steps("sft", tmp_path, tmp_path, tmp_path, None)


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


def test_without_a_name_the_benchmarks_are_listed_and_an_unknown_one_is_refused(capsys):
    assert main([]) == 0
    usage = capsys.readouterr().out
    assert all(f"\n  {name} " in usage for name in ("head", "dpo", "kto", "orpo", "simpo", "grpo", "sft", "ladder", "costs", "results"))
    assert main(["nonsense"]) == 2
    assert capsys.readouterr().err == f"bench: there is no nonsense\n{usage}"


def test_a_side_joins_where_its_options_mean_something():
    joined = {name: [side for side in SIDES if SIDES[side].joins(TASKS[name])] for name in TASKS}
    assert joined["dpo"] == ["fastalign", "fastalign_unshared", "trl_default", "trl_no_checkpointing", "trl_fastest"]
    assert joined["kto"] == ["fastalign", "trl_default", "trl_no_checkpointing", "trl_fastest"]
    assert joined["orpo"] == joined["simpo"] == joined["grpo"] == ["fastalign", "fastalign_unshared", "trl_default", "trl_no_checkpointing"]
    assert joined["sft"] == ["fastalign", "trl_default", "trl_no_checkpointing", "trl_packed"]


def test_a_packed_row_holds_a_step_and_cuts_nothing():
    shape, task = Shape(prompt_words=(5, 10), completion_words=(10, 20)), TASKS["sft"]
    assert SIDES["trl_packed"].fitted(task, shape)["max_length"] == 188  # 8 (7.5 + 15 + 1)
    assert SIDES["trl_packed"].fitted(replace(task, samples=1), shape)["max_length"] == 31
    assert SIDES["trl_default"].fitted(task, shape) == {}


def test_prompts_of_pairs_can_be_longer_than_their_completions():
    shapes = training.rows_of(TASKS["dpo"])
    assert list(shapes) == ["full", "full 2:1", "full 2:1, mostly trunk", "lora", "lora 2:1", "lora 2:1, mostly trunk"]
    assert shapes["lora"] == (training.RANK, Shape())
    long = shapes["full 2:1"][1]
    assert sum(long.prompt_words) == 2 * sum(long.completion_words)


def test_real_tokens_are_counted_without_padding():
    padded = {"input_ids": torch.zeros(2, 4), "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])}
    assert real_tokens(padded) == 7
    assert real_tokens({"input_ids": torch.zeros(1, 9), "position_ids": torch.zeros(1, 9)}) == 9


def test_steps_of_grpo_come_in_pairs_that_share_their_answers(capsys):
    with pytest.raises(SystemExit):
        main(["grpo", "--steps", "3"])
    assert "--steps 3: must be a multiple of 2" in capsys.readouterr().err


def test_pairs_are_the_same_on_every_call(tmp_path):
    first, second = (write_pairs(tmp_path / name, 16, QUICK).read_text() for name in ("a", "b"))
    assert first == second
    assert len(first.splitlines()) == 16


def test_rollouts_are_near_the_policy_and_one_group_in_four_teaches_nothing(tmp_path):
    model = write_model(tmp_path / "model", QUICK)
    first, second = (write_rollouts(tmp_path / name, 8, 4, QUICK, model, None).read_text() for name in ("a", "b"))
    assert first == second
    rows = [json.loads(line) for line in first.splitlines()]
    assert [any(row["advantages"]) for row in rows] == [True, True, True, False] * 2
    off = {"old_logps": [], "ref_logps": []}
    for row in rows:
        assert abs(sum(row["advantages"])) < 1e-5
        for name, found in off.items():
            assert [len(logps) for logps in row[name]] == [len(answer) for answer in row["answers"]]
            found += [x + math.log(QUICK.vocab_size) for logps in row[name] for x in logps]
    assert 0.05 < statistics.pstdev(off["old_logps"]) < statistics.pstdev(off["ref_logps"]) < 0.4  # a fresh model is almost uniform


def test_pages_are_those_of_the_results():
    for path, text in results.pages(results.FOLDER).items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is not up to date: run `python -m bench results`"


def test_every_page_with_a_picture_has_it_and_a_picture_shows_its_rows():
    drawn = results.pictures(results.FOLDER)
    assert {path.name for path in drawn} == {path.name for path in results.FOLDER.glob("*.png")} and len(drawn) >= 6
    for path, picture in drawn.items():
        assert picture.startswith(b"\x89PNG") and f"]({path.name})" in path.with_suffix(".md").read_text()
    file = results.FOLDER / "dpo_cpu.csv"
    rows = table.read(file, Measurement)
    assert drawn[file.with_suffix(".png")] == draw_training(rows), "the same rows gave other bytes"
    faster = [replace(row, tokens_per_second=2 * row.tokens_per_second) if row.side == "fastalign" else row for row in rows]
    assert drawn[file.with_suffix(".png")] != draw_training(faster)


def test_results_are_one_page_with_a_table_per_file(tmp_path, capsys):
    folder = tmp_path / "results"
    rows = [
        Measurement.of(RECORD, "full 4:1", side, repeat, **ABOUT) for repeat in (0, 1) for side in SIDES if SIDES[side].joins(TASKS["grpo"])
    ]
    table.write(folder / "grpo_cpu.csv", rows)
    assert table.read(folder / "grpo_cpu.csv", Measurement) == rows
    assert main(["results", "--results", str(folder)]) == 0
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["RESULTS.md", "grpo_cpu.csv", "grpo_cpu.md", "grpo_cpu.png"]
    page = (tmp_path / "RESULTS.md").read_text()
    assert page.count("## The update of GRPO on a CPU: fastalign and TRL") == page.count("\n## ") == 1
    assert "[grpo_cpu.csv](results/grpo_cpu.csv), [page](results/grpo_cpu.md)" in page
    assert page.count("\n| full 4:1 | ") == len(rows) / 2
    assert "Both sides are given the same answers" in (folder / "grpo_cpu.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "theirs", "suffix"), [("dpo", "trl_fastest", " 2:1"), ("grpo", "trl_no_checkpointing", " 4:1"), ("sft", "trl_packed", "")]
)
def test_quick_benchmark_runs(tmp_path, name, theirs, suffix):
    assert main([name, "--quick", "--output", str(tmp_path / "results")]) == 0
    rows = table.read(tmp_path / "results" / f"{name}_cpu.csv", Measurement)
    assert [(row.training, row.side) for row in rows] == [
        (f"{training}{suffix}", side) for training in ("full", "lora") for side in ("fastalign", theirs)
    ]
    assert len({row.tokens for row in rows}) == 1, "both sides count the same tokens"
    assert all(row.tokens_per_second > 0 and (row.steps == 4 or row.side == "trl_packed") for row in rows)
    assert rows[0].command == f"python -m bench {name} --quick"
    page = (tmp_path / "results" / f"{name}_cpu.md").read_text()
    assert results.pages(tmp_path / "results")[tmp_path / "results" / f"{name}_cpu.md"] == page


@pytest.mark.slow
def test_another_commit_is_measured_beside_this_one(tmp_path, capsys):
    assert main(["dpo", "--quick", "--base", "HEAD", "--rows", "lora", "--sides", "fastalign", "--output", str(tmp_path)]) == 0
    rows = table.read(tmp_path / "base_dpo_cpu.csv", Measurement)
    assert [row.side for row in rows] == ["fastalign", "fastalign@HEAD"]
    assert rows[0].tokens == rows[1].tokens and min(row.tokens_per_second for row in rows) > 0
    assert "| lora | fastalign, defaults | " in capsys.readouterr().out
    listed = subprocess.run(["git", "worktree", "list"], cwd=base.ROOT, capture_output=True, text=True, check=True).stdout
    assert "base-tree" not in listed


def test_the_comparison_with_a_commit_is_of_medians():
    rows = [Measurement.of(RECORD, "lora", side, repeat, **ABOUT) for side in ("fastalign", "fastalign@old") for repeat in range(3)]
    rows = [replace(row, tokens_per_second=(10.0 if "@" in row.side else 25.0) + (90 if row.repeat == 2 else 0)) for row in rows]
    line = base.comparison(rows, "old").splitlines()[-1]
    assert line.startswith("| lora | fastalign, defaults | 25 | 10 | 2.500 | ") and line.endswith(" | 1.000 |")
