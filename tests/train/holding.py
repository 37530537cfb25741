"""What a process of a group holds: `python -m torch.distributed.run --nproc_per_node N tests/train/holding.py FOLDER CASE...`

FOLDER is what `inputs` made. Of every case the process writes FOLDER/<case>-<rank>.json: bytes of its weights, moments and gradients as
their tensors say, bytes that its private memory had grown by at the peak from the second step on, and what was predicted.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from group import current_index, patched, private_bytes, quiet
from torch.distributed.tensor import DTensor

import fastalign.train.loop
from fastalign import train
from fastalign.data.config import DataConfig
from fastalign.models.config import LoraConfig, ModelConfig
from fastalign.objectives.base import RunConfig
from fastalign.objectives.dpo import DPOConfig
from fastalign.ranks import ParallelConfig
from fastalign.train.metrics import peak_rss_bytes

LORA = LoraConfig(r=8, targets=["all-linear"])
CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "optimizer": {"parallel": ParallelConfig("optimizer")},
    "lora": {"lora": LORA},
    "lora optimizer": {"lora": LORA, "parallel": ParallelConfig("optimizer")},
    "vocab": {"parallel": ParallelConfig(head="vocab")},
    "optimizer vocab": {"parallel": ParallelConfig("optimizer", head="vocab")},
    "full checkpointing": {"gradient_checkpointing": True},
    "half": {"path": "half"},
    "half optimizer": {"path": "half", "parallel": ParallelConfig("optimizer")},
    "replicas": {"parallel": ParallelConfig(replicas=2)},
    "copy": {"reference": "copy"},
}


def inputs(folder: Path, *, hidden: int, layers: int, vocabulary: int, pairs: int) -> None:
    """A float32 model, one in bfloat16, a toy, and pairs."""
    from tiny import preference_rows, save_tiny

    shape = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers, "num_attention_heads": 4}
    save_tiny(folder / "single", "llama", vocab_size=vocabulary, **shape)
    save_tiny(folder / "half", "llama", vocab_size=vocabulary, dtype=torch.bfloat16, **shape)
    save_tiny(folder / "toy", "llama")
    rows = preference_rows(pairs, prompt_words=(10, 20), completion_words=(10, 40))
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def config(folder: Path, case: str, **more: Any) -> RunConfig:
    """The run of a case."""
    options: dict[str, Any] = {"max_tokens": 512, "batch_size": 16, "max_steps": 3, "logits_budget": 16 << 20, **CASES[case], **more}
    path, checkpointing = options.pop("path", "single"), options.pop("gradient_checkpointing", False)
    model = ModelConfig(path=str(folder / path), gradient_checkpointing=checkpointing)
    data = DataConfig(path=str(folder / "pairs.jsonl"))
    return DPOConfig(model=model, data=data, output=str(folder / f"run-{case}"), save_every=0, **options)


def size(tensors: Any) -> int:
    """Bytes of different tensors, here."""
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors if t is not None]
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in local}.values())


def measure(folder: Path, case: str) -> None:
    """Run a case, and write what was measured."""
    found: dict[str, Any] = {}
    own = fastalign.train.loop._Run._step
    gc.collect()  # a run before this one
    before = private_bytes()

    def step(run: Any) -> None:
        if run.progress.step == 1:
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
        own(run)
        if run.progress.step < 3:
            return
        of_files = int(Path("/proc/self/statm").read_text().split()[2]) * os.sysconf("SC_PAGE_SIZE")
        optimizer, parameters = run.optimizer, [*run.model.parameters()]
        states = [value for state in (engine.state for engine in optimizer.engines) for of in state.values() for value in of.values()]
        files = size(p for p in parameters if not p.requires_grad and not isinstance(p, DTensor))  # pages of their file
        found.update(
            weights=size([*parameters, *run.model.buffers()]),
            moments=size(value for value in states if value.ndim),
            masters=size(optimizer.masters[name] for name in optimizer.copied),
            measured=peak_rss_bytes() - of_files - before + files,
            parts=run.footprint.parts,
            predicted=run.footprint.peak,
            moment=run.footprint.moment,
        )

    with patched(step):
        train(config(folder, case))
    (folder / f"{case}-{current_index()}.json").write_text(json.dumps(found))


def main() -> None:
    fastalign.train.loop.unpredicted = lambda *_: None  # type: ignore[assignment]  # what is not compared yet is compared here
    folder = Path(sys.argv[1])
    torch.distributed.init_process_group("gloo")
    quiet()
    for case in sys.argv[2:]:  # so that libraries have been loaded
        train(replace(config(folder, case, path="toy"), output=str(folder / "toy-run" / case)))
    for case in sys.argv[2:]:
        measure(folder, case)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
