"""Rows of every kind of data source, each with a place that a person can go to: `pairs.jsonl:17`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastalign.data.json_rows import scan_json, scan_jsonl
from fastalign.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

Row = dict[str, Any]
BATCH_ROWS = 1024
_HUB_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?")
_JSONL_SUFFIXES = (".jsonl", ".ndjson")
_SUFFIXES = (*_JSONL_SUFFIXES, ".json", ".parquet", *(f"{suffix}.gz" for suffix in (*_JSONL_SUFFIXES, ".json")))


def read_rows(path: str, split: str = "train", subset: str | None = None) -> Iterator[tuple[str, Row]]:
    """Yields (place, row) in the order of the source. Raises DataError at the first row that cannot be read."""
    for place, row in scan_rows(path, split, subset):
        if isinstance(row, DataError):
            raise row
        yield place, row


def scan_rows(path: str, split: str = "train", subset: str | None = None) -> Iterator[tuple[str, Row | DataError]]:
    """Like `read_rows`, but yields the DataError of a bad row in its place and goes on where the format allows.

    `path` is a .jsonl/.ndjson, .json (any of them may be compressed: .jsonl.gz) or .parquet file, a folder (saved by `datasets`, or
    holding data files), or a hub name. Code that comes with a data set is never run. Raises DataError when there is no such source.
    """
    for place, row in _open(path, split, subset):
        if isinstance(row, (dict, DataError)):
            yield place, row
        else:
            yield (
                place,
                DataError(
                    f"{place}: expected a JSON object with columns such as 'prompt', 'chosen', 'rejected', got {kind_of(row)}; "
                    "write one object per row"
                ),
            )


def kind_of(value: Any) -> str:
    """What a value is, in the words of JSON, short enough for a message."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"the boolean {str(value).lower()}"
    if isinstance(value, int):
        return f"the number {value}" if abs(value) < 10**15 else "a huge integer"
    if isinstance(value, float):
        return f"the number {value}"
    if isinstance(value, str):
        return "text"
    if isinstance(value, (list, tuple)):
        return f"a list of {kind_of(value[0]).removeprefix('a ').removeprefix('an ')}s" if value else "an empty list"
    if isinstance(value, dict):
        return "an object"
    return f"a {type(value).__name__}"


def _open(path: str, split: str, subset: str | None) -> Iterator[tuple[str, Any]]:
    local = Path(path).expanduser()
    if local.is_dir():
        return _scan_dataset(path, split, _load_folder(local, split, subset))
    if local.exists():
        if split != "train" or subset is not None:
            given = f"data.subset {subset!r}" if subset is not None else f"split {split!r}"
            raise DataError(f"{path}: a file has neither splits nor subsets ({given} was asked for); name the file that holds those rows")
        return _scan_file(local)
    looks_local = path.endswith(_SUFFIXES) or not _HUB_NAME.fullmatch(path)
    if looks_local:
        raise DataError(f"{path}: no such file or folder{_nearest_file(local)}")
    return _scan_dataset(path, split, _load_hub(path, split, subset))


def _scan_file(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        path.open("rb").close()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; check its permissions") from error
    suffix = path.suffix.lower() if path.suffix.lower() != ".gz" else path.with_suffix("").suffix.lower()
    if path.suffix.lower() == ".gz" and suffix == ".parquet":
        raise DataError(f"{path}: Parquet is compressed in itself and cannot be read from gzip; decompress the file (gunzip)")
    if suffix in _JSONL_SUFFIXES:
        return scan_jsonl(path)
    if suffix == ".json":
        return scan_json(path)
    if suffix == ".parquet":
        return _scan_parquet(path)
    raise DataError(
        f"{path}: the suffix {path.suffix.lower()!r} is not one that is read ({', '.join(_SUFFIXES)}); "
        "convert or decompress the file, then rename it"
    )


def _scan_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=BATCH_ROWS):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}:row {number}", row
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        place = f"{path}:row {number + 1}"
        yield place, DataError(f"{place}: not a readable Parquet file: {error}; write it again, or give the data as JSONL")


def _scan_dataset(name: str, split: str, dataset: Dataset) -> Iterator[tuple[str, Any]]:
    number = 0
    for batch in dataset.with_format(None).iter(batch_size=BATCH_ROWS):
        for values in zip(*batch.values()):
            number += 1
            yield f"{name}[{split}]:row {number}", dict(zip(batch, values))


def _load_folder(path: Path, split: str, subset: str | None) -> Dataset:
    from datasets import Dataset, load_from_disk

    if not any((path / name).exists() for name in ("dataset_dict.json", "state.json")):
        return _load_hub(str(path), split, subset)
    try:
        loaded = load_from_disk(str(path))
    except Exception as error:
        raise DataError(f"{path}: the saved data set cannot be loaded: {_first_line(error)}; save it again with save_to_disk") from error
    if isinstance(loaded, Dataset):
        if split not in ("train", str(loaded.split)):
            raise DataError(f"{path}: one data set without splits was saved there, and no split {split!r}; leave data.split out")
        return loaded
    if split not in loaded:
        raise DataError(f"{path}: no split {split!r}; it has {', '.join(map(repr, loaded))}: choose one with data.split")
    return loaded[split]


def _load_hub(name: str, split: str, subset: str | None) -> Dataset:
    import datasets

    # datasets 4 removed loading scripts together with this argument; 3 would ask on the terminal without it.
    scripts = {"trust_remote_code": False} if int(datasets.__version__.split(".")[0]) < 4 else {}
    try:
        return datasets.load_dataset(name, subset, split=split, **scripts)
    except Exception as error:
        raise DataError(
            f"{name}: neither a file here nor a data set that the hub or this folder gives (split {split!r}): {_first_line(error)}; "
            "check the name, data.split and data.subset, and the network"
        ) from error


def _nearest_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f" (nor the folder {str(path.parent)!r}); check data.path"
    near = get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1)
    return f"; did you mean {str(path.parent / near[0])!r}?" if near else "; check data.path"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n", 1)[0]
