"""Which schedule computes the head, in what slabs and tiles, and why.

FLOPs are counted in NVD: one GEMM of the head over N live rows is 2NVD.

| schedule    | when `auto` takes it                                  | FLOPs | kept for the backward       |
|-------------|-------------------------------------------------------|-------|-----------------------------|
| `none`      | nothing wants a gradient                              | 2NVD  | nothing                     |
| `frozen`    | only the hidden states want a gradient                | 4NVD  | d logp / d hidden, (N, D)   |
| `slab`      | the loss is known while the slab is there             | 6NVD  | nothing (4NVD, frozen head) |
| `keep`      | the logits of all rows fit the budget                 | 6NVD  | logits (N, V), input dtype  |
| `recompute` | otherwise                                             | 8NVD  | log-sum-exp (N,)            |

A slab is `slab_rows` whole rows of logits. When the budget has no room for MIN_ROWS whole rows, a slab is cut into
tiles of `tile_cols` columns; `slab` and `frozen` then form the logits twice, which costs another 2NVD. `none` and `recompute`
need no whole rows: on a CPU they always work in tiles that stay in its caches (1.1 to 1.3 times faster, measured on 32 MiB).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch

from fastalign.errors import DependencyError
from fastalign.head import native

SCHEDULES = ("none", "frozen", "slab", "keep", "recompute")
IMPLEMENTATIONS = ("torch", "triton", "native", "reference")
MIN_ROWS = {"cpu": 64, "cuda": 1024}  # fewer rows make a GEMM re-read the weight for too little work
MAX_ROWS = {"cpu": 1024, "cuda": 8192}  # more rows gain nothing
MIB = 1 << 20
ROW_SCRATCH = 4 * MIB  # what the row kernels and upcasts hold beside the tile
CPU_TILE = 16 * MIB  # stays in a processor's last cache between the GEMM that writes it and the row kernel that reads it
NARROWEST = 512  # columns of such a tile: its GEMM reads all rows of `hidden` again for each tile


@dataclass(frozen=True)
class Plan:
    """The planner's choice. Sizes in bytes; `nvd` counts multiples of N V D floating-point operations."""

    schedule: str
    impl: str
    budget: int
    slab_rows: int
    tile_cols: int
    tiled: bool  # a slab is cut over the vocabulary as well
    nvd: int
    scratch: int
    kept: int
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        head = f"schedule {self.schedule}, impl {self.impl}: {self.nvd} NVD"
        sizes = f"{self.scratch / MIB:.1f} MiB scratch of {self.budget / MIB:.1f} MiB budget, {self.kept / MIB:.1f} MiB kept"
        return "\n".join([head, f"  slabs of {self.slab_rows} rows x {self.tile_cols} columns, {sizes}", *(f"  {r}" for r in self.reasons)])


