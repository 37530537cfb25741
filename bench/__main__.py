"""`python -m bench NAME [options]`: run one benchmark; `python -m bench NAME --help` lists its options."""

from __future__ import annotations

import sys
from importlib import import_module

BENCHMARKS = {"dpo": "bench.dpo", "head": "bench.head"}


def main(argv: list[str]) -> int:
    if not argv or argv[0] not in BENCHMARKS:
        print(f"usage: python -m bench {{{','.join(BENCHMARKS)}}} [--quick] [options]", file=sys.stderr)
        return 2
    return import_module(BENCHMARKS[argv[0]]).main(argv[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
