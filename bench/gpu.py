"""DPO on one GPU against TRL, at the widths of an 8B model: `python -m bench gpu` writes bench/results/gpu_MACHINE.{csv,md}.

The model is Qwen3-8B's architecture with random bfloat16 weights and fewer layers (--layers), so that a full fine-tuning, with its
reference and AdamW's moments, fits a card of 80 GB several times over. First a toy model in float32 must give both sides the same
losses and gradient norms on the device. Then, in this order, what is left when time is up being left out and named:
    speed      tokens per second and peak memory of a few steps, every run in a fresh process
    longest    the longest sequence of a pair that trains with a LoRA in so much memory (--gib)
    profile    where a step's time goes (profile.md of `--profile`), fastalign alone
The files are rewritten after every run. A run that fails is a row that says so; the others go on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from bench import head_page, table
from bench.machine import command, describe
from bench.provenance import Measured
from bench.training import RANK, ROOT, check_steps, run, write_data
from bench.training_rows import WARMUP_STEPS
from bench.training_sides import Recording, Spec
from bench.workload import QUICK, Shape, save_tokenizer, write_adapter, write_model, write_pairs

TITLE = "DPO on one GPU against TRL, at the widths of an 8B model"
GATE_TOLERANCE = 1e-3  # relative, float32 on the device
LAYERS, STEPS, PAIRS = 8, 6, 8
SPEED = Shape(vocab_size=151936, prompt_words=(256, 768), completion_words=(256, 768))
MICRO = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": PAIRS // 2}  # as many tokens as ours
CHECKPOINTED = {"gradient_checkpointing": True}
SIDES: dict[str, tuple[str, str, dict[str, Any]]] = {  # side, in words, options
    "fastalign": ("fastalign", "fastalign", {}),
    "trl_no_checkpointing": ("trl", "TRL without gradient checkpointing", {"gradient_checkpointing": False}),
    "trl_default": ("trl", "TRL, defaults (gradient checkpointing)", {}),
    "fastalign_checkpointing": ("fastalign", "fastalign, gradient checkpointing", CHECKPOINTED),
    "trl_liger": ("trl", "TRL with Liger's loss, gradient checkpointing", {"use_liger_kernel": True}),
}
LONGEST = ("fastalign_checkpointing", "trl_default", "trl_liger")  # all with gradient checkpointing
TRAININGS = {"lora": RANK, "full": 0}
SECONDS = {"speed": 150.0, "longest": 200.0, "profile": 150.0}  # that a run is allowed, at most


@dataclass(frozen=True)
class GpuRun(Measured):
    part: str
    training: str
    side: str
    status: str = ""  # measured, or why not
    steps: int | None = None
    tokens_per_second: float | None = None  # steps after the first two
    reference_seconds: float | None = None
    startup_seconds: float | None = None
    cuda_before_mib: float | None = None
    cuda_peak_mib: float | None = None
    memory_gib: float | None = None  # that may be taken
    longest_tokens: int | None = None
    too_long_tokens: int | None = None
    workload: str = ""


def main(argv: list[str]) -> int:
    options = parse(argv)
    started = time.monotonic()
    device = torch.device(options.device)
    file = options.output / f"gpu_{head_page.machine_kind(device) if device.type == 'cuda' else 'cpu'}.csv"
    about = describe(["torch", "triton", "transformers", "peft", "trl", "liger-kernel", "accelerate"], device)
    about |= {"command": command("gpu", argv)}
    rows: list[GpuRun] = []
    failed = 0
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as scratch:
        bench = Bench(Path(scratch), options, lambda: options.limit - (time.monotonic() - started))
        for row in bench.rows():
            failed += row.status.startswith(("failed", "differ"))
            rows.append(replace(row, workload=bench.workload, **about))
            print(line(rows[-1]), flush=True)
            table.write(file, rows)
            file.with_suffix(".md").write_text(page(rows), encoding="utf-8")
    print(f"\n{file} and {file.with_suffix('.md').name} written")
    return 1 if failed else 0


def parse(argv: list[str]) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m bench gpu", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a toy model and two sides: checks the benchmark, measures nothing")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if cuda else "cpu", help="cpu only with --quick")
    parser.add_argument("--parts", nargs="+", choices=list(SECONDS), default=["speed", "longest"])
    parser.add_argument("--layers", type=int, default=LAYERS, help="of the model's 36; default: %(default)s")
    parser.add_argument("--trainings", nargs="+", choices=list(TRAININGS), default=list(TRAININGS))
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES))
    parser.add_argument("--gib", nargs="+", type=float, default=[24.0], help="memory of `longest`; default: 24")
    parser.add_argument("--most", type=int, default=65536, help="longest sequence that is tried; default: %(default)s")
    parser.add_argument("--limit", type=float, default=3600.0, metavar="SECONDS", help="start nothing later, stop what runs on")
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results", help="folder of the files")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not cuda:
        parser.error("--device cuda: torch sees no CUDA device")
    if options.device == "cpu" and not options.quick:
        parser.error("--device cpu: only --quick runs on a CPU, `python -m bench dpo` measures there")
    if options.quick:
        options.sides, options.most = [side for side in options.sides if side in ("fastalign_checkpointing", "trl_default")], 128
    return options


class Bench:
    """The runs of one call."""

    def __init__(self, folder: Path, options: argparse.Namespace, left: Callable[[], float]) -> None:
        self.folder, self.options, self.left = folder, options, left
        self.shape = QUICK if options.quick else SPEED
        self.dtype = "float32" if options.device == "cpu" else "bfloat16"
        self.workload = ""
        self.steps = STEPS
        self.model = Path()

    def rows(self) -> Iterator[GpuRun]:
        """Every row of the call, as it is measured."""
        agreeing = []
        for training in self.options.trainings:
            if reason := self.gate(training):
                yield GpuRun("gate", training, "all", reason)
            else:
                agreeing.append(training)
        self.options.trainings = agreeing
        if not agreeing:
            return
        self.write()
        parts = {"speed": self.speed, "longest": self.longest, "profile": self.profile}
        for name, part in parts.items():
            if name in self.options.parts:
                yield from part()

    def gate(self, training: str) -> str:
        """Why both sides do not agree, or nothing."""
        model = write_model(self.folder / "toy", QUICK)
        data = write_data("dpo", self.folder / "gate.jsonl", PAIRS, QUICK, model, None, seed=1)
        adapter = None
        if TRAININGS[training]:
            adapter = write_adapter(self.folder / "toy-adapter", model, RANK)
        try:
            check_steps("dpo", self.folder, model, data, adapter, device=self.options.device, tolerance=GATE_TOLERANCE)
        except SystemExit as error:
            return f"differ: {str(error)[-1500:]}"
        print(f"{training}: losses and gradient norms agree on a toy model", flush=True)
        return ""

    def write(self) -> None:
        """The model and the pairs as files."""
        if self.options.quick:
            self.model, self.workload = self.folder / "toy", f"{self.shape.text}; toy"
        else:
            self.model = write_wide(self.folder / "model", self.options.layers, self.options.device)
            self.workload = (
                f"Qwen3-8B with {self.options.layers} of its 36 layers, random weights, {self.dtype}, V={SPEED.vocab_size}; {PAIRS} pairs "
                f"a step, prompts of {SPEED.prompt_words[0]}-{SPEED.prompt_words[1]} tokens, completions likewise, micro-batches of 2 pairs"
            )
        self.steps = 4 if self.options.quick else STEPS
        self.data = write_pairs(self.folder / "pairs.jsonl", PAIRS * self.steps, self.shape)

    def spec(self, side: str, training: str, **given: Any) -> Spec:
        name, _, options = SIDES[side]
        options = dict(options)
        if name == "fastalign":
            options |= {"max_tokens": 4 * self.shape.most_tokens}  # two pairs of the longest
            if not TRAININGS[training] and self.dtype == "bfloat16":
                options["master_weights"] = False  # as TRL, which updates the bfloat16 weights
        elif not given.get("search"):
            options |= MICRO
        given = {"lora_rank": TRAININGS[training], "device": self.options.device, "dtype": self.dtype, "uncut": True, **given}
        return Spec("dpo", name, str(self.model), str(self.data), "", "", options, **given)

    def attempt(self, part: str, spec: Spec, module: str = "bench.training_sides") -> tuple[str, Recording]:
        """The status of a run, and what it recorded."""
        seconds = min(SECONDS[part], self.left())
        if seconds < 20:
            return "not run: time limit", Recording()
        try:
            found = run(self.folder, spec, timeout=seconds, module=module)
        except subprocess.TimeoutExpired:
            return f"not finished in {seconds:.0f} s", Recording()
        except SystemExit as error:
            print(str(error), flush=True)
            return "failed: " + " ".join(str(error).split())[-300:], Recording()
        return ("out of memory" if found.out_of_memory else "measured"), found

    def speed(self) -> Iterator[GpuRun]:
        for training in self.options.trainings:
            for side in self.options.sides:
                status, found = self.attempt("speed", self.spec(side, training, leave_after=self.steps))
                row = GpuRun("speed", training, side, status)
                if status == "measured":
                    first = min(WARMUP_STEPS, len(found.ends) - 1)
                    row = replace(
                        row,
                        steps=len(found.ends),
                        tokens_per_second=sum(found.tokens[first:]) / (found.ends[-1] - found.ends[first - 1]),
                        reference_seconds=found.reference_seconds,
                        startup_seconds=found.startup_seconds,
                        cuda_before_mib=found.cuda_before,
                        cuda_peak_mib=found.cuda_peak,
                    )
                yield row

    def longest(self) -> Iterator[GpuRun]:
        for gib, side in product(self.options.gib, LONGEST):
            if side not in self.options.sides or "lora" not in self.options.trainings:
                continue
            cap = gib if self.options.device == "cuda" else None
            spec = self.spec(side, "lora", cuda_gib=cap, search=self.options.most, vocabulary=self.shape.vocab_size)
            spec = replace(spec, output=str(self.folder / f"{side}-{gib}"))
            partial = self.folder / "partial.json"
            partial.unlink(missing_ok=True)
            status, found = self.attempt("longest", replace(spec, result=str(partial)), "bench.gpu_search")
            if status != "measured" and partial.exists():
                with suppress(ValueError):  # cut off as it was written
                    found = Recording(**json.loads(partial.read_text()))
            yield GpuRun("longest", "lora", side, status, memory_gib=gib, longest_tokens=found.fits, too_long_tokens=found.too_long)

    def profile(self) -> Iterator[GpuRun]:
        for training in self.options.trainings:
            spec = self.spec("fastalign", training)
            spec = replace(spec, output=str(self.folder / f"profiled-{training}"), options=spec.options | {"profile": 2})
            status, _ = self.attempt("profile", spec)
            written = Path(spec.output) / "profile.md"
            if written.exists():
                text = written.read_text(encoding="utf-8")
                (self.options.output / f"profile_{training}.md").write_text(text, encoding="utf-8")
                print(text, flush=True)
            yield GpuRun("profile", training, "fastalign", status)


def write_wide(folder: Path, layers: int, device: str) -> Path:
    """A model of Qwen3-8B's widths with random bfloat16 weights, and a word tokenizer."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    save_tokenizer(folder, SPEED.vocab_size)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=SPEED.vocab_size,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=1 << 18,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
        dtype="bfloat16",
    )
    with torch.device(device):
        model = Qwen3ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    del model
    if device == "cuda":
        torch.cuda.empty_cache()
    return folder


