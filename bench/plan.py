"""Predicted against measured memory of training on a CPU: `python -m bench plan` writes bench/results/plan_cpu.{csv,md}.

Each configuration trains for a few steps in a fresh process. Measured is the growth of peak resident memory from the moment when
the weights are in memory to the end of the last step, after the training of a toy model has paged in the libraries; predicted is
`fastalign.train.footprint` without the weights, from the largest micro-batch of these steps. So that resident memory means what is
allocated, the process runs with one arena and gives every freed block of 64 KiB or more back at once (MALLOC_ARENA_MAX,
MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_).
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from bench.machine import describe, peak_rss_mib, reset_peak_rss
from bench.meter import MIB, Meter
from bench.workload import QUICK, Shape, write_model, write_pairs

ROOT = Path(__file__).resolve().parent.parent
STEPS, BATCH = 2, 64
ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_TOP_PAD_": "0"}

# name -> options of DPOConfig, dotted as on the command line
CONFIGS: dict[str, dict[str, Any]] = {
    "full": {},
    "full, half the tokens": {"max_tokens": 2048},
    "full, twice the tokens": {"max_tokens": 8192},
    "full, checkpointing": {"model.gradient_checkpointing": True},
    "full, reference copy": {"reference": "copy"},
    "full, 16 MiB of logits": {"logits_budget": 16 * MIB},
    "full, bfloat16": {"model.dtype": "bfloat16"},
    "full, bfloat16, 8 bits": {"model.dtype": "bfloat16", "optimizer": "adamw_8bit"},
    "full, 8 bits": {"optimizer": "adamw_8bit"},
    "full, bfloat16, rounded": {"model.dtype": "bfloat16", "master_weights": False, "stochastic_rounding": True},
    "full, in the backward": {"update_in_backward": True, "max_grad_norm": None, "max_tokens": 8192},
    "full, offloaded": {"optimizer": "adamw_offload"},
    "LoRA": {"lora.r": 16},
    "LoRA, checkpointing": {"lora.r": 16, "model.gradient_checkpointing": True},
    "LoRA, cached reference": {"lora.r": 16, "reference": "cache", "max_tokens": 2048},
}

NOTE = """\
In bfloat16 on a CPU, oneDNN compiles every product for its shape and keeps up to 1024 of them, 0.6 MiB each: counted by the shapes of the
micro-batches (`fastalign/train/onednn.py`). Two steps have compiled 546 before the micro-batch of the peak; a long run has them all."""


@dataclass(frozen=True)
class Row:
    """One configuration; the columns of the CSV file."""

    name: str
    options: str
    predicted_mib: float
    measured_mib: float
    error_percent: float


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench plan", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a toy model: checks the benchmark, measures nothing")
    parser.add_argument("--only", nargs="+", choices=list(CONFIGS), default=list(CONFIGS))
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results", help="folder of plan_cpu.csv and plan_cpu.md")
    options = parser.parse_args(argv)
    shape = QUICK if options.quick else Shape()
    rows = []
    with tempfile.TemporaryDirectory(prefix="bench-plan-") as scratch:
        model = write_model(Path(scratch) / "model", shape)
        data = write_pairs(Path(scratch) / "data.jsonl", STEPS * BATCH, shape)
        for name in options.only:
            predicted, measured = run(Path(scratch), model, data, CONFIGS[name])
            given = " ".join(f"--{key} {value}" for key, value in CONFIGS[name].items())
            rows.append(Row(name, given, round(predicted, 1), round(measured, 1), round(100 * (predicted / measured - 1), 1)))
            print(json.dumps(asdict(rows[-1])), flush=True)
            write(options.output, rows, shape, " ".join(["python -m bench plan", *argv]))
    print((options.output / "plan_cpu.md").read_text(encoding="utf-8"))
    return 0


def write(folder: Path, rows: list[Row], shape: Shape, command: str) -> None:
    """The CSV file and the page of the rows so far."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "plan_cpu.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [column.name for column in fields(Row)])
        writer.writeheader()
        writer.writerows(map(asdict, rows))
    (folder / "plan_cpu.md").write_text(page(rows, shape, command), encoding="utf-8")


