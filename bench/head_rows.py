"""One row of the head benchmark's table: what a side took, and how far it was from float64. CSV in and out."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

Key = tuple[str, int, int, int, str, str, str]


@dataclass(frozen=True)
class Row:
    """The columns of the CSV file. A number is None where it was not measured; `status` says why."""

    device: str
    rows: int  # N
    vocabulary: int  # V
    hidden_size: int  # D
    dtype: str
    task: str
    side: str
    ours: bool
    status: str = "measured"
    gemms_nvd: float | None = None  # floating-point operations of the side's GEMMs in multiples of N V D
    median_ms: float | None = None
    min_ms: float | None = None
    max_ms: float | None = None
    repeats: int = 0
    bare_gemms_ms: float | None = None  # of the same GEMMs, in the same rounds
    peak_memory_mib: float | None = None  # above inputs; results included
    logps_error_nats: float | None = None  # max |x - gold|
    logps_bound_nats: float | None = None  # 8 eps(float32) max(1, max |logit|): what fastalign's log-probs are to keep
    loss_error: float | None = None  # |x - gold| / (1 + |gold|)
    d_hidden_error: float | None = None  # |x - gold| / |gold|, Euclidean norms over the sampled rows
    d_weight_error: float | None = None
    commit: str = ""
    command: str = ""

    @property
    def key(self) -> Key:
        return (self.device, self.rows, self.vocabulary, self.hidden_size, self.dtype, self.task, self.side)

    @property
    def over_bare(self) -> float | None:
        """Time over that of its own bare GEMMs."""
        return self.median_ms / self.bare_gemms_ms if self.median_ms and self.bare_gemms_ms else None


def write(path: Path, rows: Iterable[Row]) -> None:
    """Replace the file in one step, so that an interrupted benchmark leaves the rows it had."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    with beside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [column.name for column in fields(Row)])
        writer.writeheader()
        for row in rows:
            writer.writerow({name: _short(value) for name, value in asdict(row).items()})
    beside.replace(path)


def read(path: Path) -> list[Row]:
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Row(**{column.name: _parse(str(column.type), record[column.name]) for column in fields(Row)}) for record in csv.DictReader(file)
        ]


def _parse(kind: str, text: str) -> Any:
    if kind in ("str", "bool"):
        return text if kind == "str" else text == "True"
    return (int if kind == "int" else float)(text) if text else None


def _short(value: object) -> object:
    return f"{value:.5g}" if isinstance(value, float) else "" if value is None else value
