"""Rows of JSON and JSON Lines files, each with the line it starts on.

Lines end at "\\n" only: a Unicode line separator inside a string is data. Keys that appear twice are an error, since a
reader would have to drop one of the values.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from fastalign.errors import DataError

_SPACE = re.compile(r"[ \t\n\r]*")
_UTF8_BOM = b"\xef\xbb\xbf"
_UNPACKING = (gzip.BadGzipFile, EOFError, zlib.error)
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")


def scan_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields (place, value or DataError) for every line that is not blank."""
    offset, number = 0, 0
    with opened(path) as file:
        lines = iter(file)
        while True:
            number += 1
            try:
                raw = next(lines)
            except StopIteration:
                return
            except _UNPACKING as error:
                yield f"{path}:{number}", _not_gzip(path, number, error)
                return
            place, start = f"{path}:{number}", offset
            offset += len(raw)
            if number == 1:
                if wrong := _utf16_error(path, raw):
                    yield place, wrong
                    return
                if raw.startswith(_UTF8_BOM):
                    raw, start = raw[len(_UTF8_BOM) :], len(_UTF8_BOM)
            if not raw.strip():
                continue
            yield place, _parse_line(place, raw, start)


def opened(path: Path) -> IO[bytes]:
    """The bytes of a file, unpacked where its name ends in .gz."""
    return cast("IO[bytes]", gzip.open(path)) if path.suffix.lower() == ".gz" else path.open("rb")


def scan_json(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields (place, value or DataError) for a JSON array, an object with an array `data`, or JSON Lines in a .json file.

    A syntax error ends an array, because what follows it has no certain meaning.
    """
    try:
        with opened(path) as file:
            raw = file.read()
    except _UNPACKING as error:
        yield f"{path}:1", _not_gzip(path, 1, error)
        return
    if wrong := _utf16_error(path, raw):
        yield f"{path}:1", wrong
        return
    try:
        text = raw.removeprefix(_UTF8_BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        shift = len(raw) - len(error.object)
        line = error.object.count(b"\n", 0, error.start) + 1
        place = f"{path}:{line}"
        yield place, _not_utf8(place, error, shift)
        return
    cursor = _Cursor(text)
    try:
        first = cursor.peek()
        if first == "[":
            yield from _scan_array(path, cursor)
            _expect_end(cursor)
        elif first == "{" and _enter_data_array(cursor):
            yield from _scan_array(path, cursor)
            _leave_object(cursor)
            _expect_end(cursor)
        elif first == "{":
            yield from _scan_objects(path, text)
        elif first:
            yield (
                f"{path}:{cursor.line}",
                DataError(f"{path}:{cursor.line}: expected a JSON array of rows, or an object with an array 'data'"),
            )
    except json.JSONDecodeError as error:
        place = f"{path}:{error.lineno}"
        yield place, _malformed(place, error)
    except (ValueError, RecursionError) as error:
        place = f"{path}:{cursor.line}"
        yield place, _malformed(place, error)


def _scan_objects(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """A .json file that starts with an object which has no array `data`: one row, or JSON Lines under the wrong suffix."""
    cursor = _Cursor(text)
    try:
        cursor.peek()
        line, row = cursor.line, cursor.value()
        alone = not cursor.peek()
    except (ValueError, RecursionError):
        alone = False
    if alone:
        yield f"{path}:{line}", row
    else:
        yield from scan_jsonl(path)


def _scan_array(path: Path, cursor: _Cursor) -> Iterator[tuple[str, Any]]:
    cursor.expect("[")
    if cursor.peek() == "]":
        cursor.expect("]")
        return
    while True:
        cursor.peek()
        place = f"{path}:{cursor.line}"
        yield place, cursor.value()
        if cursor.peek() == "]":
            cursor.expect("]")
            return
        cursor.expect(",")


def _enter_data_array(cursor: _Cursor) -> bool:
    """Moves to the value of the key `data`; False when the object has no such key or its value is not an array."""
    cursor.expect("{")
    while cursor.peek() == '"':
        key = cursor.value()
        cursor.expect(":")
        if key == "data" and cursor.peek() == "[":
            return True
        cursor.value()
        if cursor.peek() != ",":
            return False
        cursor.expect(",")
    return False


def _leave_object(cursor: _Cursor) -> None:
    while cursor.peek() == ",":
        cursor.expect(",")
        cursor.value()
        cursor.expect(":")
        cursor.value()
    cursor.expect("}")


def _expect_end(cursor: _Cursor) -> None:
    if cursor.peek():
        raise json.JSONDecodeError("Extra data", cursor.text, cursor.pos)


class _Cursor:
    """A position in JSON text that knows its line; values are decoded by the C scanner."""

    def __init__(self, text: str) -> None:
        self.text, self.pos = text, 0
        self._line, self._counted = 1, 0

    @property
    def line(self) -> int:
        self._line += self.text.count("\n", self._counted, self.pos)
        self._counted = self.pos
        return self._line

    def peek(self) -> str:
        """The next character that is not white space, or "" at the end."""
        match = _SPACE.match(self.text, self.pos)
        assert match is not None
        self.pos = match.end()
        return self.text[self.pos : self.pos + 1]

    def expect(self, char: str) -> None:
        if self.peek() != char:
            raise json.JSONDecodeError(f"Expecting {char!r}", self.text, self.pos)
        self.pos += 1

    def value(self) -> Any:
        self.peek()
        value, self.pos = _DECODER.raw_decode(self.text, self.pos)
        return value


def _parse_line(place: str, raw: bytes, start: int) -> Any:
    try:
        return _DECODER.decode(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return _not_utf8(place, error, start)
    except (ValueError, RecursionError) as error:
        return _malformed(place, error)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {twice!r} appears twice in one object; keep one of them")
    return row


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys)


def _malformed(place: str, error: Exception) -> DataError:
    if isinstance(error, json.JSONDecodeError):
        hint = "an object was cut short or a quote, comma or bracket is missing there"
        if error.msg.startswith("Extra data"):
            hint = "write one object per line (.jsonl), or one array of objects (.json)"
        elif "control character" in error.msg:
            hint = 'write line breaks and tabs inside strings as "\\n" and "\\t"'
        return DataError(f"{place}: not valid JSON at column {error.colno}: {error.msg}; {hint}")
    if isinstance(error, RecursionError):
        return DataError(f"{place}: not usable JSON: nested too deeply; a row is a flat object of text or messages")
    return DataError(f"{place}: not usable JSON: {error}")


def _not_utf8(place: str, error: UnicodeDecodeError, start: int) -> DataError:
    byte = error.object[error.start]
    return DataError(
        f"{place}: not UTF-8: byte 0x{byte:02x} at offset {start + error.start} of the file; "
        "re-save the file as UTF-8 (for example: iconv -f latin1 -t utf-8 OLD > NEW)"
    )


def _utf16_error(path: Path, raw: bytes) -> DataError | None:
    if raw.startswith(_UTF16_BOMS):
        return DataError(
            f"{path}:1: not UTF-8: the file starts with a UTF-16 byte order mark; re-save it as UTF-8 (iconv -f utf-16 -t utf-8 OLD > NEW)"
        )
    return None


def _not_gzip(path: Path, line: int, error: Exception) -> DataError:
    return DataError(
        f"{path}:{line}: cannot be unpacked: {error}; it is no gzip file, or its end is missing: compress or download it again"
    )
