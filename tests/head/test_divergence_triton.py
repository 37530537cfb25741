"""The Triton kernels of the divergences: their tests under Triton's interpreter, and what they refuse."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent


def test_kernels_under_the_interpreter():
    """In a process of its own: Triton reads TRITON_INTERPRET when a kernel is defined."""
    pytest.importorskip("triton", reason="Triton is not installed: the kernels of the divergences are unproven here")
    environment = dict(os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    command = [sys.executable, "-m", "pytest", "-W", "ignore::RuntimeWarning", "tests/head/interpreted_divergence.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    summary = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0 and summary and int(summary[1]) >= 139 and "skipped" not in done.stdout, (
        done.stdout[-6000:] + done.stderr[-2000:]
    )


def test_kernels_refuse_what_they_would_get_wrong():
    pytest.importorskip("triton", reason="Triton is not installed: the refusals of its kernels are unproven here")
    from fastalign.head import divergence_triton
    from fastalign.head.rows import LogitMap

    nothing, cpu = frozenset(), torch.device("cpu")
    state = divergence_triton.start(3, "jsd", nothing, dtype=torch.float32, device=cpu)
    for tile in (torch.zeros(3, 5, dtype=torch.float64), torch.zeros(5, 3).T, torch.zeros(3, 5, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match=rf"must be float32 .* got {tile.dtype}, strides .*: use impl='torch'"):
            divergence_triton.update(state, tile, tile, torch.zeros(3, dtype=torch.int64), 0, LogitMap(), LogitMap())
    with pytest.raises(ValueError, match=r"compute in float32, got torch\.float64"):
        divergence_triton.start(3, "jsd", nothing, dtype=torch.float64, device=cpu)
