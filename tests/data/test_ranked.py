"""Ranked data: sequences equal TRL's, order and margins as stated, gaps, ties and scores out of the scale named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rows import BAD, GOOD, USER, sequences, write
from tiny import preference_rows, tiny_tokenizer
from trl_preprocessing import trl_reward

from fastalign.data.config import RankedDataConfig
from fastalign.data.ranked import load_ranked
from fastalign.data.samples import Samples
from fastalign.errors import ConfigError, DataError

TOKENIZER = tiny_tokenizer()
PAIRS = preference_rows(20, seed=1)
CHAT_PAIRS = preference_rows(20, seed=2, conversational=True)
LIST = {"prompt": "old river", "completions": [" a", " b", " c", " d"]}


def load(rows: list[Any], folder: Path, **options: Any) -> Samples:
    options.setdefault("max_length", None)
    return load_ranked(RankedDataConfig(path=write(folder, rows), **options), TOKENIZER, vocab_size=len(TOKENIZER))


def texts(data: Samples, row: int = 0) -> list[str]:
    """The completions of a sample, best first, without EOS."""
    return [TOKENIZER.decode(completion, skip_special_tokens=True) for completion in data.samples[row].completions]


@pytest.mark.parametrize("max_length", [None, 25])
@pytest.mark.parametrize("implicit", [False, True])
@pytest.mark.parametrize("pairs", [PAIRS, CHAT_PAIRS], ids=["plain", "chat"])
def test_sequences_equal_trl_and_long_ones_are_left_out(
    pairs: list[dict[str, Any]], implicit: bool, max_length: int | None, tmp_path: Path
) -> None:
    rows = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in pairs] if implicit else pairs
    expected = trl_reward(rows, TOKENIZER, max_length)
    data = load(rows, tmp_path, max_length=max_length)
    assert [tuple(ids for ids, _ in sequences(sample)) for sample in data.samples] == expected
    assert all((sample.labels, sample.margin) == ((1.0, 0.0), 0.0) for sample in data.samples)
    assert data.report.dropped == ({f"longer than max_length={max_length}": 20 - len(expected)} if max_length else {})
    assert 0 < len(expected) <= 20


def test_completions_come_best_first(tmp_path: Path) -> None:
    data = load([{**LIST, "ranks": [3, 1, 4, 2]}, {**LIST, "scores": [-0.5, 7, -3, 2]}], tmp_path)
    for row in (0, 1):
        assert texts(data, row) == [" b", " d", " a", " c"]
    assert [sample.labels for sample in data.samples] == [(3.0, 2.0, 1.0, 0.0), (7.0, 2.0, -0.5, -3.0)]
    assert data.report.counts == {"with more than two completions": 2}


def test_messages_are_ranked_too(tmp_path: Path) -> None:
    data = load([{"prompt": [USER], "completions": [[BAD], [GOOD]], "ranks": [2, 1]}], tmp_path)
    pair = load([{"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}], tmp_path)
    assert data.samples == pair.samples


def test_margins_are_given_or_the_difference_of_scores(tmp_path: Path) -> None:
    pair = PAIRS[0]
    rows = [
        {**pair, "margin": 2},
        {**pair, "score_chosen": 4.5, "score_rejected": 3},
        {**pair, "score_chosen": 3, "score_rejected": 3},
        pair,
    ]
    data = load(rows, tmp_path)
    assert [sample.margin for sample in data.samples] == [2.0, 1.5, 0.0, 0.0]
    assert data.report.counts == {"with a margin": 2}


def test_ties_are_an_error_or_the_first_of_them_is_kept(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{**LIST, "ranks": [2, 1, 2, 4]}, {**LIST, "ranks": [2, 1, 2, 3]}, {**LIST, "scores": [5, 9, 5, 1]}]
    for row in rows:
        with pytest.raises(DataError, match=r"completions 0 and 2 are tied; order them, or set data.ties drop"):
            load([row], tmp_path)
    data = load(rows, tmp_path, ties="drop")
    assert [texts(data, row) for row in range(3)] == [[" b", " a", " d"]] * 3
    assert [sample.labels for sample in data.samples] == [(2.0, 1.0, 0.0), (2.0, 1.0, 0.0), (9.0, 5.0, 1.0)]
    with pytest.raises(DataError, match=r"no ranking is left to train on, of 1 rows \(1: fewer than two completions are left\)"):
        load([{**LIST, "scores": [1, 1, 1, 1]}], tmp_path, ties="drop")


def test_empty_and_identical_completions(tmp_path: Path) -> None:
    empty = {**LIST, "completions": [" a", "", " c", " d"], "ranks": [3, 1, 4, 2]}
    data = load([empty], tmp_path)
    assert texts(data) == [" d", " a", " c"], "an empty completion leaves its ranking; the others keep their order"
    assert data.samples[0].labels == (2.0, 1.0, 0.0)
    rows = [
        {**LIST, "completions": [" a", " b", " a", " d"], "ranks": [3, 1, 4, 2]},
        {**LIST, "completions": ["", "", " a", ""], "ranks": [3, 1, 4, 2]},
        {**LIST, "ranks": [1, 2, 3, 4], "weight": 0},
    ]
    data = load([*rows, empty], tmp_path)
    assert data.report.dropped == {"two completions are identical": 1, "fewer than two completions are left": 1, "weight is 0": 1}
    rows = [{"prompt": "a", "completions": [" b x", " b y", " c"], "ranks": [1, 2, 3]}, {"prompt": "a", "chosen": " b", "rejected": " c"}]
    data = load(rows, tmp_path, max_length=2, truncation="keep_start")
    assert data.report.dropped == {"two completions are identical after truncation to max_length=2": 1}


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "gap": ({**LIST, "ranks": [1, 2, 4, 5]}, "the ranks 1, 2, 4, 5 have a gap: nothing has rank 3; number the completions 1 to 4"),
    "gap_at_the_start": ({**LIST, "ranks": [2, 3, 4, 5]}, "the ranks 2, 3, 4, 5 have a gap: nothing has rank 1"),
    "gap_after_tie": ({**LIST, "ranks": [1, 1, 4, 5]}, "have a gap: nothing has rank 2"),
    "zero": ({**LIST, "ranks": [0, 1, 2, 3]}, "a rank is a whole number of at least 1 (the best), got 0"),
    "fraction": ({**LIST, "ranks": [1, 1.5, 2, 3]}, "a rank is a whole number of at least 1 (the best), got 1.5"),
    "few_ranks": ({**LIST, "ranks": [1, 2]}, "column 'ranks': expected one number for each of the 4 completions, got 2 of them"),
    "rank_text": ({**LIST, "ranks": [1, "2", 3, 4]}, "column 'ranks', entry 1: expected a number, got text"),
    "rank_null": (
        {**LIST, "ranks": [1, None, 3, 4]},
        "column 'ranks', entry 1: expected a number, got null; give a finite",
    ),
    "scores_number": ({**LIST, "scores": 3}, "column 'scores': expected one number for each of the 4 completions, got the number 3"),
    "score_nan": ({**LIST, "scores": [1, 2, float("nan"), 3]}, "column 'scores', entry 2: expected a finite number, got the number nan"),
    "score_boolean": ({**LIST, "scores": [True, 2, 0, 3]}, "column 'scores', entry 0: expected a number, got the boolean true"),
    "low": ({**LIST, "scores": [1, 2, 0, 3]}, "column 'scores', entry 2: 0 is outside the scale (1 to 5); mend the score, or"),
    "high": ({**LIST, "scores": [1, 2, 7, 3]}, "column 'scores', entry 2: 7 is outside the scale (1 to 5)"),
    "pair_high": ({**PAIRS[0], "score_chosen": 10, "score_rejected": 1}, "column 'score_chosen': 10 is outside the scale (1 to 5)"),
    "both": ({**LIST, "ranks": [1, 2, 3, 4], "scores": [1, 2, 3, 4]}, "needs either 'ranks' (1 is best) or 'scores'; both are there"),
    "neither": (LIST, "needs either 'ranks' (1 is best) or 'scores'; add one of them"),
    "no_prompt": ({"completions": [" a", " b"], "ranks": [1, 2]}, "column 'prompt' is missing (columns: 'completions', 'ranks'); reward"),
    "empty_prompt": ({**LIST, "prompt": "", "ranks": [1, 2, 3, 4]}, "column 'prompt': the prompt is empty"),
    "completions_text": (
        {"prompt": "a", "completions": "b", "ranks": [1]},
        "column 'completions': expected a list of completions, got",
    ),
    "completion_null": ({"prompt": "a", "completions": ["b", None], "ranks": [1, 2]}, "column 'completions[1]': expected text or a list"),
    "mixed": ({"prompt": "a", "completions": ["b", [GOOD]], "ranks": [1, 2]}, "column 'prompt' is text but 'completions' is a list"),
    "user_last": (
        {"prompt": [USER], "completions": [[GOOD], [BAD, USER]], "ranks": [1, 2]},
        "'completions', completion 1: the last",
    ),
    "negative_margin": ({**PAIRS[0], "margin": -1}, "column 'margin': -1 is negative"),
    "margin_text": ({**PAIRS[0], "margin": "big"}, "column 'margin': expected a number, got text; give a finite number of at least 0"),
    "margin_and_scores": ({**PAIRS[0], "margin": 1, "score_chosen": 3}, "both 'margin' and 'score_chosen' are given; remove one"),
    "one_score": ({**PAIRS[0], "score_chosen": 3}, "column 'score_rejected' is missing"),
    "swapped": ({**PAIRS[0], "score_chosen": 2, "score_rejected": 4}, "chosen scores 2 and rejected 4, so the rejected completion is the"),
    "no_pair": ({"prompt": "a", "completion": "b"}, "column 'chosen' is missing (columns: 'prompt', 'completion'); these look like"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_malformed_rows_are_named_with_column_and_remedy(case: str, tmp_path: Path) -> None:
    row, expected = ERRORS[case]
    with pytest.raises(DataError) as error:
        load([PAIRS[1], row], tmp_path, scale_min=1.0, scale_max=5.0)
    assert str(error.value).startswith(f"{tmp_path}/rows.jsonl:2: ")
    assert expected in str(error.value)


def test_options_out_of_range_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.scale_min must be below data.scale_max, got 5 and 1"):
        load(PAIRS, tmp_path, scale_min=5.0, scale_max=1.0)
    with pytest.raises(ConfigError, match=r"data.ties must be 'error' or 'drop', got 'keep'"):
        load(PAIRS, tmp_path, ties="keep")
    load([{**LIST, "scores": [1, 2, 50, 3]}], tmp_path, scale_min=1.0)
