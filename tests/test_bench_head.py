"""The head benchmark: its float64, its gate, its limit, its table and its page; one slow test runs all of it on a toy shape."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from support import relative_error

from bench import head, head_page, head_sides, table
from bench.__main__ import main
from bench.head_problem import Problem
from bench.head_rows import Row
from bench.head_sides import TASKS, Outcome, Side

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
SHAPE = (64, 512, 32)


@pytest.fixture(scope="module")
def problem() -> Problem:
    return Problem.random(SHAPE, torch.float32, CPU)


@pytest.mark.parametrize("task", [task for task in TASKS if task != "logps"])
def test_float64_equals_autograd_through_the_logits(problem, task):
    hidden, weight = (x.detach().double().requires_grad_() for x in (problem.hidden, problem.weight))
    logps = (hidden @ weight.T).log_softmax(1).gather(1, problem.target[:, None])[:, 0]
    loss = head_sides.gold_loss(task, problem)
    want = torch.autograd.grad(loss(logps), (hidden, weight))
    value, slope = problem.gold.loss(loss)
    assert relative_error(problem.gold.logps, logps) < 1e-12
    assert value == pytest.approx(float(loss(logps).detach()), rel=1e-12)
    assert relative_error(problem.gold.d_hidden(slope), want[0][problem.gold.rows]) < 1e-10
    assert relative_error(problem.gold.d_weight(slope), want[1][problem.gold.words]) < 1e-10


def test_two_fifths_of_the_rows_are_live(problem):
    assert (problem.sparse != 0).float().mean() == pytest.approx(0.4, abs=0.05)


def side(run, ours: bool) -> Side:
    return Side("trainable", "a side", (1, 1, 1), lambda problem: partial(run, problem), ours=ours)


def wrong_by(share: float, what: str):
    """A side whose log-probs or gradient of weight are off by `share`."""

    def run(problem: Problem) -> Outcome:
        out = head_sides.from_logps("trainable", head_sides.plain_logps, problem)()
        return out._replace(**{what: getattr(out, what) * (1 + share)})

    return run


@pytest.mark.parametrize(
    ("ours", "what", "share", "named"),
    [
        (True, "logps", 1e-3, "logps_error_nats"),
        (True, "d_weight", 1e-3, "d_weight_error"),
        (False, "logps", 0.1, "logps_error_nats"),
        (False, "d_weight", 0.2, "d_weight_error"),
    ],
)
def test_no_speed_for_a_wrong_answer(monkeypatch, ours, what, share, named):
    bench, block = head.Bench(CPU, 1, None), head.Block(0, SHAPE, torch.float32, "trainable", late=False)
    for error in (share, 0.0):
        monkeypatch.setattr(head, "sides_of", lambda task, error=error: [side(wrong_by(error, what), ours)])
        (row,) = bench.measure(block)
        assert (row.median_ms is None) == bool(error)
        assert row.status.startswith(f"wrong answer: {named}") if error else row.status == "measured"


def test_results_count_as_memory():
    """A gradient of 32 MiB is in every peak, also when the run before has left one of its own."""
    bench = head.Bench(CPU, 1, ["slab", "recompute", "TRL"])
    rows = bench.measure(head.Block(0, (64, 1 << 16, 128), torch.float32, "trainable", late=False))
    assert len(rows) == 3 and all(32 <= row.peak_memory_mib < 200 for row in rows)


def test_what_cannot_run_is_named(monkeypatch):
    bench, block = head.Bench(CPU, 1, ["TRL", "Liger"]), head.Block(0, SHAPE, torch.float32, "dpo", late=False)
    monkeypatch.setattr(head_sides, "find_spec", lambda package: None)
    assert {row.side: row.status for row in bench.measure(block)} == {
        "Liger, dpo": "absent: not installed",
        "TRL, log-probs and dpo": "absent: not installed",
    }
    bench.late_after = 0.0
    assert {row.status for row in bench.measure(block)} == {"not run: time limit"}

    def fails(problem: Problem) -> Outcome:
        raise RuntimeError("out of luck\nand more")

    monkeypatch.setattr(head, "sides_of", lambda task: [replace(side(fails, ours=False), name="Liger")])
    bench.late_after = None
    (row,) = bench.measure(block)
    assert row.status == "failed: RuntimeError: out of luck"


def test_under_a_limit_the_least_important_blocks_come_last():
    options = head.parse(["--device", "cpu", "--limit", "100", "--dtypes", "bfloat16", "--shapes", "8,9,4", "8,10,4"])
    order = [(block.shape[1], block.task) for block in head.blocks(options)]
    assert order[:4] == [(9, "logps"), (9, "frozen"), (9, "trainable"), (9, "zero_advantage")]
    assert order.index((9, "orpo")) < order.index((10, "dpo"))
    assert len(order) == 2 * (len(TASKS) + 5)  # torch.compile comes late, with five tasks


TIMES = {"gemms_nvd": 6.0, "median_ms": 10.0, "min_ms": 9.0, "max_ms": 12.0, "repeats": 5, "bare_gemms_ms": 8.0, "peak_memory_mib": 40.0}
ERRORS = {"logps_error_nats": 1e-6, "logps_bound_nats": 2e-6}
ABOUT = {"machine": "a machine", "versions": "torch 2", "commit": "abc", "command": "python -m bench head"}
MEASURED = Row("cpu", 64, 512, 32, "float32", "trainable", "fastalign, slab", True, **TIMES, **ERRORS, **ABOUT)


def test_rows_survive_the_file(tmp_path):
    rows = [MEASURED, replace(MEASURED, side="x, y", ours=False, status="absent: not installed", median_ms=None, repeats=0)]
    table.write(tmp_path / "t.csv", rows)
    assert table.read(tmp_path / "t.csv", Row) == rows
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]


def test_page_says_where_fastalign_is_behind():
    peer = replace(MEASURED, side="peer", ours=False, median_ms=5.0, peak_memory_mib=80.0, logps_error_nats=1e-3)
    lean = replace(MEASURED, side="lean", ours=False, median_ms=20.0, peak_memory_mib=10.0, logps_error_nats=1e-8)
    absent = replace(MEASURED, side="gone", ours=False, status="absent: not installed", median_ms=None)
    slow = replace(MEASURED, side="fastalign, keep", median_ms=30.0, logps_error_nats=3e-6)
    rows = [MEASURED, slow, peer, lean, absent]
    where = "N=64, V=512, D=32, float32, trainable: "
    assert head_page.behind(rows) == [
        where + "fastalign, keep 3e-06 nats of error in log-probs, bound 2e-06",
        where + "peer 5 ms, fastalign, slab 10",
        where + "lean 10 MiB, fastalign, slab 40",
        where + "lean 1e-08 nats of error in log-probs, fastalign, slab 1e-06",
    ]
    page = head_page.page(rows)
    assert "| trainable | peer | 5 (9-12) | 6 | 0.62 | 0.50 | 80 |" in page
    assert "| trainable | gone | absent: not installed |" in page
    for word in ("- machine: a machine", "- versions: torch 2", "- commit: abc", "- command: `python -m bench head`"):
        assert word in page
    (line,) = [line for line in head_page.section(rows) if line.startswith("| 64, ")]
    assert line == "| 64, 512, 32, float32 | trainable | 10 | 1.25 | peer | 0.50 | 40 | lean | 10 |"


def test_small_run(tmp_path, capsys):
    command = ["head", "--quick", "--device", "cpu", "--dtypes", "bfloat16", "--output", str(tmp_path)]
    assert main([*command, "--tasks", "frozen", "zero_advantage", "--sides", "fastalign", "torch, "]) == 0
    assert main([*command, "--tasks", "grpo", "--sides", "fastalign", "--append"]) == 0
    rows = table.read(tmp_path / "head_cpu.csv", Row)
    assert [(row.task, row.side) for row in rows] == [
        ("frozen", "fastalign, frozen"),
        ("frozen", "torch, log_softmax and gather"),
        ("zero_advantage", "fastalign, slab"),
        ("zero_advantage", "torch, log_softmax and gather"),
        ("grpo", "fastalign, slab, grpo"),
    ]
    assert all(row.status == "measured" and row.median_ms and row.bare_gemms_ms and row.d_hidden_error for row in rows)
    assert rows[0].logps_error_nats < 1e-4 < 1e-3 < rows[1].logps_error_nats  # bfloat16 in, float32 out: only ours
    page = (tmp_path / "head_cpu.md").read_text()
    assert (
        page.count("- command:") == 2 and "liger-kernel" in page and "--dtypes bfloat16 --tasks grpo" in page and str(tmp_path) not in page
    )
    assert "x bare" in capsys.readouterr().out


@pytest.mark.slow
def test_quick_benchmark_runs(tmp_path):
    assert main(["head", "--quick", "--device", "cpu", "--output", str(tmp_path)]) == 0
    rows = table.read(tmp_path / "head_cpu.csv", Row)
    assert {row.task for row in rows} == set(TASKS)
    assert not [row for row in rows if not row.status.startswith(("measured", "absent"))]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device: that `make gpu` names the lack of one is unproven here")
def test_make_gpu_without_a_gpu_names_the_remedy(tmp_path):
    environment = dict(os.environ, PYTHON=sys.executable, OUT=str(tmp_path))
    done = subprocess.run(["bash", str(ROOT / "tests" / "gpu.sh")], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "sees no CUDA device; name another interpreter with PYTHON=..." in done.stderr
