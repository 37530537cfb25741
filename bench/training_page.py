"""The Markdown page of a training benchmark: what was measured on what, the medians, and where fastalign is behind."""

from __future__ import annotations

import statistics
from dataclasses import asdict

from bench.table import facts
from bench.training_rows import WARMUP_STEPS, Measurement
from bench.training_sides import SIDES, TASKS

HOW = f"""Medians of the runs, each in a process of its own, sides taking turns. tokens/s: real tokens (no padding) through
training; the first {WARMUP_STEPS} steps are not timed. Growth: peak resident memory during training less resident memory with model and
data loaded. Ratios are fastalign's advantage: above 1 is better."""
CHECKED = "Before, in four steps on the same batches, both sides agreed to 1e-4 in their {}."
REFERENCE = """The reference's work is in tokens/s wherever a side does it, but not in those of the steps alone. For TRL the loaded part
holds its reference model, too."""
GIVEN = """Both sides are given the same answers, advantages, and log-probs of the reference and of the policy that answered: the update
alone is measured. Tokens are those of prompts and answers, the prompt once per answer, however a side computes it. One group in four
is rewarded alike. For both sides the loaded part holds the reference model."""
PACKED = """Where TRL packs, its step is one row as long as eight completions with their prompts are on average, so that all sides make
about as many updates with as many tokens."""


def page(name: str, rows: list[Measurement]) -> str:
    task = TASKS[name]
    checked = [CHECKED.format(what) for what in dict.fromkeys(row.checked for row in rows)]
    how = [HOW, *checked, *([REFERENCE] if task.reference else []), *([GIVEN] if task.answers else []), *([PACKED] if task.packing else [])]
    return "\n".join([f"# {title(name)}", "", *facts(rows), "", *("\n\n".join(how)).splitlines(), "", *section(rows)]) + "\n"


def title(name: str) -> str:
    return f"{TASKS[name].title} on a CPU: fastalign and TRL"


def section(rows: list[Measurement]) -> list[str]:
    """The workloads, one table of medians, and where fastalign is behind."""
    lines = []
    for workload in dict.fromkeys(row.workload for row in rows):
        some = [row for row in rows if row.workload == workload]
        names = ", ".join(dict.fromkeys(row.training for row in some))
        runs = 1 + max(row.repeat for row in some)
        lines.append(f"- {names}: {workload}; {some[0].steps} steps, {some[0].tokens:,} tokens, {runs} run{'s' * (runs > 1)}")
    lines += [
        "",
        "| training | side | tokens/s | tokens/s, steps only | growth, MiB | start, s | speed ratio | memory ratio |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    behind = []
    for training in dict.fromkeys(row.training for row in rows):
        found = {side: columns for side in SIDES if (columns := medians(rows, training, side))}
        ours = found.get("fastalign")
        for side, them in found.items():
            speed = f"{ours['tokens_per_second'] / them['tokens_per_second']:.2f}" if ours else ""
            memory = f"{them['rss_growth_mib'] / ours['rss_growth_mib']:.2f}" if ours else ""
            lines.append(
                f"| {training} | {SIDES[side].text} | {them['tokens_per_second']:.0f} | {them['tokens_per_second_steps_only']:.0f} "
                f"| {them['rss_growth_mib']:.0f} | {them['startup_seconds']:.1f} | {speed} | {memory} |"
            )
            if ours and SIDES[side].name != "fastalign":
                behind += _behind(training, SIDES[side].text, ours, them)
    return [*lines, "", "Where fastalign is behind: " + ("; ".join(behind) + "." if behind else "in none of these columns.")]


def medians(rows: list[Measurement], training: str, side: str) -> dict[str, float]:
    """Of every column that a table shows; {} where nothing was measured."""
    runs = [asdict(row) for row in rows if row.training == training and row.side == side]
    numbers = ("tokens_per_second", "tokens_per_second_steps_only", "rss_growth_mib", "startup_seconds")
    return {name: statistics.median(run[name] for run in runs) for name in numbers} if runs else {}


def _behind(training: str, side: str, ours: dict[str, float], theirs: dict[str, float]) -> list[str]:
    found = []
    for name, label in (("tokens_per_second", "tokens/s"), ("tokens_per_second_steps_only", "tokens/s of the steps alone")):
        if ours[name] < theirs[name]:
            found.append(f"{training}, {label}: {ours[name]:.0f} against {theirs[name]:.0f} of {side}")
    for name, label in (("rss_growth_mib", "growth of memory, MiB"), ("startup_seconds", "seconds to start")):
        if ours[name] > theirs[name]:
            found.append(f"{training}, {label}: {ours[name]:.0f} against {theirs[name]:.0f} of {side}")
    return found
