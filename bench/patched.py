"""TRL's trainers with and without fastalign's patch, on a CPU: `python -m bench patched` writes bench/results/patched_cpu.{csv,md}.

Both sides are the same trainer, options, model and data; one trains under `fastalign.dropin.trl.patch()`. Every run is a fresh process,
sides taking turns; medians over the repeats. In each repeat the losses and gradient norms of all steps must agree, or nothing is written.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from bench import patched_page, table
from bench.machine import command, describe
from bench.patched_page import SIDES, TASK_NAMES
from bench.training import CHECKED, ROOT, must_agree, run, write_data
from bench.training_rows import Measurement
from bench.training_sides import TASKS, Recording, Spec
from bench.workload import QUICK, Shape, write_model


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench patched", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a toy model and one repeat: checks the benchmark, measures nothing")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps of a run, two of them not timed; default: 4")
    parser.add_argument("--tasks", nargs="+", choices=TASK_NAMES, default=TASK_NAMES)
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results", help="folder of patched_cpu.csv and patched_cpu.md")
    options = parser.parse_args(argv)
    if options.steps < 4 or options.steps % 2:
        parser.error(f"--steps {options.steps}: must be even, for GRPO makes two with the same answers, and at least 4")
    shape = QUICK if options.quick else Shape()
    about = describe(["torch", "transformers", "trl", "accelerate"])
    about |= {"command": command("patched", argv), "checked": " and ".join(CHECKED)}
    results = []
    with tempfile.TemporaryDirectory(prefix="bench-patched-") as scratch:
        folder = Path(scratch)
        model = write_model(folder / "model", shape)
        data = {}
        for name in options.tasks:
            rows = TASKS[name].samples * options.steps // TASKS[name].iterations
            data[name] = write_data(name, folder / f"{name}.jsonl", rows, shape, model, None)
        for repeat in range(1 if options.quick else options.repeats):
            for name in options.tasks:
                records = {side: train(folder, name, model, data[name], side) for side in turn(repeat)}
                must_agree(f"patched {name}", {side: {"losses": r.losses, "gradient norms": r.grad_norms} for side, r in records.items()})
                for side, record in records.items():
                    workload = f"{shape.text}; fp32, {TASKS[name].step_of} a step, no gradient checkpointing"
                    results.append(Measurement.of(record, TASKS[name].title, side, repeat, workload=workload, **about))
                    print(f"{name}, {SIDES[side]}: {results[-1].tokens_per_second_steps_only} tokens/s", flush=True)

    file = options.output / "patched_cpu.csv"
    table.write(file, results)
    text = patched_page.page(results)
    file.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    return 0


def turn(repeat: int) -> list[str]:
    """Which side goes first changes from repeat to repeat."""
    return list(SIDES)[:: -1 if repeat % 2 else 1]


def train(folder: Path, name: str, model: Path, data: Path, side: str) -> Recording:
    """One run; the loss of every step is logged, so that gradient norms can be compared."""
    options = {"logging_steps": 1, "gradient_checkpointing": False}
    spec = Spec(name, "trl", str(model), str(data), "", "", options, learning_rate=TASKS[name].check_rate, patched=side == "trl_patched")
    return run(folder, spec)
