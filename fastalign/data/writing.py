"""Rows into a JSON Lines or Parquet file, streamed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from fastalign.errors import DataError

SUFFIXES = (".jsonl", ".ndjson", ".parquet")
_BATCH_ROWS = 4096
_ABSENT = {"margin": 0.0, "weight": 1.0}  # what a row without the column means; in Parquet every row has it


def write_rows(path: Path, lines: Callable[[], Iterator[str]], wrote: Callable[[int], None]) -> None:
    """Writes rows to `path`, in the format of its suffix; they are on the disk when this returns.

    `lines()` starts over and gives one JSON object per line; `wrote` is told how many are done. Raises DataError when rows
    do not fit into one Parquet schema, OSError when the disk is full.
    """
    if path.suffix == ".parquet":
        _write_parquet(path, lines, wrote)
    else:
        with path.open("w", encoding="utf-8") as file:
            for line in lines():
                file.write(line)
                wrote(1)
    with path.open("rb") as written:
        os.fsync(written.fileno())


def _write_parquet(path: Path, lines: Callable[[], Iterator[str]], wrote: Callable[[int], None]) -> None:
    """Reads the rows twice: once for the columns that they have together, so that none is lost, and once to write them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pa.schema([])
        for batch in _batches(lines()):
            names = dict.fromkeys(name for row in batch for name in row)
            found = pa.table({name: [row.get(name) for row in batch] for name in names}).schema
            schema = pa.unify_schemas([schema, found], promote_options="permissive")
        with pq.ParquetWriter(path, schema) as writer:
            absent = {name: value for name, value in _ABSENT.items() if name in schema.names}
            for batch in ([{**absent, **row} for row in rows] for rows in _batches(lines())):
                writer.write_table(pa.Table.from_pylist(batch, schema=schema))
                wrote(len(batch))
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(f"Parquet needs rows of one shape, and these differ ({error}); write .jsonl") from error


def _batches(lines: Iterator[str]) -> Iterator[list[dict[str, Any]]]:
    rows = map(_row, lines)
    while batch := list(islice(rows, _BATCH_ROWS)):
        yield batch


def _row(line: str) -> dict[str, Any]:
    row: dict[str, Any] = json.loads(line)
    if '"tool_calls"' in line:
        raise DataError("Parquet would give all tool calls each other's arguments, as nulls; write .jsonl")
    if row.get("tools") is not None and not isinstance(row["tools"], str):
        row["tools"] = json.dumps(row["tools"])  # of tool schemas the same is true, and they may be text
    return row
