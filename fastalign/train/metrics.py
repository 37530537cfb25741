"""Where the metrics of a run go: `metrics.jsonl`, a progress bar or plain lines, and the trackers that the user names.

Answers of an online run, with their rewards, go to `completions.jsonl` beside it.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import json
import math
import os
import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TextIO

from fastalign.errors import CheckpointError, ConfigError, DependencyError
from fastalign.train.folder import writing

PLAIN_LINE_SECONDS = 5.0  # between lines where there is no terminal to draw a bar on

COMPLETIONS = "completions.jsonl"
_NON_FINITE = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}


class MetricsWriter:
    """Writes one row per logged step to `output/metrics.jsonl` and to every other sink; use it as a context manager.

    A row is `{"step": 3, "loss": 0.61, ...}`; those of an evaluation have the prefix `eval_` and a row of their own. JSON has
    no NaN or infinity: they are written as the strings "NaN", "Infinity", "-Infinity", which `read_metrics` (and Python's
    float) turns back. Each row is flushed as it is written, so that a killed run loses none.

    With `resume_step` k the files keep the rows of steps 1..k and lose later ones and a torn last line; with 0 they start
    empty. Raises ConfigError for an unknown logger, DependencyError for one that is not installed, OutputError when the
    disk refuses.
    """

    def __init__(
        self,
        output: Path | str,
        *,
        loggers: Sequence[str] = (),
        resume_step: int = 0,
        total_steps: int,
        run_name: str,
        config: Mapping[str, Any] | None = None,
        progress: bool = True,
        stream: TextIO | None = None,
    ) -> None:
        output = Path(output)
        self.path = output / "metrics.jsonl"
        check_loggers(loggers)
        self.completions = output / COMPLETIONS
        for path in (self.path, self.completions):
            truncate_metrics(path, resume_step)
        with writing(self.path):
            self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        self._trackers = [_start(name, output, run_name, resume_step, dict(config or {})) for name in loggers]
        self._progress = _progress(stream or sys.stderr, total_steps, resume_step) if progress else None

    def log(self, step: int, metrics: Mapping[str, float], kind: Literal["train", "eval"] = "train") -> None:
        """Write the metrics of one step. Numbers may be Python's or 0-d tensors; training rows get peak memory added."""
        values = {_prefixed(name, kind): _number(value) for name, value in metrics.items()}
        if kind == "train":
            values = {**values, **{name: value for name, value in memory().items() if name not in values}}
        row = json.dumps({"step": step, **{name: _jsonable(value) for name, value in values.items()}}, allow_nan=False)
        with writing(self.path):
            self._file.write(row + "\n")
            self._file.flush()
        for tracker in self._trackers:
            tracker.log(step, values)
        if self._progress:
            self._progress.update(step, values, kind)

    def log_completions(self, step: int, answers: Sequence[Mapping[str, Any]]) -> None:
        """Add answers of one step to `completions.jsonl`, on the disk when this returns."""
        if not answers:
            return
        lines = [json.dumps({"step": step, **answer}, allow_nan=False) + "\n" for answer in answers]
        with writing(self.completions), open(self.completions, "a", encoding="utf-8") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())

    def sync(self) -> None:
        """Force the rows onto the disk, before a checkpoint that counts on them."""
        with writing(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._progress:
            self._progress.close()
        for tracker in self._trackers:
            tracker.close()
        with writing(self.path):
            self._file.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class NoMetrics(MetricsWriter):
    """A writer that writes nothing, for all processes of a run but the first."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def log(self, step: int, metrics: Mapping[str, float], kind: Literal["train", "eval"] = "train") -> None:
        pass

    def log_completions(self, step: int, answers: Sequence[Mapping[str, Any]]) -> None:
        pass

    def sync(self) -> None:
        pass

    def close(self) -> None:
        pass


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl` with NaN and infinities as floats again. A torn last line, which a killed run may leave, is left out.

    Raises CheckpointError for any other line that is not a JSON object with a "step".
    """
    path = Path(path)
    lines = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        torn = number == len(lines)  # nothing follows the last newline in a whole file
        if torn:
            break
        try:
            row = json.loads(line)
            row["step"] = int(row["step"])
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"{path}:{number}: not a metrics row ({error}); delete this line or restore the file") from error
        rows.append({name: float(value) if value in _NON_FINITE.values() else value for name, value in row.items()})
    return rows


