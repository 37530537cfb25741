"""Several processes of a gloo group, forked from that of a test: they need not import anything again."""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch.distributed as dist


def processes(size: int, tmp_path: Path, job: Callable[[int, int], Any]) -> list[Any]:
    """What `job(index, size)` returns on each process of the group; numbers, text and arrays, for tensors would end with their process."""
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    group = [context.Process(target=_work, args=(job, i, size, str(tmp_path / "store"), queue)) for i in range(size)]
    for process in group:
        process.start()
    found: list[Any] = [None] * size
    for _ in group:
        index, value, error = queue.get()
        assert error is None, error
        found[index] = value
    for process in group:
        process.join()
    return found


def _work(job: Callable[..., Any], index: int, size: int, file: str, to: Any) -> None:
    try:
        dist.init_process_group("gloo", init_method=f"file://{file}", rank=index, world_size=size, timeout=timedelta(seconds=300))
        to.put((index, job(index, size), None))
    except BaseException:
        to.put((index, None, traceback.format_exc()))


def end(numbers: Iterable[int], within: float = 120.0) -> bool:
    """Whether these processes end: the pipes of one close a little before, and it may stay as a zombie where nobody asks how it ended."""
    until = time.monotonic() + within
    while any(_is_running(number) for number in numbers):
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def _is_running(number: int) -> bool:
    try:
        return psutil.Process(number).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