def default_budget(device: torch.device) -> int:
    """Bytes of logits scratch where the caller names none: 2 % of the device's memory, as a power of two.

    It depends on the machine and not on what is free at the moment: slab boundaries change the rounding of the weight's
    gradient, and a rerun must give the same bits. CPUs are capped at 256 MiB: slabs of hundreds of rows of the largest vocabularies.
    """
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return 1 << (total // 50).bit_length() - 1
    return min(256 * MIB, 1 << (_host_memory() // 50).bit_length() - 1)


def make_plan(
    rows: int,
    vocabulary: int,
    hidden_size: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    hidden_grad: bool = True,
    head_grad: bool = True,
    local_loss: bool = False,
    group_rows: int = 1,
    grad_outputs: int = 1,
    schedule: str = "auto",
    budget: int | None = None,
    impl: str = "auto",
) -> Plan:
    """Choose a schedule and its slabs.

    rows                live rows N (those with a target)
    hidden_grad         the hidden states (or the inputs of a LoRA on the head) want a gradient
    head_grad           the weight, its bias or its LoRA want a gradient
    local_loss          the loss decomposes over row groups and is known while the slab is there (`linear_loss`)
    group_rows          rows of the largest group that a slab may not split
    grad_outputs        differentiable outputs that were asked for
    impl                "auto": "triton" on a CUDA or ROCm device if Triton is installed, "native" on a CPU if the native library is
                        there (`head.native`) and has its vector instructions, else, and for float64, "torch"

    Raises ValueError for a schedule or implementation that cannot serve the request, naming one that can, and
    DependencyError for impl "triton" without Triton or "native" without its library.
    """
    device = torch.device(device)
    impl = _choose_impl(impl, dtype, device)
    budget = default_budget(device) if budget is None else int(budget)
    if budget <= 0:
        raise ValueError(f"budget must be a positive number of bytes, got {budget}")
    work = torch.promote_types(dtype, torch.float32).itemsize
    min_rows = min(max(1, rows), max(MIN_ROWS.get(device.type, 64), group_rows if local_loss else 1))
    reasons: list[str] = []

    # Each output after the first takes a slab's logits once more, from a copy.
    frozen = schedule == "frozen" or (schedule == "auto" and hidden_grad and not head_grad and not local_loss)
    copies = 2 if frozen and grad_outputs > 1 else 1
    room = max(budget // 2, budget - ROW_SCRATCH) // copies
    most = MAX_ROWS.get(device.type, 1024)
    whole_rows = room // max(1, vocabulary * work)
    slab_rows, tile_cols = max(min_rows, min(whole_rows, most, max(1, rows))), vocabulary
    if whole_rows < min_rows:
        tile_cols = _columns(room // (min_rows * work), vocabulary)
    logits_bytes = rows * vocabulary * dtype.itemsize

    if schedule == "slab" and local_loss and not (hidden_grad or head_grad):
        schedule = "auto"
    if schedule == "auto":
        if not (hidden_grad or head_grad):
            schedule, why = "none", "nothing wants a gradient"
        elif local_loss:
            schedule, why = "slab", "the loss is known slab by slab"
        elif not head_grad:
            schedule, why = "frozen", "the head is frozen: its row gradients are formed in the forward"
        elif logits_bytes + slab_rows * tile_cols * work <= budget:
            schedule, why = "keep", f"all logits fit the budget ({logits_bytes / MIB:.1f} MiB)"
        else:
            schedule, why = "recompute", f"all logits need {logits_bytes / MIB:.1f} MiB, more than the budget"
        reasons.append(why)
    else:
        _check_schedule(schedule, hidden_grad=hidden_grad, head_grad=head_grad, local_loss=local_loss)
        reasons.append("the caller asked for this schedule")

    if tile_cols < vocabulary or (device.type == "cpu" and schedule in ("none", "recompute")):
        if device.type == "cpu":
            elements = min(CPU_TILE, room) // work
            slab_rows = max(min_rows, min(max(1, rows), most, elements // min(vocabulary, NARROWEST)))
            tile_cols = _columns(elements // slab_rows, vocabulary)
        if whole_rows < min_rows and tile_cols < vocabulary:
            reasons.append(f"{budget / MIB:.1f} MiB hold fewer than {min_rows} whole rows: slabs are cut into tiles of {tile_cols} columns")
        elif tile_cols < vocabulary:
            reasons.append(f"tiles of {tile_cols} columns stay in cache between the GEMM and the row kernels")
    slab_rows = _even(rows, slab_rows, min_rows, group_rows if local_loss else 1)
    tiled = tile_cols < vocabulary
    scratch = slab_rows * tile_cols * work * (1 if tiled else copies)

    gemms = {"none": 1, "frozen": 1 + grad_outputs, "slab": 1 + hidden_grad + head_grad, "keep": 1 + hidden_grad + head_grad}
    gemms["recompute"] = 2 + hidden_grad + head_grad
    again = {"slab": 1, "frozen": grad_outputs}.get(schedule, 0) if tiled else 0
    nvd = 2 * (gemms[schedule] + again)
    kept = {"frozen": rows * hidden_size * dtype.itemsize * grad_outputs, "keep": logits_bytes}.get(schedule, rows * 4)
    return Plan(
        schedule, impl, budget, slab_rows, tile_cols, tiled, nvd, scratch, 0 if schedule in ("none", "slab") else kept, tuple(reasons)
    )


def _columns(room: int, vocabulary: int) -> int:
    """As many columns as there is room for, a multiple of 64 if possible: rows of a tile begin where wide loads may."""
    columns = max(1, min(vocabulary, room))
    return columns - columns % 64 if 64 < columns < vocabulary else columns


def _even(rows: int, slab_rows: int, min_rows: int, group_rows: int) -> int:
    """Rows of a slab such that as many slabs are alike; a last one of few rows would re-read the whole weight for them."""
    share = -(-rows // -(-max(1, rows) // slab_rows)) + group_rows - 1
    return max(min_rows, min(slab_rows, share + -share % 16))


def explain(rows: int, vocabulary: int, hidden_size: int, **request: object) -> str:
    """What `make_plan` chooses for a request, in words.

    >>> print(explain(4096, 151936, 512, budget=64 * 2**20, impl="torch"))
    schedule recompute, impl torch: 8 NVD
      slabs of 1024 rows x 4096 columns, 16.0 MiB scratch of 64.0 MiB budget, 0.0 MiB kept
      all logits need 2374.0 MiB, more than the budget
      tiles of 4096 columns stay in cache between the GEMM and the row kernels
    """
    return str(make_plan(rows, vocabulary, hidden_size, **request))  # type: ignore[arg-type]


def _choose_impl(impl: str, dtype: torch.dtype, device: torch.device) -> str:
    if impl == "auto":
        if dtype == torch.float64:
            return "torch"
        if device.type == "cuda" and _has_triton():
            return "triton"
        return "native" if device.type == "cpu" and _has_native() else "torch"
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be 'auto' or one of {IMPLEMENTATIONS}, got {impl!r}")
    if impl == "triton":
        if not _has_triton():
            raise DependencyError(
                "impl 'triton' needs Triton, which is not installed: pip install 'fastalign[triton]', or use impl='torch'"
            )
        if dtype == torch.float64:
            raise ValueError("impl 'triton' computes in float32, but hidden is float64: use impl='torch'")
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(
                f"impl 'triton' needs a CUDA or ROCm device, but hidden is on {device}: use impl='torch', "
                "or set TRITON_INTERPRET=1 before the first use to interpret the kernels (slow, for tests)"
            )
    if impl == "native":
        native.library()
        if dtype == torch.float64:
            raise ValueError("impl 'native' computes in float32, but hidden is float64: use impl='torch'")
        if device.type != "cpu":
            raise ValueError(f"impl 'native' runs on a CPU, but hidden is on {device}: use impl='auto'")
    return impl


@lru_cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


@lru_cache
def _has_native() -> bool:
    return native.find() is not None and native.isa() != "scalar"  # torch is faster than that


def _check_schedule(schedule: str, *, hidden_grad: bool, head_grad: bool, local_loss: bool) -> None:
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be 'auto' or one of {SCHEDULES}, got {schedule!r}")
    if schedule == "slab" and not local_loss:
        raise ValueError("schedule 'slab' needs the loss while the slab is there: call linear_loss, or use 'keep' or 'recompute'")
    if schedule == "none" and (hidden_grad or head_grad):
        raise ValueError("schedule 'none' gives no gradient, but an input requires one: use 'auto', or detach it or enter torch.no_grad()")
    if schedule == "frozen" and head_grad:
        raise ValueError("schedule 'frozen' gives the head no gradient, but weight, bias or lora requires one: use 'auto' or 'recompute'")


@lru_cache
def _host_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else ():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    return 8 << 30