def truncate_metrics(path: Path, last_step: int) -> None:
    """Keep only the rows of steps 1..last_step, in one atomic replacement."""
    if not path.exists():
        return
    rows = [row for row in read_metrics(path) if row["step"] <= last_step] if last_step else []
    temporary = path.with_suffix(".jsonl.new")
    with writing(path), open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps({name: _jsonable(value) for name, value in row.items()}, allow_nan=False) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def memory() -> dict[str, float]:
    """Peak memory so far, GiB: resident memory of this process and, where CUDA is in use, what torch's allocator held."""
    found = {"mem/peak_rss_gib": peak_rss_bytes() / 2**30}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        found["mem/peak_cuda_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found


def rss_bytes() -> int:
    """Resident memory of this process now, or where the system does not tell, its peak."""
    return _status("VmRSS") or peak_rss_bytes()


def peak_rss_bytes() -> int:
    """Peak resident memory of this process. Linux's own high-water mark, as getrusage's includes what a parent had at the fork."""
    if found := _status("VmHWM"):
        return found
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _status(key: str) -> int:
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii", errors="replace") as status:
        for line in status:
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    return 0


def check_loggers(names: Sequence[str]) -> None:
    """Raise ConfigError for a logger that does not exist and DependencyError for one that is not installed."""
    for name in names:
        if name not in _TRACKERS:
            near = difflib.get_close_matches(name, _TRACKERS, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(_TRACKERS)}"
            raise ConfigError(f"loggers: unknown logger {name!r}; {hint}")
        if name not in sys.modules and find_spec(name) is None:
            raise DependencyError(f"loggers: {name} is not installed; pip install {name}, or leave it out of --loggers")


class _TensorBoard:
    def __init__(self, output: Path, run_name: str, resume_step: int, config: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(output / "tensorboard"), purge_step=resume_step + 1 if resume_step else None)
        if config and not resume_step:
            self.writer.add_text("config", "\n".join(f"    {name}: {value}" for name, value in config.items()))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class _Wandb:
    def __init__(self, output: Path, run_name: str, resume_step: int, config: dict[str, Any]) -> None:
        wandb = importlib.import_module("wandb")
        marker = output / "wandb" / "run-id.txt"
        marker.parent.mkdir(exist_ok=True)
        if not (resume_step and marker.exists()):
            marker.write_text(secrets.token_hex(4), encoding="ascii")
        run_id = marker.read_text(encoding="ascii").strip()
        self.run = wandb.init(project="fastalign", name=run_name, id=run_id, resume="allow", dir=str(output), config=config)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


class _Trackio:
    def __init__(self, output: Path, run_name: str, resume_step: int, config: dict[str, Any]) -> None:
        self.trackio = importlib.import_module("trackio")
        self.trackio.init(project="fastalign", name=run_name, config=config, resume="allow" if resume_step else "never")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.trackio.log(dict(values), step=step)

    def close(self) -> None:
        self.trackio.finish()


_TRACKERS: dict[str, Callable[[Path, str, int, dict[str, Any]], Any]] = {"tensorboard": _TensorBoard, "wandb": _Wandb, "trackio": _Trackio}


def _start(name: str, *options: Any) -> Any:
    try:
        return _TRACKERS[name](*options)
    except Exception as error:  # whatever the service makes of a missing login, network or version
        raise DependencyError(f"loggers: {name} did not start: {error}; mend that, or leave {name} out of --loggers") from error


def _progress(stream: TextIO, total_steps: int, first: int) -> _Bar | _Lines:
    return _Bar(stream, total_steps, first) if stream.isatty() else _Lines(stream, total_steps, first)


class _Bar:
    """A progress bar with loss, accuracy, speed, memory and time left."""

    def __init__(self, stream: TextIO, total_steps: int, first: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (
            TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=None), TextColumn("{task.fields[summary]}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        )  # fmt: skip
        self.bar = Progress(*columns, console=Console(file=stream), expand=True)
        self.task = self.bar.add_task("train", total=total_steps, completed=first, summary="")
        self.bar.start()

    def update(self, step: int, values: Mapping[str, float], kind: str) -> None:
        if kind == "eval":
            self.bar.console.print(f"step {step}: {summary(values)}", highlight=False, markup=False)
        else:
            self.bar.update(self.task, completed=step, summary=summary(values))

    def close(self) -> None:
        self.bar.stop()


class _Lines:
    """A line at the first and last step, for every evaluation, and otherwise every few seconds."""

    def __init__(self, stream: TextIO, total_steps: int, first: int) -> None:
        self.stream, self.total, self.first = stream, total_steps, first
        self.start = time.monotonic()
        self.last = -math.inf

    def update(self, step: int, values: Mapping[str, float], kind: str) -> None:
        now = time.monotonic()
        if kind == "train" and step < self.total:
            if now - self.last < PLAIN_LINE_SECONDS:
                return
            self.last = now
        left = ""
        if kind == "train" and self.first + 1 < step < self.total:
            left = f"  left {_clock((now - self.start) / (step - self.first) * (self.total - step))}"
        print(f"step {step}/{self.total}  {summary(values)}{left}", file=self.stream, flush=True)

    def close(self) -> None:
        pass


def summary(values: Mapping[str, float]) -> str:
    """The few numbers that fit on a line.

    >>> summary({"loss": 0.6931, "rewards/accuracies": 0.5, "perf/tokens_per_second": 4210.3, "mem/peak_rss_gib": 1.25})
    'loss 0.6931  accuracy 0.500  4,210 tok/s  1.25 GiB'
    """
    formats = {
        "loss": "loss {:.4f}",
        "eval_loss": "eval loss {:.4f}",
        "reward": "reward {:.3f}",
        "eval_reward": "eval reward {:.3f}",
        "rewards/accuracies": "accuracy {:.3f}",
        "eval_rewards/accuracies": "eval accuracy {:.3f}",
        "accuracy": "accuracy {:.3f}",
        "eval_accuracy": "eval accuracy {:.3f}",
        "rewards/margins": "margin {:.3f}",
        "eval_rewards/margins": "eval margin {:.3f}",
        "margin": "margin {:.3f}",
        "eval_margin": "eval margin {:.3f}",
        "perf/tokens_per_second": "{:,.0f} tok/s",
        "mem/peak_cuda_gib": "{:.2f} GiB",
        "mem/peak_rss_gib": "{:.2f} GiB",
    }
    skip = {"mem/peak_rss_gib"} if "mem/peak_cuda_gib" in values else set()
    return "  ".join(text.format(values[name]) for name, text in formats.items() if name in values and name not in skip)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _prefixed(name: str, kind: str) -> str:
    return name if kind == "train" or name.startswith("eval_") else f"eval_{name}"


def _number(value: Any) -> float:
    return value if isinstance(value, (int, float)) else float(value)


def _jsonable(value: Any) -> Any:
    return value if not isinstance(value, float) or math.isfinite(value) else _NON_FINITE[str(value)]
