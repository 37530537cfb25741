"""Rows of a benchmark: dataclasses in, CSV out, and back. Every row says what it was measured on."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

R = TypeVar("R")
FACTS = ("machine", "system", "versions", "commit")  # columns that `machine.describe` fills; `command` comes beside them


def write(path: Path, rows: Iterable[Any]) -> None:
    """Replace the file in one step, so that an interrupted benchmark leaves the rows it had."""
    records = [asdict(row) for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    with beside.open("w", newline="", encoding="utf-8") as file:
        last = (*FACTS, "command")  # a base class has them, whose fields a dataclass puts first
        writer = csv.DictWriter(file, sorted(records[0], key=lambda name: name in last) if records else [])
        writer.writeheader()
        writer.writerows({name: _short(value) for name, value in record.items()} for record in records)
    beside.replace(path)


def read(path: Path, kind: type[R]) -> list[R]:
    """The rows of a file as `kind`; a column that the file does not have keeps its default."""
    with path.open(newline="", encoding="utf-8") as file:
        records = list(csv.DictReader(file))
    columns = {column.name: str(column.type) for column in fields(kind)}  # type: ignore[arg-type]
    return [kind(**{name: _parse(columns[name], text) for name, text in record.items() if name in columns}) for record in records]


def facts(rows: Sequence[Any]) -> list[str]:
    """Lines for a page: what the rows were measured on, and with which commands."""

    def all_of(name: str) -> list[str]:
        return list(dict.fromkeys(getattr(row, name) for row in rows if getattr(row, name)))

    return [*(f"- {name}: {', '.join(all_of(name))}" for name in FACTS), *(f"- command: `{command}`" for command in all_of("command"))]


def _parse(kind: str, text: str) -> Any:
    if kind in ("str", "bool"):
        return text if kind == "str" else text == "True"
    return (int if kind.startswith("int") else float)(text) if text else None


def _short(value: object) -> object:
    return f"{value:.5g}" if isinstance(value, float) else "" if value is None else value
