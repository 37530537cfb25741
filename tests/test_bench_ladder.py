"""The search for the longest pair, what is run for it, and its page; a slow test runs it on a toy model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import ladder, ladder_page, results, table
from bench.__main__ import main
from bench.ladder_page import Rung
from bench.workload import Shape

ABOUT = {"workload": "a model", "machine": "a machine", "versions": "torch 2", "commit": "abc", "command": "python -m bench ladder"}


@pytest.mark.parametrize("most", [32, 64, 500, 4096, 100_000])
@pytest.mark.parametrize("limit", [10, 40, 129, 3000, 90_000])
def test_search_finds_where_memory_ends(limit, most):
    tried: list[int] = []

    def growth(length: int) -> float:
        tried.append(length)
        return float(length)

    fits, too_long = ladder.longest(growth, limit, most)
    assert fits % 32 == 0 and fits <= limit
    if too_long is None:
        assert fits == most // 32 * 32
    else:
        assert limit < too_long <= most and too_long - fits <= max(32, fits // 16)
    assert len(tried) <= 20 and max(tried) <= 2 * max(32, limit)


def test_a_pair_is_as_long_as_it_is_said_to_be(tmp_path):
    for side in ladder_page.SIDES:
        spec = ladder.spec_of(side, tmp_path, tmp_path, Shape(), 96, 16, None)
        (row,) = [json.loads(line) for line in Path(spec.data).read_text().splitlines()]
        for completion in ("chosen", "rejected"):
            assert len(row["prompt"].split()) + len(row[completion].split()) + 1 == 96
        assert (spec.samples, spec.epochs, spec.uncut, spec.device) == (1, 2, True, "cpu")
        assert spec.options.get("max_tokens") == (192 if spec.side == "fastalign" else None)
    assert ladder.spec_of("fastalign", tmp_path, tmp_path, Shape(), 96, 0, 256.0).device == "cuda"


def test_page_says_what_fits_and_where_fastalign_is_behind(tmp_path):
    rungs = [
        Rung("cpu", "lora", "fastalign", 256, 640, 672, 250.1, 260.2, **ABOUT),
        Rung("cpu", "lora", "fastalign", 512, 1024, 1056, 500.0, 520.0, **ABOUT),
        Rung("cpu", "lora", "trl_default", 256, 0, 32, None, 300.0, **ABOUT),
        Rung("cpu", "lora", "trl_default", 512, 512, 544, 500.0, 520.0, **ABOUT),
        Rung("cpu", "lora", "fastalign_leanest", 512, 1000, 1056, 500.0, 520.0, **ABOUT),
        Rung("cpu", "lora", "trl_leanest", 512, 2000, None, 400.0, None, **ABOUT),
    ]
    table.write(tmp_path / "results" / "ladder_cpu.csv", rungs)
    assert table.read(tmp_path / "results" / "ladder_cpu.csv", Rung) == [Rung(**{**vars(r), "system": ""}) for r in rungs]
    page = results.pages(tmp_path / "results")[tmp_path / "results" / "ladder_cpu.md"]
    assert "| lora | fastalign, defaults | 640 | 1.00 | 1024 | 1.00 |\n" in page
    assert "| lora | TRL, defaults (gradient checkpointing) | none (< 32) |  | 512 | 2.00 |\n" in page
    assert "| lora | TRL, defaults and reference log-probs precomputed |  |  | >= 2000 | 0.50 |\n" in page
    assert page.count("tokens against") == 1
    assert "lora, 512 MiB: 1000 tokens against 2000 of TRL, defaults and reference" in page
    assert "The longest pair in fixed memory on a CPU" in results.pages(tmp_path / "results")[tmp_path / "RESULTS.md"]


def test_a_search_that_cannot_begin_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["ladder", "--longest", "31"])
    assert "--longest 31: must be 32 or more" in capsys.readouterr().err


@pytest.mark.slow
def test_quick_benchmark_runs(tmp_path):
    assert main(["ladder", "--quick", "--device", "cpu", "--output", str(tmp_path)]) == 0
    rungs = table.read(tmp_path / "ladder_cpu.csv", Rung)
    assert [(rung.training, rung.side, rung.limit_mib, rung.runs) for rung in rungs] == [
        ("lora", side, 64, 2) for side in ("fastalign", "trl_default")
    ]
    assert all(rung.length == 64 and 0 < rung.growth_mib <= 64 for rung in rungs)
    assert ladder_page.page(rungs) == (tmp_path / "ladder_cpu.md").read_text()
