"""The statistics page of a conversion: what came in, by which rules it was converted, what came out."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastalign.data.messages import Turns
from fastalign.data.pairing import SHOWN_CYCLES, OutputRow, Tally
from fastalign.data.report import DataReport

if TYPE_CHECKING:
    from fastalign.data.convert import ConvertConfig

_SHOWN_VALUES = 20  # of a distribution


@dataclass
class Running:
    """Count, mean and extremes of numbers that pass by."""

    count: int = 0
    total: float = 0.0
    low: float = float("inf")
    high: float = float("-inf")

    def add(self, value: float) -> None:
        self.count += 1
        self.total += value
        self.low, self.high = min(self.low, value), max(self.high, value)

    def cells(self) -> str:
        mean = self.total / self.count if self.count else 0.0
        return f"{self.count:,} | {self.low:,.4g} | {mean:,.4g} | {self.high:,.4g}"


@dataclass
class Statistics:
    """Counts over the rows that a conversion wrote; the memory they take does not grow with the rows."""

    source: str
    to: str
    tally: Tally = field(default_factory=lambda: Tally(DataReport("")))
    rows: list[int] = field(default_factory=lambda: [0, 0])  # to train on, held out
    labels: Counter[str] = field(default_factory=Counter)
    sizes: Counter[int] = field(default_factory=Counter)  # completions of a list -> rows
    numbers: dict[str, Running] = field(default_factory=dict)  # lengths in characters, margins
    longer: int = 0  # pairs whose chosen completion is the longer one
    unused: set[str] = field(default_factory=set)  # columns of the source that were not carried over

    def add(self, row: OutputRow, part: int) -> None:
        self.rows[part] += 1
        self._number("prompt, characters", _length(row["prompt"]))
        if "chosen" in row:
            chosen, rejected = _length(row["chosen"]), _length(row["rejected"])
            self._number("chosen, characters", chosen)
            self._number("rejected, characters", rejected)
            self.longer += chosen > rejected
            if "margin" in row:
                self._number("margin", row["margin"])
        elif "completions" in row:
            self.sizes[len(row["completions"])] += 1
            for completion in row["completions"]:
                self._number("completion, characters", _length(completion))
        else:
            self.labels["desirable" if row["label"] else "undesirable"] += 1
            self._number("completion, characters", _length(row["completion"]))

    def _number(self, name: str, value: float) -> None:
        self.numbers.setdefault(name, Running()).add(value)

    def summary(self) -> str:
        """What came of how many rows, as one sentence."""
        held_out = f", {self.rows[1]:,} held out" if self.rows[1] else ""
        report = self.tally.report
        came = f"{report.rows:,} rows of {self.source}, {self.tally.prompts:,} prompts"
        return f"{came} -> {self.rows[0]:,} rows of {self.to}{held_out}"


def write_page(path: Path, statistics: Statistics, config: ConvertConfig) -> None:
    """Writes the statistics as Markdown."""
    tally, report = statistics.tally, statistics.tally.report
    lines = [f"# {Path(config.output).name}", "", statistics.summary() + ".", "", "## Rules", ""]
    lines += [f"* {rule}" for rule in rules_in_words(config)]
    lines += ["", "## Counts", "", "| | rows |", "|---|---:|"]
    counts: list[tuple[str, Any]] = [
        (f"read from {config.data.path}", report.rows),
        ("usable judgements", report.samples),
        ("prompts", tally.prompts),
        *((f"left out: {reason} (first at {report.dropped_at[reason]})", count) for reason, count in report.dropped.most_common()),
        ("completions judged more than once, counted with their mean", tally.averaged),
        ("contradictions (cycles)", tally.cycle_count),
        (f"written to {config.outputs[0].name}", statistics.rows[0]),
        *((f"held out in {path.name}", statistics.rows[1]) for path in config.outputs[1:]),
        *statistics.labels.most_common(),
        *((f"lists of {size} completions", count) for size, count in sorted(statistics.sizes.items())[:_SHOWN_VALUES]),
    ]
    lines += [f"| {_cell(name)} | {count:,} |" for name, count in counts]
    lines += ["", "| | count | min | mean | max |", "|---|---:|---:|---:|---:|"]
    lines += [f"| {name} | {numbers.cells()} |" for name, numbers in statistics.numbers.items()]
    if statistics.to == "pairs":
        share = statistics.longer / max(1, sum(statistics.rows))
        lines += ["", f"The chosen completion is the longer one in {share:.1%} of the pairs; far from 50 %, a model learns the length too."]
    if tally.cycles:
        lines += ["", "## Contradictions", "", *(f"* {_cell(text)}" for text in tally.cycles)]
        if tally.cycle_count > SHOWN_CYCLES:
            lines += [f"* and {tally.cycle_count - SHOWN_CYCLES:,} more"]
    if statistics.unused:
        lines += ["", "Columns that were not carried over: " + ", ".join(f"`{name}`" for name in sorted(statistics.unused)) + "."]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def rules_in_words(config: ConvertConfig) -> list[str]:
    """The rules that a conversion followed, one sentence each."""
    source, to = config.from_, config.to
    rules = {
        "ratings": "Completions with equal text and prompt are one, with the mean of their ratings.",
        "binary": "Completions with equal text and prompt are one, with the label of the majority.",
        "listwise": "Completions are compared within their list.",
        "pairs": "Pairs are taken as they are.",
        "edits": "The edited completion is better than the original.",
    }
    words = [rules[source]]
    if to == "pairs":
        words.append(
            "Any two completions that differ in value make a pair." if config.select == "all" else "The best and the worst make a pair."
        )
        words.append("Ties make a pair with margin 0." if config.ties == "keep" else "Ties make no pair.")
        words.append("The margin is the difference of the ratings or scores, where there are any.")
    if config.min_margin:
        words.append(f"What differs by less than {config.min_margin:g} makes no pair.")
    if config.max_pairs is not None:
        words.append(f"Of a prompt at most {config.max_pairs} pairs are written, those with the largest margins first.")
    if to == "binary" and config.threshold is not None:
        low = config.threshold if config.reject_below is None else config.reject_below
        words.append(f"From {config.threshold:g} on a completion is desirable, below {low:g} it is not; what is between is left out.")
    elif to == "binary" and source != "binary":
        words.append("A completion that only wins is desirable, one that only loses is not; others are left out.")
    if to == "listwise":
        words.append("Equal completions keep equal places." if config.ties == "keep" else "Of equally good completions the first stays.")
        if source in ("pairs", "edits"):
            words.append("The pairs of a prompt become one ranking where they leave only one order of all its completions.")
    cycles = {"drop": "are left out and listed below", "keep": "are kept and listed below", "error": "are an error"}[config.cycles]
    words.append(f"Pairs that contradict each other (a over b, b over c, c over a) {cycles}.")
    if config.deduplicate:
        words.append("No pair of a prompt is written twice.")
    if config.held_out:
        words.append(
            f"About {config.held_out:.3g} of the prompts are held out, chosen by the prompt's text alone, without case and white "
            "space, so that no prompt is in both files."
        )
    return words


def _length(turns: Turns) -> int:
    if isinstance(turns, str):
        return len(turns)
    contents = (message.get("content") or "" for message in turns)
    return sum(len(text) if isinstance(text, str) else sum(len(part["text"]) for part in text) for text in contents)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
