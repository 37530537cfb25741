"""What happened to the rows of a data set on their way to samples."""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import dataclass, field

from fastalign.errors import DataError


def _lengths() -> array[int]:
    return array("q")


@dataclass
class DataReport:
    """Counts of rows, with reasons; lengths are in tokens, before truncation, and empty without a tokenizer."""

    source: str
    rows: int = 0
    pairs: int = 0
    conversational: int = 0
    dropped: Counter[str] = field(default_factory=Counter)  # reason -> rows
    dropped_at: dict[str, str] = field(default_factory=dict)  # reason -> place of the first such row
    truncated: set[int] = field(default_factory=set)  # index of every pair that was cut
    notices: Counter[str] = field(default_factory=Counter)  # message -> rows it concerns
    problems: list[DataError] = field(default_factory=list)  # one per row that cannot be used
    prompt_lengths: array[int] = field(default_factory=_lengths)
    chosen_lengths: array[int] = field(default_factory=_lengths)
    rejected_lengths: array[int] = field(default_factory=_lengths)

    def drop(self, place: str, reason: str) -> None:
        self.dropped[reason] += 1
        self.dropped_at.setdefault(reason, place)

    def lines(self) -> list[str]:
        """The counts and notices as sentences for a log: how many rows became pairs, what was dropped and why."""
        lines = [f"{self.source}: {self.rows:,} rows, {self.pairs:,} pairs, {len(self.truncated):,} of them truncated"]
        lines += [f"dropped {count:,}: {reason} (first at {self.dropped_at[reason]})" for reason, count in self.dropped.most_common()]
        lines += [f"{count:,} rows: {notice}" for notice, count in self.notices.most_common()]
        return lines

    def raise_for_problems(self, shown: int = 5) -> None:
        """Raises the rows' errors as one DataError, or a DataError when no pair is left."""
        if len(self.problems) == 1:
            raise self.problems[0]
        if self.problems:
            more = len(self.problems) - shown
            text = "\n".join(f"  {problem}" for problem in self.problems[:shown])
            rest = f"\n  and {more:,} more; `fastalign data check {self.source}` lists them" if more > 0 else ""
            raise type(self.problems[0])(f"{self.source}: {len(self.problems):,} rows cannot be used:\n{text}{rest}")
        if not self.pairs:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.most_common())
            raise DataError(f"{self.source}: no pair is left to train on ({self.rows:,} rows{': ' + reasons if reasons else ''})")
