"""The judgements on one prompt as training rows: pairs, labels or rankings, by stated rules."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from heapq import nlargest
from itertools import combinations
from typing import Any, Literal

from fastalign.data.feedback import Judgement, Kind, digest
from fastalign.data.messages import Turns
from fastalign.data.report import DataReport
from fastalign.errors import ConfigError, DataError

SHOWN_CYCLES = 20
OutputRow = dict[str, Any]


@dataclass
class Rules:
    """How judgements become rows. Completions of a prompt that were judged several times count with their mean."""

    min_margin: float = 0.0  # leave out pairs whose ratings, scores or margins differ by less
    threshold: float | None = None  # --to binary: ratings of at least this are desirable, those below are not
    reject_below: float | None = None  # --to binary: only ratings below this are undesirable, those up to threshold are left out
    ties: Literal["drop", "keep"] = "drop"  # equal ratings; keep: a pair with margin 0, a ranking with equal scores
    select: Literal["all", "best_worst"] = "all"  # --to pairs: any two completions of a prompt, or only the best with the worst
    max_pairs: int | None = None  # most pairs of a prompt, those with the largest margins first; null: all
    cycles: Literal["drop", "keep", "error"] = "drop"  # pairs that contradict each other: a over b, b over c, c over a
    deduplicate: bool = True  # write no pair of a prompt twice

    def check(self, source: str, to: str) -> None:
        """Raises ConfigError for rules that are out of range or do not go with what is converted."""
        for name, choices in (("ties", ("drop", "keep")), ("select", ("all", "best_worst")), ("cycles", ("drop", "keep", "error"))):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if not 0 <= self.min_margin < float("inf"):
            raise ConfigError(f"min_margin must be 0 or more and finite, got {self.min_margin}")
        if self.max_pairs is not None and self.max_pairs < 1:
            raise ConfigError(f"max_pairs must be at least 1, or null, got {self.max_pairs}")
        if source == "binary" and to == "listwise":
            raise ConfigError("--from binary --to listwise: a label says good or bad and orders nothing beyond that; use --to pairs")
        if source == "ratings" and to == "binary" and self.threshold is None:
            raise ConfigError("--from ratings --to binary needs --threshold: the rating from which a completion is desirable")
        if to != "pairs" and (self.min_margin or self.select != "all" or self.max_pairs is not None):
            raise ConfigError(f"min_margin, select and max_pairs go with --to pairs, not with --to {to}; leave them out")
        if self.threshold is not None and (to != "binary" or source not in ("ratings", "listwise")):
            raise ConfigError(
                f"threshold goes with --from ratings or listwise --to binary, not with --from {source} --to {to}; leave it out"
            )
        if self.reject_below is not None and (self.threshold is None or self.reject_below > self.threshold):
            raise ConfigError(f"reject_below must be at most threshold ({self.threshold}), got {self.reject_below}")
        if self.ties == "keep" and (to == "binary" or source in ("binary", "pairs", "edits")):
            raise ConfigError(f"ties keep has no meaning --from {source} --to {to}; leave it out")


@dataclass(frozen=True)
class Comparison:
    """One completion is better than another."""

    index: int
    place: str
    winner: Turns
    loser: Turns
    margin: float | None
    weight: float
    keys: tuple[bytes, bytes]  # digests of winner and loser


@dataclass
class Tally:
    """What happened on the way; `report` counts what was left out."""

    report: DataReport
    prompts: int = 0
    averaged: int = 0  # completions that were judged more than once
    cycles: list[str] = field(default_factory=list)  # the first of them, in words
    cycle_count: int = 0


def rows_of(to: str, judgements: Sequence[Judgement], kind: Kind, rules: Rules, tally: Tally) -> list[tuple[int, OutputRow]]:
    """The rows that the judgements on one prompt become, each with the index of the row that it comes from."""
    tally.prompts += 1
    first = judgements[0]
    head = {"prompt": first.prompt, **(first.shared or {})}
    if kind.merged or (to == "binary" and all(judgement.scale == "grade" for judgement in judgements)):
        judgements = [_mean(judgements, tally)]
    orders = _chain if kind.paired and len(judgements) > 1 else _rankings
    make = {"pairs": _pairs, "binary": _labels, "listwise": orders}[to]
    return [(index, {**head, **row}) for index, row in make(judgements, rules, tally)]


def _mean(judgements: Sequence[Judgement], tally: Tally) -> Judgement:
    """All judgements as one, in which every completion is once, with the mean of its values."""
    values: dict[bytes, list[float]] = {}
    completions: dict[bytes, Turns] = {}
    for judgement in judgements:
        for completion, value in zip(judgement.completions, judgement.values):
            key = digest(completion)
            completions.setdefault(key, completion)
            values.setdefault(key, []).append(value)
    tally.averaged += sum(len(several) > 1 for several in values.values())
    first = judgements[0]
    means = [sum(several) / len(several) for several in values.values()]
    return Judgement(first.index, first.place, first.prompt, list(completions.values()), means, first.scale, shared=first.shared)


def _pairs(judgements: Sequence[Judgement], rules: Rules, tally: Tally) -> Iterator[tuple[int, OutputRow]]:
    comparisons = _compare(judgements, rules, tally)
    if rules.max_pairs is not None and len(comparisons) > rules.max_pairs:
        tally.report.dropped[f"more than max_pairs={rules.max_pairs} pairs of a prompt"] += len(comparisons) - rules.max_pairs
        tally.report.dropped_at.setdefault(f"more than max_pairs={rules.max_pairs} pairs of a prompt", comparisons[0].place)
        largest = nlargest(rules.max_pairs, range(len(comparisons)), key=lambda i: (comparisons[i].margin or 0.0, -i))
        comparisons = [comparisons[i] for i in sorted(largest)]
    for one in comparisons:
        row: OutputRow = {"chosen": one.winner, "rejected": one.loser}
        if one.margin is not None:
            row["margin"] = one.margin
        if one.weight != 1.0:
            row["weight"] = one.weight
        yield one.index, row


def _labels(judgements: Sequence[Judgement], rules: Rules, tally: Tally) -> Iterator[tuple[int, OutputRow]]:
    first = judgements[0]
    if first.scale == "order":
        yield from _verdicts(judgements, rules, tally)
        return
    high = 0.5 if first.scale == "label" else rules.threshold
    if high is None:
        raise ConfigError("scores become labels by --threshold: the score from which a completion is desirable")
    low = high if first.scale == "label" or rules.reject_below is None else rules.reject_below
    for completion, value in zip(first.completions, first.values):
        if low <= value < high:
            tally.report.drop(first.place, f"rated from reject_below={low:g} to below threshold={high:g}")
        elif first.scale == "label" and value == high:
            tally.report.drop(first.place, "labelled good as often as bad")
        else:
            yield first.index, {"completion": completion, "label": value >= high}


def _verdicts(judgements: Sequence[Judgement], rules: Rules, tally: Tally) -> Iterator[tuple[int, OutputRow]]:
    """Labels of what was only compared: a completion that only wins is desirable, one that only loses is not."""
    outcomes: dict[bytes, set[bool]] = {}
    seen: dict[bytes, tuple[Comparison, Turns]] = {}
    for one in _compare(judgements, rules, tally):
        for key, turns, won in zip(one.keys, (one.winner, one.loser), (True, False)):
            outcomes.setdefault(key, set()).add(won)
            seen.setdefault(key, (one, turns))
    for key, (one, turns) in seen.items():
        if len(outcomes[key]) > 1:
            tally.report.drop(one.place, "better than one completion and worse than another")
        else:
            yield one.index, {"completion": turns, "label": True in outcomes[key]}


def _rankings(judgements: Sequence[Judgement], rules: Rules, tally: Tally) -> Iterator[tuple[int, OutputRow]]:
    for judgement in judgements:
        order = sorted(range(len(judgement.values)), key=lambda i: -judgement.values[i])
        if rules.ties == "drop":
            kept = [i for n, i in enumerate(order) if not n or judgement.values[i] != judgement.values[order[n - 1]]]
            if len(kept) < len(order):
                tally.report.dropped["tied with another completion"] += len(order) - len(kept)
                tally.report.dropped_at.setdefault("tied with another completion", judgement.place)
            order = kept
        if len(order) < 2:
            tally.report.drop(judgement.place, "fewer than two completions in an order")
            continue
        completions = [judgement.completions[i] for i in order]
        values = [judgement.values[i] for i in order]
        if judgement.scale == "grade":
            yield judgement.index, {"completions": completions, "scores": values}
        else:
            yield judgement.index, {"completions": completions, "ranks": [1 + sum(other > value for other in values) for value in values]}


def _chain(judgements: Sequence[Judgement], rules: Rules, tally: Tally) -> Iterator[tuple[int, OutputRow]]:
    """The pairs of a prompt as one ranking, if they leave only one order of all its completions."""
    comparisons = _compare(judgements, rules, tally)
    turns = {key: one_of for one in comparisons for key, one_of in zip(one.keys, (one.winner, one.loser))}
    sorter = _sorter(comparisons)
    order: list[bytes] = []
    try:
        sorter.prepare()
    except CycleError:
        sorter = TopologicalSorter()  # cycles were kept: there is no order
    while sorter.is_active():
        ready = sorter.get_ready()
        if len(ready) > 1:
            order = []
            break
        order += ready
        sorter.done(*ready)
    if order:
        yield judgements[0].index, {"completions": [turns[key] for key in order], "ranks": list(range(1, len(order) + 1))}
    elif comparisons:
        tally.report.drop(judgements[0].place, "the pairs of the prompt leave more than one order of its completions")


def _compare(judgements: Sequence[Judgement], rules: Rules, tally: Tally) -> list[Comparison]:
    """Every comparison that the judgements hold and the rules keep, winners first."""
    found: list[Comparison] = []
    seen: set[tuple[bytes, bytes]] = set()
    for one in judgements:
        keys = [digest(completion) for completion in one.completions]
        best, worst = max(one.values), min(one.values)
        order = sorted(range(len(one.values)), key=lambda i: -one.values[i])
        for a, b in combinations(order, 2):
            difference = one.values[a] - one.values[b]
            if rules.select == "best_worst" and difference != best - worst:
                continue
            if not difference and rules.ties == "drop":
                tally.report.drop(one.place, "ties: equally good completions")
                continue
            margin = difference if one.scale == "grade" else one.margin
            if rules.min_margin and margin is None:
                raise DataError(f"{one.place}: no rating, score or margin to hold against min_margin={rules.min_margin:g}; leave it out")
            if margin is not None and margin < rules.min_margin:
                tally.report.drop(one.place, f"differ by less than min_margin={rules.min_margin:g}")
                continue
            key = keys[a], keys[b]
            if key[0] == key[1]:
                tally.report.drop(one.place, "compares a completion with itself")
                continue
            if key in seen and rules.deduplicate:
                tally.report.drop(one.place, "repeats an earlier pair")
                continue
            seen.add(key)
            found.append(Comparison(one.index, one.place, one.completions[a], one.completions[b], margin, one.weight, key))
    return _without_cycles(found, rules, tally) if len(judgements) > 1 else found


def _sorter(comparisons: Sequence[Comparison]) -> TopologicalSorter[bytes]:
    sorter: TopologicalSorter[bytes] = TopologicalSorter()
    for one in comparisons:
        winner, loser = one.keys
        sorter.add(loser, winner)
    return sorter


def _without_cycles(comparisons: list[Comparison], rules: Rules, tally: Tally) -> list[Comparison]:
    """The comparisons less those that contradict each other. Every cycle is reported; all of its comparisons go."""
    while True:
        try:
            _sorter(comparisons).prepare()
            return comparisons
        except CycleError as error:
            cycle: list[bytes] = error.args[1]  # each better than the next, and the first again at the end
        edges = {(cycle[n], cycle[n + 1]) for n in range(len(cycle) - 1)}
        members = [one for one in comparisons if one.keys in edges]
        steps = ", ".join(f"{one.place} ({_short(one.winner)} over {_short(one.loser)})" for one in members)
        text = f"{len(edges)} completions in a circle: {steps}"
        if rules.cycles == "error":
            raise DataError(f"{text}; remove one of the rows, or set --cycles drop")
        tally.cycle_count += 1
        if len(tally.cycles) < SHOWN_CYCLES:
            tally.cycles.append(text)
        if rules.cycles == "keep":
            return comparisons
        for one in members:
            tally.report.drop(one.place, "contradicts other pairs of its prompt (in a cycle)")
        gone = set(map(id, members))
        comparisons = [one for one in comparisons if id(one) not in gone]


def _short(turns: Turns, length: int = 30) -> str:
    text = turns if isinstance(turns, str) else json.dumps(turns[-1].get("content"), ensure_ascii=False)
    return repr(text if len(text) <= length else text[:length] + "...")
