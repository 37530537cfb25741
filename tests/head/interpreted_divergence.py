"""The Triton kernels of the divergences under Triton's interpreter, on a CPU: run by `test_divergence_triton` in a process of its own.

By hand: TRITON_INTERPRET=1 python -m pytest tests/head/interpreted_divergence.py
"""

import mmap
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from pairs import BETA, KINDS, TERMS, pair
from row_contract import EPS, assert_near
from support import assert_close_to_gold
from torch import Tensor

from fastalign.head import divergence_torch
from fastalign.head.rows import LogitMap

pytest.importorskip("triton", reason="Triton is not installed: the kernels of the divergences are unproven here")
from fastalign.head import divergence_triton

SIZES = (1, 7, 301, 1023, 1024, 1025, 2049, 4097)  # one column, odd, and around the blocks of the kernels
assert (divergence_triton.BLOCK, divergence_triton.STEP) == (2048, 1024)


class Case:
    """Two tiles between NaN, their logit maps, and dL/d output that lie apart in memory."""

    def __init__(self, kind: str, rows: int, columns: int, *, rich=False, seed=0) -> None:
        g = torch.Generator().manual_seed(seed)
        self.kind, self.columns = kind, columns
        self.storage = torch.full((2, rows, columns + 24), float("nan"))
        self.x, self.ref_x = self.storage[:, :, 8 : 8 + columns]
        self.x.copy_(torch.randn(rows, columns, generator=g) * 3)
        self.ref_x.copy_(self.x * 0.5 + torch.randn(rows, columns, generator=g) * 2)
        self.target = torch.randint(0, columns, (rows, 2), generator=g)[:, 0]
        apart = torch.randn(rows, len(TERMS), generator=g)
        self.coefficients = {name: apart[:, i] for i, name in enumerate(TERMS)}
        self.maps = (LogitMap(logit_scale=1.5), LogitMap(logit_scale=0.8))
        if rich:
            inv_temperature = torch.rand(rows, generator=g) + 0.5
            self.maps = tuple(
                LogitMap(torch.randn(columns, generator=g), scale, cap, inv_temperature) for scale, cap in ((0.7, 6.0), (1.2, 9.0))
            )

    def cut(self, lo: int, hi: int, dtype=torch.float32) -> tuple[LogitMap, LogitMap]:
        def part(logits):
            t = logits.inv_temperature
            bias = None if logits.bias is None else logits.bias[lo:hi].to(dtype)
            return replace(logits, bias=bias, inv_temperature=t.to(dtype) if isinstance(t, Tensor) else t)

        return part(self.maps[0]), part(self.maps[1])

    def score(self, impl, dtype=torch.float32, cuts=(), outputs=frozenset({"logps", "entropy", "is_top1"})) -> dict[str, Tensor]:
        """What a schedule finds, over tiles cut at `cuts`, the last tile first."""
        x, ref_x = self.x.to(dtype), self.ref_x.to(dtype)
        x, ref_x = (self.x, self.ref_x) if dtype == torch.float32 else (x, ref_x)
        state = impl.start(len(x), self.kind, outputs, dtype=dtype, device=x.device)
        tiles = [*reversed([*pairwise([0, *cuts, self.columns])])]
        for lo, hi in tiles:
            impl.update(state, x[:, lo:hi], ref_x[:, lo:hi], self.target, lo, *self.cut(lo, hi, dtype))
        found = impl.finish(state)
        if self.kind == "jsd":
            sums = torch.zeros(2, len(x), dtype=dtype)
            for lo, hi in tiles:
                impl.mix(sums, x[:, lo:hi], ref_x[:, lo:hi], *self.cut(lo, hi, dtype), found["lse"], found["ref_lse"], BETA)
            found["divergence"], found["student_kl"] = sums
        return found

    def gradient(self, impl, found, dtype=torch.float32, names=TERMS, in_place=False, cut=None) -> Tensor:
        work = found["lse"].dtype
        lo, hi = cut or (0, self.columns)
        x, ref_x = self.x[:, lo:hi].to(work), self.ref_x[:, lo:hi].to(work)
        x = self.x if in_place else x.clone()
        c = {name: self.coefficients[name].to(work) for name in names}
        options = {"kind": self.kind, "beta": BETA, "dtype": dtype}
        return impl.gradient_(x, ref_x, self.target, lo, *self.cut(lo, hi, work), found, c, **options)

    def gold(self) -> tuple[dict[str, Tensor], Tensor]:
        found = self.score(divergence_torch, torch.float64)
        return found, self.gradient(divergence_torch, found, torch.float64)

    @property
    def bound(self) -> float:
        return 8 * EPS * max(1.0, float(self.x.abs().max()), float(self.ref_x.abs().max()))


