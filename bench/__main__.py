"""`python -m bench NAME [options]`: run one benchmark; `python -m bench NAME --help` lists its options."""

from __future__ import annotations

import sys
from importlib import import_module

from bench.training_sides import TASKS

BENCHMARKS = {"head": "bench.head", **dict.fromkeys(TASKS, "bench.training"), "plan": "bench.plan"}


def main(argv: list[str]) -> int:
    if not argv or argv[0] not in BENCHMARKS:
        print(f"usage: python -m bench {{{','.join(BENCHMARKS)}}} [--quick] [options]", file=sys.stderr)
        return 2
    run = import_module(BENCHMARKS[argv[0]]).main
    return run(argv) if argv[0] in TASKS else run(argv[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
