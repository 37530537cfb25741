"""`fastalign label`: a judge scores the completions of a data file, row by row, resumable, nothing lost."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from fastalign.data.messages import Turns, check_turns
from fastalign.data.sources import Row, read_rows
from fastalign.errors import ConfigError, DataError, JudgeError, OutputError
from fastalign.rollout.judges import EndpointJudge, Judge, Verdict
from fastalign.rollout.judging import JudgeConfig as JudgeConfig
from fastalign.rollout.judging import RewardModelJudge as RewardModelJudge
from fastalign.rollout.judging import build_judge as build_judge
from fastalign.train.folder import writing
from fastalign.train.measures import wilson

SCORES, HUMAN, ERROR = "scores", "human_scores", "judge_error"
_NOT_COLUMNS = ("prompt", "prompts", "completions", "completion_ids", HUMAN)


@dataclass
class LabelConfig:
    """Scores the completions of every row with a judge, and measures its agreement with people where the rows hold their choice.

    Rows have `prompt` and `completions`, or `chosen` and `rejected`, or one `completion`. Each gains `completions` and `scores`
    (higher is better), ready for `fastalign data convert --from listwise`. Rows without a verdict go to OUTPUT.failed.jsonl.
    """

    path: str = ""
    """Rows to judge: .jsonl, .json or .parquet."""
    output: str = ""
    """JSONL file for the judged rows. An interrupted run goes on where it stopped."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    max_failures: int = 100
    """Stop after so many rows in a row without a verdict."""
    overwrite: bool = False
    """Begin anew even if OUTPUT or a part of it is there."""

    def validate(self) -> None:
        """Raise ConfigError for the first option that is missing or out of range."""
        if not self.path or not self.output:
            raise ConfigError("label needs rows and a place for the result: fastalign label ROWS.jsonl --output JUDGED.jsonl --judge....")
        if not self.output.endswith(".jsonl"):
            raise ConfigError(f"output must be a .jsonl file, got {self.output}")
        if self.max_failures < 1:
            raise ConfigError(f"max_failures must be at least 1, got {self.max_failures}")
        self.judge.validate()


class Judged(NamedTuple):
    """One line of the part file."""

    digest: str  # of the row as it came
    row: Row  # with its scores, unless there is an error
    counts: dict[str, int]  # of the verdict, see Statistics
    error: str | None


@dataclass
class Statistics:
    """Counts over all judged rows."""

    rows: int = 0
    failed: int = 0
    ties: int = 0  # of pairs of completions with equal scores
    pairs: int = 0
    compared: int = 0
    consistent: int = 0
    first_wins: int = 0
    second_wins: int = 0
    human_pairs: int = 0  # pairs that people ordered
    agreed: float = 0.0  # of them, a tie of the judge counting half

    def add(self, judged: Judged) -> None:
        self.rows += 1
        if judged.error is not None:
            self.failed += 1
            return
        scores, human = judged.row[SCORES], judged.row.get(HUMAN)
        for i, j in combinations(range(len(scores)), 2):
            self.pairs += 1
            self.ties += scores[i] == scores[j]
            if human and human[i] != human[j]:
                self.human_pairs += 1
                self.agreed += 0.5 if scores[i] == scores[j] else float((scores[i] > scores[j]) == (human[i] > human[j]))
        for name, count in judged.counts.items():
            setattr(self, name, getattr(self, name) + count)

    def figures(self) -> dict[str, Any]:
        """Counts and shares, the agreement with people with its 95 % interval."""
        result: dict[str, Any] = {"rows": self.rows, "failed": self.failed, "pairs": self.pairs, "ties": self.ties}
        if self.compared:
            result |= {"consistent_under_swap": self.consistent / self.compared}
            decided = self.first_wins + self.second_wins
            result |= {"first_position_wins": self.first_wins / decided} if decided else {}
        if self.human_pairs:
            result |= {"human_pairs": self.human_pairs, "human_agreement": self.agreed / self.human_pairs}
            result |= {"human_agreement_ci95": list(wilson(self.agreed, self.human_pairs))}
        return result


