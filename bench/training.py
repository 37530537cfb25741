"""Training on a CPU against TRL's trainers: `python -m bench dpo|kto|orpo|simpo` writes bench/results/NAME_cpu.{csv,md}.

First the losses of both sides on the same batches must agree; no speed is printed for a wrong answer. Then each side trains on
the same model and data for one epoch, every run in a fresh process, sides taking turns; medians over the repeats.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from bench.machine import describe
from bench.training_sides import TASKS, Recording, Spec
from bench.workload import QUICK, Shape, write_adapter, write_model, write_pairs, write_single

ROOT = Path(__file__).resolve().parent.parent
RANK = 16
WARMUP_STEPS = 2  # not timed: first allocations
LOSS_TOLERANCE = 1e-4  # relative, fp32

# side, its options beside those that both sides get, what it stands for
SIDES: dict[str, tuple[str, dict[str, Any], str]] = {
    "fastalign": ("fastalign", {}, "fastalign, defaults"),
    "trl_default": ("trl", {}, "TRL, defaults (gradient checkpointing)"),
    "trl_no_checkpointing": ("trl", {"gradient_checkpointing": False}, "TRL without gradient checkpointing"),
    "trl_fastest": (
        "trl",
        {"gradient_checkpointing": False, "precompute_ref_log_probs": True},
        "TRL without gradient checkpointing, reference log-probs precomputed",
    ),
}
ROWS = {"full": 0, "lora": RANK}


@dataclass(frozen=True)
class Measurement:
    """One run; the columns of the CSV file."""

    training: str
    side: str
    repeat: int
    steps: int
    tokens: int
    tokens_per_second: float  # reference pass included
    tokens_per_second_steps_only: float
    reference_seconds: float
    startup_seconds: float
    rss_before_mib: float
    rss_peak_mib: float
    rss_growth_mib: float

    @classmethod
    def of(cls, record: Recording, training: str, side: str, repeat: int) -> Measurement:
        first = min(WARMUP_STEPS, len(record.ends) - 1)
        timed = sum(record.tokens[first:])
        step_cost = (record.ends[-1] - record.ends[first - 1]) / timed  # seconds per token
        reference_cost = record.reference_seconds / sum(record.tokens)
        return cls(
            training,
            side,
            repeat,
            len(record.ends),
            sum(record.tokens),
            round(1 / (step_cost + reference_cost), 1),
            round(1 / step_cost, 1),
            round(record.reference_seconds, 2),
            round(record.startup_seconds, 2),
            round(record.rss_before, 1),
            round(record.rss_peak, 1),
            round(record.rss_peak - record.rss_before, 1),
        )


def main(argv: list[str]) -> int:
    name, *argv = argv
    task = TASKS[name]
    sides = [side for side in SIDES if task.reference or side != "trl_fastest"]
    parser = argparse.ArgumentParser(prog=f"python -m bench {name}", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="a toy model, one repeat and few steps: checks the benchmark, measures nothing"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of 8 samples")
    parser.add_argument("--sides", nargs="+", choices=sides, default=sides)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results", help=f"folder of {name}_cpu.csv and {name}_cpu.md")
    options = parser.parse_args(argv)
    if options.quick:
        options.repeats, options.steps = 1, 4
        options.sides = [side for side in options.sides if side in ("fastalign", sides[-1])]
    shape, write = QUICK if options.quick else Shape(), write_single if task.single else write_pairs

    with tempfile.TemporaryDirectory(prefix="bench-training-") as scratch:
        folder = Path(scratch)
        model = write_model(folder / "model", shape)
        adapter = write_adapter(folder / "adapter", model, RANK)
        for row in options.rows:
            check_losses(name, folder, model, write(folder / "gate.jsonl", 8, shape, seed=1), adapter if ROWS[row] else None)
            print(f"{row}: losses agree", flush=True)
        data = write(folder / "data.jsonl", 8 * options.steps, shape)
        results = []
        for repeat in range(options.repeats):
            for row in options.rows:
                for chosen in options.sides:
                    side, extra, _ = SIDES[chosen]
                    record = run(folder, Spec(name, side, str(model), str(data), "", "", extra, lora_rank=ROWS[row]))
                    results.append(Measurement.of(record, row, chosen, repeat))
                    print(json.dumps(asdict(results[-1])), flush=True)

    options.output.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python -m bench", name, *argv])
    write_csv(options.output / f"{name}_cpu.csv", results)
    (options.output / f"{name}_cpu.md").write_text(page(name, results, shape, command), encoding="utf-8")
    print(page(name, results, shape, command))
    return 0


def check_losses(task: str, folder: Path, model: Path, data: Path, adapter: Path | None) -> None:
    """Stop unless both sides report the same loss in each of four steps on the same eight samples."""
    losses = {}
    for side, options in (("fastalign", TASKS[task].same), ("trl", {})):
        start = str(adapter) if adapter else None
        spec = Spec(task, side, str(model), str(data), "", "", options, adapter=start, epochs=4, learning_rate=TASKS[task].check_rate)
        losses[side] = run(folder, spec).losses
    ours, theirs = losses.values()
    if len(ours) != 4 or len(theirs) != 4 or any(abs(a - b) > LOSS_TOLERANCE * abs(b) for a, b in zip(ours, theirs)):
        raise SystemExit(f"bench {task}: losses differ, nothing is measured: {losses}")


def run(folder: Path, spec: Spec) -> Recording:
    """The recording of one run in a fresh process, outside the repository's configuration files."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        place = Path(scratch)
        spec = Spec(**{**asdict(spec), "output": str(place / "run"), "result": str(place / "result.json")})
        (place / "spec.json").write_text(json.dumps(asdict(spec)))
        environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(place / "cache")}
        command = [sys.executable, "-m", "bench.training_sides", str(place / "spec.json")]
        done = subprocess.run(command, env=environment, cwd=place, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"bench {spec.task}: {spec.side} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        return Recording(**json.loads(Path(spec.result).read_text()))


def write_csv(path: Path, results: list[Measurement]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [column.name for column in fields(Measurement)])
        writer.writeheader()
        writer.writerows(asdict(result) for result in results)


def page(task: str, results: list[Measurement], shape: Shape, command: str) -> str:
    """The Markdown page: what was measured on what, the medians, and where fastalign is behind."""
    about = describe(["torch", "transformers", "peft", "trl", "accelerate"])
    what = "labelled answers" if TASKS[task].single else "pairs"
    repeats = 1 + max(result.repeat for result in results)
    lines = [
        f"# {TASKS[task].title} on a CPU: fastalign and TRL",
        "",
        f"{shape.text}; fp32, 8 {what} a step, {results[0].steps} steps, {results[0].tokens:,} tokens. Medians of {repeats} runs, each",
        "in a process of its own, sides taking turns. Losses of both sides agreed to 1e-4 in four steps on the same batches first.",
        "",
        *(f"- {key}: {value}" for key, value in about.items()),
        f"- command: `{command}`",
        "",
        "tokens/s: real tokens (no padding) through training, the reference's work included wherever a side does it; the first",
        f"{WARMUP_STEPS} steps are not timed. Growth: peak resident memory during training less resident memory with model and data loaded",
        "(for TRL the loaded part holds its reference model, too). Ratios are fastalign's advantage: above 1 is better.",
        "",
        "| training | side | tokens/s | tokens/s, steps only | growth, MiB | start, s | speed ratio | memory ratio |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    behind = []
    for row in dict.fromkeys(result.training for result in results):
        medians = {side: _medians(results, row, side) for side in SIDES if any(r.side == side and r.training == row for r in results)}
        ours = medians.get("fastalign")
        for side, them in medians.items():
            speed = f"{ours['tokens_per_second'] / them['tokens_per_second']:.2f}" if ours else ""
            memory = f"{them['rss_growth_mib'] / ours['rss_growth_mib']:.2f}" if ours else ""
            lines.append(
                f"| {row} | {SIDES[side][2]} | {them['tokens_per_second']:.0f} | {them['tokens_per_second_steps_only']:.0f} "
                f"| {them['rss_growth_mib']:.0f} | {them['startup_seconds']:.1f} | {speed} | {memory} |"
            )
            if ours and side != "fastalign":
                behind += _behind(row, SIDES[side][2], ours, them)
    lines += ["", "Where fastalign is behind: " + ("; ".join(behind) + "." if behind else "in none of these columns.")]
    return "\n".join(lines) + "\n"


def _medians(results: list[Measurement], row: str, side: str) -> dict[str, float]:
    runs = [asdict(result) for result in results if result.training == row and result.side == side]
    numbers = ("tokens_per_second", "tokens_per_second_steps_only", "rss_growth_mib", "startup_seconds")
    return {name: statistics.median(run[name] for run in runs) for name in numbers}


def _behind(row: str, side: str, ours: dict[str, float], theirs: dict[str, float]) -> list[str]:
    found = []
    for name, label in (("tokens_per_second", "tokens/s"), ("tokens_per_second_steps_only", "tokens/s of the steps alone")):
        if ours[name] < theirs[name]:
            found.append(f"{row}, {label}: {ours[name]:.0f} against {theirs[name]:.0f} of {side}")
    for name, label in (("rss_growth_mib", "growth of memory, MiB"), ("startup_seconds", "seconds to start")):
        if ours[name] > theirs[name]:
            found.append(f"{row}, {label}: {ours[name]:.0f} against {theirs[name]:.0f} of {side}")
    return found
