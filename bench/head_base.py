"""The head of another commit beside this working tree's: `python -m bench head --base REF`.

Processes of the two take turns, and each measures fastalign's sides of every block as without `--base`, float64's gate included. The
benchmark is this working tree's in both, the `fastalign` that it imports in every other one is that of REF.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bench import base, head_page, table
from bench.head_rows import Key, Row

TURNS = 3  # of each side, in which it makes all of its rounds


def measure(options: argparse.Namespace, *, turns: int = TURNS) -> list[Row]:
    """A row of this working tree and one of `options.base` for every side, medians over the turns. SystemExit where one gives none."""
    found: dict[str | None, list[Row]] = {None: [], options.base: []}
    with tempfile.TemporaryDirectory(prefix="bench-head-") as scratch, base.checkout(options.base, Path(scratch)) as package:
        for turn in range(turns):
            order = [None, options.base] if turn % 2 == 0 else [options.base, None]  # what a machine does with time hits both alike
            for ref in order:
                place = Path(scratch) / f"turn-{turn}-{'base' if ref else 'here'}"
                found[ref] += _process(options, place, package if ref else None)
                print(f"turn {turn + 1} of {turns}{f' at {ref}' if ref else ''}: {len(found[ref])} measurements", flush=True)
    return [row for ref, rows in found.items() for row in _medians(rows, ref)]


def comparison(rows: Sequence[Row], ref: str) -> str:
    """A table of medians: this working tree, `ref`, and how much faster and leaner this working tree is."""
    there = {row.key: row for row in rows}
    lines = [
        f"| N, V, D | task | side | ms | at {ref} | speed ratio | peak, MiB | at {ref} | memory ratio |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        other = there.get(replace(row, side=base.side_of(row.side, ref)).key)
        if other is None or not (row.median_ms and row.peak_memory_mib and other.median_ms and other.peak_memory_mib):
            continue
        cells = [f"{row.rows}, {row.vocabulary}, {row.hidden_size}, {row.dtype}", row.task, row.side]
        cells += [f"{row.median_ms:.4g}", f"{other.median_ms:.4g}", f"{other.median_ms / row.median_ms:.3f}"]
        cells += [f"{row.peak_memory_mib:.0f}", f"{other.peak_memory_mib:.0f}", f"{other.peak_memory_mib / row.peak_memory_mib:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _process(options: argparse.Namespace, place: Path, package: Path | None) -> list[Row]:
    """Fastalign's rows of one process, with the fastalign in `package`, outside the repository's configuration files."""
    place.mkdir()
    shapes = [",".join(map(str, shape)) for shape in options.shapes]
    command = [sys.executable, "-m", "bench", "head", "--device", options.device, "--shapes", *shapes, "--dtypes", *options.dtypes]
    command += ["--tasks", *options.tasks, "--sides", *(options.sides or ["fastalign"]), "--repeats", str(options.repeats)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [package, base.ROOT] if package else [base.ROOT]))}
    if package:
        base.check_import(package, environment, place)
    done = subprocess.run([*command, "--output", str(place)], env=environment, cwd=place, capture_output=True, text=True)
    files = list(place.glob("head_*.csv"))
    if done.returncode or not files:
        at = f" at {options.base}" if package else ""
        raise SystemExit(f"bench head{at}: nothing is compared:\n{(done.stdout + done.stderr)[-2000:]}")
    return [row for row in table.read(files[0], Row) if row.ours]


def _medians(rows: Sequence[Row], ref: str | None) -> list[Row]:
    """One row for those of a side, which is called as in `base.side_of`."""
    groups: dict[Key, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.key, []).append(row)
    return [_median(group, base.side_of(group[0].side, ref) if ref else group[0].side) for group in groups.values()]


def _median(group: Sequence[Row], side: str) -> Row:
    first = replace(group[0], side=side, repeats=sum(row.repeats for row in group))
    if any(row.median_ms is None for row in group):
        return next(replace(row, side=side) for row in group if row.median_ms is None)
    middle = {name: statistics.median(getattr(row, name) for row in group) for name in ("median_ms", "bare_gemms_ms", "peak_memory_mib")}
    ends = {"min_ms": min(row.min_ms or 0.0 for row in group), "max_ms": max(row.max_ms or 0.0 for row in group)}
    return replace(first, **middle, **ends)


def report(rows: Sequence[Row], options: argparse.Namespace, stem: Path) -> None:
    """The rows beside the other results, as base_head_MACHINE.csv, and the table for a terminal."""
    table.write(stem.with_name(f"base_{stem.name}.csv"), rows)
    for row in rows:
        if row.status != "measured":
            print(head_page.line(row))
    print(comparison(rows, options.base))