def assert_found(case: Case, got: dict[str, Tensor], gold: dict[str, Tensor]) -> None:
    assert set(got) == set(gold) and "divergence" in got
    for name, value in gold.items():
        if name == "is_top1":
            assert torch.equal(got[name], value)
        else:
            assert got[name].dtype == torch.float32
            assert_near(got[name], value, case.bound, name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rich", [False, True], ids=["plain", "rich"])
@pytest.mark.parametrize("columns", SIZES)
def test_one_tile(columns, rich, kind):
    case = Case(kind, 3, columns, rich=rich)
    case.target[0] = columns - 1
    gold, gold_gradient = case.gold()
    assert_found(case, case.score(divergence_triton), gold)
    got = case.gradient(divergence_triton, {name: value.float() for name, value in gold.items()})
    assert_near(got, gold_gradient, 4 * case.bound, "gradient")
    assert not case.storage[:, :, 8 : 8 + columns].isnan().any() and case.storage[:, :, 8 + columns :].isnan().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [7, 2049, 5 * 2048 + 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_gradient_in_place(dtype, columns, kind):
    case = Case(kind, 2, columns, rich=True)
    found, ref_x = case.score(divergence_triton), case.ref_x.clone()
    want = case.gradient(divergence_triton, found)
    got = case.gradient(divergence_triton, found, dtype, in_place=True)
    assert got.data_ptr() == case.x.data_ptr() and got.stride() == (2 * case.x.stride(0), 1) and got.shape == want.shape
    if dtype == torch.float16:
        assert torch.equal(got, want.to(dtype))
    else:  # the interpreter truncates where a GPU rounds to nearest
        assert ((got.float() - want).abs() <= 2**-7 * want.abs()).all()
    assert case.storage[:, :, :8].isnan().all() and case.storage[:, :, 8 + columns :].isnan().all()
    assert torch.equal(case.ref_x, ref_x) and got.any() and got.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("names", [*((n,) for n in TERMS), ("divergence", "logps"), ()], ids=str)
def test_each_coefficient_alone(names, kind):
    case = Case(kind, 4, 301, rich=True)
    found = case.score(divergence_triton)
    got, want = (case.gradient(impl, found, names=names) for impl in (divergence_triton, divergence_torch))
    assert_near(got, want.double(), 4 * case.bound, str(names))
    assert bool(want.any()) == bool(names)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cuts", [(1,), (2, 50, 51, 300)], ids=str)
def test_tiles_of_the_vocabulary_in_any_order(cuts, kind):
    case = Case(kind, 5, 301, rich=True)
    gold = case.score(divergence_torch, torch.float64)
    for impl in (divergence_triton, divergence_torch):
        assert_found(case, case.score(impl, cuts=cuts), gold)
    found = case.score(divergence_triton)
    tiles = [case.gradient(divergence_triton, found, cut=edges) for edges in pairwise([0, *cuts, 301])]
    assert torch.equal(torch.cat(tiles, 1), case.gradient(divergence_triton, found))


@pytest.mark.parametrize("kind", KINDS)
def test_identical_tiles_diverge_by_exactly_nothing(kind):
    case = Case(kind, 4, 2500, rich=True)
    case.ref_x, case.maps = case.x, (case.maps[0], case.maps[0])
    for cuts in ((), (100, 101)):
        found = case.score(divergence_triton, cuts=cuts)
        assert not found["divergence"].any() and torch.equal(found["lse"], found["ref_lse"])
        assert not case.gradient(divergence_triton, found, names=("divergence",)).any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cuts", [(), (100,), (200,)], ids=str)  # with cuts, the first tiles that are seen hold nothing else
def test_columns_of_minus_infinity_on_both_sides(kind, cuts):
    case, short = Case(kind, 4, 301), Case(kind, 4, 301)
    for each in (case, short):
        each.target = each.target.clamp(max=99)
    bias = torch.zeros(301).index_fill_(0, torch.arange(100, 301), float("-inf"))
    case.maps, short.maps = (LogitMap(bias), LogitMap(bias)), (LogitMap(), LogitMap())
    short.x, short.ref_x, short.columns = case.x[:, :100], case.ref_x[:, :100], 100
    gold, want = short.gold()
    for impl in (divergence_triton, divergence_torch):
        found = case.score(impl, cuts=cuts)
        assert_found(case, found, gold)
        d = case.gradient(impl, found)
        assert not d[:, 100:].any()
        assert_near(d[:, :100], want, 4 * case.bound, "gradient")


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cuts", [(), (100,), (200,)], ids=str)
def test_columns_of_minus_infinity_on_one_side(kind, side, cuts):
    case = Case(kind, 4, 301)
    case.target = case.target.clamp(max=99)
    bias = LogitMap(torch.zeros(301).index_fill_(0, torch.arange(100, 301), float("-inf")))
    case.maps = (bias, LogitMap()) if side == "student" else (LogitMap(), bias)
    gold, want = case.gold()
    infinite = (kind, side) in (("forward_kl", "student"), ("reverse_kl", "teacher"))
    for impl in (divergence_triton, divergence_torch):
        found = case.score(impl, cuts=cuts)
        if infinite:
            assert found["divergence"].isposinf().all() and gold["divergence"].isposinf().all()
        else:
            assert_found(case, found, gold)
        if (kind, side) != ("reverse_kl", "teacher"):
            assert_near(case.gradient(impl, found), want, 4 * case.bound, "gradient")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["x", "ref_x"])
def test_nan_and_targets_outside_the_vocabulary_stay_in_their_row(side, kind):
    case = Case(kind, 6, 301)
    clean = case.score(divergence_triton)
    case.target = torch.tensor([301, -1, 2**40, 3, 4, 5])
    getattr(case, side)[4, 17] = float("nan")
    found = case.score(divergence_triton)
    assert found["divergence"].isnan().tolist() == [False] * 4 + [True, False]
    assert found["logps"].isnan().tolist() == [True] * 3 + [False, side == "x", False]
    others = [0, 1, 2, 3, 5]
    assert all(torch.equal(found[name][others], clean[name][others]) for name in ("divergence", "lse", "ref_lse"))
    d, want = (case.gradient(impl, found, names=("divergence", "logps")) for impl in (divergence_triton, divergence_torch))
    assert d[4].isnan().any()
    assert_near(d[others], want[others].double(), 4 * case.bound, "gradient")


@pytest.mark.parametrize("kind", KINDS)
def test_bits_do_not_depend_on_the_run_or_on_the_order_of_rows(kind):
    case = Case(kind, 6, 2500, rich=True)
    found = case.score(divergence_triton)
    first = case.gradient(divergence_triton, found)
    assert torch.equal(first, case.gradient(divergence_triton, case.score(divergence_triton)))
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    case.x, case.ref_x, case.target = case.x[order].contiguous(), case.ref_x[order].contiguous(), case.target[order]
    case.maps = tuple(replace(logits, inv_temperature=logits.inv_temperature[order]) for logits in case.maps)
    case.coefficients = {name: c[order] for name, c in case.coefficients.items()}
    again = case.score(divergence_triton)
    assert all(torch.equal(again[name], value[order]) for name, value in found.items())
    assert torch.equal(case.gradient(divergence_triton, again), first[order])


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows(kind):
    case = Case(kind, 0, 301)
    found = case.score(divergence_triton)
    assert all(value.shape == (0,) for value in found.values())
    assert case.gradient(divergence_triton, found, torch.bfloat16, in_place=True).shape == (0, 301)


def test_rows_beyond_2_31_elements():
    """Row 2 of both tiles lies 2^31 + 32 elements behind row 0, in memory of which only the rows' own pages exist."""
    stride, columns = 2**30 + 16, 64

    def far_rows(seed):
        memory = mmap.mmap(-1, 4 * (2 * stride + columns), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000))
        near, far = (torch.frombuffer(memory, dtype=torch.float32, count=columns, offset=4 * row * stride) for row in (0, 2))
        far.copy_(torch.randn(columns, generator=torch.Generator().manual_seed(seed)))
        return near, far

    (x, far), (ref_x, ref_far) = far_rows(0), far_rows(1)
    log_p, log_q = far.log_softmax(0), ref_far.log_softmax(0)
    log_m = torch.logaddexp(log_p + torch.tensor(1 - BETA).log(), log_q + torch.tensor(BETA).log())
    student_kl = (log_p.exp() * (log_p - log_m)).sum()
    jsd = BETA * (log_q.exp() * (log_q - log_m)).sum() + (1 - BETA) * student_kl
    d_want = (1 - BETA) * log_p.exp() * (log_p - log_m - student_kl)

    def state(value=0.0):
        return torch.full((3,), value)

    m, s, ref_m, ref_s, found, kl, target = state(-torch.inf), state(), state(-torch.inf), state(), state(), state(), torch.full((3,), 5)
    maps, capped = (None, None, None, 1.0, 1.0, 1.0, 1.0), {"CAPPED": False, "REF_CAPPED": False}
    sums = (found, m, s, None, ref_m, ref_s, None)
    options = {"KIND": "jsd", **capped}
    lanes = divergence_triton.lanes(False)
    divergence_triton.statistics_kernel[(3,)](x, ref_x, stride, stride, columns, 0, target, *maps, *sums, **options, **lanes)
    assert found[2] == far[5]
    lse, ref_lse = m + s.log(), ref_m + ref_s.log()
    mixed, kl = state(), state()
    divergence_triton.mix_kernel[(3,)](x, ref_x, stride, stride, columns, *maps, BETA, lse, ref_lse, mixed, kl, **capped, BLOCK=1024)
    assert abs(mixed[2] - jsd) < 1e-6 and abs(kl[2] - student_kl) < 1e-6
    strides, scores = (stride, stride, stride), (lse, ref_lse, kl, None, torch.ones(3), None, None, None)
    options |= {"NARROW": False, "BLOCK": 2048, "ROCM": False}
    divergence_triton.gradient_kernel[(3,)](x, x, ref_x, *strides, columns, 0, target, *maps, BETA, *scores, **options)
    assert_near(far, d_want, 1e-6, "gradient")


