"""Training on a CPU against TRL's trainers: `python -m bench sft|dpo|kto|orpo|simpo|grpo` writes bench/results/NAME_cpu.{csv,md}.

First the losses and gradient norms of both sides on the same batches must agree; no speed is printed for a wrong answer. Then each
side trains on the same model and data for one epoch, every run in a fresh process, sides taking turns; medians over the repeats. Of
GRPO only the update is measured: both sides are given the same answers, advantages and log-probs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

from bench import base, table, training_page
from bench.machine import command, describe
from bench.plot import draw_training, publish
from bench.training_rows import Measurement
from bench.training_sides import SIDES, TASKS, Recording, Spec, Task
from bench.workload import QUICK, Shape, write_adapter, write_model, write_pairs, write_rollouts, write_single

ROOT = Path(__file__).resolve().parent.parent
RANK = 16
CHECKED = ("losses", "gradient norms")  # in which both sides must agree
TOLERANCE = 1e-4  # relative, fp32
ONE_ROW = 4096  # tokens, more than the rows of a step have: packed, they are the same batch

RANKS = {"full": 0, "lora": RANK}


def rows_of(task: Task) -> dict[str, tuple[int, Shape]]:
    """Rank of the adapter (0: none) and shape of the data, by what the row is called."""
    return {f"{row} {name}".strip(): (rank, shape) for row, rank in RANKS.items() for name, shape in task.shapes.items()}


def main(argv: list[str]) -> int:
    name, *argv = argv
    task = TASKS[name]
    sides = [name for name, side in SIDES.items() if side.joins(task)]
    parser = argparse.ArgumentParser(prog=f"python -m bench {name}", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="a toy model, one repeat and few steps: checks the benchmark, measures nothing"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=task.steps, help=f"optimizer steps of {task.step_of}; default: {task.steps}")
    parser.add_argument("--sides", nargs="+", choices=sides, default=sides)
    parser.add_argument("--rows", nargs="+", choices=list(rows_of(task)), default=list(rows_of(task)))
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results", help=f"folder of {name}_cpu.csv and {name}_cpu.md")
    parser.add_argument("--base", metavar="REF", help="measure fastalign of this commit, too, and print the two side by side")
    options = parser.parse_args(argv)
    if options.steps % task.iterations:
        parser.error(f"--steps {options.steps}: must be a multiple of {task.iterations}, the steps made with the same answers")
    rows = {row: rows_of(task)[row] for row in options.rows}
    if options.quick:
        options.repeats, options.steps = 1, 4
        options.sides = [side for side in options.sides if side in ("fastalign", sides[-1])]
        rows = {row: (rank, QUICK) for rank, row in {rank: row for row, (rank, _) in rows.items()}.items()}  # one of each rank

    with tempfile.TemporaryDirectory(prefix="bench-training-") as scratch, ExitStack() as stack:
        folder = Path(scratch)
        package = stack.enter_context(base.checkout(options.base, folder)) if options.base else None
        models: dict[str, tuple[Path, Path]] = {}  # and the adapters, by what a model is like
        for _, shape in rows.values():
            if shape.model_text not in models:
                model = write_model(folder / f"model-{len(models)}", shape)
                models[shape.model_text] = model, write_adapter(folder / f"adapter-{len(models)}", model, RANK)
        for row, (rank, shape) in rows.items():
            model, adapter = models[shape.model_text]
            start = adapter if rank else None
            check_steps(name, folder, model, write_data(name, folder / "gate.jsonl", task.samples, shape, model, start, seed=1), start)
            if package:
                check_steps(name, folder, model, folder / "gate.jsonl", start, package=package)
            print(f"{row}: losses and gradient norms agree", flush=True)
        data, count = {}, task.samples * options.steps // task.iterations
        for _, shape in rows.values():
            if shape not in data:
                model, _ = models[shape.model_text]
                data[shape] = write_data(name, folder / f"data-{len(data)}.jsonl", count, shape, model, None)
        about = describe(["torch", "transformers", "peft", "trl", "accelerate"])
        about |= {"command": command(name, argv), "checked": " and ".join(CHECKED)}
        results = []
        for repeat in range(options.repeats):
            for row, (rank, shape) in rows.items():
                for chosen in options.sides:
                    side, (model, _) = SIDES[chosen], models[shape.model_text]
                    of = {chosen: None} | ({base.side_of(chosen, options.base): package} if package and side.name == "fastalign" else {})
                    for called, imported in of.items():
                        spec = Spec(name, side.name, str(model), str(data[shape]), "", "", side.fitted(task, shape), lora_rank=rank)
                        record = run(folder, spec, package=imported)
                        workload = f"{shape.text}; fp32, {task.step_of} a step"
                        results.append(Measurement.of(record, row, called, repeat, workload=workload, **about))
                        at = f" at {options.base}" if imported else ""
                        print(f"{row}, {side.text}{at}: {results[-1].tokens_per_second} tokens/s", flush=True)

    if options.base:
        table.write(options.output / f"base_{name}_cpu.csv", results)
        print(base.comparison(results, options.base))
        return 0
    file = options.output / f"{name}_cpu.csv"
    table.write(file, results)
    text = training_page.page(name, results)
    publish(file, text, draw_training(results))
    print(text)
    return 0


def write_data(name: str, path: Path, samples: int, shape: Shape, model: Path, adapter: Path | None, *, seed: int = 0) -> Path:
    """The rows that a task trains on."""
    task = TASKS[name]
    if task.answers:
        return write_rollouts(path, samples, task.answers, shape, model, adapter, seed=seed)
    if task.data == "DataConfig":
        return write_pairs(path, samples, shape, seed=seed)
    return write_single(path, samples, shape, seed=seed, labels=task.data == "UnpairedDataConfig")


def check_steps(
    name: str,
    folder: Path,
    model: Path,
    data: Path,
    adapter: Path | None,
    *,
    package: Path | None = None,
    device: str = "cpu",
    tolerance: float = TOLERANCE,
) -> None:
    """Stop unless all sides report the same loss and gradient norm in each of four steps on the same rows; fastalign being `package`'s."""
    task, found = TASKS[name], {}
    sides = {"fastalign": ("fastalign", task.same), "TRL": ("trl", {"logging_steps": 1})}
    if task.packing:
        sides["TRL, packed"] = ("trl", {"logging_steps": 1, "packing": True, "max_length": ONE_ROW, "per_device_train_batch_size": 1})
    for called, (side, options) in sides.items():
        start = str(adapter) if adapter else None
        epochs = 4 // task.iterations
        spec = Spec(name, side, str(model), str(data), "", "", options, adapter=start, epochs=epochs, learning_rate=task.check_rate)
        record = run(folder, replace(spec, device=device), package=package)
        found[called] = dict(zip(CHECKED, (record.losses, record.grad_norms)))
    must_agree(name, found, tolerance)


