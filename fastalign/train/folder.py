"""The run folder: who may write in it, and files that appear whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from fastalign.errors import OutputError

logger = logging.getLogger("fastalign")

MARK = "metrics.jsonl"  # the first file of a run: a folder that has it holds a run
_LOCK = ".lock"  # held while a process trains; the kernel lets go of it when the process ends, however it ends
TEMPORARY = ".writing-"  # begins the name of a folder that is still being written

# What a run writes at the top of its folder; overwriting deletes these and nothing else. The mark goes last.
RUN_FILES = (
    "checkpoints", "final", "reference", "report", "report.html", "data.json", "completions.jsonl", "critic.safetensors", "config.yaml",
    "adapters", "tensorboard", "wandb", MARK,
)  # fmt: skip


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
        present = _content(path)
        if present and MARK not in present:
            shown = ", ".join(sorted(present)[:3])
            raise OutputError(f"{path}: the folder holds files that are not a run's ({shown}); choose an empty or new --output")
        handle = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"{path}: cannot write in the output folder ({_reason(error)}); choose another --output") from error
    try:
        _lock(handle, path)
    except OutputError:  # the folder is the other process's, empty or not
        os.close(handle)
        raise
    try:
        if MARK in _content(path) and not (resume or overwrite):
            raise OutputError(
                f"{path}: the folder holds another run; continue it with --resume, delete it with --overwrite, or choose another --output"
            )
        yield RunFolder(path)
    finally:
        if path.is_dir() and not _content(path):
            (path / _LOCK).unlink(missing_ok=True)
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


def _content(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir()} - {_LOCK}


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """The folder `path`, created, with no second process inside this block. Raises OutputError."""
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
        handle = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT)
    try:
        _lock(handle, path)
        yield
    finally:
        os.close(handle)


def _lock(handle: int, path: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise OutputError(f"{path}: another process is at work in this folder; wait for it or choose another --output") from error
    except OSError as error:
        logger.warning("%s: this file system has no locks (%s); see to it that no other process trains here", path, _reason(error))


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _is_full(error: Exception) -> bool:
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return getattr(error, "errno", None) in full or any(os.strerror(code) in str(error) for code in full)