def label(config: LabelConfig, judge: Judge | None = None) -> dict[str, Any]:
    """Judge all rows of `config.path` into `config.output` and return the figures of `Statistics`.

    Rows are written in order to OUTPUT.part, each as soon as it and those before it are judged; a killed run goes on behind
    the last whole line. Raises DataError for a malformed row before anything is judged, OutputError when the output exists,
    ConfigError when the part file was made from other rows or with another judge, JudgeError after `max_failures` in a row.
    """
    config.validate()
    judge = judge or build_judge(config.judge)
    rows = sum(1 for _ in _examples(config.path))  # every row is checked before the judge costs anything
    output, part = Path(config.output), Path(config.output + ".part")
    if output.exists() and not config.overwrite:
        raise OutputError(f"{output}: exists; judge anew with --overwrite, or choose another --output")
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "r+b" if part.exists() and not config.overwrite else "w+b") as file:
            _lock(file.fileno(), part)
            statistics = Statistics()
            done = _resume(file, part, judge, statistics)
            _judge_rows(config, judge, file, done, rows, statistics)
        return _publish(part, output, statistics)


def _examples(path: str) -> Iterator[tuple[str, Row]]:
    """(place, row) with `prompt` and `completions`; the choice of people becomes `human_scores`."""
    for place, row in read_rows(path):
        row = {name: value for name, value in row.items() if name != ERROR}
        if "completions" not in row:
            if "chosen" in row and "rejected" in row:
                row["completions"] = [row.pop("chosen"), row.pop("rejected")]
                row[HUMAN] = [1, 0]
            elif "completion" in row:
                row["completions"] = [row.pop("completion")]
            else:
                have = ", ".join(map(repr, row)) or "none"
                raise DataError(f"{place}: no column 'completions', 'chosen' and 'rejected', or 'completion' (columns: {have})")
        if "prompt" not in row:
            raise DataError(f"{place}: column 'prompt' is missing; a judge needs to see what was asked")
        check_turns(place, "prompt", row["prompt"])
        completions = row["completions"]
        if not isinstance(completions, list) or not completions:
            raise DataError(f"{place}: column 'completions' must be a list of at least one completion")
        for completion in completions:
            check_turns(place, "completions", completion)
        for column in (SCORES, "ranks", HUMAN):
            given = row.get(column)
            numbers = isinstance(given, list) and all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in given)
            if given is not None and not (numbers and len(given) == len(completions)):
                raise DataError(
                    f"{place}: column {column!r} must be one number for each of the {len(completions)} completions, got {given!r:.200}"
                )
        if SCORES in row:
            row[HUMAN] = row.pop(SCORES)
        elif row.get("ranks") is not None:
            row[HUMAN] = [-rank for rank in row.pop("ranks")]
        yield place, row


def _judge_rows(config: LabelConfig, judge: Judge, file: BinaryIO, done: list[str], rows: int, statistics: Statistics) -> None:
    from rich.console import Console
    from rich.progress import track

    workers = config.judge.workers if isinstance(judge, EndpointJudge) else 1
    waiting: deque[Future[Judged]] = deque()
    failures = 0
    pool = ThreadPoolExecutor(workers)
    stream = track(_examples(config.path), "judging", total=rows, console=Console(stderr=True), disable=not sys.stderr.isatty())

    def take() -> None:
        nonlocal failures
        judged = waiting.popleft().result()
        file.write(json.dumps(judged._asdict(), ensure_ascii=False).encode() + b"\n")
        file.flush()
        statistics.add(judged)
        failures = failures + 1 if judged.error else 0
        if failures >= config.max_failures:
            raise JudgeError(
                f"{failures} rows in a row without a verdict, the last: {judged.error}; "
                "what was judged is kept, run the command again to go on"
            )

    try:
        for number, (place, row) in enumerate(stream):
            digest = _digest(row)
            if number < len(done):
                if done[number] != digest:
                    raise ConfigError(f"{place}: not the row that {file.name} was made from; begin anew with --overwrite")
                continue
            waiting.append(pool.submit(_judge_row, judge, row, digest))
            if len(waiting) >= 4 * workers:
                take()
        while waiting:
            take()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def other_columns(row: Row) -> Row:
    """The columns that a judge gets beside the prompt and its completions; none of the names of what it judges is taken by data."""
    return {name: value for name, value in row.items() if name not in _NOT_COLUMNS}


