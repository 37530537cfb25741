"""The rows of the ladder benchmark, and its Markdown page: the longest sequence that each side has memory for."""

from __future__ import annotations

from dataclasses import dataclass

from bench.provenance import Measured
from bench.table import facts
from bench.training_sides import SIDES as TRAINING_SIDES
from bench.training_sides import Side

SIDES = {
    "fastalign": TRAINING_SIDES["fastalign"],
    "fastalign_leanest": Side("fastalign", {"gradient_checkpointing": True}, "fastalign, gradient checkpointing"),
    "trl_default": TRAINING_SIDES["trl_default"],
    "trl_leanest": Side("trl", {"precompute_ref_log_probs": True}, "TRL, defaults and reference log-probs precomputed"),
}
HOW = """The longest sequence of a DPO pair (half prompt, half completion, both of one length) with which two optimizer steps of one pair
take no more than the memory named beside model and data; for TRL the reference model is among these. Every length is tried in a process
of its own; lengths are multiples of 32, found to 1/16 by doubling and bisection, which supposes that memory grows with the length.
{memory} Ratio: fastalign's tokens over those of the side, both at their defaults or both at their leanest; above 1 fastalign fits more.
Before, in four steps of 8 shorter pairs, both sides agreed to 1e-4 in their losses and gradient norms."""
MEMORY = {
    "cpu": "Memory is the growth of the peak of resident memory.",
    "cuda": "CUDA's caching allocator enforces the limit, its fragments and what it keeps unused included.",
}


@dataclass(frozen=True)
class Rung(Measured):
    """The columns of the CSV file: one search."""

    device: str
    training: str
    side: str
    limit_mib: int
    length: int  # tokens of a sequence; 0: not even the shortest fits
    too_long: int | None  # the shortest seen that does not fit; None: all that were tried did
    growth_mib: float | None  # at `length`, on a CPU
    too_long_growth_mib: float | None
    runs: int = 0  # processes so far, those of smaller limits included
    workload: str = ""


def title(device: str) -> str:
    return f"The longest pair in fixed memory on {'a CPU' if device == 'cpu' else 'a GPU'}: fastalign and TRL"


def page(rungs: list[Rung]) -> str:
    how = HOW.format(memory=MEMORY[rungs[0].device]).splitlines()
    return "\n".join([f"# {title(rungs[0].device)}", "", *facts(rungs), "", *how, "", *section(rungs)]) + "\n"


def section(rungs: list[Rung]) -> list[str]:
    """The workload, one table, and where fastalign is behind."""
    found = {(rung.training, rung.side, rung.limit_mib): rung for rung in rungs}
    limits = sorted({rung.limit_mib for rung in rungs})
    lines = [
        f"- {', '.join(dict.fromkeys(rung.workload for rung in rungs))}",
        "",
        "| training | side | " + " | ".join(f"{mib} MiB, tokens | ratio" for mib in limits) + " |",
        "|---|---|" + "---:|" * 2 * len(limits),
    ]
    behind = []
    for training, side in dict.fromkeys((rung.training, rung.side) for rung in rungs):
        cells = []
        for mib in limits:
            rung, ours = found.get((training, side, mib)), found.get((training, _peer(side), mib))
            cells += [_tokens(rung), f"{ours.length / rung.length:.2f}" if rung and rung.length and ours else ""]
            if rung and ours and rung.length > ours.length:
                behind.append(f"{training}, {mib} MiB: {ours.length} tokens against {rung.length} of {SIDES[side].text}")
        lines.append(f"| {training} | {SIDES[side].text} | " + " | ".join(cells) + " |")
    return [*lines, "", "Where fastalign is behind: " + ("; ".join(behind) + "." if behind else "in none of these columns.")]


def _peer(side: str) -> str:
    """The side of fastalign that one of TRL's is held against."""
    return "fastalign_leanest" if side.endswith("leanest") else "fastalign"


def _tokens(rung: Rung | None) -> str:
    if rung is None:
        return ""
    if not rung.length:
        return f"none (< {rung.too_long})"
    return str(rung.length) if rung.too_long else f">= {rung.length}"
