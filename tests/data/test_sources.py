"""Every kind of source gives the same rows, and every kind of broken file an error with its place and remedy."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import preference_rows

from fastalign.data.sources import read_rows, scan_rows
from fastalign.errors import DataError

ROWS = preference_rows(5, seed=3)
LINES = [json.dumps(row) for row in ROWS]


def write(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def rows_of(path: str, **options: Any) -> list[dict[str, Any]]:
    return [row for _, row in read_rows(path, **options)]


def lines_of(path: str) -> list[int]:
    return [int(place.rpartition(":")[2]) for place, _ in read_rows(path)]


def error_of(path: str, **options: Any) -> str:
    with pytest.raises(DataError) as error:
        list(read_rows(path, **options))
    assert str(error.value).startswith(path)
    return str(error.value)


def test_jsonl_with_bom_crlf_and_blank_lines(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", "\ufeff" + "\r\n\r\n".join(LINES) + "\r\n  \r\n")
    assert rows_of(path) == ROWS
    assert lines_of(path) == [1, 3, 5, 7, 9]


def test_a_line_ends_only_at_a_newline(tmp_path: Path) -> None:
    row = {"prompt": "a\u2028b\u2029c\x85d", "chosen": "c", "rejected": "r"}  # str.splitlines would cut at each of them
    path = write(tmp_path, "a.jsonl", json.dumps(row, ensure_ascii=False) + "\n" + LINES[0])
    assert rows_of(path) == [row, ROWS[0]]
    assert lines_of(path) == [1, 2]


def test_json_array_and_data_object_know_their_lines(tmp_path: Path) -> None:
    array = write(tmp_path, "array.json", json.dumps(ROWS, indent=1))
    assert rows_of(array) == ROWS
    assert lines_of(array) == [2, 7, 12, 17, 22]
    wrapped = write(tmp_path, "wrapped.json", json.dumps({"version": {"data": 1}, "data": ROWS, "more": [1]}, indent=1))
    assert rows_of(wrapped) == ROWS
    assert lines_of(wrapped) == [6, 11, 16, 21, 26]
    compact = write(tmp_path, "compact.json", json.dumps({"data": ROWS}))
    assert lines_of(compact) == [1] * 5
    assert rows_of(write(tmp_path, "empty.json", " [ ] ")) == []


def test_json_lines_under_the_suffix_json(tmp_path: Path) -> None:
    path = write(tmp_path, "a.json", "\n".join(LINES))  # what datasets.Dataset.to_json writes
    assert rows_of(path) == ROWS
    assert lines_of(path) == [1, 2, 3, 4, 5]
    assert rows_of(write(tmp_path, "one.json", json.dumps(ROWS[0], indent=2))) == ROWS[:1]


def test_parquet(tmp_path: Path) -> None:
    path = str(tmp_path / "a.parquet")
    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=2)
    assert list(read_rows(path)) == [(f"{path}:row {i + 1}", row) for i, row in enumerate(ROWS)]


def test_a_folder_of_data_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "files"
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "train.parquet")
    pq.write_table(pa.Table.from_pylist(ROWS[:2]), folder / "test.parquet")
    assert rows_of(str(folder)) == ROWS
    assert rows_of(str(folder), split="test") == ROWS[:2]


def test_saved_data_sets(tmp_path: Path) -> None:
    saved, splits = str(tmp_path / "saved"), str(tmp_path / "splits")
    datasets.Dataset.from_list(ROWS).save_to_disk(saved)
    assert rows_of(saved) == ROWS
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:2])}).save_to_disk(splits)
    assert list(read_rows(splits, "test")) == [(f"{splits}[test]:row {i + 1}", ROWS[i]) for i in range(2)]
    assert "no split 'dev'; it has 'train', 'test': choose one with data.split" in error_of(splits, split="dev")


def test_a_hub_name_goes_to_load_dataset_without_code(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def load_dataset(*args: Any, **options: Any) -> datasets.Dataset:
        calls.append((args, options))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "__version__", "5.2.0")
    assert next(read_rows("owner/pairs-1.0", "test", "en")) == ("owner/pairs-1.0[test]:row 1", ROWS[0])
    assert calls == [(("owner/pairs-1.0", "en"), {"split": "test"})]
    monkeypatch.setattr(datasets, "__version__", "3.6.0")
    next(read_rows("owner/pairs"))
    assert calls[1] == (("owner/pairs", None), {"split": "train", "trust_remote_code": False})


def test_an_unreachable_hub_name_is_one_error() -> None:
    message = error_of("nobody/no-such-data-set")  # the tests run offline
    assert "neither a file here nor a data set" in message
    assert "check the name, data.split and data.subset, and the network" in message


BROKEN = {
    "cut_short": ("a.jsonl", LINES[0] + "\n" + LINES[1][:-9] + "\n", 2, "not valid JSON at column"),
    "two_objects_on_a_line": ("a.jsonl", LINES[0] + LINES[1], 1, "write one object per line"),
    "tab_in_a_string": ("a.jsonl", '{"prompt": "a\tb"}', 1, r'write line breaks and tabs inside strings as "\n" and "\t"'),
    "array_in_jsonl": ("a.jsonl", json.dumps(ROWS), 1, "expected a JSON object with columns such as 'prompt', 'chosen', 'rejected', got a"),
    "number_in_jsonl": ("a.jsonl", LINES[0] + "\n7\n", 2, "got the number 7; write one object per row"),
    "key_twice": ("a.jsonl", '{"prompt": "a", "prompt": "b"}', 1, "key 'prompt' appears twice in one object; keep one"),
    "huge_integer": ("a.jsonl", '{"weight": ' + "9" * 5000 + "}", 1, "not usable JSON: Exceeds the limit (4300"),
    "nested_too_deeply": ("a.jsonl", '{"a": ' + "[" * 200_000 + "]" * 200_000 + "}", 1, "nested too deeply"),
    "utf16": ("a.jsonl", LINES[0].encode("utf-16"), 1, "the file starts with a UTF-16 byte order mark; re-save it as UTF-8"),
    "latin1": ("a.jsonl", LINES[0].encode() + b'\n{"a": "caf\xe9"}', 2, f"not UTF-8: byte 0xe9 at offset {len(LINES[0]) + 11} of"),
    "latin1_after_bom": ("a.jsonl", b"\xef\xbb\xbf\xe9", 1, "not UTF-8: byte 0xe9 at offset 3 of the file"),
    "latin1_json": ("a.json", b'\xef\xbb\xbf[\n{"a": "\xe9"}]', 2, "not UTF-8: byte 0xe9 at offset 12 of the file"),
    "utf16_json": ("a.json", json.dumps(ROWS).encode("utf-16"), 1, "UTF-16 byte order mark"),
    "missing_comma": ("a.json", "[" + LINES[0] + "\n" + LINES[1] + "]", 2, "not valid JSON at column 1: Expecting ','"),
    "unclosed_array": ("a.json", "[" + LINES[0] + ",\n", 2, "not valid JSON at column 1: Expecting value"),
    "text_after_array": ("a.json", "[" + LINES[0] + "]\n[]", 2, "Extra data"),
    "broken_row_in_array": ("a.json", "[" + LINES[0] + ',\n{"prompt": }]', 2, "not valid JSON at column 12: Expecting value"),
    "text_only": ("a.json", '"pairs"', 1, "expected a JSON array of rows, or an object with an array 'data'"),
    "key_twice_in_array": ("a.json", "[" + LINES[0] + ',\n{"a": 1, "a": 2}]', 2, "key 'a' appears twice"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_json_is_named_with_file_and_line(case: str, tmp_path: Path) -> None:
    name, content, line, expected = BROKEN[case]
    message = error_of(write(tmp_path, name, content))
    assert message.startswith(f"{tmp_path / name}:{line}: ")
    assert expected in message


def test_a_scan_goes_on_after_a_bad_line(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", "\n".join([LINES[0], "{", LINES[1], "[]", LINES[2]]))
    found = list(scan_rows(path))
    assert [row for _, row in found if isinstance(row, dict)] == ROWS[:3]
    assert [place for place, row in found if isinstance(row, DataError)] == [f"{path}:2", f"{path}:4"]


def test_parquet_that_is_none_or_was_cut(tmp_path: Path) -> None:
    assert "not a readable Parquet file" in error_of(write(tmp_path, "a.parquet", "no parquet"))
    path = tmp_path / "b.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    path.write_bytes(path.read_bytes()[:-40])
    assert "write it again, or give the data as JSONL" in error_of(str(path))


def test_a_gzip_file_gives_the_rows_of_what_is_in_it(tmp_path: Path) -> None:
    plain, lines = write(tmp_path, "a.jsonl", "\n\n".join(LINES)), "\n\n".join(LINES).encode()
    packed = write(tmp_path, "a.jsonl.gz", gzip.compress(lines))
    assert rows_of(packed) == rows_of(plain) == ROWS
    assert lines_of(packed) == lines_of(plain)
    assert rows_of(write(tmp_path, "a.json.gz", gzip.compress(json.dumps(ROWS).encode()))) == ROWS
    for name in ("b.jsonl.gz", "b.json.gz"):
        for content in (lines, gzip.compress(lines)[:-20]):  # not packed at all; cut short
            assert "cannot be unpacked" in error_of(write(tmp_path, name, content))
    assert "compressed in itself" in error_of(write(tmp_path, "a.parquet.gz", b""))


def test_a_split_of_what_has_none_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", LINES[0])
    assert "a file has neither splits nor subsets (split 'test' was asked for)" in error_of(path, split="test")
    assert "(data.subset 'en' was asked for)" in error_of(path, subset="en")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert rows_of(str(tmp_path / "saved")) == ROWS
    assert "no split 'test'; leave data.split out" in error_of(str(tmp_path / "saved"), split="test")


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    write(tmp_path, "pairs.jsonl", LINES[0])
    assert f"did you mean '{tmp_path}/pairs.jsonl'?" in error_of(str(tmp_path / "pair.jsonl"))
    assert f"nor the folder '{tmp_path}/none'" in error_of(str(tmp_path / "none" / "pairs.jsonl"))
    assert "the suffix '.csv' is not one that is read (.jsonl, .ndjson, .json, .parquet, .jsonl.gz, " in error_of(
        write(tmp_path, "a.csv", "a,b")
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "neither a file here nor a data set" in error_of(str(empty))


def test_a_damaged_saved_data_set(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    datasets.Dataset.from_list(ROWS).save_to_disk(saved)
    next(saved.glob("*.arrow")).write_bytes(b"x")
    assert "the saved data set cannot be loaded" in error_of(str(saved))
