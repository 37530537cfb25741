"""The Triton row kernels as a GPU runs them, tile by tile; small enough for compute-sanitizer (`make gpu` runs both).

The cases are those of the interpreter. Without a GPU: TRITON_INTERPRET=1 python -m pytest tests/head/test_cuda_rows.py
"""

import os
from dataclasses import replace

import pytest
import torch
from row_contract import EPS, SIZES, Case, assert_near, assert_outputs

pytest.importorskip("triton", reason="Triton is not installed: its row kernels are unproven here")
from fastalign.head import rows_triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not INTERPRETED and not torch.cuda.is_available(), reason="no CUDA device: the row kernels on a GPU are unproven here"
    ),
]


def case_on_device(rows: int, columns: int, **options) -> Case:
    case = Case(rows, columns, **options)
    first = case.x.storage_offset()
    case.storage = case.storage.to(DEVICE)
    case.x = case.storage[:, first : first + columns]
    case.target = case.target.to(DEVICE)
    case.coefficients = {name: c.to(DEVICE) for name, c in case.coefficients.items()}
    moved = {name: x.to(DEVICE) for name in ("bias", "inv_temperature") if isinstance(x := getattr(case.map, name), torch.Tensor)}
    case.map = replace(case.map, **moved)
    return case


@pytest.mark.parametrize("rich", [False, True], ids=["plain", "rich"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("columns", [*SIZES, 30011])
def test_tile(columns, dtype, rich):
    case = case_on_device(5, columns, dtype=dtype, rich=rich)
    gold, gold_gradient = case.gold()
    assert_outputs(case, case.score(rows_triton), gold)
    assert_outputs(case, case.score(rows_triton, cuts=(columns // 3,) if columns > 3 else None), gold)
    if dtype != torch.float32:
        return
    stats = {name: value.float() for name, value in gold.items()}
    got = case.gradient(rows_triton, stats)
    assert_near(got, gold_gradient, 32 * EPS * max(1.0, float(case.x.abs().max())), "gradient")
    assert torch.equal(got, case.gradient(rows_triton, stats))


@pytest.mark.parametrize("columns", [7, 2048, 2049, 5 * 2048 + 3, 30011])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_gradient_in_the_storage_of_the_tile(dtype, columns):
    """Each row overwrites itself by half as many bytes: no thread may read what another has already written."""
    wide = case_on_device(64, columns, rich=True)
    stats = wide.score(rows_triton)
    want = wide.gradient(rows_triton, stats).to(dtype)
    for _ in range(20):  # a race would show in some of them
        case = case_on_device(64, columns, rich=True)
        got = case.gradient(rows_triton, stats, dtype, x=case.x)
        assert got.data_ptr() == case.x.data_ptr()
        if INTERPRETED and dtype == torch.bfloat16:  # the interpreter truncates
            assert ((got.float() - want.float()).abs() <= 2**-7 * want.float().abs() + 1e-30).all()
            return
        assert torch.equal(got, want)
        assert case.storage[:, :8].isnan().all() and case.storage[:, 8 + columns :].isnan().all()


def test_rows_beyond_2_31_elements():
    """The last row of a tile of 2^31 + 2^16 elements."""
    if INTERPRETED:
        pytest.skip("the interpreter has a test of its own, which does not hold the memory")
    columns, rows = 1 << 16, (1 << 15) + 1
    x = torch.empty(rows, columns, device=DEVICE, dtype=torch.bfloat16)
    x[-1] = torch.randn(columns, device=DEVICE)
    last = x[-1].clone()
    case = case_on_device(1, columns)
    case.x = last[None]
    want = case.score(rows_triton)
    x[:-1] = 0
    case.x, case.target = x, case.target.expand(rows).contiguous()
    found = case.score(rows_triton)
    assert all(torch.equal(found[name][-1:], want[name]) for name in want)
