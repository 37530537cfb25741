"""Unpaired data: ids, labels and cuts equal TRL's, pairs taken apart, labels as people write them, one class, imbalance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rows import BAD, GOOD, USER, sequences, write
from tiny import preference_rows, tiny_tokenizer
from trl_preprocessing import trl_unpaired

from fastalign.data.config import UnpairedDataConfig
from fastalign.data.samples import Samples
from fastalign.data.unpaired import load_unpaired
from fastalign.errors import DataError

TOKENIZER = tiny_tokenizer()
PAIRS = preference_rows(12, seed=1)
CHAT_PAIRS = preference_rows(12, seed=2, conversational=True)


def labelled(pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    sides = [("chosen", True), ("rejected", False)]
    return [{"prompt": row["prompt"], "completion": row[side], "label": label} for row in pairs for side, label in sides]


def load(rows: list[Any], folder: Path, **options: Any) -> Samples:
    options.setdefault("max_length", None)
    return load_unpaired(UnpairedDataConfig(path=write(folder, rows), **options), TOKENIZER, vocab_size=len(TOKENIZER))


def scored(data: Samples) -> list[Any]:
    assert all(len(sample.labels) == 1 for sample in data.samples)
    return [(sequences(sample)[0], sample.labels == (1.0,)) for sample in data.samples]


@pytest.mark.parametrize("max_length", [None, 17])
@pytest.mark.parametrize("pairs", [PAIRS, CHAT_PAIRS], ids=["plain", "chat"])
def test_ids_labels_and_cuts_equal_trl(pairs: list[dict[str, Any]], max_length: int | None, tmp_path: Path) -> None:
    rows = labelled(pairs)
    data = load(rows, tmp_path, max_length=max_length)
    assert scored(data) == trl_unpaired(rows, TOKENIZER, max_length)
    assert data.report.dropped.total() == len(rows) - len(data.samples)


def test_pairs_become_a_desirable_and_an_undesirable_completion(tmp_path: Path) -> None:
    implicit = [{"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]} for row in PAIRS]
    for rows in (PAIRS, CHAT_PAIRS, implicit):
        data = load(rows, tmp_path)
        assert sorted(map(str, scored(data))) == sorted(map(str, trl_unpaired(rows, TOKENIZER)))  # TRL puts the chosen ones first
        assert [sample.index for sample in data.samples] == list(range(24))
        assert [sample.labels for sample in data.samples] == [(1.0,), (0.0,)] * 12
        assert data.report.counts == {"desirable": 12, "undesirable": 12}
        assert data.report.notices["pairs were taken apart: the chosen completion is desirable, the rejected one undesirable"] == 12
    mixed = load([*labelled(PAIRS[:2]), *PAIRS[2:]], tmp_path)
    assert scored(mixed) == scored(load(PAIRS, tmp_path))


def test_indices_do_not_depend_on_what_is_dropped(tmp_path: Path) -> None:
    rows = [labelled(PAIRS)[0], {**PAIRS[1], "chosen": ""}, PAIRS[2], {**labelled(PAIRS)[0], "completion": ""}, labelled(PAIRS)[1]]
    data = load(rows, tmp_path)
    assert [sample.index for sample in data.samples] == [0, 3, 4, 6]
    assert data.report.dropped == {"chosen is empty": 2, "completion is empty": 1}


WRITTEN = [(True, 1), (False, 0), (1, 1), (0, 0), (1.0, 1), (0.0, 0), ("true", 1), ("False", 0), ("GOOD", 1), ("bad", 0), ("desirable", 1),
           ("Undesirable", 0)]  # fmt: skip


def test_labels_as_people_write_them(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": f" b{i}", "label": label} for i, (label, _) in enumerate(WRITTEN)]
    assert [sample.labels[0] for sample in load(rows, tmp_path).samples] == [value for _, value in WRITTEN]


@pytest.mark.parametrize(
    ("label", "got"),
    [("yes", "the text 'yes'"), ("1", "the text '1'"), ("", "the text ''"), (" true", "the text ' true'"), (2, "the number 2"),
     (-1, "the number -1"), (0.5, "the number 0.5"), (float("nan"), "the number nan"), (None, "null"), ({}, "an object"),
     ("x" * 99, f"the text {'x' * 40!r}")],
)  # fmt: skip
def test_a_label_that_is_none_is_named_with_its_row_and_what_is_one(label: Any, got: str, tmp_path: Path) -> None:
    rows = [*labelled(PAIRS[:1]), {"prompt": "a", "completion": "b", "label": label}]
    with pytest.raises(DataError) as error:
        load(rows, tmp_path)
    assert str(error.value) == (
        f"{tmp_path}/rows.jsonl:3: column 'label': expected a label, got {got}; give true or false, 1 or 0, "
        "or one of the words 'true', 'false', 'good', 'bad', 'desirable', 'undesirable'"
    )


def test_a_parquet_file_of_booleans_equals_the_same_rows_as_json(tmp_path: Path) -> None:
    rows = labelled(PAIRS)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    data = load_unpaired(UnpairedDataConfig(path=str(tmp_path / "rows.parquet"), max_length=None), TOKENIZER)
    assert data.samples == load(rows, tmp_path).samples


def test_one_class_is_an_error_unless_it_is_wanted(tmp_path: Path) -> None:
    for label, name, other in ((True, "desirable", "undesirable"), (False, "undesirable", "desirable")):
        rows = [{**row, "label": label} for row in labelled(PAIRS)]
        with pytest.raises(DataError) as error:
            load(rows, tmp_path)
        assert str(error.value) == (
            f"{tmp_path}/rows.jsonl: all 24 completions to train on are {name}; add {other} ones, or set data.one_class true"
        )
        assert {sample.labels for sample in load(rows, tmp_path, one_class=True).samples} == {(float(label),)}
    held_out = write(tmp_path, [{**row, "label": True} for row in labelled(PAIRS)], "held_out.jsonl")
    assert len(load(labelled(PAIRS), tmp_path, eval_path=held_out).eval_samples) == 24, "held-out data may have one class"


def test_a_split_that_leaves_one_class_to_train_on_is_an_error(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b", "label": True}, {"prompt": "c", "completion": "d", "label": False}]
    with pytest.raises(DataError, match="all 1 completions to train on are"):
        load(rows, tmp_path, eval_fraction=0.5)


@pytest.mark.parametrize(
    ("desirable", "undesirable", "range_"),
    [(9, 1, "undesirable_weight between 6.75 and 9"), (1, 4, "desirable_weight between 4 and 5.33"), (4, 3, None), (3, 4, None)],
)
def test_imbalance_is_reported_with_the_weights_that_mend_it(desirable: int, undesirable: int, range_: str | None, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": f" b{i}", "label": i < desirable} for i in range(desirable + undesirable)]
    report = load(rows, tmp_path).report
    assert report.counts == {"desirable": desirable, "undesirable": undesirable}
    assert f"{desirable} desirable, {undesirable} undesirable" in report.summary()
    assert [notice for notice in report.notices if range_ and range_ in notice] == list(report.notices)
    assert bool(report.notices) is (range_ is not None)


def test_no_prompt_is_on_both_sides_of_the_split(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i % 5}", "completion": f" c{i}", "label": i % 2} for i in range(40)]
    data = load([*rows, *({"prompt": f"p{i}", "chosen": "x", "rejected": "y"} for i in range(5))], tmp_path, eval_fraction=0.4)
    prompts = [{sample.prompt for sample in part} for part in (data.samples, data.eval_samples)]
    assert not prompts[0] & prompts[1]
    assert len(data.samples) + len(data.eval_samples) == 50
    assert len(data.eval_samples) == 20


def test_duplicates_can_be_dropped_and_another_label_is_no_duplicate(tmp_path: Path) -> None:
    row = labelled(PAIRS)[0]
    data = load([row, row, {**row, "label": False}, {**row, "label": 1}], tmp_path, deduplicate=True)
    assert [sample.index for sample in data.samples] == [0, 2]
    assert data.report.dropped == {"repeats an earlier row": 2}


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "no_label": ({"prompt": "a", "completion": "b"}, "column 'label' is missing (columns: 'prompt', 'completion'); these look like"),
    "misspelt": ({"prompt": "a", "completion": "b", "labels": True}, "there is 'labels': did you mean 'label'?"),
    "no_prompt": ({"completion": "b", "label": True}, "column 'prompt' is missing (columns: 'completion', 'label'); unpaired preference"),
    "empty_prompt": ({"prompt": "", "completion": "b", "label": True}, "column 'prompt': the prompt is empty"),
    "null": ({"prompt": "a", "completion": None, "label": True}, "column 'completion': expected text or a list of messages, got null"),
    "mixed": ({"prompt": "a", "completion": [GOOD], "label": True}, "column 'prompt' is text but 'completion' is a list of objects"),
    "repeated": ({"prompt": [USER], "completion": [USER, BAD], "label": True}, "column 'completion' repeats the messages of 'prompt'"),
    "user_last": ({"prompt": [USER], "completion": [USER], "label": True}, "column 'completion' repeats the messages of 'prompt'"),
    "ends_with_user": ({"prompt": [USER], "completion": [BAD, USER], "label": 1}, "column 'completion': the last message has role 'user'"),
    "messages": ({"messages": [USER, GOOD], "label": True}, "these look like conversations for SFT"),
    "half_a_pair": ({"prompt": "a", "chosen": "b"}, "column 'rejected' is missing"),
    "weight": ({"prompt": "a", "completion": "b", "label": 1, "weight": "2"}, "column 'weight': expected a number, got text"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_malformed_rows_are_named_with_column_and_remedy(case: str, tmp_path: Path) -> None:
    row, expected = ERRORS[case]
    with pytest.raises(DataError) as error:
        load([row], tmp_path)
    assert str(error.value).startswith(f"{tmp_path}/rows.jsonl:1: ")
    assert expected in str(error.value)
