"""The fused LM head against its bare GEMMs and against its peers: `python -m bench head` writes bench/results/head_MACHINE.{csv,md}.

A block is one task at one shape and dtype. Every side of it must first agree with float64 on log-probs, loss and gradients;
no speed is printed for a wrong answer. Then the sides and the three bare GEMMs take turns in this process; medians over the
rounds. The files are rewritten after every block. Under --limit the least important blocks are left out, and named. With --base the
sides of fastalign are compared with those of another commit instead (bench/head_base.py), and base_head_MACHINE.csv is written.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import head_base, head_page, table
from bench.head_problem import Problem
from bench.head_rows import Row
from bench.head_sides import LOSSES, REFERENCED, TASKS, Absent, Outcome, Run, Side, gold_loss, sides_of
from bench.machine import command, describe
from bench.meter import Meter
from bench.plot import draw_head, publish

ROOT = Path(__file__).resolve().parent.parent
Shape = tuple[int, int, int]
CUDA_SHAPES: list[Shape] = [
    (8192, 151936, 4096),
    (8192, 151936, 1024),
    (2048, 151936, 4096),
    (8192, 128256, 4096),
    (16384, 262144, 2304),
]
CPU_SHAPES: list[Shape] = [(1024, 32768, 1024), (2048, 151936, 512)]
QUICK_SHAPES: list[Shape] = [(64, 512, 32)]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
OWN_BOUND = {torch.float32: 1e-4, torch.bfloat16: 1e-2}  # relative error of our loss and gradients
OWN_NATS = 1e-3  # of our log-probs, for a speed to be shown; what they must keep is `logps_bound_nats`, and the page says where not
PEER_BOUND, PEER_NATS = 0.1, 0.5
NOT_RUN = "not run: time limit"


class Block(NamedTuple):
    """One table: sides of one task that take turns at one shape and dtype."""

    rank: float  # the higher, the sooner it is left out
    shape: Shape
    dtype: torch.dtype
    task: str
    late: bool


def main(argv: list[str]) -> int:
    options = parse(argv)
    device = torch.device(options.device)
    started = time.monotonic()
    stem = options.output / f"head_{head_page.machine_kind(device)}"
    file, page = stem.with_suffix(".csv"), stem.with_suffix(".md")
    if options.base:
        about = {"command": command("head", argv)}
        compared = [replace(row, **about) for row in head_base.measure(options, turns=1 if options.quick else head_base.TURNS)]
        head_base.report(compared, options, stem)
        return 0
    rows = {row.key: row for row in table.read(file, Row)} if options.append and file.exists() else {}
    about = describe(head_page.PACKAGES, device) | {"command": command("head", argv)}

    def save() -> None:
        table.write(file, rows.values())
        publish(file, head_page.page(list(rows.values())), draw_head(list(rows.values())))

    bench = Bench(device, options.repeats, options.sides)
    bench.late_after = None if options.limit is None else started + options.limit
    wrong = 0
    for block in blocks(options):
        for row in bench.measure(block):
            rows[row.key] = replace(row, **about)
            wrong += row.ours and row.status.startswith("wrong")
            print(head_page.line(row), flush=True)
        save()
    print(f"\n{file} and {page.name} written")
    return 1 if wrong else 0


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench head", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a toy shape and one round: checks the benchmark, measures nothing")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--shapes", nargs="+", type=_shape, metavar="N,V,D", help="rows, vocabulary, hidden size; default: by device")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), help="default: bfloat16 on CUDA, both on a CPU")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--sides", nargs="+", metavar="TEXT", help="only sides whose name contains one of these")
    parser.add_argument("--repeats", type=int, help="rounds; default: 15 on CUDA, 5 on a CPU")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="start no block and no side later than this")
    parser.add_argument("--append", action="store_true", help="keep the rows of an earlier run that this one does not measure")
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results", help="folder of the two files")
    parser.add_argument("--base", metavar="REF", help="compare fastalign with that of this commit, in processes that take turns")
    options = parser.parse_args(argv)
    if options.base and (options.append or options.limit is not None):
        parser.error("--base: goes with neither --append nor --limit")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device; use --device cpu")
    cuda = options.device == "cuda"
    options.shapes = options.shapes or (QUICK_SHAPES if options.quick else CUDA_SHAPES if cuda else CPU_SHAPES)
    options.dtypes = options.dtypes or (["bfloat16"] if cuda else list(DTYPES))
    options.repeats = 1 if options.quick else options.repeats or (15 if cuda else 5)
    return options


def _shape(text: str) -> Shape:
    n, v, d = map(int, text.split(","))
    return n, v, d


def blocks(options: argparse.Namespace) -> list[Block]:
    """What is to be measured: by importance under a limit, else shape by shape. Compiled sides come late, at the first shape only."""
    found = []
    for i, shape in enumerate(options.shapes):
        for name in options.dtypes:
            for j, task in enumerate(TASKS):
                if task not in options.tasks:
                    continue
                order = 3 * i + j if options.limit is not None else 100 * i + j
                found.append(Block(order, shape, DTYPES[name], task, late=False))
                if any(side.late for side in sides_of(task)) and (i == 0 or options.device == "cpu"):
                    found.append(Block(order + (len(TASKS) if options.limit is not None else 0.5), shape, DTYPES[name], task, late=True))
    return sorted(found, key=lambda block: block.rank)


class Bench:
    """Measures blocks on one device."""

    def __init__(self, device: torch.device, repeats: int, only: list[str] | None) -> None:
        self.device, self.repeats, self.only = device, repeats, only
        self.meter = Meter(device)
        self.late_after: float | None = None  # clock after which no side is begun
        self.problems: dict[tuple[Shape, torch.dtype], Problem] = {}

    def measure(self, block: Block) -> list[Row]:
        """The rows of a block: measured, or with the reason why not."""
        n, v, d = block.shape
        blank = Row(self.device.type, n, v, d, str(block.dtype).removeprefix("torch."), block.task, "", False)
        sides = [s for s in sides_of(block.task) if s.late == block.late and (not self.only or any(part in s.name for part in self.only))]
        if not sides:
            return []
        if self.too_late():
            return [replace(blank, side=side.name, ours=side.ours, status=NOT_RUN) for side in sides]
        problem = self.problem(block)
        torch._dynamo.reset()  # or what was compiled for earlier blocks counts against a limit, beyond which nothing is compiled
        rows: dict[Side, Row] = {}
        runs: dict[Side, Run] = {}
        for side in sides:
            rows[side] = replace(blank, side=side.name, ours=side.ours, gemms_nvd=2 * sum(side.gemms))
            if self.too_late():
                rows[side] = replace(rows[side], status=NOT_RUN)
                continue
            try:
                runs[side] = side.build(problem)
                rows[side] = self.check(rows[side], problem, runs[side])
                problem.forget_gradients()  # those of the check are no inputs
                if rows[side].status == "measured":
                    rows[side] = replace(rows[side], peak_memory_mib=self.meter.peak_mib(partial(self.once, problem, runs[side])))
            except Absent as reason:
                rows[side] = replace(rows[side], status=f"absent: {reason}")
            except Exception as error:  # a peer may fail in any way; the others are still measured
                if side.ours:
                    raise
                kind = "absent" if isinstance(error, ImportError) else f"failed: {type(error).__name__}"
                rows[side] = replace(rows[side], status=f"{kind}: {_first_line(error)}")
        live = {side: run for side, run in runs.items() if rows[side].status == "measured"}
        self.time(problem, live, rows)
        return [rows[side] for side in sides]

    def too_late(self) -> bool:
        return self.late_after is not None and time.monotonic() > self.late_after

    def problem(self, block: Block) -> Problem:
        key = block.shape, block.dtype
        if key not in self.problems:
            if self.device.type == "cpu":
                self.problems.clear()
            self.problems[key] = Problem.random(block.shape, block.dtype, self.device)
        return self.problems[key]

    def once(self, problem: Problem, run: Run) -> Outcome:
        problem.forget_gradients()
        return run()

    def check(self, row: Row, problem: Problem, run: Run) -> Row:
        """The row with its errors, or with the status "wrong answer". The first run of a side, which may compile."""
        out, gold = self.once(problem, run), problem.gold
        errors: dict[str, Any] = {}
        if out.logps is not None:
            errors["logps_error_nats"] = float((out.logps.double() - gold.logps).abs().max())
        if row.task in LOSSES or row.task in REFERENCED:
            value, slope = gold.loss(gold_loss(row.task, problem))
            assert out.loss is not None and out.d_hidden is not None
            errors["loss_error"] = abs(float(out.loss) - value) / (1 + abs(value))
            errors["d_hidden_error"] = _distance(out.d_hidden[gold.rows], gold.d_hidden(slope))
            if out.d_weight is not None:
                errors["d_weight_error"] = _distance(out.d_weight[gold.words], gold.d_weight(slope))
        errors["logps_bound_nats"] = 8 * torch.finfo(torch.float32).eps * max(1.0, gold.largest_logit)
        bound, nats = (OWN_BOUND[problem.hidden.dtype], OWN_NATS) if row.ours else (PEER_BOUND, PEER_NATS)
        bad = [f"{k} {x:.2g}" for k, x in errors.items() if not x <= (nats if k == "logps_error_nats" else bound)]
        return replace(row, **errors, status="wrong answer: " + ", ".join(bad) if bad else "measured")

    def time(self, problem: Problem, runs: dict[Side, Run], rows: dict[Side, Row]) -> None:
        """Rounds in which every side and every bare GEMM runs once.

        The sides have run twice before, the GEMMs run once unseen; on CUDA all run once more, for memory was given back.
        """
        if not runs:
            return
        self.meter.release()
        gemms = bare_gemms(problem)
        for gemm in gemms.values():
            gemm()
        for run in runs.values() if self.meter.cuda else ():
            self.once(problem, run)
        times: dict[Any, list[float]] = {key: [] for key in (*runs, *gemms)}
        for _ in range(self.repeats):
            for name, gemm in gemms.items():
                times[name].append(self.meter.milliseconds(gemm))
            for side, run in runs.items():
                problem.forget_gradients()
                times[side].append(self.meter.milliseconds(run))
        problem.forget_gradients()
        bare = [statistics.median(times[name]) for name in gemms]
        for side in runs:
            taken = times[side]
            rows[side] = replace(
                rows[side],
                median_ms=statistics.median(taken),
                min_ms=min(taken),
                max_ms=max(taken),
                repeats=len(taken),
                bare_gemms_ms=sum(count * cost for count, cost in zip(side.gemms, bare)),
            )


def bare_gemms(problem: Problem) -> dict[str, Callable[[], Tensor]]:
    """The three products of a head in its own dtype, into memory that is there: logits, d_hidden, d_weight."""
    hidden, weight = problem.hidden.detach(), problem.weight.detach()
    logits = hidden @ weight.T
    d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight)
    return {
        "logits": lambda: torch.mm(hidden, weight.T, out=logits),
        "d_hidden": lambda: torch.mm(logits, weight, out=d_hidden),
        "d_weight": lambda: torch.mm(logits.T, hidden, out=d_weight),
    }


def _distance(x: Tensor, gold: Tensor) -> float:
    return float((x.double() - gold).norm() / gold.norm())


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:160]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
