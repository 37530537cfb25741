"""The run folder: who may write in it, and files that appear whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from fastalign.errors import OutputError

MARK = "metrics.jsonl"  # the first file of a run: a folder that has it holds a run
TEMPORARY = ".writing-"  # begins the name of a folder that is still being written

# What a run writes at the top of its folder; overwriting deletes these and nothing else. The mark goes last.
RUN_FILES = ("checkpoints", "final", "reference", "report", "report.html", "data.json", "config.yaml", "tensorboard", "wandb", MARK)


class RunFolder:
    """A claimed output folder: locked against a second process, and known to hold either nothing or the run to continue."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.final = path / "final"

    def begin(self, *, fresh: bool) -> None:
        """Mark the folder as a run's and delete what a killed process left half-written; with `fresh`, the run in it too."""
        with writing(self.path):
            old = [self.path / name for name in RUN_FILES] if fresh else []
            for entry in [*self.path.glob(f"{TEMPORARY}*"), *self.checkpoints.glob(f"{TEMPORARY}*"), *old]:
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink(missing_ok=True)
            (self.path / MARK).touch()


@contextmanager
def claim(path: str | Path, *, resume: bool = False, overwrite: bool = False) -> Iterator[RunFolder]:
    """Create and lock `path` for one run; nothing in it is changed yet, and a folder that stays empty is removed again.

    Raises OutputError when it cannot be written, another process trains in it, it holds another run and neither `resume` nor
    `overwrite` is set, or it holds files that are not a run's.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise OutputError(f"{path}: cannot create the output folder ({_reason(error)}); choose another --output") from error
    try:
        if not os.access(path, os.W_OK | os.X_OK):
            raise OutputError(f"{path}: the output folder is not writable; change its permissions or choose another --output")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(f"{path}: another process is training in this folder; wait for it or choose another --output") from error
        _check_content(path, resume=resume, overwrite=overwrite)
        yield RunFolder(path)
    finally:
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
        os.close(handle)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failure of the file system inside the block into an OutputError that names `path` and the remedy."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OutputError):
            raise
        remedy = "free space and continue with --resume" if _is_full(error) else "make it writable and continue with --resume"
        raise OutputError(f"{path}: cannot write ({_reason(error)}); {remedy}") from error


def publish(temporary: Path, target: Path) -> None:
    """Make the folder `temporary` appear as `target`, durably: its files and both folders are synced before the call returns."""
    for file in sorted(temporary.rglob("*")):
        sync(file)
    sync(temporary)
    if target.exists():
        shutil.rmtree(target)
    os.rename(temporary, target)
    sync(target.parent)


def sync(path: Path) -> None:
    """fsync a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _check_content(path: Path, *, resume: bool, overwrite: bool) -> None:
    entries = {entry.name for entry in path.iterdir()}
    if not entries:
        return
    if MARK not in entries:
        shown = ", ".join(sorted(entries)[:3])
        raise OutputError(f"{path}: the folder holds files that are not a run's ({shown}); choose an empty or new --output")
    if not (resume or overwrite):
        raise OutputError(
            f"{path}: the folder holds another run; continue it with --resume, delete it with --overwrite, or choose another --output"
        )


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _is_full(error: Exception) -> bool:
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return getattr(error, "errno", None) in full or any(os.strerror(code) in str(error) for code in full)
