"""`fastalign data convert`: feedback of one kind into training data of another, streamed, in memory that does not grow with the data.

Rows are spread over files by the digest of their prompt, so that each file holds all rows of its prompts; the files are
converted one after another, and what they give is merged back into the order of the source.
"""

from __future__ import annotations

import heapq
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from fastalign.data.config import ScaleConfig
from fastalign.data.examples import Dropped
from fastalign.data.feedback import KINDS, Judgement, Kind, read_judgement
from fastalign.data.page import Statistics, write_page
from fastalign.data.pairing import Rules, Tally, rows_of
from fastalign.data.report import DataReport
from fastalign.data.sources import scan_rows
from fastalign.data.writing import SUFFIXES, write_rows
from fastalign.errors import ConfigError, DataError, OutputError

logger = logging.getLogger(__name__)

_BUCKET_BYTES = 16 << 20  # of rows that are held in memory at once
_MOST_BUCKETS = 256
_MOST_PROBLEMS = 1000  # bad rows after which reading stops

Bar = Callable[..., None]  # bar(phase, rows, total) advances the bar of a phase


@dataclass
class FeedbackSource(ScaleConfig):
    """Where the feedback is. The columns depend on its kind."""


@dataclass
class ConvertConfig(Rules):
    """Turns feedback of one kind into training data of another."""

    data: FeedbackSource = field(default_factory=FeedbackSource)
    output: str = ""  # .jsonl or .parquet file to write; held-out rows and the statistics page go beside it
    from_: str = ""  # kind of the feedback: ratings, binary, listwise, pairs or edits
    to: str = ""  # kind of the training data: pairs, binary or listwise
    held_out: float = 0.0  # share of the prompts whose rows go to a file of their own, chosen by the prompt's text
    overwrite: bool = False  # replace files that are there

    def validate(self) -> None:
        """Raises ConfigError naming the option that is missing, out of range or contradicts another one."""
        if self.from_ not in KINDS:
            raise ConfigError(f"--from names the kind of the feedback: {', '.join(KINDS)}; got {self.from_ or 'nothing'!r}")
        if self.to not in ("pairs", "binary", "listwise"):
            raise ConfigError(f"--to names the kind of the training data: pairs, binary, listwise; got {self.to or 'nothing'!r}")
        self.check(self.from_, self.to)
        self.source.validate()
        if not 0.0 <= self.held_out < 1.0:
            raise ConfigError(f"held_out must be in [0, 1), got {self.held_out}")
        if Path(self.output).suffix not in SUFFIXES:
            raise ConfigError(f"output must end with one of {', '.join(SUFFIXES)}, got {self.output!r}")

    @property
    def source(self) -> ScaleConfig:
        """The source as rows of its kind are read from it."""
        return KINDS[self.from_].config(**asdict(self.data))

    @property
    def outputs(self) -> list[Path]:
        """The file of rows, and that of held-out rows if there is one."""
        path = Path(self.output)
        return [path, path.with_name(f"{path.stem}.heldout{path.suffix}")] if self.held_out else [path]

    @property
    def page(self) -> Path:
        return Path(self.output).with_suffix(".md")


def convert(config: ConvertConfig, *, progress: bool = False) -> Statistics:
    """Converts `config.data.path` into the files of `config.outputs` and writes the statistics page.

    Files are written beside their names and renamed when all are complete. Raises ConfigError for the options, DataError
    naming the bad rows (nothing is written then), OutputError when a file is there or cannot be written.
    """
    config.validate()
    for path in (*config.outputs, config.page):
        if path.resolve() == Path(config.data.path).resolve():
            raise ConfigError(f"output {path} is the file that is read; name another one")
        if path.exists() and not config.overwrite:
            raise OutputError(f"{path} is there already; set --overwrite, or name another output")
    try:
        Path(config.output).parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".convert-", dir=Path(config.output).parent))
    except OSError as error:
        raise OutputError(f"{Path(config.output).parent}: cannot be written to: {error.strerror}") from error
    try:
        with _Progress(progress) as bar:
            return _convert(config, scratch, bar)
    except OSError as error:
        raise OutputError(f"{config.output}: cannot be written: {error.strerror or error}; free some space or name another file") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _convert(config: ConvertConfig, scratch: Path, bar: Bar) -> Statistics:
    kind, report = KINDS[config.from_], DataReport(config.data.path, noun="judgement")
    tally, statistics = Tally(report), Statistics(config.from_, config.to)
    statistics.tally = tally
    buckets = _spread(kind, config, report, statistics, scratch, bar)
    report.raise_for_problems()
    bar("converting", 0, report.samples)
    parts = range(len(config.outputs))
    for number, bucket in enumerate(buckets):
        with ExitStack() as stack:
            files = [stack.enter_context((scratch / f"rows-{part}-{number}").open("w", encoding="utf-8")) for part in parts]
            _convert_bucket(config, kind, bucket, tally, statistics, files, bar)
        bucket.unlink()
    bar("writing", 0, sum(statistics.rows))
    written = []
    for part, path in enumerate(config.outputs):
        beside = scratch / f"done-{part}{path.suffix}"
        write_rows(beside, lambda part=part: _merged(scratch, part, len(buckets)), partial(bar, "writing"))  # type: ignore[misc]
        written.append((beside, path))
    if not statistics.rows[0]:
        reasons = ", ".join(f"{count:,}: {reason}" for reason, count in report.dropped.most_common())
        raise DataError(f"{config.data.path}: nothing is left to train on" + (f" ({reasons})" if reasons else ""))
    if config.held_out and not statistics.rows[1]:
        logger.warning("held_out=%g of %d prompts held none out; raise it, or convert more data", config.held_out, tally.prompts)
    page = scratch / "page.md"
    write_page(page, statistics, config)
    for beside, path in (*written, (page, config.page)):
        os.replace(beside, path)
    return statistics


