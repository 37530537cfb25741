"""What happened to the rows of a data set on their way to samples."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from fastalign.errors import DataError


@dataclass
class DataReport:
    """Counts of rows, with reasons; lengths are in tokens, before truncation, and empty without a tokenizer."""

    source: str
    noun: str = "sample"  # what a sample of this data is called
    rows: int = 0
    examples: int = 0  # that the rows hold, usable or not
    samples: int = 0  # that can be trained on
    conversational: int = 0  # samples of messages
    counts: dict[str, int] = field(default_factory=dict)  # what else is counted of this kind of data, as desirable samples
    dropped: Counter[str] = field(default_factory=Counter)  # reason -> rows
    dropped_at: dict[str, str] = field(default_factory=dict)  # reason -> place of the first such row
    truncated: set[int] = field(default_factory=set)  # index of every sample that was cut
    notices: Counter[str] = field(default_factory=Counter)  # message -> rows it concerns
    problems: list[tuple[str, str]] = field(default_factory=list)  # (place, message) of every row that cannot be used
    problem_kinds: set[type[DataError]] = field(default_factory=set)
    lengths: dict[str, array[int]] = field(default_factory=dict)  # "prompt", and the name of each completion

    def drop(self, place: str, reason: str) -> None:
        self.dropped[reason] += 1
        self.dropped_at.setdefault(reason, place)

    def count_lengths(self, prompt: int, completions: Iterable[tuple[str, int]]) -> None:
        for name, length in (("prompt", prompt), *completions):
            self.lengths.setdefault(name, array("q")).append(length)

    def add_problem(self, place: str, error: DataError) -> None:
        self.problems.append((place, str(error)))  # an error object would keep its row alive through the traceback
        self.problem_kinds.add(type(error))

    def summary(self) -> str:
        """How many rows became samples, as one sentence."""
        counts = "".join(f", {count:,} {name}" for name, count in self.counts.items())
        return f"{self.source}: {self.rows:,} rows, {self.samples:,} {self.noun}s{counts}, {len(self.truncated):,} of them truncated"

    def warnings(self) -> list[str]:
        """What was dropped, cut or odd, with counts and reasons, one sentence each."""
        lines = [f"dropped {count:,} rows: {reason} (first at {self.dropped_at[reason]})" for reason, count in self.dropped.most_common()]
        if self.truncated:
            lines.append(f"cut {len(self.truncated):,} {self.noun}s to max_length")
        lines += [f"{count:,} rows: {notice}" for notice, count in self.notices.most_common()]
        return [f"{self.source}: {line}" for line in lines]

    def problem_lines(self) -> list[str]:
        """One line per kind of problem, in the order found: the message of its first row, and where the others are."""
        groups: dict[str, list[str]] = {}
        for place, message in self.problems:
            groups.setdefault(message.removeprefix(place), []).append(place)
        return [f"{places[0]}{text}{_also(places[1:])}" for text, places in groups.items()]

    def raise_for_problems(self, shown: int = 5) -> None:
        """Raises the rows' errors as one DataError (a TemplateError if that is what all are), or one when no sample is left."""
        kind = next(iter(self.problem_kinds)) if len(self.problem_kinds) == 1 else DataError
        if len(self.problems) == 1:
            raise kind(self.problems[0][1])
        if self.problems:
            lines = self.problem_lines()
            text = "".join(f"\n  {line}" for line in lines[:shown])
            if len(lines) > shown:
                text += f"\n  and {len(lines) - shown:,} more kinds; `fastalign data check {self.source}` lists them"
            raise kind(f"{self.source}: {len(self.problems):,} rows cannot be used:{text}")
        if not self.samples:
            reasons = ", ".join(f"{count:,}: {reason}" for reason, count in self.dropped.most_common())
            raise DataError(
                f"{self.source}: no {self.noun} is left to train on, of {self.rows:,} rows" + (f" ({reasons})" if reasons else "")
            )


def _also(places: list[str], shown: int = 4) -> str:
    if not places:
        return ""
    numbers = ", ".join(place.rpartition(":")[2].removeprefix("row ") for place in places[:shown])
    more = ", ..." if len(places) > shown else ""
    return f" (and {len(places):,} more {'row' if len(places) == 1 else 'rows'} like it: {numbers}{more})"
