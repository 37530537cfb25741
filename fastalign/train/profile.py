"""Where the time of a step goes: a trace of a few steps for a viewer, and a page of shares.

The profiler attributes every operator's own time, on CUDA that of the kernels it launched, to one line of the table; what is left
of the wall time is no operator's: the host's Python, data, and a device that waits.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from fastalign.models.reference import CachedReference
from fastalign.packing import spared_tokens
from fastalign.train.config import write_text
from fastalign.train.flops import main_dtype, model_flops, peak_flops
from fastalign.train.folder import writing
from fastalign.types import Sample

WARMUP = 2  # steps before the first that is profiled, where the run has as many: first allocations, and kernels that are compiled
TRACE, PAGE = "profile.json", "profile.md"

PARTS = {
    "trunk GEMMs": "linear layers, forward and backward",
    "attention": "scores, softmax and values",
    "head GEMMs": "logits, and their gradients to hidden states and weight",
    "head, rest": "row kernels on logits, and the loss; with the native library also its bfloat16 products",
    "optimizer": "gradient norm, clipping, update",
    "other operators": "norms, activations, embeddings, copies",
    "no operator": "Python, data, and a device that waits",
}
_HEAD = re.compile(r"Linear(Logps|Loss|Divergence)|fastalign::linear")
_GEMM = re.compile(r"aten::(_?addmm|mm|bmm|baddbmm|_grouped_mm|addmv|mv)\b")
_ATTENTION = re.compile(r"attention|varlen|flash_attn", re.IGNORECASE)
_OPTIMIZER = re.compile(r"^Optimizer\.|aten::_foreach_|aten::_fused_adam")


class StepProfiler:
    """Profiles `steps` steps after a warm-up; `metrics()` then has perf/head_share and perf/mfu of them, once."""

    def __init__(self, steps: int, left: int, folder: Path, model: Any, device: torch.device) -> None:
        self.steps = min(steps, left)
        self.warmup = min(WARMUP, left - self.steps)
        self.folder, self.model, self.device = folder, model, device
        self.seconds: list[float] = []
        self.flops = 0.0
        self.found: dict[str, float] = {}
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
        self.profile = profile(activities=activities)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around every step of the run."""
        if self.warmup > 0 or len(self.seconds) >= self.steps:
            self.warmup -= 1
            yield
            return
        if not self.seconds:
            self._wait()
            self.profile.start()
        started = time.perf_counter()
        yield
        self._wait()
        self.seconds.append(time.perf_counter() - started)
        if len(self.seconds) == self.steps:
            self.profile.stop()
            self._write()

    def count(self, bins: Sequence[Sequence[Sample]], objective: Any, *, share: bool) -> None:
        """Add the FLOPs of a step's micro-batches, if it is one that is profiled; those of a reference that is not cached, too."""
        if self.warmup > 0 or len(self.seconds) >= self.steps:
            return
        samples = [sample for members in bins for sample in members]
        tokens = sum(s.num_tokens for s in samples) - (sum(map(spared_tokens, bins)) if share else 0)
        lengths = [len(context) + len(own) for s in samples for context, own in zip(s.contexts, s.completions)]
        rows = sum(sample.num_targets for sample in samples)
        reference = getattr(objective, "reference", None)
        self.flops += model_flops(self.model, tokens, lengths, rows).total
        if reference is not None and not isinstance(reference, CachedReference):
            self.flops += model_flops(self.model, tokens, lengths, rows, backward=False).total

    def metrics(self) -> dict[str, float]:
        """perf/mfu and perf/head_share, for the first row that is logged after the last profiled step; else nothing."""
        found, self.found = self.found, {}
        return found

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _write(self) -> None:
        spent = parts_of(self.profile.events(), cuda=self.device.type == "cuda")
        wall = sum(self.seconds)
        spent["no operator"] = max(0.0, wall - sum(spent.values()))
        with writing(self.folder / TRACE):
            self.profile.export_chrome_trace(str(self.folder / TRACE))
        peak, source = peak_flops(self.device, main_dtype(self.model))
        mfu = self.flops / wall / peak
        self.found = {"perf/mfu": mfu, "perf/head_share": (spent["head GEMMs"] + spent["head, rest"]) / wall}
        utilisation = f"{mfu:.1%} of {peak / 1e12:.3g} TFLOP/s ({source})"
        write_text(self.folder / PAGE, page(spent, self.seconds, self.flops, utilisation))


def parts_of(events: Any, *, cuda: bool = False) -> dict[str, float]:
    """Seconds of every line of PARTS in the profiler's events: of an operator its own time, without the operators that it called."""
    spent = dict.fromkeys(PARTS, 0.0)
    for event in events:
        if event.device_type == DeviceType.CPU:
            own = event.self_device_time_total if cuda else event.self_cpu_time_total
            spent[_part(event)] += own / 1e6
    return spent


def page(spent: dict[str, float], seconds: Sequence[float], flops: float, utilisation: str) -> str:
    """The Markdown page of `spent` seconds in steps that took `seconds` each."""
    wall, steps = sum(seconds), len(seconds)
    lines = [
        "# Where the time of a step goes",
        "",
        f"{steps} step{'s' if steps > 1 else ''} of {wall / steps:.3f} s, the profiler's own work included; {TRACE} is their trace "
        "(chrome://tracing, or ui.perfetto.dev).",
        f"The model's arithmetic is {flops / steps / 1e12:.4g} TFLOP a step, which is {utilisation}.",
        "",
        "| part | share | s per step | what |",
        "|---|---:|---:|---|",
        *(f"| {name} | {spent[name] / wall:.1%} | {spent[name] / steps:.4f} | {what} |" for name, what in PARTS.items()),
    ]
    return "\n".join(lines) + "\n"


def _part(event: Any) -> str:
    """The line of the table that an operator belongs to, by its own name and those of its callers."""
    names, caller = [event.name], event.cpu_parent
    while caller is not None:
        names.append(caller.name)
        caller = caller.cpu_parent
    if any(map(_HEAD.search, names)):
        return "head GEMMs" if _GEMM.match(event.name) else "head, rest"
    if any(map(_OPTIMIZER.search, names)):
        return "optimizer"
    if any(map(_ATTENTION.search, names)):
        return "attention"
    return "trunk GEMMs" if _GEMM.match(event.name) else "other operators"
