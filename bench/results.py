"""bench/RESULTS.md, and the pages and pictures in bench/results/, from the CSV files there: `python -m bench results`."""

from __future__ import annotations

import argparse
from pathlib import Path

from bench import costs_page, gpu, head_page, ladder_page, patched_page, serve_page, table, training_page
from bench.costs_page import Cost
from bench.gpu import GpuRun
from bench.head_rows import Row
from bench.ladder_page import Rung
from bench.plot import draw_head, draw_ladder, draw_training, embedded
from bench.serve_page import Served
from bench.training_rows import Measurement
from bench.training_sides import TASKS

FOLDER = Path(__file__).with_name("results")
DRAWN = ("head_", "ladder_", *(f"{name}_" for name in TASKS))  # pages with a picture
HEAD = """# Results

Written by `python -m bench results` from the CSV files in [results/](results/), which hold every run; how each was measured is on the
page beside its file. Every side had to give the right answer before it was timed. Ratios are fastalign's advantage: above 1 is better."""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench results", description=__doc__)
    parser.add_argument("--results", type=Path, default=FOLDER, help="folder of the CSV files; RESULTS.md is written beside it")
    folder = parser.parse_args(argv).results
    drawn = pictures(folder)
    for path, content in {**pages(folder), **drawn}.items():
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        print(path)
    return 0


def pages(folder: Path) -> dict[Path, str]:
    """What every page that follows from the CSV files in `folder` should hold, by its path."""
    found, lines = {}, [HEAD]
    for name in TASKS:
        if (file := folder / f"{name}_cpu.csv").exists():
            runs = table.read(file, Measurement)
            found[file.with_suffix(".md")] = training_page.page(name, runs)
            lines += _section(file, training_page.title(name), [*table.facts(runs), *training_page.section(runs)])
    for device in ladder_page.MEMORY:
        if (file := folder / f"ladder_{device}.csv").exists():
            rungs = table.read(file, Rung)
            found[file.with_suffix(".md")] = ladder_page.page(rungs)
            lines += _section(file, ladder_page.title(device), [*table.facts(rungs), *ladder_page.section(rungs)])
    for file in sorted(folder.glob("gpu_*.csv")):
        trained = table.read(file, GpuRun)
        found[file.with_suffix(".md")] = gpu.page(trained)
        lines += _section(file, gpu.TITLE, gpu.section(trained))
    if (file := folder / "patched_cpu.csv").exists():
        runs = table.read(file, Measurement)
        found[file.with_suffix(".md")] = patched_page.page(runs)
        lines += _section(file, patched_page.TITLE, [*table.facts(runs), "", *patched_page.section(runs)])
    if (file := folder / "costs_cpu.csv").exists():
        costs = table.read(file, Cost)
        found[file.with_suffix(".md")] = costs_page.page(costs)
        lines += _section(file, costs_page.TITLE, [*table.facts(costs), "", *costs_page.section(costs)])
    if (file := folder / "serve_cpu.csv").exists():
        served = table.read(file, Served)
        found[file.with_suffix(".md")] = serve_page.page(served)
        lines += _section(file, serve_page.TITLE, [*table.facts(served), "", *serve_page.section(served)])
    for file in sorted(folder.glob("head_*.csv")):
        rows = table.read(file, Row)
        found[file.with_suffix(".md")] = head_page.page(rows)
        lines += _section(file, head_page.TITLE, [*table.facts(rows), "", *head_page.section(rows)])
    found = {path: embedded(path, text) if path.name.startswith(DRAWN) else text for path, text in found.items()}
    return found | {folder.parent / "RESULTS.md": "\n".join(lines) + "\n"}


def pictures(folder: Path) -> dict[Path, bytes]:
    """The picture of every page that has one, by its path."""
    found = {}
    for file in sorted(folder.glob("*.csv")):
        name = file.stem.partition("_")[0]
        if name in TASKS:
            found[file.with_suffix(".png")] = draw_training(table.read(file, Measurement))
        elif name == "ladder":
            found[file.with_suffix(".png")] = draw_ladder(table.read(file, Rung))
        elif name == "head":
            found[file.with_suffix(".png")] = draw_head(table.read(file, Row))
    return found


def _section(file: Path, title: str, lines: list[str]) -> list[str]:
    return ["", f"## {title}", "", f"[{file.name}]({file.parent.name}/{file.name}), [page]({file.parent.name}/{file.stem}.md)", "", *lines]
