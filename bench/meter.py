"""Time and peak memory of one call, on a CPU or a CUDA device."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable

import torch

from bench.machine import peak_rss_mib, reset_peak_rss, rss_mib

MIB = 1 << 20


class Meter:
    """Weighs and times calls on one device."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def milliseconds(self, run: Callable[[], object]) -> float:
        """Wall time of a call; on CUDA between two events, with an idle device before the first."""
        if not self.cuda:
            started = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - started)
        torch.cuda.synchronize()
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        run()
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last)

    def peak_mib(self, run: Callable[[], object]) -> float:
        """Peak memory during a call above what is held before it, its results included.

        CUDA: of the caching allocator. CPU: of the process's resident memory, after freed memory was given back to the system.
        """
        self.release()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            torch.cuda.synchronize()
            return (torch.cuda.max_memory_allocated() - before) / MIB
        reset_peak_rss()
        resident = rss_mib()
        run()
        return max(0.0, peak_rss_mib() - resident)

    def release(self) -> None:
        """Give back what earlier calls have freed."""
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        else:
            ctypes.CDLL(None).malloc_trim(0)