N = 16  # a row is a program, which the interpreter runs one after another
WHOLE, TILES = None, 2 * 2 * N * 130 * 4  # budgets: one slab; tiles of 130 columns


@pytest.mark.parametrize(
    ("budget", "rich", "dtype"), [(WHOLE, True, torch.bfloat16), (TILES, False, torch.float32)], ids=["whole", "tiles"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_operator_equals_float64(kind, budget, rich, dtype):
    problem = pair(kind, n=N, dtype=dtype, rich=rich)
    gold = problem.to(torch.float64)
    truth = gold.score(impl="reference")
    options = {"budget": budget, "impl": "triton"}
    size = max(float((side.hidden @ side.weight.T).detach().abs().max()) for side in (gold.student, gold.teacher))
    for name, value, want in zip(TERMS, problem.score(**options), truth):
        assert_near(value, want, 8 * EPS * max(1.0, size), name)
    wanted = torch.autograd.grad(gold.student.loss(truth), gold.leaves)
    for got in (problem.gradients(**options), problem.slab_gradients(**options)):
        for x, base, g in zip(got, problem.plain_gradients(), wanted):
            if dtype == torch.float32:
                assert_near(x, g, 32 * EPS * float(g.abs().max()), "gradient")
            else:
                assert_close_to_gold(x, base, g)
