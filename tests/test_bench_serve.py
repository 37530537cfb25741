"""The page of the service's benchmark; a slow test runs it on a toy model."""

from __future__ import annotations

import pytest

from bench import results, serve_page, table
from bench.__main__ import main
from bench.serve_page import BARE, SERVICE, Latency

ABOUT = {"workload": "a toy", "machine": "a machine", "versions": "torch 2", "commit": "abc", "command": "python -m bench serve"}


def test_page_shows_percentiles_and_what_is_added(tmp_path):
    rows = [Latency(4, SERVICE, i, 10.0 + i, **ABOUT) for i in range(20)] + [
        Latency(4, BARE, i, 5.0 + i, **ABOUT) for i in range(19, -1, -1)
    ]
    table.write(tmp_path / "results" / "serve_cpu.csv", rows)
    page = results.pages(tmp_path / "results")[tmp_path / "results" / "serve_cpu.md"]
    assert "| 4 | 19.5 | 28.0 | 14.5 | 23.0 | 5.0 | 5.0 |\n" in page  # the 19th of 20 is the 95th percentile
    assert "a machine" in page and "python -m bench serve" in page


def test_percentile_is_a_value_that_occurred():
    assert serve_page.percentile([1.0], 0.95) == 1.0 and serve_page.percentile(range(1, 101), 0.95) == 95


@pytest.mark.slow
def test_quick_benchmark_runs(tmp_path):
    assert main(["serve", "--quick", "--clients", "1", "3", "--output", str(tmp_path)]) == 0
    rows = table.read(tmp_path / "serve_cpu.csv", Latency)
    assert [(clients, sum(row.clients == clients for row in rows)) for clients in (1, 3)] == [(1, 6), (3, 18)]
    assert all(row.milliseconds > 0 for row in rows) and serve_page.page(rows) == (tmp_path / "serve_cpu.md").read_text()
