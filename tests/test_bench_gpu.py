"""The benchmarks that need a GPU: what they write when runs fail or time is up; slow tests run them on a CPU with toy sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu, gpu_search, results, table
from bench.gpu import Bench, GpuRun
from bench.training_sides import Recording, Spec
from bench.workload import QUICK
from fastalign.errors import DeviceMemoryError

ROOT = Path(__file__).parents[1]
TOY = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    made = Bench(tmp_path, gpu.parse(["--quick", "--device", "cpu"]), lambda: 100.0)
    made.data = tmp_path / "pairs.jsonl"
    return made


@pytest.mark.parametrize(
    ("outcome", "status"),
    [
        (SystemExit("bench dpo: trl failed:\nValueError: no"), "failed: bench dpo: trl failed: ValueError: no"),
        (subprocess.TimeoutExpired("python", 100), "not finished in 100 s"),
        (Recording(out_of_memory=True), "out of memory"),
        (Recording(ends=[1.0, 2.0, 4.0, 5.0], tokens=[9, 9, 10, 20], cuda_peak=2048.0), "measured"),
    ],
)
def test_the_others_go_on_when_a_run_fails(bench, outcome, status, monkeypatch):
    def run(folder, spec, **options):
        assert options["timeout"] == 100
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    monkeypatch.setattr(gpu, "run", run)
    rows = list(bench.speed())
    assert [(row.training, row.side) for row in rows] == [
        (t, s) for t in ("lora", "full") for s in ("trl_default", "fastalign_checkpointing")
    ]
    assert {row.status for row in rows} == {status}
    assert {row.tokens_per_second for row in rows} == {10.0 if status == "measured" else None}


def test_what_a_search_had_found_is_kept_when_its_time_is_up(bench, monkeypatch):
    def run(folder, spec, **options):
        Path(spec.result).write_text(json.dumps({"fits": 64, "too_long": 128}))
        raise subprocess.TimeoutExpired("python", 100)

    monkeypatch.setattr(gpu, "run", run)
    assert [(row.longest_tokens, row.too_long_tokens, row.status) for row in bench.longest()] == [(64, 128, "not finished in 100 s")] * 2
    bench.left = lambda: 10.0
    assert {row.status for row in bench.longest()} == {"not run: time limit"}


def test_sides_that_disagree_are_not_measured(bench, monkeypatch):
    def check(*args, **options):
        if args[4] is None:
            raise SystemExit("losses differ")

    monkeypatch.setattr(gpu, "check_steps", check)
    monkeypatch.setattr(gpu, "run", lambda *args, **options: Recording(out_of_memory=True))
    rows = list(bench.rows())
    assert (rows[0].part, rows[0].training, rows[0].status) == ("gate", "full", "differ: losses differ")
    assert {row.training for row in rows[1:]} == {"lora"}


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, DeviceMemoryError])
@pytest.mark.parametrize("side", ["fastalign", "trl"])
def test_a_search_tries_pairs_of_the_length_it_says(tmp_path, side, error):
    tried = []

    def run(spec: Spec) -> Recording:
        (row,) = map(json.loads, Path(spec.data).read_text().splitlines())
        length = len(row["prompt"].split()) + len(row["chosen"].split()) + 1
        tried.append(length)
        assert spec.options.get("max_tokens") == (2 * length if side == "fastalign" else None)
        assert (spec.samples, spec.epochs, spec.uncut) == (1, 1, True)
        if length > 5000:
            raise error("too long")
        return Recording()

    spec = Spec("dpo", side, "", "", "out", str(tmp_path / "result.json"), search=65536)
    found = gpu_search.search(spec, run)
    assert (found.fits, found.too_long) == (4096, 5120) and max(tried) == 8192
    left = json.loads((tmp_path / "result.json").read_text())
    assert (left["fits"], left["too_long"]) == (4096, 5120)


def test_page_says_what_was_left_out(tmp_path):
    about = {"machine": "a card", "versions": "torch 2", "commit": "abc", "command": "python -m bench gpu", "workload": "a model"}
    rows = [
        GpuRun("speed", "lora", "fastalign", "measured", 6, 12345.6, 1.5, 9.0, 5000.0, 20480.0, **about),
        GpuRun("speed", "lora", "trl_default", "out of memory", **about),
        GpuRun("longest", "lora", "trl_liger", "not run: time limit", memory_gib=24.0, longest_tokens=0, **about),
        GpuRun("profile", "full", "fastalign", "measured", **about),
    ]
    text = gpu.page(rows)
    assert "| lora | fastalign | 12346 | 20.0 | 1.5 | measured |" in text
    assert "| lora | TRL, defaults (gradient checkpointing) |  |  |  | out of memory |" in text
    assert "| 24 | TRL with Liger's loss, gradient checkpointing | 0 |  | not run: time limit |" in text
    assert "- profile, full, fastalign, measured" in text
    file = tmp_path / "results" / "gpu_a_card.csv"
    table.write(file, rows)
    assert table.read(file, GpuRun)[0].tokens_per_second == 12346.0
    pages = results.pages(file.parent)
    assert pages[file.with_suffix(".md")] == text
    assert "| lora | fastalign | 12346 | 20.0 | 1.5 | measured |" in pages[tmp_path / "RESULTS.md"]


def test_a_toy_is_all_that_runs_on_a_cpu(capsys):
    with pytest.raises(SystemExit):
        gpu.parse(["--device", "cpu"])
    assert "only --quick runs on a CPU" in capsys.readouterr().err
    assert gpu.parse(["--quick", "--device", "cpu"]).most == 128 and QUICK.vocab_size < 5000


@pytest.mark.parametrize(("argument", "status", "said"), [("--help", 0, "widths of an 8B model"), ("4", 2, "there is no call 4")])
def test_the_script_explains_its_calls(argument, status, said):
    done = subprocess.run(["bash", str(ROOT / "tests" / "gpu.sh"), argument], capture_output=True, text=True)
    assert done.returncode == status and said in done.stdout + done.stderr


@pytest.mark.slow
def test_row_kernels_by_their_launch(tmp_path):
    command = [sys.executable, "-m", "bench", "rows", "--quick", "--device", "cpu", "--output", str(tmp_path)]
    done = subprocess.run(command, env=TOY, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = tmp_path.glob("rows_*.csv")
    assert file.read_text().count(",measured,") == 5


@pytest.mark.slow
def test_the_second_call_on_a_cpu(tmp_path):
    pytest.importorskip("trl", reason="trl is not installed: the second call is unproven here")
    environment = {**TOY, "DEVICE": "cpu", "OUT": str(tmp_path), "PYTHON": sys.executable, "WHEELS": str(tmp_path / "none")}
    done = subprocess.run(["bash", str(ROOT / "tests" / "gpu.sh"), "2"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bench gpu: passed" in (tmp_path / "summary.txt").read_text()
    rows = table.read(tmp_path / "gpu_cpu.csv", GpuRun)
    assert [row.part for row in rows] == ["speed"] * 4 + ["longest"] * 2
    assert {row.status for row in rows} == {"measured"}
    assert {row.longest_tokens for row in rows if row.part == "longest"} == {128}
