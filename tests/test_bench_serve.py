"""The page of the service's benchmark; a slow test runs it on a toy model."""

from __future__ import annotations

import pytest

from bench import results, serve_page, table
from bench.__main__ import main
from bench.serve_page import Served

ABOUT = {"workload": "a toy", "machine": "a machine", "versions": "torch 2", "commit": "abc", "command": "python -m bench serve"}


def test_page_shows_what_is_added_and_its_parts(tmp_path):
    rows = [Served(4, "answer", i, 10.0 + i, 5.0, 1.0, 2.0 + i / 2, 0.5, **ABOUT) for i in range(20)]
    rows += [Served(4, "feedback", i, 3.0 + i, **ABOUT) for i in range(19, -1, -1)]
    table.write(tmp_path / "results" / "serve_cpu.csv", rows)
    page = results.pages(tmp_path / "results")[tmp_path / "results" / "serve_cpu.md"]
    cells = "5.0 / 5.0 | 19.5 / 28.0 | 14.5 / 23.0 | 1.0 / 1.0 | 11.8 / 16.0 | 0.5 / 0.5 | 12.5 / 21.0"
    assert f"| 4 | 20 | {cells} |\n" in page  # the 19th of 20 is the 95th percentile
    assert "a machine" in page and "python -m bench serve" in page


def test_percentile_is_a_value_that_occurred():
    assert serve_page.percentile([1.0], 0.95) == 1.0 and serve_page.percentile(range(1, 101), 0.95) == 95


@pytest.mark.slow
def test_quick_benchmark_runs(tmp_path):
    assert main(["serve", "--quick", "--clients", "1", "20", "--output", str(tmp_path)]) == 0
    rows = table.read(tmp_path / "serve_cpu.csv", Served)
    answers = {clients: [row for row in rows if (row.clients, row.kind) == (clients, "answer")] for clients in (1, 20)}
    assert {clients: len(found) for clients, found in answers.items()} == {1: 3, 20: 60}
    assert len([row for row in rows if row.kind == "feedback"]) >= 6
    for row in rows:
        assert row.milliseconds > 0 and (row.kind == "feedback" or (row.outside > row.store > 0 and row.generate > 0 and row.bare > 0))
    for repeat in range(3):  # the k-th reply and the k-th answer
        found = [row for row in answers[20] if row.repeat == repeat]
        assert found == sorted(found, key=lambda row: row.milliseconds) and found[15].bare < found[16].bare == found[19].bare
    assert serve_page.page(rows) == (tmp_path / "serve_cpu.md").read_text()
