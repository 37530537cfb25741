"""How long a pair may be: `python -m bench ladder` writes bench/results/ladder_{cpu,cuda}.{csv,md}.

A DPO pair of two sequences, each half prompt and half completion, is trained on for two optimizer steps in a fresh process. It
fits where this takes no more memory than allowed beside model and data. The longest sequence that fits is found by doubling the
length, then by bisection. First the losses and gradient norms of both sides must agree.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from bench import ladder_page, table
from bench.ladder_page import SIDES, Rung
from bench.machine import command, describe
from bench.plot import draw_ladder, publish
from bench.training import RANK, RANKS, ROOT, check_steps, run, write_data
from bench.training_sides import TASKS, Recording, Spec
from bench.workload import QUICK, Shape, write_adapter, write_model, write_pairs

MIB = (256, 512, 1024)
STEP = 32  # tokens; lengths are multiples of it
Growth = Callable[[int], float]  # MiB at a length, infinite where memory did not suffice


def main(argv: list[str]) -> int:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m bench ladder", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="a toy model, one limit and two lengths: checks the benchmark, measures nothing"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if cuda else "cpu")
    parser.add_argument("--mib", nargs="+", type=int, default=MIB, help="memory that may be taken; default: %(default)s")
    parser.add_argument("--longest", type=int, default=16384, help="tokens of a sequence at which the search ends; default: %(default)s")
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES))
    parser.add_argument("--rows", nargs="+", choices=list(RANKS), default=list(RANKS))
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results", help="folder of the two files")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not cuda:
        parser.error("--device cuda: torch sees no CUDA device; use --device cpu")
    if options.longest < STEP:
        parser.error(f"--longest {options.longest}: must be {STEP} or more, the step of the search")
    if options.quick:
        options.mib, options.longest, options.rows = [64], 2 * STEP, options.rows[-1:]
        options.sides = [side for side in options.sides if side in ("fastalign", "trl_default")]

    rows: list[Rung] = []
    with tempfile.TemporaryDirectory(prefix="bench-ladder-") as scratch:
        folder = Path(scratch)
        shape = Shape(**{**vars(QUICK if options.quick else Shape()), "positions": options.longest})
        model = write_model(folder / "model", shape)
        adapter = write_adapter(folder / "adapter", model, RANK)
        for row in options.rows:
            start = adapter if RANKS[row] else None
            check_steps(
                "dpo", folder, model, write_data("dpo", folder / "gate.jsonl", TASKS["dpo"].samples, shape, model, start, seed=1), start
            )
        about = describe(["torch", "transformers", "peft", "trl", "accelerate"], torch.device(options.device))
        about |= {"command": command("ladder", argv), "workload": f"{shape.model_text}; fp32, 1 pair a step"}
        for row in options.rows:
            for side in options.sides:
                known: dict[int, Recording] = {}  # on a CPU one run tells of every limit
                for mib in sorted(options.mib):
                    if options.device == "cuda":
                        known = {}

                    def growth(length: int, row: str = row, side: str = side, mib: int = mib, known: dict[int, Recording] = known) -> float:
                        if length not in known:
                            spec = spec_of(side, folder, model, shape, length, RANKS[row], mib if options.device == "cuda" else None)
                            known[length] = run(folder, spec)
                        record = known[length]
                        if options.device == "cuda":  # the allocator enforces the limit
                            return float("inf") if record.out_of_memory else 0.0
                        return record.rss_peak - record.rss_before

                    fits, too_long = longest(growth, mib, options.longest)
                    grown = [round(growth(n), 1) if n and options.device == "cpu" else None for n in (fits, too_long)]
                    rows.append(Rung(options.device, row, side, mib, fits, too_long, *grown, runs=len(known), **about))
                    print(f"{row}, {SIDES[side].text}, {mib} MiB: {fits} tokens", flush=True)

    file = options.output / f"ladder_{options.device}.csv"
    table.write(file, rows)
    text = ladder_page.page(rows)
    publish(file, text, draw_ladder(rows))
    print(text)
    return 0


def longest(growth: Growth, limit: float, most: int, step: int = STEP) -> tuple[int, int | None]:
    """The longest multiple of `step` that fits, 0 if none does, and the shortest seen that does not, None if all up to `most` do.

    Growth is taken to rise with the length. The two are next to each other, or within 1/16 of each other.
    """
    fits, length, most = 0, step, most // step * step
    while growth(length) <= limit:
        fits = length
        if length == most:
            return fits, None
        length = min(2 * length, most)
    too_long = length
    while too_long - fits > max(step, fits // 16):
        middle = (fits + too_long) // 2 // step * step
        if growth(middle) <= limit:
            fits = middle
        else:
            too_long = middle
    return fits, too_long


def spec_of(side: str, folder: Path, model: Path, shape: Shape, length: int, rank: int, cuda_growth: float | None) -> Spec:
    """Two steps on one pair whose sequences have `length` tokens each, the end included."""
    prompt = length // 2
    words = Shape(**{**vars(shape), "prompt_words": (prompt, prompt), "completion_words": (length - prompt - 1, length - prompt - 1)})
    data = write_pairs(folder / f"pair-{length}.jsonl", 1, words)
    chosen = SIDES[side]
    options = chosen.options | ({"max_tokens": 2 * length} if chosen.name == "fastalign" else {})
    device = "cpu" if cuda_growth is None else "cuda"
    return Spec(
        "dpo",
        chosen.name,
        str(model),
        str(data),
        "",
        "",
        options,
        rank,
        None,
        2,
        samples=1,
        uncut=True,
        device=device,
        cuda_growth=cuda_growth,
    )