def line(row: GpuRun) -> str:
    parts = [row.part, row.training, SIDES[row.side][1] if row.side in SIDES else row.side, row.status]
    if row.tokens_per_second:
        parts.append(f"{row.tokens_per_second:.0f} tokens/s, peak {(row.cuda_peak_mib or 0) / 1024:.1f} GiB")
    if row.memory_gib:
        parts.append(f"{row.longest_tokens} tokens fit in {row.memory_gib:g} GiB, {row.too_long_tokens} do not")
    return ", ".join(parts)


def page(rows: list[GpuRun]) -> str:
    return "\n".join([f"# {TITLE}", "", *section(rows)]).rstrip() + "\n"


def section(rows: list[GpuRun]) -> list[str]:
    """What was measured on what, and a table for each part."""
    lines = [*table.facts(rows), *(f"- workload: {text}" for text in dict.fromkeys(row.workload for row in rows)), ""]
    speed, longest = ([row for row in rows if row.part == part] for part in ("speed", "longest"))
    if speed:
        lines += ["| training | side | tokens/s | peak memory, GiB | reference, s | |", "|---|---|---:|---:|---:|---|"]
        for row in speed:
            numbers = ["", "", ""]
            if row.tokens_per_second:
                numbers = [f"{row.tokens_per_second:.0f}", f"{(row.cuda_peak_mib or 0) / 1024:.1f}", f"{row.reference_seconds:.1f}"]
            lines.append("| " + " | ".join([row.training, SIDES[row.side][1], *numbers, row.status]) + " |")
        lines.append("")
    if longest:
        lines += [
            "| memory, GiB | side | longest sequence of a pair that fits | shortest seen that does not | |",
            "|---:|---|---:|---:|---|",
        ]
        for row in longest:
            cells = [f"{row.memory_gib:g}", SIDES[row.side][1], str(row.longest_tokens), str(row.too_long_tokens or ""), row.status]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return [*lines, *(f"- {line(row)}" for row in rows if row.part not in ("speed", "longest"))]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
