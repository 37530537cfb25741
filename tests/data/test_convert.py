"""Conversion: every kind of feedback by its stated rules, cycles, splits by prompt, duplicates, files, bad input, memory."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from rows import BAD, GOOD, USER, write
from tiny import preference_rows, tiny_tokenizer

from fastalign import cli
from fastalign.data import convert as module
from fastalign.data import writing
from fastalign.data.check import AnyDataConfig
from fastalign.data.config import DataConfig, RankedDataConfig, UnpairedDataConfig
from fastalign.data.convert import ConvertConfig, FeedbackSource, convert
from fastalign.data.page import Statistics
from fastalign.data.preferences import load_preferences
from fastalign.data.ranked import load_ranked
from fastalign.data.unpaired import load_unpaired
from fastalign.errors import ConfigError, DataError, OutputError

Row = dict[str, Any]


def run(folder: Path, rows: list[Any], source: str, to: str, output: str = "out.jsonl", **rules: Any) -> tuple[list[Row], Statistics]:
    data = FeedbackSource(
        path=write(folder, rows), **{name: rules.pop(name) for name in ("scale_min", "scale_max", "columns") if name in rules}
    )
    config = ConvertConfig(data=data, output=str(folder / output), from_=source, to=to, overwrite=True, **rules)
    statistics = convert(config)
    return read(folder / output), statistics


def read(path: Path) -> list[Row]:
    if path.suffix == ".parquet":
        rows: list[Row] = pq.read_table(path).to_pylist()
        return rows
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def dropped(statistics: Statistics) -> dict[str, int]:
    return dict(statistics.tally.report.dropped)


def rated(**ratings: float) -> list[Row]:
    return [{"prompt": "p", "completion": name, "rating": rating} for name, rating in ratings.items()]


def pair(chosen: str, rejected: str, **more: Any) -> Row:
    return {"prompt": "p", "chosen": chosen, "rejected": rejected, **more}


def test_ratings_become_pairs_with_the_difference_as_margin(tmp_path: Path) -> None:
    rows, statistics = run(tmp_path, rated(a=4, b=1, c=4, d=2.5), "ratings", "pairs")
    assert rows == [pair(*two, margin=m) for two, m in (("ad", 1.5), ("ab", 3.0), ("cd", 1.5), ("cb", 3.0), ("db", 1.5))]
    assert dropped(statistics) == {"ties: equally good completions": 1}
    kept, _ = run(tmp_path, rated(a=4, b=1, c=4), "ratings", "pairs", ties="keep")
    assert kept == [pair("a", "c", margin=0.0), pair("a", "b", margin=3.0), pair("c", "b", margin=3.0)]
    few, statistics = run(tmp_path, rated(a=4, b=1, c=3), "ratings", "pairs", min_margin=2)
    assert few == [pair("a", "b", margin=3.0), pair("c", "b", margin=2.0)]
    assert dropped(statistics) == {"differ by less than min_margin=2": 1}
    best, _ = run(tmp_path, rated(a=4, b=1, c=3), "ratings", "pairs", select="best_worst")
    assert best == [pair("a", "b", margin=3.0)]
    most, statistics = run(tmp_path, rated(a=4, b=1, c=3), "ratings", "pairs", max_pairs=2)
    assert most == [pair("a", "b", margin=3.0), pair("c", "b", margin=2.0)]
    assert dropped(statistics) == {"more than max_pairs=2 pairs of a prompt": 1}


def test_a_completion_rated_several_times_counts_with_the_mean(tmp_path: Path) -> None:
    rows = [*rated(a=5, b=3), *rated(a=2, c=3.25)]
    pairs, statistics = run(tmp_path, rows, "ratings", "pairs")
    assert pairs == [pair("a", "c", margin=0.25), pair("a", "b", margin=0.5), pair("c", "b", margin=0.25)]
    assert statistics.tally.averaged == 1


def test_ratings_become_labels_by_a_threshold(tmp_path: Path) -> None:
    labels, _ = run(tmp_path, rated(a=4, b=1, c=3), "ratings", "binary", threshold=3)
    assert [(row["completion"], row["label"]) for row in labels] == [("a", True), ("b", False), ("c", True)]
    labels, statistics = run(tmp_path, rated(a=4, b=1, c=3, d=2), "ratings", "binary", threshold=4, reject_below=2)
    assert [(row["completion"], row["label"]) for row in labels] == [("a", True), ("b", False)]
    assert dropped(statistics) == {"rated from reject_below=2 to below threshold=4": 2}


def test_ratings_become_a_ranking(tmp_path: Path) -> None:
    lists, statistics = run(tmp_path, [*rated(a=1, b=4, c=2, d=4), {"prompt": "q", "completion": "a", "rating": 1}], "ratings", "listwise")
    assert lists == [{"prompt": "p", "completions": ["b", "c", "a"], "scores": [4.0, 2.0, 1.0]}]
    assert dropped(statistics) == {"tied with another completion": 1, "fewer than two completions in an order": 1}
    lists, _ = run(tmp_path, rated(a=1, b=4, c=2, d=4), "ratings", "listwise", ties="keep")
    assert lists == [{"prompt": "p", "completions": ["b", "d", "c", "a"], "scores": [4.0, 4.0, 2.0, 1.0]}]


def test_ratings_in_lists_equal_ratings_in_rows(tmp_path: Path) -> None:
    row = {"prompt": "p", "completions": ["a", "b", "c"], "ratings": [4, 1, 3]}
    assert run(tmp_path, [row], "ratings", "pairs")[0] == run(tmp_path, rated(a=4, b=1, c=3), "ratings", "pairs")[0]


def test_labels_become_pairs_and_the_majority_counts(tmp_path: Path) -> None:
    labels = [("a", True), ("b", "bad"), ("c", 1), ("d", 0), ("e", True), ("e", False), ("a", True), ("a", False)]
    rows: list[Row] = [{"prompt": "p", "completion": name, "label": label} for name, label in labels]
    kept, statistics = run(tmp_path, rows, "binary", "binary")
    assert [(row["completion"], row["label"]) for row in kept] == [("a", True), ("b", False), ("c", True), ("d", False)]
    assert dropped(statistics) == {"labelled good as often as bad": 1}
    pairs, _ = run(tmp_path, [*rows[:4], {"prompt": "q", "completion": "a", "label": True}], "binary", "pairs")
    assert pairs == [pair("a", "b"), pair("a", "d"), pair("c", "b"), pair("c", "d")]


def test_lists_become_pairs_and_labels(tmp_path: Path) -> None:
    scored = {"prompt": "p", "completions": ["a", "b", "c"], "scores": [1, 5, 3]}
    ranked = {"prompt": "p", "completions": ["a", "b", "c"], "ranks": [3, 1, 2]}
    expected = [pair("b", "c"), pair("b", "a"), pair("c", "a")]
    assert run(tmp_path, [ranked], "listwise", "pairs")[0] == expected
    assert run(tmp_path, [scored], "listwise", "pairs")[0] == [{**row, "margin": m} for row, m in zip(expected, (2.0, 4.0, 2.0))]
    labels, statistics = run(tmp_path, [ranked], "listwise", "binary")
    assert [(row["completion"], row["label"]) for row in labels] == [("b", True), ("a", False)]
    assert dropped(statistics) == {"better than one completion and worse than another": 1}
    labels, _ = run(tmp_path, [scored], "listwise", "binary", threshold=3)
    assert [(row["completion"], row["label"]) for row in labels] == [("a", False), ("b", True), ("c", True)]
    with pytest.raises(ConfigError, match="scores become labels by --threshold"):
        run(tmp_path, [scored], "listwise", "binary")
    two = [{"prompt": "p", "completions": list(names), "ranks": [1, 2]} for names in ("ab", "bc", "ca")]
    assert run(tmp_path, two, "listwise", "listwise")[0] == two, "lists stay apart, whatever their length"
    tied = {"prompt": "p", "completions": ["a", "b", "c"], "ranks": [1, 1, 3]}
    assert run(tmp_path, [tied], "listwise", "pairs")[0] == [pair("a", "c"), pair("b", "c")]
    assert run(tmp_path, [tied], "listwise", "listwise")[0] == [{"prompt": "p", "completions": ["a", "c"], "ranks": [1, 2]}]
    assert run(tmp_path, [tied], "listwise", "listwise", ties="keep")[0] == [tied]


def test_edits_are_preferred_to_what_they_mend(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "original": "a", "edited": "b"}, {"prompt": "q", "original": "a", "edited": "a"}]
    pairs, statistics = run(tmp_path, rows, "edits", "pairs")
    assert pairs == [pair("b", "a")]
    assert dropped(statistics) == {"the edit changes nothing": 1}
    twice = [rows[0], {"prompt": "p", "original": "b", "edited": "c"}]
    assert run(tmp_path, twice, "edits", "listwise")[0] == [{"prompt": "p", "completions": ["c", "b", "a"], "ranks": [1, 2, 3]}]
    labels, _ = run(tmp_path, twice, "edits", "binary")
    assert [(row["completion"], row["label"]) for row in labels] == [("a", False), ("c", True)], "b is better and worse"


def test_pairs_keep_their_margins_and_weights_and_lose_repetitions(tmp_path: Path) -> None:
    rows = [pair("a", "b", margin=2), pair("a", "b"), pair("c", "b", weight=0.5), pair("c", "d", score_chosen=3, score_rejected=1)]
    pairs, statistics = run(tmp_path, rows, "pairs", "pairs")
    assert pairs == [pair("a", "b", margin=2.0), pair("c", "b", weight=0.5), pair("c", "d", margin=2.0)]
    assert dropped(statistics) == {"repeats an earlier pair": 1}
    assert len(run(tmp_path, rows, "pairs", "pairs", deduplicate=False)[0]) == 4


def test_pairs_become_a_ranking_only_where_they_leave_one_order(tmp_path: Path) -> None:
    chain, _ = run(tmp_path, [pair("b", "c"), pair("a", "b"), pair("a", "c")], "pairs", "listwise")
    assert chain == [{"prompt": "p", "completions": ["a", "b", "c"], "ranks": [1, 2, 3]}]
    with pytest.raises(DataError, match=r"nothing is left to train on .*the pairs of the prompt leave more than one order"):
        run(tmp_path, [pair("a", "b"), pair("a", "c")], "pairs", "listwise")
    assert run(tmp_path, [pair("a", "b")], "pairs", "listwise")[0] == [{"prompt": "p", "completions": ["a", "b"], "ranks": [1, 2]}]


def test_cycles_are_reported_and_left_out_kept_or_refused(tmp_path: Path) -> None:
    rows = [
        pair("a", "b"),
        pair("b", "c"),
        pair("x", "a"),
        pair("c", "a"),
        {**pair("a", "b"), "prompt": "q"},
        pair("y", "x"),
        pair("x", "y"),
    ]
    pairs, statistics = run(tmp_path, rows, "pairs", "pairs")
    assert pairs == [pair("x", "a"), {**pair("a", "b"), "prompt": "q"}]
    assert statistics.tally.cycle_count == 2
    assert dropped(statistics) == {"contradicts other pairs of its prompt (in a cycle)": 5}
    page = (tmp_path / "out.md").read_text()
    [three] = [line for line in page.splitlines() if "3 completions in a circle" in line]
    for place, words in (("1", "'a' over 'b'"), ("2", "'b' over 'c'"), ("4", "'c' over 'a'")):
        assert f"rows.jsonl:{place} ({words})" in three
    assert "2 completions in a circle" in page
    assert len(run(tmp_path, rows, "pairs", "pairs", cycles="keep")[0]) == 7
    with pytest.raises(DataError, match=r"completions in a circle: .*; remove one of the rows, or set --cycles drop"):
        run(tmp_path, rows, "pairs", "pairs", cycles="error")


def test_every_cycle_is_found(tmp_path: Path) -> None:
    """After conversion the pairs of a prompt can be ordered, and a pair that is in no cycle is never left out."""
    rng = random.Random(0)
    for _ in range(20):
        edges = {(rng.randrange(6), rng.randrange(6)) for _ in range(10)}
        edges = {(a, b) for a, b in edges if a != b} | {(7, 8)}
        kept, _ = run(tmp_path, [pair(str(a), str(b)) for a, b in sorted(edges)], "pairs", "pairs")
        left = {(int(row["chosen"]), int(row["rejected"])) for row in kept}

        def reach(start: int, among: set[tuple[int, int]]) -> set[int]:
            seen, todo = set(), [start]
            while todo:
                todo += [b for a, b in among if a == todo[0] and b not in seen]
                seen |= {b for a, b in among if a == todo[0]}
                todo.pop(0)
            return seen

        assert all(a not in reach(b, left) for a, b in left)
        assert all((a, b) in left for a, b in edges if a not in reach(b, edges))


def test_the_order_is_the_sources_and_prompts_may_be_scattered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": f"p{i % 50}", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(400)]
    monkeypatch.setattr(module, "_BUCKET_BYTES", 1000)
    many, _ = run(tmp_path, rows, "pairs", "pairs")
    assert many == rows
    monkeypatch.setattr(module, "_BUCKET_BYTES", 1 << 30)
    assert run(tmp_path, rows, "pairs", "pairs")[0] == many
    scattered = [{"prompt": f"p{i % 7}", "completion": f"c{i}", "rating": i % 5} for i in range(70)]
    monkeypatch.setattr(module, "_BUCKET_BYTES", 500)
    one = run(tmp_path, scattered, "ratings", "listwise")[0]
    assert [row["prompt"] for row in one] == [f"p{i}" for i in range(7)]


def test_no_prompt_is_on_both_sides_not_even_in_another_spelling(tmp_path: Path) -> None:
    rows = [{"prompt": f"Question {i % 300}", "chosen": f"a{i}", "rejected": "b"} for i in range(600)]
    rows += [{"prompt": f"  question  {i}\n", "chosen": "c", "rejected": "d"} for i in range(300)]
    train, statistics = run(tmp_path, rows, "pairs", "pairs", held_out=0.2)
    held_out = read(tmp_path / "out.heldout.jsonl")
    prompts = [{" ".join(row["prompt"].lower().split()) for row in part} for part in (train, held_out)]
    assert not prompts[0] & prompts[1]
    assert len(prompts[0] | prompts[1]) == 300
    assert 40 <= len(prompts[1]) <= 80
    assert statistics.rows == [len(train), len(held_out)]
    shuffled = random.Random(1).sample(rows, len(rows))
    run(tmp_path, shuffled, "pairs", "pairs", held_out=0.2)
    assert {row["prompt"] for row in read(tmp_path / "out.heldout.jsonl")} == {row["prompt"] for row in held_out}


def test_messages_that_differ_in_case_and_white_space_are_one_prompt(tmp_path: Path) -> None:
    """Also at their ends, by characters that JSON escapes, and in letters beyond ASCII."""
    spellings = ["Über {} stones", "  über {}\tstones", "ÜBER\u00a0{}  Stones\n"]
    rows = [
        {
            "prompt": [{"role": "system", "content": f" brief{' ' * k}"}, {"role": "user", "content": text.format(i)}],
            "chosen": [GOOD],
            "rejected": [BAD],
        }
        for i in range(60)
        for k, text in enumerate(spellings)
    ]
    train, _ = run(tmp_path, rows, "pairs", "pairs", held_out=0.3)
    held_out = read(tmp_path / "out.heldout.jsonl")
    numbers = [{int(re.search(r"\d+", row["prompt"][1]["content"])[0]) for row in part} for part in (train, held_out)]
    assert not numbers[0] & numbers[1] and len(numbers[0] | numbers[1]) == 60 and len(numbers[1]) >= 8


def test_what_is_written_is_what_the_loaders_read(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tool = {"type": "function", "function": {"name": "f"}}
    rows = [{"prompt": [USER], "completion": [{**GOOD, "content": f"stone {i}"}], "rating": i, "tools": [tool]} for i in range(4)]
    for name in ("out.jsonl", "out.parquet"):
        path = str(tmp_path / name)
        data = FeedbackSource(path=write(tmp_path, rows))
        convert(ConvertConfig(data=data, output=path, from_="ratings", to="pairs", overwrite=True))
        ranked = load_ranked(RankedDataConfig(path=path), tokenizer).samples
        assert sorted(sample.margin for sample in ranked) == [1, 1, 1, 2, 2, 3]
        assert len(load_preferences(DataConfig(path=path), tokenizer).samples) == 6
        convert(ConvertConfig(data=data, output=path, from_="ratings", to="listwise", overwrite=True))
        [sample] = load_ranked(RankedDataConfig(path=path), tokenizer).samples
        assert sample.labels == (3.0, 2.0, 1.0, 0.0)
        convert(ConvertConfig(data=data, output=path, from_="ratings", to="binary", threshold=2, overwrite=True))
        assert [sample.labels for sample in load_unpaired(UnpairedDataConfig(path=path), tokenizer).samples] == [(0,), (0,), (1,), (1,)]
        assert read(tmp_path / name)[0]["tools"] in ([tool], json.dumps([tool])), "what the prompt was rendered with goes along"


def test_parquet_needs_rows_of_one_shape(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}]
    with pytest.raises(DataError, match=r"Parquet needs rows of one shape, and these differ .*; write .jsonl"):
        run(tmp_path, rows, "pairs", "pairs", output="out.parquet")
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
    with pytest.raises(DataError, match=r"Parquet would give all tool calls each other's arguments, as nulls; write .jsonl"):
        run(tmp_path, [{"prompt": [USER], "chosen": [call], "rejected": [BAD]}], "pairs", "pairs", output="out.parquet")
    assert not (tmp_path / "out.parquet").exists()


def test_parquet_loses_no_column_that_comes_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "_BATCH_ROWS", 2)
    rows = [{"prompt": [USER], "chosen": [GOOD], "rejected": [{**BAD, "content": f"{i}"}]} for i in range(5)]
    rows[3]["weight"] = 0.5
    rows[4]["rejected"] = [{**BAD, "name": "late"}]
    run(tmp_path, rows, "pairs", "pairs", output="late.jsonl")
    found, _ = run(tmp_path, rows, "pairs", "pairs", output="late.parquet")
    assert [row["weight"] for row in found] == [1, 1, 1, 0.5, 1]
    assert found[4]["rejected"][0]["name"] == "late"
    tokenizer = tiny_tokenizer()
    both = [load_preferences(DataConfig(path=str(tmp_path / f"late.{kind}")), tokenizer).samples for kind in ("jsonl", "parquet")]
    assert both[0] == both[1]


def test_the_page_says_rules_counts_and_columns_that_were_left(tmp_path: Path) -> None:
    rows = [{**row, "source": "web"} for row in rated(a=4, b=1, c=4, dddd=2)]
    run(tmp_path, rows, "ratings", "pairs", min_margin=2)
    page = (tmp_path / "out.md").read_text()
    assert "4 rows of ratings, 1 prompts -> 4 rows of pairs." in page
    assert "* What differs by less than 2 makes no pair." in page
    assert "* Ties make no pair." in page
    assert f"| left out: ties: equally good completions (first at {tmp_path}/rows.jsonl:1) | 1 |" in page
    assert "| margin | 4 | 2 | 2.5 | 3 |" in page
    assert "longer one in 0.0% of the pairs" in page
    assert "not carried over: `source`." in page


def test_bad_rows_are_all_named_and_nothing_is_written(tmp_path: Path) -> None:
    rows = [*rated(a=4, b=6), {"prompt": "p", "completion": "c", "rating": "5"}, {"prompt": "p", "completion": "c"}, "{"]
    with pytest.raises(DataError) as error:
        run(tmp_path, rows, "ratings", "pairs", scale_min=1.0, scale_max=5.0)
    message = str(error.value)
    assert "rows.jsonl: 4 rows cannot be used:" in message
    assert "rows.jsonl:2: column 'rating': 6 is outside the scale (1 to 5); mend the score, or data.scale_min" in message
    assert "rows.jsonl:3: column 'rating': expected a number, got text" in message
    assert "rows.jsonl:4: column 'rating' is missing" in message
    assert "--from ratings needs 'prompt', 'completion' and 'rating'" in message
    assert "rows.jsonl:5: not valid JSON" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]


ROWS: dict[str, tuple[str, Row, str]] = {
    "label": (
        "binary",
        {"prompt": "p", "completion": "a", "label": "yes"},
        "column 'label': expected a label, got the text 'yes'; give true",
    ),
    "gap": ("listwise", {"prompt": "p", "completions": ["a", "b"], "ranks": [1, 3]}, "the ranks 1, 3 have a gap: nothing has rank 2"),
    "edit": ("edits", {"prompt": "p", "original": "a"}, "column 'edited' is missing"),
    "null": ("edits", {"prompt": "p", "original": "a", "edited": None}, "column 'edited': expected text or a list of messages, got null"),
    "mixed": ("edits", {"prompt": "p", "original": "a", "edited": [GOOD]}, "column 'prompt' is text but 'edited' is a list of objects"),
    "swapped": ("pairs", pair("a", "b", score_chosen=1, score_rejected=2), "the rejected completion is the better one"),
    "empty_prompt": ("ratings", {"prompt": "", "completion": "a", "rating": 1}, "column 'prompt': the prompt is empty"),
    "ratings": ("ratings", {"prompt": "p", "completions": ["a", "b"], "ratings": [1]}, "one number for each of the 2 completions, got 1"),
}


@pytest.mark.parametrize("case", ROWS)
def test_malformed_rows_are_named_with_column_and_remedy(case: str, tmp_path: Path) -> None:
    source, row, expected = ROWS[case]
    with pytest.raises(DataError) as error:
        run(tmp_path, [row], source, "pairs")
    assert str(error.value).startswith(f"{tmp_path}/rows.jsonl:1: ")
    assert expected in str(error.value)


def test_empty_completions_are_left_out(tmp_path: Path) -> None:
    pairs, statistics = run(tmp_path, [*rated(a=4, b=1), {"prompt": "p", "completion": "", "rating": 3}], "ratings", "pairs")
    assert pairs == [pair("a", "b", margin=3.0)]
    assert dropped(statistics) == {"empty completion": 1}


OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "from": ({"from_": ""}, "--from names the kind of the feedback: ratings, binary, listwise, pairs, edits; got 'nothing'"),
    "to": ({"to": ""}, "--to names the kind of the training data: pairs, binary, listwise; got 'nothing'"),
    "threshold": ({"to": "binary"}, "--from ratings --to binary needs --threshold"),
    "order": ({"from_": "binary", "to": "listwise"}, "a label says good or bad and orders nothing beyond that; use --to pairs"),
    "between": ({"to": "binary", "threshold": 2.0, "reject_below": 3.0}, "reject_below must be at most threshold (2.0), got 3.0"),
    "margin": ({"min_margin": -1.0}, "min_margin must be 0 or more and finite, got -1.0"),
    "most": ({"max_pairs": 0}, "max_pairs must be at least 1, or null, got 0"),
    "threshold_of_pairs": (
        {"threshold": 3.0},
        "threshold goes with --from ratings or listwise --to binary, not with --from ratings --to pairs",
    ),
    "margin_of_lists": (
        {"to": "listwise", "min_margin": 1.0},
        "min_margin, select and max_pairs go with --to pairs, not with --to listwise",
    ),
    "ties": ({"from_": "pairs", "ties": "keep"}, "ties keep has no meaning --from pairs --to pairs"),
    "held_out": ({"held_out": 1.0}, "held_out must be in [0, 1), got 1.0"),
    "suffix": ({"output": "out.csv"}, "output must end with one of .jsonl, .ndjson, .parquet, got 'out.csv'"),
    "scale": ({"data": FeedbackSource(path="a.jsonl", scale_min=5, scale_max=1)}, "data.scale_min must be below data.scale_max"),
    "path": ({"data": FeedbackSource()}, "data.path is empty"),
    "columns": (
        {"data": FeedbackSource(path="a", columns={"chosen": "x"})},
        "data.columns maps 'chosen', which is not one of our columns: prompt",
    ),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_out_of_range_are_named(case: str) -> None:
    options, expected = OPTIONS[case]
    given = {"data": FeedbackSource(path="a.jsonl"), "output": "b.jsonl", "from_": "ratings", "to": "pairs", **options}
    with pytest.raises(ConfigError) as error:
        ConvertConfig(**given).validate()
    assert expected in str(error.value)


def test_a_margin_rule_without_margins_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows.jsonl:1: no rating, score or margin to hold against min_margin=1; leave it out"):
        run(tmp_path, [pair("a", "b")], "pairs", "pairs", min_margin=1)


def test_files_are_not_replaced_unasked_and_the_source_never(tmp_path: Path) -> None:
    path = write(tmp_path, rated(a=4, b=1))
    config = ConvertConfig(data=FeedbackSource(path=path), output=str(tmp_path / "out.jsonl"), from_="ratings", to="pairs")
    convert(config)
    with pytest.raises(OutputError, match=r"out.jsonl is there already; set --overwrite, or name another output"):
        convert(config)
    with pytest.raises(ConfigError, match="is the file that is read; name another one"):
        convert(ConvertConfig(data=FeedbackSource(path=path), output=path, from_="ratings", to="pairs", overwrite=True))


def test_the_disk_being_full_is_named_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_rows", full)
    with pytest.raises(OutputError, match=r"out.jsonl: cannot be written: No space left on device; free some space"):
        run(tmp_path, rated(a=4, b=1), "ratings", "pairs")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = write(tmp_path, rated(a=4, b=1, c=5)), str(tmp_path / "out.jsonl")
    assert cli.main(["data", "convert", path, out, "--from", "ratings", "--to", "pairs", "--min_margin", "2"]) == 0
    assert capsys.readouterr().out.splitlines() == ["3 rows of ratings, 1 prompts -> 2 rows of pairs", out, str(tmp_path / "out.md")]
    assert cli.main(["data", "convert", path, out, "--from=stars", "--to", "pairs"]) == 2
    assert "--from names the kind of the feedback: ratings, binary, listwise, pairs, edits; got 'stars'" in capsys.readouterr().err
    assert cli.main(["data", "convert", path, out]) == 2
    assert "--from names the kind of the feedback" in capsys.readouterr().err
    assert cli.main(["data", "convert", "--help"]) == 0
    help_text = capsys.readouterr().out
    assert "--from " in help_text
    assert "from_" not in help_text
    assert cli.main(["data", "convrt"]) == 2
    assert "did you mean data convert?" in capsys.readouterr().err


def test_the_kind_of_a_file_is_seen_from_its_columns(tmp_path: Path) -> None:
    rows: dict[str, Row] = {
        "sft": {"messages": [USER, GOOD]},
        "kto": {"prompt": "a", "completion": "b", "label": True},
        "dpo": preference_rows(1)[0],
        "grpo": {"prompt": "a", "answer": "b"},
        "reward": {"prompt": "a", "completions": ["b", "c"], "ranks": [1, 2]},
    }
    for name, row in rows.items():
        config = AnyDataConfig(path=write(tmp_path, [row]), max_length=7)
        assert type(config.of()) is type(config.of(name))
        assert config.of().max_length == 7
    assert config.of().truncation == "drop", "each kind has its own defaults"
    with pytest.raises(ConfigError, match=r"data.assistant_only is no option of data for reward; leave it out, or choose the data's"):
        AnyDataConfig(path=config.path, assistant_only=True).of()
    with pytest.raises(ConfigError, match=r"objective must be one of sft, reward, dpo, .*, got 'dpoo'"):
        config.of("dpoo")


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """Ten times the rows in the same process take the same memory, but for what the buckets' handles need."""
    program = f"""
import json
from fastalign.data.convert import ConvertConfig, FeedbackSource, convert
from fastalign.train.metrics import peak_rss_bytes
import fastalign.data.convert as module
module._BUCKET_BYTES = 1 << 19
peaks = []
for n in (3000, 60000):
    path = f"{tmp_path}/{{n}}.jsonl"
    with open(path, "w") as file:
        for i in range(n):
            row = {{"prompt": f"question {{i // 4}}", "completion": f"{{i}} " + 20 * "river stone ", "rating": i % 4}}
            file.write(json.dumps(row) + "\\n")
    convert(ConvertConfig(data=FeedbackSource(path=path), output=path + ".out.jsonl", from_="ratings", to="binary", threshold=2))
    peaks.append(peak_rss_bytes() >> 10)  # of this process: getrusage counts what its parent had at the fork
print(*peaks)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    small, large = map(int, done.stdout.split())
    assert large - small < 12_000, f"{small} KiB, then {large} KiB"