def must_agree(name: str, found: dict[str, dict[str, list[float]]], tolerance: float = TOLERANCE) -> None:
    """Stop unless every side has the first one's numbers in each of `CHECKED`, by its name in `found`: four steps or more."""
    first, *others = found
    for other in others:
        for what in CHECKED:
            ours, theirs = found[first][what], found[other][what]
            if not 4 <= len(ours) == len(theirs) or any(abs(a - b) > tolerance * abs(b) for a, b in zip(ours, theirs)):
                raise SystemExit(f"bench {name}: {what} differ, nothing is measured: {first} {ours}, {other} {theirs}")


def run(
    folder: Path, spec: Spec, *, package: Path | None = None, timeout: float | None = None, module: str = "bench.training_sides"
) -> Recording:
    """The recording of one run in a fresh process, outside the repository's configuration files; with the fastalign in `package`.

    Raises subprocess.TimeoutExpired after `timeout` seconds.
    """
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        place = Path(scratch)
        spec = Spec(**{**asdict(spec), "output": spec.output or str(place / "run"), "result": spec.result or str(place / "result.json")})
        (place / "spec.json").write_text(json.dumps(asdict(spec)))
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(map(str, filter(None, [package, ROOT, os.environ.get("PYTHONPATH")]))),
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": str(place / "cache"),
        }
        if package:
            base.check_import(package, environment, place)
        command = [sys.executable, "-m", module, str(place / "spec.json")]
        done = subprocess.run(command, env=environment, cwd=place, capture_output=True, text=True, timeout=timeout)
        if done.returncode:
            raise SystemExit(f"bench {spec.task}: {spec.side} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        return Recording(**json.loads(Path(spec.result).read_text()))