def _spread(kind: Kind, config: ConvertConfig, report: DataReport, statistics: Statistics, scratch: Path, bar: Bar) -> list[Path]:
    """Reads and checks every row, and writes it to the file of its prompt."""
    source = config.source
    bar("reading", 0, _row_count(Path(source.path)))
    paths = [scratch / f"judgements-{number}" for number in range(_bucket_count(Path(config.data.path)))]
    used = {source.columns.get(name, name) for name in source.column_names}
    with ExitStack() as stack:
        files = [stack.enter_context(path.open("w", encoding="utf-8")) for path in paths]
        for index, (place, row) in enumerate(scan_rows(source.path, source.split, source.subset)):
            report.rows += 1
            bar("reading", 1)
            try:
                if isinstance(row, DataError):
                    raise row
                judgement = read_judgement(kind, place, index, row, source)
            except DataError as error:
                report.add_problem(place, error)
                if len(report.problems) >= _MOST_PROBLEMS:
                    break
                continue
            statistics.unused.update(row.keys() - used)
            if isinstance(judgement, Dropped):
                report.drop(*judgement)
                continue
            report.samples += 1
            number = int.from_bytes(judgement.prompt_key()[:8], "big") % len(paths)
            json.dump([getattr(judgement, one.name) for one in fields(Judgement)], files[number], ensure_ascii=False)
            files[number].write("\n")
    return paths


def _bucket_count(path: Path) -> int:
    """So many that the rows of one take about _BUCKET_BYTES, whatever the data's size; Parquet is compressed."""
    size = path.stat().st_size * (6 if path.suffix == ".parquet" else 1) if path.is_file() else _BUCKET_BYTES * _MOST_BUCKETS
    return max(1, min(_MOST_BUCKETS, -(-size // _BUCKET_BYTES)))


def _row_count(path: Path) -> int | None:
    """Rows of a JSON Lines or Parquet file, for the progress bar; None where counting would mean reading."""
    if not path.is_file() or path.suffix == ".json":
        return None
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            return int(pq.read_metadata(path).num_rows)
        except pa.ArrowException:
            return None  # what is wrong with the file is said when it is read
    with path.open("rb") as file:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b""))


def _convert_bucket(
    config: ConvertConfig, kind: Kind, bucket: Path, tally: Tally, statistics: Statistics, files: Sequence[TextIO], bar: Bar
) -> None:
    prompts: dict[bytes, list[Judgement]] = {}
    for line in _lines(bucket):
        judgement = Judgement(*json.loads(line))
        prompts.setdefault(judgement.prompt_key(), []).append(judgement)
    lines: list[list[tuple[int, str]]] = [[] for _ in files]
    for judgements in prompts.values():
        part = _part(judgements[0], config.held_out)
        for index, row in rows_of(config.to, judgements, kind, config, tally):
            statistics.add(row, part)
            lines[part].append((index, json.dumps(row, ensure_ascii=False)))
        bar("converting", len(judgements))
    for file, some in zip(files, lines):
        some.sort(key=lambda item: item[0])
        file.writelines(f"{index:015d}{number:09d} {text}\n" for number, (index, text) in enumerate(some))


def _part(judgement: Judgement, held_out: float) -> int:
    """1 for a prompt that is held out. Depends on nothing but the prompt's text, not even on its case and white space."""
    return int(int.from_bytes(judgement.split_key()[:8], "big") < held_out * 2**64)


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8", newline="\n") as file:
        yield from file


def _merged(scratch: Path, part: int, buckets: int) -> Iterator[str]:
    """The rows of all buckets in the order of the source, without the keys that they are sorted by."""
    for line in heapq.merge(*(_lines(scratch / f"rows-{part}-{number}") for number in range(buckets))):
        yield line.partition(" ")[2]


class _Progress:
    """A bar for each phase, drawn on a terminal: bar(phase, rows, total)."""

    def __init__(self, shown: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self.bars = Progress(*columns, console=Console(stderr=True), disable=not shown)
        self.tasks: dict[str, Any] = {}
        self.waiting: dict[str, int] = {}

    def __enter__(self) -> Bar:
        self.bars.start()
        return self.advance

    def __exit__(self, *_: object) -> None:
        for phase, rows in self.waiting.items():
            self.bars.advance(self.tasks[phase], rows)
        self.bars.stop()

    def advance(self, phase: str, rows: int, total: int | None = None) -> None:
        if phase not in self.tasks:
            self.tasks[phase] = self.bars.add_task(phase, total=total)
            self.waiting[phase] = 0
        self.waiting[phase] += rows
        if self.waiting[phase] >= 1000:
            self.bars.advance(self.tasks[phase], self.waiting[phase])
            self.waiting[phase] = 0
