"""Bandwidth of the Triton row kernels by how they are launched: `python -m bench rows` writes bench/results/rows_MACHINE.csv.

A tile of float32 logits is scored (read once, 4 bytes a logit) and overwritten by its bfloat16 gradient (read and written once, 6 bytes),
with so many warps to a row and so many columns at a time. The yardstick is a copy of a tile, bytes read and written counted. Results of
every launch must equal those of the kernels' own settings before it is timed. Medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import head_page, table
from bench.machine import command, describe
from bench.meter import Meter
from bench.provenance import Measured

ROOT = Path(__file__).resolve().parent.parent
SHAPES = [(2048, 151936), (4096, 128256)]
WARPS, BLOCKS = (2, 4, 8, 16), (1024, 2048, 4096, 8192)
BYTES = {"copy": 8, "statistics": 4, "gradient": 6}  # per logit


@dataclass(frozen=True)
class Launch(Measured):
    kernel: str
    rows: int
    columns: int
    warps: int = 0
    block: int = 0
    status: str = "measured"
    median_ms: float | None = None
    gb_per_second: float | None = None


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench rows", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a toy tile, few launches: checks the benchmark, measures nothing")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda", help="cpu: interpreted, only with --quick")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results", help="folder of the file")
    options = parser.parse_args(argv)
    if options.device == "cpu":
        if not options.quick:
            parser.error("--device cpu: only --quick runs on a CPU, interpreted")
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    device = torch.device(options.device)
    about = describe(["torch", "triton"], device) | {"command": command("rows", argv)}
    file = options.output / f"rows_{head_page.machine_kind(device)}.csv"
    shapes, settings = ([(3, 1000)], [(4, 2048), (2, 1024)]) if options.quick else (SHAPES, list(product(WARPS, BLOCKS)))
    found: list[Launch] = []
    for shape in shapes:
        for row in measure(*shape, settings, device, 1 if options.quick else options.repeats):
            found.append(replace(row, **about))
            table.write(file, found)
            where = f"{row.rows} x {row.columns}, {row.kernel}, {row.warps} warps, {row.block} columns"
            print(f"{where}: {row.status}" + (f", {row.gb_per_second:.0f} GB/s" if row.gb_per_second else ""), flush=True)
    return 1 if any(row.status.startswith("wrong") for row in found) else 0


def measure(rows: int, columns: int, settings: list[tuple[int, int]], device: torch.device, repeats: int) -> Iterator[Launch]:
    """The copy, and both kernels at every setting."""
    from fastalign.head import rows_triton as kernels
    from fastalign.head.rows import LogitMap

    generator = torch.Generator(device).manual_seed(0)
    source = 3 * torch.randn(rows, columns, generator=generator, device=device)
    tile = source.clone()
    target = torch.randint(columns, (rows,), generator=generator, device=device)
    coefficients = {"logps": torch.ones(rows, device=device)}
    outputs = frozenset({"logps"})

    def score() -> Any:
        state = kernels.start(rows, outputs, dtype=torch.float32, device=device)
        kernels.update(state, source, target, 0, LogitMap())
        return state

    def differentiate() -> Tensor:
        options: dict[str, Any] = {"entropy": None, "vocabulary": columns, "dtype": torch.bfloat16}
        return kernels.gradient_(tile, target, 0, LogitMap(), lse, coefficients, **options)

    own = score()
    lse = kernels.finish(own)["lse"]
    own_gradient = differentiate().clone()
    meter = Meter(device)

    def row(kernel: str, run: Callable[[], object], warps: int = 0, block: int = 0) -> Launch:
        times = []
        for _ in range(repeats):
            if kernel == "gradient":  # it overwrites what it reads
                tile.copy_(source)
            times.append(meter.milliseconds(run))
        median = statistics.median(times)
        return Launch(kernel, rows, columns, warps, block, "measured", median, BYTES[kernel] * rows * columns / median / 1e6)

    tile.copy_(source)
    yield row("copy", lambda: tile.copy_(source))
    for warps, block in settings:
        with launched(kernels, warps, block) as possible:
            for kernel, run in (("statistics", score), ("gradient", differentiate)):
                blank = Launch(kernel, rows, columns, warps, block)
                if kernel == "statistics" and not possible:
                    yield replace(blank, status="not possible: fewer columns than lanes")
                    continue
                try:
                    tile.copy_(source)
                    got = run()
                    right = (
                        torch.allclose(got.m + got.s.log(), own.m + own.s.log(), rtol=1e-5, atol=1e-5)
                        if kernel == "statistics"
                        else torch.allclose(got.float(), own_gradient.float(), rtol=2**-7, atol=1e-30)
                    )
                    yield row(kernel, run, warps, block) if right else replace(blank, status="wrong answer")
                except Exception as error:  # out of registers or shared memory; the others are still measured
                    yield replace(blank, status=f"failed: {type(error).__name__}: {' '.join(str(error).split())[:120]}")


@contextmanager
def launched(kernels: Any, warps: int, block: int) -> Iterator[bool]:
    """Inside, the row kernels are launched so; whether the statistics can be."""
    before = kernels.WARPS, kernels.BLOCK, kernels.LAUNCH
    kernels.WARPS, kernels.BLOCK, kernels.LAUNCH = warps, block, kernels.LAUNCH | {"num_warps": warps}
    try:
        yield kernels.lanes(4, kernels.ROCM)["DEPTH"] >= 1
    finally:
        kernels.WARPS, kernels.BLOCK, kernels.LAUNCH = before


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