def run(folder: Path, model: Path, data: Path, options: dict[str, Any]) -> tuple[float, float]:
    """Predicted and measured growth in MiB, of a run in a fresh process."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        spec = {"model": str(model), "data": str(data), "output": f"{place}/run", "options": options}
        environment = os.environ | ALLOCATOR | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": f"{place}/cache"}
        command = [sys.executable, "-m", "bench.plan", json.dumps(spec)]
        done = subprocess.run(command, env=environment, cwd=place, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"bench plan: {options} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        predicted, measured = json.loads(done.stdout.splitlines()[-1])
        return predicted, measured


def child(spec: dict[str, Any]) -> tuple[float, float]:
    """Train here, and say what was predicted and what was measured."""
    import torch

    import fastalign
    from fastalign.objectives.dpo import DPOConfig
    from fastalign.train.config import parse
    from fastalign.train.footprint import footprint_of_steps
    from fastalign.train.step import Order

    toy = Path(spec["output"]).parent / "toy"
    _train_toy(toy, spec["options"])
    meter = Meter(torch.device("cpu"))
    before, peaks, predicted = [0.0], [0.0], [0.0]

    class WeighedConfig(DPOConfig):
        def load_model(self, tokenizer: Any) -> Any:
            model = super().load_model(tokenizer)
            for weight in model.parameters():
                weight.data = weight.data.clone()  # out of the mapped file
            return model

        def check_model(self, model: Any, batch: Any) -> None:
            super().check_model(model, batch)
            meter.release()

        def objective(self, model: Any, data: Any, folder: Any) -> Any:
            order = Order.of(self, len(data.samples))
            steps = [[data.samples[i] for i in order.samples_of(step)] for step in range(STEPS)]
            found = footprint_of_steps(model, self, steps, max_tokens=self.token_limit)
            there = found.parts["float32 copies of weights"]  # of the optimizer, made already
            for weight in model.parameters():
                there += 4 * weight.numel() if hasattr(weight, "main_grad") else 0
            predicted[0] = (found.growth - there) / MIB
            meter.release()
            before[0] = peak_now()
            return super().objective(model, data, folder)

    def peak_now() -> float:
        reset_peak_rss()
        return peak_rss_mib()

    argv = _flags(spec["options"])
    argv += [f"--model.path={spec['model']}", f"--data.path={spec['data']}", f"--output={spec['output']}", f"--batch_size={BATCH}"]
    config = parse([*argv, f"--max_steps={STEPS}", "--save_every=0"], WeighedConfig)
    fastalign.train(config, callbacks=[lambda step, _: peaks.__setitem__(0, peak_rss_mib())])
    return predicted[0], peaks[0] - before[0]


def _train_toy(folder: Path, options: dict[str, Any]) -> None:
    """Page in the code and the buffers of the libraries, which are no part of what is predicted."""
    import fastalign
    from fastalign.objectives.dpo import DPOConfig
    from fastalign.train.config import parse

    model, data = write_model(folder / "model", QUICK), write_pairs(folder / "data.jsonl", 8, QUICK)
    argv = [*_flags(options), f"--model.path={model}", f"--data.path={data}", f"--output={folder / 'run'}", "--save_every=0"]
    fastalign.train(parse(argv, DPOConfig))


def _flags(options: dict[str, Any]) -> list[str]:
    return [f"--{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in options.items()]


def page(rows: list[Row], shape: Shape, command: str) -> str:
    """The Markdown page: what was predicted, what was measured, and how far they are apart."""
    about = describe(["torch", "transformers", "peft"])
    errors = sorted(abs(row.error_percent) for row in rows)
    lines = [
        "# Memory of training: predicted and measured on a CPU",
        "",
        f"DPO, {shape.text}; fp32 unless said otherwise, {BATCH} pairs a step, {STEPS} steps, micro-batches of 4096 tokens unless said",
        "otherwise. Growth of peak resident memory from the moment when the weights are in memory, in a fresh process that has",
        "trained a toy model before, with one arena that gives freed blocks back",
        f"({', '.join(f'{key}={value}' for key, value in ALLOCATOR.items())}).",
        "",
        *(f"- {key}: {value}" for key, value in about.items()),
        f"- command: `{command}`",
        "",
        "| configuration | options | predicted, MiB | measured, MiB | error |",
        "|---|---|---:|---:|---:|",
        *(f"| {r.name} | `{r.options}` | {r.predicted_mib:.0f} | {r.measured_mib:.0f} | {r.error_percent:+.1f} % |" for r in rows),
        "",
        f"Largest error {errors[-1]:.1f} %, median {errors[len(errors) // 2]:.1f} %; {sum(e <= 5 for e in errors)} of {len(errors)} are "
        "within 5 %.",
    ]
    if any(row.name == "full, bfloat16" for row in rows):
        lines += ["", NOTE]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(json.dumps(child(json.loads(sys.argv[1]))))
