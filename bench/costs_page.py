"""The rows of the benchmark of costs, and its Markdown page."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from bench.provenance import Measured
from bench.table import facts

TITLE = "What is paid beside the steps: unfilled bins, resuming, starting"
HOW = """Packing: tokens over the room of a step's bins, or of its padded micro-batches, all steps of an epoch together. The lengths are
drawn, not taken from a data set: log-normal with the medians that are named, and cut to sequences of 1024 tokens. A bin has max_tokens
of room; a padded micro-batch holds the sequences of 8 pairs, each as long as its longest. A shared prompt counts once, so that equal
shares with and without sharing are not equal work.

Resume: from the start of the process to the end of its first optimizer step, in a new run and from the checkpoint of an interrupted one.
Start: from the start of the process to its end, files in the system's cache. Medians of runs in fresh processes, sides taking turns.
Ratios are fastalign's advantage: above 1 is better."""
PARTS = {"packing": "Packing", "resume": "First step of a run", "start": "Start"}


@dataclass(frozen=True)
class Cost(Measured):
    """The columns of the CSV file: one measurement."""

    part: str  # of PARTS
    case: str
    side: str
    repeat: int
    value: float
    unit: str  # share, or seconds
    workload: str = ""


def page(costs: list[Cost]) -> str:
    return "\n".join([f"# {TITLE}", "", *facts(costs), "", *HOW.splitlines(), "", *section(costs)]) + "\n"


def section(costs: list[Cost]) -> list[str]:
    """One table for each part, and where fastalign is behind."""
    lines, behind = [], []
    for part in dict.fromkeys(cost.part for cost in costs):
        some = [cost for cost in costs if cost.part == part]
        sides = list(dict.fromkeys(cost.side for cost in some))
        share = some[0].unit == "share"
        runs = 1 + max(cost.repeat for cost in some)
        lines += [f"{PARTS[part]}, {some[0].unit}: {some[0].workload}; {runs} run{'s' * (runs > 1)}", ""]
        lines += [f"| case | {' | '.join(sides)} | ratio |", "|---|" + "---:|" * (len(sides) + 1)]
        for case in dict.fromkeys(cost.case for cost in some):
            values = {
                side: statistics.median(found)
                for side in sides
                if (found := [cost.value for cost in some if (cost.case, cost.side) == (case, side)])
            }
            ours, theirs = values.get(sides[0]), values.get(sides[-1])
            ratio = (ours / theirs if share else theirs / ours) if ours and theirs else None
            cells = [f"{values[side]:.3f}" if side in values else "" for side in sides]
            lines.append(f"| {case} | {' | '.join(cells)} | {'' if ratio is None else f'{ratio:.2f}'} |")
            if ratio is not None and ratio < 1:
                behind.append(f"{PARTS[part]}, {case}: {ours:.3f} against {theirs:.3f} of {sides[-1]}")
        lines.append("")
    return [*lines, "Where fastalign is behind: " + ("; ".join(behind) + "." if behind else "in none of these rows.")]