def _judge_row(judge: Judge, row: Row, digest: str) -> Judged:
    completions: Sequence[Turns] = row["completions"]
    try:
        verdict: Verdict = judge(row["prompt"], completions, other_columns(row))
    except JudgeError as error:
        return Judged(digest, row, {}, str(error))
    counts = {name: getattr(verdict, name) for name in ("consistent", "compared", "first_wins", "second_wins")}
    return Judged(digest, row | {SCORES: list(verdict.scores)}, counts, None)


def _resume(file: BinaryIO, part: Path, judge: Judge, statistics: Statistics) -> list[str]:
    """Digests of the rows that a part file holds, which are counted; its first line names the judge.

    A torn last line is cut off, and so are failures at the end: they are what stopped the run, and are asked again.
    """
    header = json.dumps({"judge": judge.fingerprint}).encode() + b"\n"
    first = file.readline()
    if first.endswith(b"\n") and first != header:
        raise ConfigError(f"{part}: was begun with another judge ({first.decode().strip()}); begin anew with --overwrite")
    lines, good, end = 0, 0, len(first)
    while (line := file.readline()).endswith(b"\n"):
        lines += 1
        if Judged(**json.loads(line)).error is None:
            good, end = lines, file.tell()
    file.seek(len(first))
    done = []
    for _ in range(good):
        judged = Judged(**json.loads(file.readline()))
        statistics.add(judged)
        done.append(judged.digest)
    file.seek(end if first == header else 0)
    file.truncate()
    if first != header:
        file.write(header)
    return done


def _publish(part: Path, output: Path, statistics: Statistics) -> dict[str, Any]:
    """Part the lines into the output and the failures, each appearing whole."""
    failed = output.with_suffix(".failed.jsonl")
    _write(output, (judged.row for judged in _read(part) if judged.error is None))
    if statistics.failed:
        _write(failed, (judged.row | {ERROR: judged.error} for judged in _read(part) if judged.error is not None))
    part.unlink()
    return statistics.figures()


def _read(part: Path) -> Iterator[Judged]:
    with open(part, encoding="utf-8") as lines:
        next(lines)
        yield from (Judged(**json.loads(line)) for line in lines)


def _write(path: Path, rows: Iterator[Row]) -> None:
    temporary = path.with_name(f".{path.name}.new")
    with open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _digest(row: Row) -> str:
    return hashlib.sha256(json.dumps(row, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _lock(handle: int, part: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise OutputError(f"{part}: another process is judging into this file; wait for it or choose another --output") from error


def show(figures: dict[str, Any], config: LabelConfig) -> None:
    """Print the figures as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{config.path} judged into {config.output}", title_justify="left")
    table.add_column("figure")
    table.add_column("value", justify="right")
    table.add_column("95 % interval", justify="right")
    for name, value in figures.items():
        if not name.endswith("_ci95"):
            low_high = figures.get(f"{name}_ci95")
            interval = f"{low_high[0]:.3f} – {low_high[1]:.3f}" if low_high else ""
            table.add_row(name, f"{value:.3f}" if isinstance(value, float) else str(value), interval)
    Console(markup=False).print(table)
    if figures["failed"]:
        failed = Path(config.output).with_suffix(".failed.jsonl")
        print(f"{figures['failed']} rows without a verdict are in {failed}: judge them again with fastalign label {failed} ...")
