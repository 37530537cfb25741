"""The Triton row kernels under Triton's interpreter, on a CPU: run by `test_rows_triton` in a process of its own.

By hand: TRITON_INTERPRET=1 python -m pytest tests/head/interpreted_rows.py
"""

import mmap

import pytest
import torch
from problems import ALL_OUTPUTS, make
from row_contract import EPS, RowContract, assert_near
from support import assert_close_to_gold

import fastalign

pytest.importorskip("triton", reason="Triton is not installed: its row kernels are unproven here")
from fastalign.head import rows_triton

assert rows_triton.BLOCK == 2048


class TestTriton(RowContract):
    rows = rows_triton
    truncates = True  # under the interpreter; a GPU rounds to nearest


def test_rows_beyond_2_31_elements():
    """Row 2 lies 2^31 + 32 elements behind row 0, in memory of which only the rows' own pages exist."""
    stride, columns = 2**30 + 16, 64
    memory = mmap.mmap(-1, 4 * (2 * stride + columns), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000))
    near, far = (torch.frombuffer(memory, dtype=torch.float32, count=columns, offset=4 * row * stride) for row in (0, 2))
    far.copy_(torch.randn(columns, generator=torch.Generator().manual_seed(0)))
    want = torch.logsumexp(far, 0)
    d_want = -want.exp().reciprocal() * far.exp()
    d_want[5] += 1

    target, found = torch.full((3,), 5), torch.zeros(3)
    m, s, ones = torch.full((3,), float("-inf")), torch.zeros(3), torch.ones(3)
    shared = (stride, columns, 0, target, None, None, 1.0, 1.0)
    rows_triton.statistics_kernel[(3,)](near, *shared, found, m, s, None, None, None, CAPPED=False, **rows_triton.lanes(4, False))
    assert found[2] == far[5]
    lse = m + s.log()
    assert abs(lse[2] - want) < 1e-5
    launch = (near, near, stride, *shared, columns, lse, None, ones, None, None, None)
    rows_triton.gradient_kernel[(3,)](*launch, CAPPED=False, NARROW=False, BLOCK=2048, ROCM=False)
    assert_near(far, d_want, 1e-6, "gradient")


N = 40  # a row is a program, which the interpreter runs one after another
WHOLE, TILES = None, 2 * N * 130 * 4  # budgets: one slab; tiles of 130 columns


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("how", "budget", "rich"),
    [("keep", WHOLE, True), ("recompute", TILES, True), ("recompute", WHOLE, False), ("slab", TILES, False), ("slab", WHOLE, True)],
)
def test_operator_equals_float64(how, budget, rich, dtype):
    problem = make(n=N, dtype=dtype, rich=rich)
    gold = problem.to(torch.float64)
    truth = gold.reference()
    with torch.no_grad():
        options = dict(problem.options, outputs=ALL_OUTPUTS, budget=budget, impl="triton")
        out = fastalign.linear_logps(problem.hidden, problem.weight, problem.target, **options)
        bound = 8 * EPS * max(1.0, float((gold.hidden @ gold.weight.T).abs().max()))
    for name in ALL_OUTPUTS[:-1]:
        assert_near(getattr(out, name), getattr(truth, name), bound, name)
    assert torch.equal(out.is_top1, truth.is_top1)
    options = {"budget": budget, "impl": "triton"}
    got = problem.slab_gradients(**options) if how == "slab" else problem.gradients(schedule=how, **options)
    for x, base, g in zip(got, problem.plain_gradients(), torch.autograd.grad(gold.loss(truth), gold.leaves)):
        assert_close_to_gold(x, base, g)


@pytest.mark.parametrize("budget", [WHOLE, TILES], ids=["whole", "tiles"])
def test_frozen_head_equals_float64(budget):
    problem = make(n=N, rich=True, frozen=True)
    gold = problem.to(torch.float64)
    want = torch.autograd.grad(gold.loss(gold.reference()), gold.leaves)
    for x, base, g in zip(problem.gradients(schedule="frozen", budget=budget, impl="triton"), problem.plain_gradients(), want):
        assert_close_to_gold(x, base, g)
