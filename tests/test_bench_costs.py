"""How costs beside the steps are counted, and their page; a slow test runs the benchmark on a toy model."""

from __future__ import annotations

import pytest

from bench import costs, costs_page, results, table
from bench.__main__ import main
from bench.costs_page import Cost

ABOUT = {"workload": "drawn", "machine": "a machine", "versions": "torch 2", "commit": "abc", "command": "python -m bench costs"}


def test_filled_is_tokens_over_the_room_of_all_bins():
    pairs = [(20, 10, 30), (20, 5, 5), (20, 40, 40)]  # unshared 80, 50 and 120 tokens, shared 61, 31 and 101
    assert costs.filled(pairs, 3, 130, share=False) == pytest.approx(250 / 260)
    assert costs.filled(pairs, 1, 130, share=False) == pytest.approx(250 / 390)
    assert costs.filled(pairs, 3, 101, share=True) == pytest.approx(193 / 202)
    assert costs.filled_by_padding(pairs, 3) == pytest.approx(250 / (6 * 60))
    assert costs.filled_by_padding(pairs, 1) == pytest.approx(250 / (100 + 50 + 120))


def test_drawn_lengths_are_long_tailed_and_fit():
    pairs = costs.draw(4000, (220, 0.8), (220, 0.7))
    assert pairs == costs.draw(4000, (220, 0.8), (220, 0.7)) != costs.draw(4000, (220, 0.8), (220, 0.7), seed=1)
    prompts, chosen = sorted(p for p, _, _ in pairs), sorted(c for _, c, _ in pairs)
    assert all(1 <= p <= 512 and 1 <= max(c, r) <= 1024 - p for p, c, r in pairs)
    assert 205 < prompts[2000] < 235 and 205 < chosen[2000] < 235  # medians
    assert 370 < chosen[int(0.841 * 4000)] < 520  # one sigma above: 220 exp(0.7) = 443


def test_page_shows_medians_and_where_fastalign_is_behind(tmp_path):
    rows = [
        Cost("resume", case, side, repeat, value, "seconds", **ABOUT)
        for case, side, values in (
            ("new run", "fastalign", (1.0, 9.0, 2.0)),
            ("new run", "TRL", (4.0, 4.0, 4.0)),
            ("resumed run", "fastalign", (3.0, 3.0, 3.0)),
            ("resumed run", "TRL", (1.5, 1.0, 2.0)),
        )
        for repeat, value in enumerate(values)
    ]
    rows += [Cost("packing", "short", side, 0, value, "share", **ABOUT) for side, value in (("fastalign", 0.9), ("padding", 0.6))]
    table.write(tmp_path / "results" / "costs_cpu.csv", rows)
    page = results.pages(tmp_path / "results")[tmp_path / "results" / "costs_cpu.md"]
    assert "| new run | 2.000 | 4.000 | 2.00 |\n" in page
    assert "| short | 0.900 | 0.600 | 1.50 |\n" in page
    assert page.endswith("Where fastalign is behind: First step of a run, resumed run: 3.000 against 1.500 of TRL.\n")


@pytest.mark.slow
def test_quick_benchmark_runs(tmp_path):
    assert main(["costs", "--quick", "--output", str(tmp_path)]) == 0
    rows = table.read(tmp_path / "costs_cpu.csv", Cost)
    assert [sum(row.part == part for row in rows) for part in costs_page.PARTS] == [27, 4, 4]
    assert all(0.3 < row.value <= 1 for row in rows if row.part == "packing")
    assert costs_page.page(rows) == (tmp_path / "costs_cpu.md").read_text()
