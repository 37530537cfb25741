"""When the Triton row kernels are chosen, what they refuse, and their tests under Triton's interpreter."""

import re

import pytest
import torch
from support import pass_under_the_interpreter

from fastalign import linear_logps
from fastalign.errors import DependencyError
from fastalign.head import plan
from fastalign.head.plan import make_plan


def chosen(**request) -> str:
    return make_plan(64, 1000, 16, budget=1 << 24, **request).impl


def test_auto_takes_triton_on_a_gpu(monkeypatch):
    monkeypatch.setattr(plan, "_has_triton", lambda: True)
    assert chosen(device="cuda") == chosen(device="cuda", dtype=torch.bfloat16) == "triton"
    assert chosen(device="cuda", dtype=torch.float64) == chosen(device="mps") == "torch"
    assert chosen(device="cpu") != "triton"
    assert chosen(device="cuda", impl="torch") == "torch"
    monkeypatch.setattr(plan, "_has_triton", lambda: False)
    assert chosen(device="cuda") == "torch"


def test_triton_is_refused_where_it_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    operands = torch.zeros(2, 4), torch.zeros(8, 4), torch.zeros(2, dtype=torch.int64)
    monkeypatch.setattr(plan, "_has_triton", lambda: True)
    with pytest.raises(ValueError, match=r"needs a CUDA or ROCm device, but hidden is on cpu: use impl='torch'"):
        linear_logps(*operands, impl="triton")
    with pytest.raises(ValueError, match=r"hidden is float64: use impl='torch'"):
        chosen(device="cuda", dtype=torch.float64, impl="triton")
    monkeypatch.setattr(plan, "_has_triton", lambda: False)
    with pytest.raises(DependencyError, match=re.escape("pip install 'fastalign[triton]'")):
        linear_logps(*operands, impl="triton")


def test_kernels_refuse_what_they_would_get_wrong():
    pytest.importorskip("triton", reason="Triton is not installed: the refusals of its row kernels are unproven here")
    from fastalign.head import rows_triton
    from fastalign.head.rows import LogitMap

    state = rows_triton.start(3, frozenset(["logps"]), dtype=torch.float32, device=torch.device("cpu"))
    for tile in (torch.zeros(3, 5, dtype=torch.float64), torch.zeros(5, 3).T):
        with pytest.raises(ValueError, match=rf"got {tile.dtype}, strides .*: use impl='torch'"):
            rows_triton.update(state, tile, torch.zeros(3, dtype=torch.int64), 0, LogitMap())
    with pytest.raises(ValueError, match=r"compute in float32, got torch\.float64"):
        rows_triton.start(3, frozenset(["logps"]), dtype=torch.float64, device=torch.device("cpu"))


@pytest.mark.parametrize("blocks", [1, 2, 3, 4, 75, 300])
def test_barriers_before_narrow_stores_suffice(blocks):
    """By bytes: a store of block k meets no wide column that a thread at the last barrier might still have to load."""
    block, waited = 2048, -1  # threads have loaded blocks 0 to `waited`
    for k in range(blocks):
        if k & (k + 1) == 0:
            waited = k
        store = range(2 * k * block, 2 * (k + 1) * block)
        pending = 4 * (waited + 1) * block  # the first byte that may be unread
        assert store.stop <= pending, (k, waited)
    assert waited >= (blocks - 1) // 2


def test_kernels_under_the_interpreter():
    pass_under_the_interpreter("tests/head/interpreted_rows.py", 90, "its row kernels")
