"""The native product against float64: values, layouts, edges, reproducibility, and its place in the schedules."""

import random

import pytest
import torch
from problems import ALL_OUTPUTS, make
from support import assert_close_to_gold
from torch import Tensor

import fastalign
from fastalign.head import native, products, products_native
from fastalign.head.products_native import multiply

INF, NAN = float("inf"), float("nan")
BF16, TINY = torch.bfloat16, 2.0**-126
AVAILABLE = native.find() is not None and products_native.supported()
pytestmark = pytest.mark.skipif(not AVAILABLE, reason="no native library, or no AVX512-BF16: the native product is unproven here")

SIZES = [
    (1, 1, 1),
    (8, 48, 32),  # one tile, whole
    (15, 33, 17),  # a group that is not full, two vectors of columns, half a pair
    (17, 15, 33),
    (97, 101, 1025),  # stretches of k that are not equal
    (2051, 31, 37),  # two parts of the rows
    (13, 4099, 101),  # three parts of the columns
    (131, 257, 2053),
]
LAYOUTS = ("rows", "columns", "padded rows", "padded columns", "strided", "expanded")


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same matrix in other storage; "expanded" repeats its first row."""
    m, n = x.shape
    if layout.startswith("padded"):
        wide = x.new_full((n + 3, m + 5) if "columns" in layout else (m + 3, n + 5), NAN)
        place = (wide.T if "columns" in layout else wide)[1 : m + 1, 2 : n + 2]
        return place.copy_(x)
    if layout == "strided":
        return x.new_full((2 * m, 3 * n), NAN)[::2, ::3].copy_(x)
    if layout == "expanded":
        return x[:1].contiguous().expand(m, n)
    return x.T.clone(memory_format=torch.contiguous_format).T if layout == "columns" else x.clone(memory_format=torch.contiguous_format)


def operands(m: int, n: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(m, k, generator=g).to(BF16), torch.randn(k, n, generator=g).to(BF16)


def product(a: Tensor, b: Tensor) -> Tensor:
    out = torch.full((a.shape[0], b.shape[1]), NAN)
    multiply(out, a, b)
    return out


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_float64(size):
    a, b = operands(*size)
    assert_close_to_gold(product(a, b), a.float() @ b.float(), a.double() @ b.double())


@pytest.mark.parametrize("layout_b", LAYOUTS)
@pytest.mark.parametrize("layout_a", LAYOUTS)
def test_layouts_of_the_operands_do_not_change_a_bit(layout_a, layout_b):
    a, b = (laid_out(x, layout) for x, layout in zip(operands(35, 67, 51), (layout_a, layout_b)))
    assert torch.equal(product(a, b), product(a.contiguous(), b.contiguous()))
    assert_close_to_gold(product(a, b), a.float() @ b.float(), a.double() @ b.double())


@pytest.mark.parametrize("layout", LAYOUTS[:5])
def test_adds_to_any_result_and_touches_nothing_beside_it(layout):
    (a, b), before = operands(19, 53, 1030), torch.randn(19, 53) * 30
    out = laid_out(before, layout)
    storage = out.as_strided((out.untyped_storage().nbytes() // 4,), (1,), 0)
    beside = torch.ones_like(storage, dtype=torch.bool)
    beside.as_strided(out.shape, out.stride(), out.storage_offset()).fill_(False)
    kept = storage[beside].clone()
    multiply(out, a, b, accumulate=True)
    assert_close_to_gold(out, before + a.float() @ b.float(), before.double() + a.double() @ b.double())
    assert torch.equal(storage[beside].view(torch.int32), kept.view(torch.int32))


@pytest.mark.parametrize("size", [(0, 5, 3), (5, 0, 3), (5, 3, 0), (0, 0, 0)], ids=str)
def test_empty_sizes(size):
    a, b = operands(*size)
    assert torch.equal(product(a, b), torch.zeros(size[0], size[1]))
    out = torch.ones(size[0], size[1])
    multiply(out, a, b, accumulate=True)
    assert torch.equal(out, torch.ones_like(out))


def test_reruns_threads_and_cuts_give_the_same_bits():
    a, b = operands(300, 700, 1500)
    want = product(a, b)
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3, 7):
            torch.set_num_threads(number)
            assert torch.equal(product(a, b), want)
    finally:
        torch.set_num_threads(threads)
    for rows, cols in ((slice(0, 1), slice(0, 1)), (slice(37, 250), slice(100, 613)), (slice(299, 300), slice(0, 700))):
        assert torch.equal(product(a[rows], b[:, cols]), want[rows, cols])


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_nan_and_infinity_reach_their_row_or_column_alone(value):
    a, b = operands(21, 60, 41)
    want = product(a, b)
    for i, k in ((0, 0), (20, 40), (9, 17)):
        bad = a.clone()
        bad[i, k] = value
        got = product(bad, b)
        assert not got[i].isfinite().any()
        assert torch.equal(got[torch.arange(21) != i], want[torch.arange(21) != i])
        bad = b.clone()
        bad[k, i] = value
        got = product(a, bad)
        assert not got[:, i].isfinite().any()
        assert torch.equal(got[:, torch.arange(60) != i], want[:, torch.arange(60) != i])
    assert product(torch.full((1, 2), INF).to(BF16), torch.tensor([[1.0], [-1.0]]).to(BF16)).isnan().all()


def test_subnormal_numbers_count_as_zero_within_the_stated_bound():
    g = torch.Generator().manual_seed(0)
    k = 257
    a = (torch.randn(33, k, generator=g) * TINY).to(BF16)  # many below the normal numbers
    b = (torch.randn(k, 47, generator=g)).to(BF16)
    assert (a.abs() < TINY).any() and (a.abs() >= TINY).any()
    gold = a.double() @ b.double()
    bound = k * 2 * TINY * (1 + float(a.abs().max()) + float(b.abs().max())) + k * 2.0**-24 * (a.double().abs() @ b.double().abs())
    assert ((product(a, b).double() - gold).abs() <= bound).all()
    alone = torch.full((1, 1), TINY / 2).to(BF16)
    assert alone != 0 and product(alone, torch.ones(1, 1).to(BF16)) == 0
    small = torch.full((1, 1), 2.0**-64).to(BF16)
    assert product(small, small) == 0  # 2^-128


def test_random_shapes_and_strides():
    choose = random.Random(0)
    for seed in range(150):
        m, n, k = (choose.choice([1, 2, 7, 16, 31, 47, 48, 49, 64, 130, choose.randint(1, 300)]) for _ in range(3))
        a, b = (laid_out(x, choose.choice(LAYOUTS)) for x in operands(m, n, k, seed))
        before = torch.randn(m, n)
        out = laid_out(before, choose.choice(LAYOUTS[:5]))
        accumulate = choose.random() < 0.5
        multiply(out, a, b, accumulate=accumulate)
        gold = a.double() @ b.double()
        error = (out.double() - gold - before.double() * accumulate).abs()
        # eps/2 of every partial sum, the last one with what was there before
        allowed = (k + 2) * 2.0**-24 * (a.double().abs() @ b.double().abs()) + 2.0**-23 * before.abs()
        assert (error <= allowed + k * TINY).all(), (seed, m, n, k, a.stride(), b.stride(), out.stride())


def test_refuses_what_it_cannot_multiply():
    a, b = operands(3, 4, 5)
    out = torch.empty(3, 4)
    with pytest.raises(ValueError, match=r"takes bfloat16 operands and a float32 result on a CPU, got .*torch.float16"):
        multiply(out, a, b.half())
    with pytest.raises(ValueError, match="bfloat16 operands and a float32 result"):
        multiply(out.to(BF16), a, b)
    with pytest.raises(ValueError, match=r"shapes do not fit: \(3, 4\) = \(3, 5\) @ \(4, 4\)"):
        multiply(out, a, b[:4])
    native.select_isa("scalar")
    try:
        assert not products_native.supported()
        with pytest.raises(ValueError, match=r"needs AVX512-BF16, the instruction set in use is 'scalar': use impl='torch'"):
            multiply(out, a, b)
    finally:
        native.select_isa("best")


@pytest.mark.parametrize("impl", ["native", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_products_of_the_schedules_equal_float64(dtype, impl, monkeypatch):
    monkeypatch.setattr(products, "UPCAST_BYTES", 1 << 14)  # several stretches
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(40, 96, generator=g).to(dtype), torch.randn(200, 96, generator=g).to(dtype)
    half = products.reads_half(hidden, impl)
    assert half == (impl == "native" and dtype == BF16)
    logits = torch.empty(40, 208)[:, :200]
    products.multiply(logits, hidden, weight.T, half=half)
    gold = hidden.double() @ weight.double().T
    assert_close_to_gold(logits, hidden.float() @ weight.float().T, gold)
    d = gold.to(dtype if half else torch.float32)
    for a, b in ((d, weight), (d.T, hidden)):
        gold, base = a.double() @ b.double(), a.float() @ b.float()
        assert_close_to_gold(products.add_product(None, a, b, torch.float32), base, gold)
        total = torch.ones(gold.shape)
        assert products.add_product(total, a, b, torch.float32) is total
        assert_close_to_gold(total, 1 + base, 1 + gold)
        rounded = torch.ones(gold.shape, dtype=dtype)
        products.add_product(rounded, a, b, torch.float32)
        assert_close_to_gold(rounded, (1 + base).to(dtype), 1 + gold)


@pytest.fixture
def calls(monkeypatch):
    """Shapes (M, K, C) of the native products."""
    seen = []

    def spy(out, a, b, *, accumulate=False):
        seen.append((a.shape[0], a.shape[1], b.shape[1]))
        multiply(out, a, b, accumulate=accumulate)

    monkeypatch.setattr(products_native, "multiply", spy)
    return seen


@pytest.mark.parametrize("budget", [None, 301 * 4 * 8], ids=["whole", "tiles"])
@pytest.mark.parametrize("rich", [False, True], ids=["plain", "rich"])
@pytest.mark.parametrize("how", ["keep", "recompute", "slab", "frozen"])
def test_gradients_of_the_head_equal_float64(how, rich, budget, calls):
    problem = make(n=150, dtype=BF16, rich=rich, frozen=how == "frozen")
    if how == "slab":
        got = problem.slab_gradients(budget=budget, impl="native")
    else:
        got = problem.gradients(schedule=how, budget=budget, impl="native")
    gold = problem.to(torch.float64)
    gold_gradients = torch.autograd.grad(gold.loss(gold.reference()), gold.leaves)
    for i, (x, base, g) in enumerate(zip(got, problem.plain_gradients(), gold_gradients)):
        assert_close_to_gold(x, base, g, f"gradient {i}")
    assert calls
    calls.clear()
    problem.slab_gradients(budget=budget, impl="torch")
    assert not calls


def test_log_probs_keep_float32_accuracy(calls):
    problem = make(n=64, v=3001, d=1536, dtype=BF16)
    with torch.no_grad():
        out = fastalign.linear_logps(problem.hidden, problem.weight, problem.target, outputs=ALL_OUTPUTS, impl="native")
        gold = problem.to(torch.float64).reference()
        largest = float((problem.hidden.double() @ problem.weight.double().T).abs().max())
    live = int((problem.target >= 0).sum())
    assert calls == [(live, 1536, 3001)]
    for name in ALL_OUTPUTS[:-1]:
        assert (getattr(out, name).double() - getattr(gold, name)).abs().max() <= 8 * torch.finfo(torch.float32).eps * max(1.0, largest)


def test_flops_are_those_of_the_schedule(calls):
    n, v, d = 96, 320, 32
    problem = make(n=n, v=v, d=d, dtype=BF16, ignored=0, terms=("logps",))
    problem.slab_gradients(impl="native", budget=v * 4 * 64 * 2)
    assert sum(2 * m * k * c for m, k, c in calls) == 6 * n * v * d
