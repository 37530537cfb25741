"""The Markdown page of the head benchmark: what was measured on what, every row, and where fastalign is behind."""

from __future__ import annotations

import re

import torch

from bench.head_rows import Row
from bench.head_sides import TASKS
from bench.table import facts

TITLE = "The LM head: fastalign, bare GEMMs and peers"
NOISE_MIB = 2.0
# what fastalign can be behind in, its unit, and the share of fastalign's value below which a peer's counts as less
MEASURES = [
    ("median_ms", "ms", 1.0),
    ("peak_memory_mib", "MiB", 1.0),
    ("logps_error_nats", "nats of error in log-probs", 0.8),
    ("d_hidden_error", "error of d hidden", 0.8),
    ("d_weight_error", "error of d weight", 0.8),
]
PACKAGES = ["torch", "triton", "trl", "liger-kernel", "cut-cross-entropy"]
HOW = """A block is one task at one shape. Its sides and the three bare GEMMs of the head take turns in one process; medians (min-max)
over the rounds. Before that every side had to agree with float64 of the rounded inputs: fastalign to 1e-3 nats in log-probs and to
1e-4 (fp32) or 1e-2 (bf16) in loss and gradients; peers, whose rounding is shown and not judged, to 0.5 nats and 10 %.

- NVD: multiples of N V D operations in the side's GEMMs; / bare: time over that of these GEMMs alone, on operands of the same dtype
- / fastalign: the side's time over that of fastalign's fastest side of the task; above 1 fastalign is faster
- peak: memory above the inputs during one forward and backward, results included ({memory})
- errors: log-probs in nats, largest of all rows; gradients |x - gold| / |gold| over {sample} rows of hidden and of weight"""


def machine_kind(device: torch.device) -> str:
    """What the result files are named by: `cpu`, or the GPU's name such as `nvidia_h200`."""
    if device.type == "cpu":
        return "cpu"
    return re.sub(r"\W+", "_", torch.cuda.get_device_name(device).lower())


def line(row: Row) -> str:
    """One row for a terminal."""
    where = f"{row.rows}x{row.vocabulary}x{row.hidden_size} {row.dtype} {row.task:14} {row.side:38}"
    if row.status != "measured":
        return f"{where} {row.status}"
    return f"{where} {row.median_ms:9.2f} ms  {row.over_bare:5.2f} x bare  {row.peak_memory_mib:8.0f} MiB"


def page(rows: list[Row]) -> str:
    memory = "of CUDA's caching allocator" if rows[0].device == "cuda" else "resident memory of the process"
    lines = [
        f"# {TITLE}",
        "",
        *facts(rows),
        "",
        *HOW.format(memory=memory, sample=64).splitlines(),
        "",
        *_behind_list(rows),
    ]
    for (n, v, d, dtype), table in _grouped(rows).items():
        lines += ["", f"## N={n}, V={v}, D={d}, {dtype}", ""]
        lines += ["| task | side | ms | NVD | / bare | / fastalign | peak, MiB | log-probs | d hidden | d weight |"]
        lines += ["|---|---|---:|---:|---:|---:|---:|---:|---:|---:|"]
        for task in TASKS:
            lines += [_table_line(row, table) for row in table if row.task == task]
    lines += ["", "Tasks:", "", *(f"- {name}: {text}" for name, text in TASKS.items())]
    return "\n".join(lines) + "\n"


def section(rows: list[Row]) -> list[str]:
    """One table: fastalign's fastest side of every task beside the fastest and the leanest of the others; and where fastalign is behind."""
    lines = [
        "| N, V, D | task | fastalign, ms | / bare | fastest other | / fastalign | fastalign, MiB | leanest other | MiB |",
        "|---|---|---:|---:|---|---:|---:|---|---:|",
    ]
    for (n, v, d, dtype), table in _grouped(rows).items():
        for task in TASKS:
            others = [row for row in table if row.task == task and not row.ours and row.median_ms and row.peak_memory_mib is not None]
            ours = fastest(table, task)
            if ours is None or not others:
                continue
            fast, lean = min(others, key=lambda row: row.median_ms or 0.0), min(others, key=lambda row: row.peak_memory_mib or 0.0)
            cells = [f"{n}, {v}, {d}, {dtype}", task, f"{ours.median_ms:.4g}", f"{ours.over_bare:.2f}"]
            cells += [fast.side, f"{(fast.median_ms or 0.0) / (ours.median_ms or 1.0):.2f}"]
            cells += [f"{ours.peak_memory_mib:.0f}", lean.side, f"{lean.peak_memory_mib:.0f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", *_behind_list(rows)]


def _behind_list(rows: list[Row]) -> list[str]:
    found = behind(rows)
    if not found:
        return ["Where fastalign is behind: in none of these rows."]
    return ["Where fastalign is behind:", "", *(f"- {text}" for text in found)]


def behind(rows: list[Row]) -> list[str]:
    """Every measured peer that is faster, leaner or nearer to float64 than fastalign's fastest side of the same task, and every
    side of fastalign whose log-probs are further from float64 than 8 eps(float32) max(1, max |logit|)."""
    found = []
    for (n, v, d, dtype), table in _grouped(rows).items():
        for row in table:
            ours = fastest(table, row.task)
            where = f"N={n}, V={v}, D={d}, {dtype}, {row.task}: {row.side}"
            if row.ours and (row.logps_error_nats or 0.0) > (row.logps_bound_nats or 0.0):
                found.append(f"{where} {row.logps_error_nats:.2g} nats of error in log-probs, bound {row.logps_bound_nats:.2g}")
            if row.ours or ours is None or row.status != "measured":
                continue
            for name, unit, share in MEASURES:
                theirs, own = getattr(row, name), getattr(ours, name)
                if theirs is not None and own is not None and theirs < share * own - NOISE_MIB * (name == "peak_memory_mib"):
                    found.append(f"{where} {theirs:.3g} {unit}, {ours.side} {own:.3g}")
    return found


def fastest(table: list[Row], task: str) -> Row | None:
    """fastalign's fastest measured side of a task."""
    own = [row for row in table if row.ours and row.task == task and row.median_ms]
    return min(own, key=lambda row: row.median_ms or 0.0, default=None)


def _table_line(row: Row, table: list[Row]) -> str:
    cells = [row.task, row.side]
    if row.status != "measured":
        return f"| {' | '.join([*cells, row.status])} | | | | | | | |"
    ours = fastest(table, row.task)
    ratio = f"{row.median_ms / ours.median_ms:.2f}" if ours and ours.median_ms and row.median_ms else ""
    cells += [f"{row.median_ms:.4g} ({row.min_ms:.4g}-{row.max_ms:.4g})", f"{row.gemms_nvd:.3g}", f"{row.over_bare:.2f}", ratio]
    cells += [f"{row.peak_memory_mib:.0f}"]
    cells += ["" if x is None else f"{x:.1e}" for x in (row.logps_error_nats, row.d_hidden_error, row.d_weight_error)]
    return f"| {' | '.join(cells)} |"


def _grouped(rows: list[Row]) -> dict[tuple[int, int, int, str], list[Row]]:
    tables: dict[tuple[int, int, int, str], list[Row]] = {}
    for row in rows:
        tables.setdefault((row.rows, row.vocabulary, row.hidden_size, row.dtype), []).append(row)
    return tables
