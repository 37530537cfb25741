"""What a run pays beside its steps: `python -m bench costs` writes bench/results/costs_cpu.{csv,md}.

packing  the share of the bins that tokens fill, over drawn lengths, against padding
resume   seconds until the first step ends, in a new run and from a checkpoint
start    seconds that `import` and `--help` take
"""

from __future__ import annotations

import argparse
import math
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import entry_points
from pathlib import Path

from bench import costs_page, table
from bench.costs_page import PARTS, Cost
from bench.machine import command, describe
from bench.training import ROOT, check_steps, run, write_data
from bench.training_sides import TASKS, Spec
from bench.workload import QUICK, Shape, write_model

LENGTHS = {  # median and sigma of the logarithm, of prompts and of completions, in tokens
    "prompts 40, answers 220": ((40, 0.8), (220, 0.7)),
    "prompts 220, answers 220": ((220, 0.8), (220, 0.7)),
    "prompts 450, answers 120": ((450, 0.5), (120, 0.7)),
}
MOST = 1024  # tokens of a sequence
PADDED = 8  # pairs of a padded micro-batch
SAVED = 2  # steps before the checkpoint

Lengths = tuple[int, int, int]  # tokens of a pair's prompt and its two completions


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench costs", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="a toy model, one repeat and few pairs: checks the benchmark, measures nothing"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results", help="folder of the two files")
    options = parser.parse_args(argv)
    if options.quick:
        options.repeats = 1
    about = describe(["torch", "transformers", "trl"]) | {"command": command("costs", argv)}
    costs: list[Cost] = []
    for part in options.parts:
        found = {"packing": packing, "resume": resuming, "start": starting}[part](options.quick, options.repeats)
        for case, side, repeat, value, workload in found:
            costs.append(Cost(part, case, side, repeat, round(value, 4), "share" if part == "packing" else "seconds", workload, **about))
            print(f"{PARTS[part]}, {case}, {side}: {value:.3f} {costs[-1].unit}", flush=True)

    file = options.output / "costs_cpu.csv"
    table.write(file, costs)
    text = costs_page.page(costs)
    file.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    return 0


Found = Iterator[tuple[str, str, int, float, str]]  # case, side, repeat, value, workload


def packing(quick: bool, repeats: int) -> Found:
    from fastalign.objectives.base import RunConfig

    pairs = 256 if quick else 8192
    workload = f"{pairs:,} drawn pairs, max_tokens {RunConfig.max_tokens}"
    for name, lengths in LENGTHS.items():
        drawn = draw(pairs, *lengths)
        for batch_size in (8, 32, 128):
            case = f"{name}, {batch_size} pairs a step"
            for side, share in (("fastalign, defaults", True), ("fastalign, prompts not shared", False)):
                yield case, side, 0, filled(drawn, batch_size, RunConfig.max_tokens, share=share), workload
            yield case, "padding", 0, filled_by_padding(drawn, PADDED), workload


def draw(pairs: int, prompts: tuple[float, float], completions: tuple[float, float], *, seed: int = 0) -> list[Lengths]:
    """Lengths of pairs; of a prompt at most half a sequence, and of a completion what it leaves."""
    rng = random.Random(seed)

    def of(bounds: tuple[float, float], most: int) -> int:
        return min(max(1, round(rng.lognormvariate(math.log(bounds[0]), bounds[1]))), most)

    found = []
    for _ in range(pairs):
        prompt = of(prompts, MOST // 2)
        found.append((prompt, of(completions, MOST - prompt), of(completions, MOST - prompt)))
    return found


def filled(pairs: Sequence[Lengths], batch_size: int, max_tokens: int, *, share: bool) -> float:
    """The share of the room of all bins that fastalign fills, when it trains on these pairs in this order."""
    from fastalign.packing import pack_samples, packed_tokens
    from fastalign.types import Sample

    samples = [Sample(i, (i, *[0] * (p - 1)), ((0,) * c, (0,) * r)) for i, (p, c, r) in enumerate(pairs)]  # no two prompts are the same
    tokens = bins = 0
    for start in range(0, len(samples), batch_size):
        step = samples[start : start + batch_size]
        bins += len(pack_samples(step, max_tokens, share=share))
        tokens += sum(packed_tokens(sample, share=share) for sample in step)
    return tokens / (bins * max_tokens)


def filled_by_padding(pairs: Sequence[Lengths], micro_batch: int) -> float:
    """The share that is not padding, when the sequences of `micro_batch` pairs are padded to the longest of them."""
    tokens = room = 0
    for start in range(0, len(pairs), micro_batch):
        sequences = [p + own for p, c, r in pairs[start : start + micro_batch] for own in (c, r)]
        tokens += sum(sequences)
        room += max(sequences) * len(sequences)
    return tokens / room


def resuming(quick: bool, repeats: int) -> Found:
    shape = QUICK if quick else Shape()
    with tempfile.TemporaryDirectory(prefix="bench-costs-") as scratch:
        folder = Path(scratch)
        model = write_model(folder / "model", shape)
        data = write_data("simpo", folder / "data.jsonl", 2 * SAVED * TASKS["simpo"].samples, shape, model, None)
        check_steps(
            "simpo", folder, model, write_data("simpo", folder / "gate.jsonl", TASKS["simpo"].samples, shape, model, None, seed=1), None
        )
        for repeat in range(repeats):
            for side, called in (("fastalign", "fastalign"), ("trl", "TRL")):
                saving = {"save_strategy": "steps", "save_steps": SAVED} if side == "trl" else {}
                output = str(folder / f"{side}-{repeat}")
                for case, resume in (("new run", False), ("resumed run", True)):
                    started = time.perf_counter()
                    stop = None if resume else SAVED  # half of the epoch: a resumed run that began anew would make twice as many steps
                    spec = Spec("simpo", side, str(model), str(data), output, "", saving, stop_after=stop, resume=resume)
                    record = run(folder, spec)
                    if len(record.ends) != SAVED:
                        raise SystemExit(f"bench costs: the {case} of {called} made {len(record.ends)} steps, {SAVED} were expected")
                    yield case, called, repeat, record.ends[0] - started, f"SimPO, all weights; {shape.text}"


def starting(quick: bool, repeats: int) -> Found:
    def code(package: str) -> dict[str, str]:
        (script,) = {point.value for point in entry_points(group="console_scripts", name=package)}
        module, function = script.split(":")
        call = f"import sys; from {module} import {function} as main; sys.argv = ['{package}', '--help']; sys.exit(main())"
        return {"import": f"import {package}", "--help": call}

    commands = {"fastalign": code("fastalign"), "TRL": code("trl")}
    for repeat in range(-1, repeats):  # the first, which fills the caches, does not count
        for case in commands["fastalign"]:
            for side in commands:
                started = time.perf_counter()
                done = subprocess.run([sys.executable, "-c", commands[side][case]], cwd=ROOT, capture_output=True, text=True)
                taken = time.perf_counter() - started
                if done.returncode:
                    raise SystemExit(f"bench costs: {case} of {side} failed:\n{done.stderr[-2000:]}")
                if repeat >= 0:
                    yield case, side, repeat, taken, "in a fresh Python process"
