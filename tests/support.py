"""Shared checks of the tests."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]


def assert_close_to_gold(x: Tensor, base: Tensor, gold: Tensor, name: str = "x") -> None:
    """`x` is as near to the float64 `gold` as the plain implementation `base` in the same dtype, within a factor.

    max |x - gold| <= 2 (max |base - gold| + eps/2 max |gold|) and rms likewise with 1.5. The check proves its own power: a
    zero in place of x, and x too large by 1 % (by 4 eps in bfloat16, whose plain gradients are already off by 0.5 %), must fail.
    """
    eps = torch.finfo(x.dtype).eps
    excess = max(0.01, 4 * eps)
    x, base, gold = (t.detach().double().flatten() for t in (x, base, gold))
    assert x.isfinite().all(), f"{name} has non-finite values"

    def passes(candidate: Tensor) -> bool:
        error, allowed = candidate - gold, base - gold
        largest = 2 * (allowed.abs().max() + eps / 2 * gold.abs().max())
        typical = 1.5 * allowed.square().mean().sqrt() + eps / 2 * gold.square().mean().sqrt()
        return bool(error.abs().max() <= largest and error.square().mean().sqrt() <= typical)

    assert passes(x), f"{name}: max error {(x - gold).abs().max():.3e}, plain {(base - gold).abs().max():.3e}, size {gold.abs().max():.3e}"
    assert not passes(torch.zeros_like(gold)), f"{name}: the check would accept zeros"
    assert not passes((1 + excess) * gold), f"{name}: the check would accept an error of {excess:.1%}"


def relative_error(x: Tensor, gold: Tensor) -> float:
    """max |x - gold| / max |gold|."""
    return float((x.detach().double() - gold.detach().double()).abs().max() / gold.detach().double().abs().max().clamp(min=1e-300))


def pass_under_the_interpreter(file: str, at_least: int, unproven: str) -> None:
    """The tests of `file`, `at_least` so many and none skipped, pass under Triton's interpreter.

    In a process of its own: Triton reads TRITON_INTERPRET when a kernel is defined. Without Triton `unproven` are.
    """
    pytest.importorskip("triton", reason=f"Triton is not installed: {unproven} are unproven here")
    environment = dict(os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    command = [sys.executable, "-m", "pytest", "-W", "ignore::RuntimeWarning", file]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    summary = re.search(r"(\d+) passed", done.stdout)
    passed = done.returncode == 0 and summary and int(summary[1]) >= at_least and "skipped" not in done.stdout
    assert passed, done.stdout[-6000:] + done.stderr[-2000:]
