"""Rounds on disk: numbers that never come twice, steps that are there or not, and what is told of a file that cannot be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastalign.errors import OutputError
from fastalign.serve.loop.rounds import Rounds


def test_a_round_is_as_it_was_left(tmp_path: Path):
    rounds = Rounds(tmp_path / "online")
    assert rounds.last() is None and rounds.learned == 0
    first = rounds.begin(parent="base", upto=7, taken=["base"])
    assert (first.name, first.begun.after, first.begun.upto, first.closed, first.read("measured")) == ("round-0001", 0, 7, None, None)
    first.write("measured", {"win_rate": 0.625})
    closed = first.close(promoted=True, reasons=["better"], figures={"win_rate": 0.625})
    again = Rounds(tmp_path / "online").last()
    assert again is not None and again.begun == first.begun and again.closed == closed and again.read("measured") == {"win_rate": 0.625}
    second = Rounds(tmp_path / "online").begin(parent=first.name, upto=9, taken=[])
    assert (second.name, second.begun.after, second.begun.parent) == ("round-0002", 7, "round-0001")
    assert [one.name for one in rounds] == ["round-0001", "round-0002"] and rounds.learned == 9


def test_no_version_s_name_is_given_again(tmp_path: Path):
    assert Rounds(tmp_path).begin(parent="base", upto=1, taken=["base", "round-0011", "round-2x"]).name == "round-0012"


def test_rounds_are_in_order_beyond_four_digits_and_a_folder_without_a_beginning_is_none(tmp_path: Path):
    rounds = Rounds(tmp_path)
    for taken in (["round-9999"], []):
        rounds.begin(parent="base", upto=1, taken=taken)
    (tmp_path / "round-10002").mkdir()  # a loop was killed as it made it
    assert [one.name for one in rounds] == ["round-10000", "round-10001"]
    assert rounds.begin(parent="base", upto=2, taken=[]).name == "round-10002"


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path):
    made = Rounds(tmp_path).begin(parent="base", upto=1, taken=[])
    (made.folder / "begun.json").write_text("{")
    with pytest.raises(OutputError, match=r"round-0001/begun\.json: cannot be read .*move the folder of its round away"):
        Rounds(tmp_path).last()
