"""Ranked completions for reward models: lists with ranks or scores, and pairs with an optional margin."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from transformers import PreTrainedTokenizerBase

from fastalign.data.config import RankedDataConfig, ScaleConfig
from fastalign.data.examples import Dropped, Example, Fields, check_ending
from fastalign.data.messages import Turns, check_turns, has_text
from fastalign.data.preferences import parse_pair, with_prompt
from fastalign.data.report import DataReport
from fastalign.data.samples import Format, Samples, load
from fastalign.data.sources import Row, kind_of
from fastalign.errors import DataError
from fastalign.types import Sample


def load_ranked(config: RankedDataConfig, tokenizer: PreTrainedTokenizerBase, *, vocab_size: int | None = None) -> Samples:
    """Samples with two or more completions, best first; see `load` for the arguments and errors.

    `labels` fall strictly from the first completion to the last: the scores, where the row has them, else the number of
    completions that are worse. `margin` is that of a pair, 0 where the row has none.
    """
    return load(RANKED, config, tokenizer, vocab_size=vocab_size)


def parse_ranked(place: str, index: int, row: Row, config: RankedDataConfig) -> Sequence[Example | Dropped]:
    """Checks one row; gives one example, or Dropped when fewer than two completions are left. Raises DataError for a malformed row."""
    fields = Fields(place, row, config)
    if "completions" not in fields:
        return parse_pair_with_margin(place, index, row, config)
    prompt, completions, values = read_ranking(fields)
    options = fields.options()
    groups = _places(values)
    tied = next((group for group in groups if len(group) > 1), None)
    if tied and config.ties == "error":
        raise DataError(
            f"{fields.where('ranks' if 'ranks' in fields else 'scores')}: completions {tied[0]} and {tied[1]} are tied; "
            "order them, or set data.ties drop to keep the first of each tie"
        )
    if not options["weight"]:
        return [Dropped(place, "weight is 0")]
    kept = [group[0] for group in groups if has_text(completions[group[0]])]
    if len(kept) < 2:
        return [Dropped(place, "fewer than two completions are left")]
    if any(completions[i] == completions[j] for n, i in enumerate(kept) for j in kept[:n]):
        return [Dropped(place, "two completions are identical")]
    labels = tuple(values[i] for i in kept) if "scores" in fields else tuple(map(float, reversed(range(len(kept)))))
    return [Example(place, index, prompt, tuple(completions[i] for i in kept), labels=labels, **options)]


def read_ranking(fields: Fields) -> tuple[Turns, list[Turns], list[float]]:
    """The prompt of a list, its completions, and of each the score, or minus the rank: higher is better, and ties are equal."""
    fields.require("prompt", "completions")
    if ("ranks" in fields) == ("scores" in fields):
        names = fields.names
        both = "both are there; remove one" if "ranks" in fields else "add one of them"
        raise DataError(f"{fields.place}: a list of completions needs either {names['ranks']!r} (1 is best) or {names['scores']!r}; {both}")
    prompt = fields.turns("prompt")
    if not has_text(prompt):
        raise DataError(f"{fields.where('prompt')}: the prompt is empty; give a prompt or remove the row")
    completions = read_completions(fields, prompt)
    if "scores" in fields:
        return prompt, completions, read_scores(fields, "scores", len(completions))
    ranks = _numbers(fields, "ranks", len(completions))
    _check_ranks(fields.where("ranks"), ranks)
    return prompt, completions, [-rank for rank in ranks]


def read_completions(fields: Fields, prompt: Turns) -> list[Turns]:
    """The column `completions`: a list of texts or of message lists, as the prompt is."""
    value = fields.value("completions")
    if not isinstance(value, (list, tuple)):
        raise DataError(f"{fields.where('completions')}: expected a list of completions, got {kind_of(value)}")
    completions = []
    for number, item in enumerate(value):
        turns = check_turns(fields.place, f"{fields.names['completions']}[{number}]", item)
        with_prompt(fields, prompt, "completions", turns)
        check_ending(f"{fields.where('completions')}, completion {number}", turns)
        completions.append(turns)
    return completions


def read_scores(fields: Fields, name: str, count: int) -> list[float]:
    """The column `name`: a number on the scale for each of `count` completions."""
    scores = _numbers(fields, name, count)
    for number, score in enumerate(scores):
        check_scale(fields.config, f"{fields.where(name)}, entry {number}", score)
    return scores


def _numbers(fields: Fields, name: str, count: int) -> list[float]:
    where, values = fields.where(name), fields.value(name)
    if not isinstance(values, (list, tuple)) or len(values) != count:
        got = f"{len(values)} of them" if isinstance(values, (list, tuple)) else kind_of(values)
        raise DataError(f"{where}: expected one number for each of the {count} completions, got {got}")
    remedy = "give a finite number for every completion, or remove the row"
    return [fields.as_number(f"{where}, entry {number}", value, remedy) for number, value in enumerate(values)]


def _places(values: Sequence[float]) -> list[list[int]]:
    """Positions of the values from the highest to the lowest, equal ones together and in order."""
    order = sorted(range(len(values)), key=lambda i: -values[i])
    return [list(group) for _, group in groupby(order, key=values.__getitem__)]


def _check_ranks(where: str, ranks: Sequence[float]) -> None:
    """Ranks count from 1, without gaps; after a tie of k the next rank is 1 or k further on."""
    for rank in ranks:
        if rank != int(rank) or rank < 1:
            raise DataError(f"{where}: a rank is a whole number of at least 1 (the best), got {rank:g}; give scores in the column 'scores'")
    places = [(rank, len(list(group))) for rank, group in groupby(sorted(ranks))]
    dense = [float(n) for n in range(1, len(places) + 1)]
    sparse = [1.0 + sum(size for _, size in places[:n]) for n in range(len(places))]
    if [rank for rank, _ in places] not in (dense, sparse):
        missing = next((n for n in dense if n not in ranks), dense[-1])
        shown = ", ".join(f"{rank:g}" for rank in ranks)
        raise DataError(f"{where}: the ranks {shown} have a gap: nothing has rank {missing:g}; number the completions 1 to {len(ranks)}")


def check_scale(config: Any, where: str, score: float) -> None:
    """Raises DataError for a score outside `config.scale`."""
    low, high = config.scale
    if not low <= score <= high:
        scale = f"at most {high:g}" if low == -math.inf else f"at least {low:g}" if high == math.inf else f"{low:g} to {high:g}"
        raise DataError(f"{where}: {score:g} is outside the scale ({scale}); mend the score, or data.scale_min and data.scale_max")


def parse_pair_with_margin(place: str, index: int, row: Row, config: ScaleConfig) -> Sequence[Example | Dropped]:
    """As `parse_pair`, with the margin: that of the row, or the difference of its two scores, or 0."""
    fields = Fields(place, row, config)
    margin = _margin(fields)
    parsed = parse_pair(place, index, row, config)
    return [pair if isinstance(pair, Dropped) else replace(pair, labels=(1.0, 0.0), margin=margin) for pair in parsed]


def _margin(fields: Fields) -> float:
    scores = [name for name in ("score_chosen", "score_rejected") if name in fields]
    remedy = "give a finite number of at least 0, or leave the column out"
    if "margin" in fields and scores:
        raise DataError(f"{fields.place}: both {fields.names['margin']!r} and {fields.names[scores[0]]!r} are given; remove one")
    if "margin" in fields:
        margin = fields.number("margin", remedy)
        if margin < 0:
            raise DataError(
                f"{fields.where('margin')}: {margin:g} is negative: the rejected completion would win; swap the two, or mend it"
            )
        return margin
    if scores:
        fields.require("score_chosen", "score_rejected")
        chosen, rejected = (fields.number(name, remedy) for name in ("score_chosen", "score_rejected"))
        for name, score in (("score_chosen", chosen), ("score_rejected", rejected)):
            check_scale(fields.config, fields.where(name), score)
        margin = chosen - rejected
        if margin < 0:
            raise DataError(
                f"{fields.place}: chosen scores {chosen:g} and rejected {rejected:g}, so the rejected completion is the better one; "
                "swap the two, or remove the row"
            )
        return margin
    return 0.0


def _describe(samples: Sequence[Sample], report: DataReport) -> None:
    lists = sum(len(sample.completions) > 2 for sample in samples)
    if lists:
        report.counts["with more than two completions"] = lists
    if margins := sum(sample.margin > 0 for sample in samples):
        report.counts["with a margin"] = margins


RANKED = Format("ranking", ("completion",), parse_ranked, _describe)
