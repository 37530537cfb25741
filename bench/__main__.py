"""`python -m bench NAME [options]`: run one benchmark; `python -m bench NAME --help` lists its options."""

from __future__ import annotations

import sys
from importlib import import_module

from bench.training_sides import TASKS

BENCHMARKS = {
    "head": ("bench.head", "the fused LM head against its bare GEMMs and peers, on a CPU or a GPU"),
    **{name: ("bench.training", f"{task.title} on a CPU against TRL") for name, task in TASKS.items()},
    "gpu": ("bench.gpu", "DPO on one GPU against TRL at the widths of an 8B model: speed, memory, longest pair, profile"),
    "rows": ("bench.rows", "bandwidth of the Triton row kernels by warps and columns at a time, on a GPU"),
    "ladder": ("bench.ladder", "the longest DPO pair that fits into fixed memory, on a CPU or a GPU, against TRL"),
    "patched": ("bench.patched", "TRL's trainers with and without the patch, on a CPU"),
    "costs": ("bench.costs", "what is paid beside the steps: unfilled bins, resuming, starting"),
    "plan": ("bench.plan", "the memory that fastalign plan predicts against what runs need, on a CPU"),
    "serve": ("bench.serve", "what the service adds to bare generation, for one client and several"),
    "results": ("bench.results", "no benchmark: writes bench/RESULTS.md and the pages in bench/results/ anew from the CSV files there"),
}


def main(argv: list[str]) -> int:
    if argv and argv[0] not in BENCHMARKS:
        print(f"bench: there is no {argv[0]}\n{usage()}", file=sys.stderr)
        return 2
    if not argv:
        print(usage())
        return 0
    run = import_module(BENCHMARKS[argv[0]][0]).main
    return run(argv) if argv[0] in TASKS else run(argv[1:])


def usage() -> str:
    lines = [f"  {name:8} {text}" for name, (_, text) in BENCHMARKS.items()]
    return "\n".join(["usage: python -m bench NAME [--quick] [options]; NAME --help lists the options", "", *lines])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
