"""The Markdown page of TRL's trainers with and without the patch, and where the patch loses."""

from __future__ import annotations

from bench.table import facts
from bench.training_page import medians
from bench.training_rows import WARMUP_STEPS, Measurement

TITLE = "TRL's trainers with and without the patch, on a CPU"
SIDES = {"trl": "TRL", "trl_patched": "TRL, patched"}
TASK_NAMES = ["sft", "dpo", "kto", "orpo", "grpo"]
HOW = f"""Medians of the runs, each in a process of its own, sides taking turns. Both sides are the same trainer with the same options and
data; in all steps of every run their losses and gradient norms agreed to 1e-4. tokens/s: real tokens (no padding) of the steps after the
first {WARMUP_STEPS}. Growth: peak resident memory during training less resident memory with model, reference and data loaded. Ratios are
the patch's advantage: above 1 is better. Of GRPO the update is measured: answers, advantages and earlier log-probs are given."""
COLUMNS = (("tokens_per_second_steps_only", "tokens/s", 1), ("rss_growth_mib", "growth of memory, MiB", -1))  # sign: more is better


def page(rows: list[Measurement]) -> str:
    return "\n".join([f"# {TITLE}", "", *facts(rows), "", *HOW.splitlines(), "", *section(rows)]) + "\n"


def section(rows: list[Measurement]) -> list[str]:
    """The workloads, one table of medians, and where the patch loses."""
    lines = []
    for workload in dict.fromkeys(row.workload for row in rows):
        names = ", ".join(dict.fromkeys(row.training for row in rows if row.workload == workload))
        some = [row for row in rows if row.workload == workload]
        lines.append(f"- {names}: {workload}; {some[0].steps} steps, {1 + max(row.repeat for row in some)} runs of each side")
    lines += ["", "| trainer | side | tokens/s | growth, MiB | speed ratio | memory ratio |", "|---|---|---:|---:|---:|---:|"]
    lost = []
    for training in dict.fromkeys(row.training for row in rows):
        plain, patched = (medians(rows, training, side) for side in SIDES)
        if not plain or not patched:
            continue
        speed = patched["tokens_per_second_steps_only"] / plain["tokens_per_second_steps_only"]
        memory = plain["rss_growth_mib"] / patched["rss_growth_mib"]
        for side, found, ratios in (("trl", plain, " | "), ("trl_patched", patched, f"{speed:.2f} | {memory:.2f}")):
            numbers = f"{found['tokens_per_second_steps_only']:.0f} | {found['rss_growth_mib']:.0f}"
            lines.append(f"| {training} | {SIDES[side]} | {numbers} | {ratios} |")
        for name, label, sign in COLUMNS:
            if sign * patched[name] < sign * plain[name]:
                lost.append(f"{training}, {label}: {patched[name]:.0f} against {plain[name]:.0f}")
    return [*lines, "", "Where the patch loses: " + ("; ".join(lost) + "." if lost else "in none of these columns.")]
