"""The longest pair that one side trains on in one process: `python -m bench.gpu_search SPEC.json` writes the spec's `result` file.

A DPO pair of two sequences, each half prompt and half completion, is trained on for one optimizer step, from the model's files
on. The result is written after every length that was tried, so that what is known survives a stop.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from bench.ladder import longest
from bench.training_sides import Recording, Spec, limit_all, run_fastalign, run_trl
from bench.workload import Shape, write_pairs
from fastalign.errors import DeviceMemoryError

STEP = 1024  # tokens; lengths are multiples of it


def search(spec: Spec, run: Callable[[Spec], Recording]) -> Recording:
    """`fits` and `too_long` of a side; `spec.search` is the longest length that is tried, of words below `spec.vocabulary`."""
    found = Recording()
    assert spec.search is not None
    step = min(STEP, spec.search)

    def growth(length: int) -> float:
        prompt, completion = length // 2, length - length // 2 - 1
        words = Shape(vocab_size=spec.vocabulary, prompt_words=(prompt, prompt), completion_words=(completion, completion))
        data = write_pairs(Path(spec.result).with_name(f"pair-{length}.jsonl"), 1, words)
        options: dict[str, Any] = spec.options | ({"max_tokens": 2 * length} if spec.side == "fastalign" else {})
        fits = True
        try:
            once = {"samples": 1, "epochs": 1, "leave_after": 1, "uncut": True}
            run(replace(spec, data=str(data), options=options, output=f"{spec.output}-{length}", **once))
        except (torch.OutOfMemoryError, DeviceMemoryError):
            fits = False
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        if fits:
            found.fits = max(found.fits, length)
        else:
            found.too_long = min(found.too_long or length, length)
        Path(spec.result).write_text(json.dumps(asdict(found)))
        print(length, "fits" if fits else "does not", flush=True)
        return 0.0 if fits else 1.0

    found.fits, found.too_long = longest(growth, 0.0, spec.search, step)
    return found


if __name__ == "__main__":
    given = Spec(**json.loads(Path(sys.argv[1]).read_text()))
    limit_all(given.cuda_gib)
    done = search(given, {"fastalign": run_fastalign, "trl": run_trl}[given.side])
    Path(given.result).write_text(json.dumps(asdict(done)))
