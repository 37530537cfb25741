"""The contract of the row kernels as tests: what every implementation passes, held against `rows_torch` in float64.

An implementation inherits RowContract in a file of its own and names its module.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from types import ModuleType

import pytest
import torch
from problems import ALL_OUTPUTS, DIFFERENTIABLE
from torch import Tensor

from fastalign.head import rows_torch
from fastalign.head.rows import LogitMap

OUTPUTS = frozenset(ALL_OUTPUTS)
EPS = torch.finfo(torch.float32).eps
SIZES = (1, 7, 301, 1024, 1025, 2047, 2048, 2049, 4097)  # one column, odd, and around the blocks of all kernels


class Case:
    """A tile between NaN, its logit map, and dL/d output that lie apart in memory."""

    def __init__(self, rows: int, columns: int, *, dtype=torch.float32, rich=False, seed=0, spread=3.0) -> None:
        g = torch.Generator().manual_seed(seed)
        self.storage = torch.full((rows, columns + 24), float("nan"), dtype=dtype)
        self.x = self.storage[:, 8 : 8 + columns]
        self.x.copy_(torch.randn(rows, columns, generator=g) * spread)
        self.target = torch.randint(0, columns, (rows, 2), generator=g)[:, 0]
        apart = torch.randn(rows, len(DIFFERENTIABLE), generator=g)
        self.coefficients = {name: apart[:, i] for i, name in enumerate(DIFFERENTIABLE)}
        self.map = LogitMap(logit_scale=1.5)
        if rich:
            self.map = LogitMap(torch.randn(columns, generator=g), 0.7, 6.0, torch.rand(rows, generator=g) + 0.5)

    def score(self, rows, dtype=torch.float32, outputs=OUTPUTS, cuts=None) -> dict[str, Tensor]:
        """The outputs by an implementation, over tiles cut at `cuts`, the last tile first."""
        x, logits = self.x.to(torch.promote_types(self.x.dtype, dtype)) if dtype == torch.float64 else self.x, self.cast_map(dtype)
        state = rows.start(x.shape[0], outputs, dtype=dtype, device=x.device)
        edges = [0, *(cuts or ()), x.shape[1]]
        for lo, hi in reversed([*pairwise(edges)]):
            rows.update(state, x[:, lo:hi], self.target, lo, self.columns(lo, hi, logits))
        return rows.finish(state)

    def gradient(self, rows, stats, dtype=torch.float32, names=DIFFERENTIABLE, x=None) -> Tensor:
        x = self.x.clone() if x is None else x
        work = stats["lse"].dtype
        c = {name: self.coefficients[name].to(work) for name in names}
        return rows.gradient_(
            x, self.target, 0, self.cast_map(work), stats["lse"], c, entropy=stats["entropy"], vocabulary=x.shape[1], dtype=dtype
        )

    def columns(self, lo, hi, logits=None) -> LogitMap:
        logits = logits or self.map
        return replace(logits, bias=None if logits.bias is None else logits.bias[lo:hi])

    def gold(self) -> tuple[dict[str, Tensor], Tensor]:
        """Outputs and gradient by the definition in float64."""
        stats = self.score(rows_torch, torch.float64)
        return stats, self.gradient(rows_torch, stats, torch.float64, x=self.x.double())

    def cast_map(self, dtype) -> LogitMap:
        def cast(value):
            return value.to(dtype) if isinstance(value, Tensor) else value

        return replace(self.map, bias=cast(self.map.bias), inv_temperature=cast(self.map.inv_temperature))


def assert_near(x: Tensor, gold: Tensor, bound: float, name: str) -> None:
    """max |x - gold| <= bound, by a check that sees an error of 1 % of the largest value."""
    error = (x.double() - gold.double()).abs().max()
    assert error <= bound, f"{name}: error {error:.2e}, bound {bound:.2e}"
    if gold.abs().max() > 1e-6:
        assert 0.01 * gold.abs().max() > bound, f"{name}: the check would accept an error of 1 %"


def assert_outputs(case: Case, got: dict[str, Tensor], gold: dict[str, Tensor]) -> None:
    bound = 8 * EPS * max(1.0, float(case.x.abs().max()))
    assert set(got) == set(gold)
    for name, value in gold.items():
        if name == "is_top1":
            assert torch.equal(got[name], value)
        else:
            assert got[name].dtype == torch.float32
            assert_near(got[name], value, bound, name)


class RowContract:
    rows: ModuleType  # the implementation
    truncates = False  # it rounds to bfloat16 towards zero

    @pytest.mark.parametrize("rich", [False, True], ids=["plain", "rich"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("columns", SIZES)
    def test_one_tile(self, columns, dtype, rich):
        case = Case(3, columns, dtype=dtype, rich=rich)
        case.target[0] = columns - 1
        gold, gold_gradient = case.gold()
        assert_outputs(case, case.score(self.rows), gold)
        stats = {name: value.float() for name, value in gold.items()}
        got = case.gradient(self.rows, stats, dtype)
        bound = 32 * EPS * max(1.0, float(case.x.abs().max())) + torch.finfo(dtype).eps * float(gold_gradient.abs().max())
        assert_near(got, gold_gradient, bound, "gradient")

    @pytest.mark.parametrize("columns", [7, 2049, 5 * 2048 + 3])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_narrow_gradient_in_place(self, dtype, columns):
        case = Case(3, columns, rich=True)
        stats = case.score(self.rows)
        want = case.gradient(self.rows, stats)
        got = case.gradient(self.rows, stats, dtype, x=case.x)
        assert got.data_ptr() == case.x.data_ptr() and got.stride() == (2 * case.x.stride(0), 1) and got.shape == want.shape
        if dtype == torch.float16 or not self.truncates:
            assert torch.equal(got, want.to(dtype))
        else:
            assert ((got.float() - want).abs() <= 2**-7 * want.abs()).all()
        assert case.storage[:, :8].isnan().all() and case.storage[:, 8 + columns :].isnan().all()
        assert got.any() and got.isfinite().all()

    @pytest.mark.parametrize("names", [*((n,) for n in DIFFERENTIABLE), ("logps", "lse"), ("entropy", "mean_logits"), ()], ids=str)
    def test_each_coefficient_alone(self, names):
        case = Case(4, 301, rich=True)
        stats = case.score(self.rows)
        got, want = (case.gradient(rows, stats, names=names) for rows in (self.rows, rows_torch))
        assert_near(got, want.double(), 32 * EPS * 12, str(names))
        assert bool(want.any()) == bool(names)

    @pytest.mark.parametrize(
        "outputs", [{"logps"}, {"logps", "entropy"}, {"logps", "log_sum_sq_probs", "is_top1"}], ids=lambda names: " ".join(sorted(names))
    )
    @pytest.mark.parametrize("cuts", [(), (1,), (2, 50, 51, 300)], ids=str)
    def test_tiles_of_the_vocabulary_in_any_order(self, cuts, outputs):
        case = Case(5, 301, rich=True)
        gold = case.score(rows_torch, torch.float64, frozenset(outputs))
        assert_outputs(case, case.score(self.rows, outputs=frozenset(outputs), cuts=cuts), gold)

        stats = case.score(self.rows)
        common = {"entropy": stats["entropy"], "vocabulary": 301, "dtype": torch.float32}
        edges = [0, *cuts, 301]
        tiles = [
            self.rows.gradient_(case.x[:, lo:hi].clone(), case.target, lo, case.columns(lo, hi), stats["lse"], case.coefficients, **common)
            for lo, hi in pairwise(edges)
        ]
        assert torch.equal(torch.cat(tiles, 1), case.gradient(self.rows, stats))

    def test_columns_of_minus_infinity(self):
        case = Case(4, 301)
        case.target.clamp_(max=99)
        case.map = LogitMap(torch.zeros(301).index_fill_(0, torch.arange(100, 301), float("-inf")))
        case.coefficients["entropy"] = torch.tensor([0.5, -2.0, 3.0, 1e6])  # large ones must not turn 0 * inf into NaN
        names = ("logps", "entropy")
        short = Case(4, 301)
        short.x, short.target, short.map, short.coefficients = case.x[:, :100], case.target, LogitMap(), case.coefficients
        gold = short.score(rows_torch, torch.float64)
        want = short.gradient(rows_torch, gold, torch.float64, names, short.x.double())
        for rows in (self.rows, rows_torch):
            for cuts in ((), (100,), (200,)):  # with cuts, the first tiles that are seen hold nothing else
                got = case.score(rows, cuts=cuts)
                del got["mean_logits"]
                assert_outputs(case, got, {name: gold[name] for name in got})
            d = case.gradient(rows, got, names=names)
            assert not d[:, 100:].any()
            assert_near(d[:3, :100], want[:3], 1e-4, "gradient")
            assert_near(d[3, :100], want[3], 1e3, "gradient with a large coefficient")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_targets_outside_the_vocabulary_and_nan_stay_in_their_row(self, dtype):
        case = Case(6, 301)
        clean = case.score(self.rows)
        case.target = case.target.clone()
        case.target[:3] = torch.tensor([301, -1, 2**40])
        case.target[4] = case.x[4].argmax()
        case.x[4, case.target[4] - 1] = float("nan")
        out = case.score(self.rows)
        assert out["logps"].isnan().tolist() == [True] * 3 + [False, True, False]
        assert all(
            out[name].isnan().tolist() == [False] * 4 + [True, False] for name in ("lse", "entropy", "log_sum_sq_probs", "mean_logits")
        )
        assert not out["is_top1"][[0, 1, 2, 4]].any()
        assert all(torch.equal(out[name][[3, 5]], clean[name][[3, 5]]) for name in clean)
        d, want = (case.gradient(rows, out, dtype, names=("logps",)) for rows in (self.rows, rows_torch))
        assert d[4].isnan().all()
        others = [0, 1, 2, 3, 5]
        assert_near(d[others], want[others].double(), 2**-7 if dtype == torch.bfloat16 else 32 * EPS, "gradient")

    def test_no_rows(self):
        case = Case(0, 301)
        assert all(value.shape == (0,) for value in case.score(self.rows).values())
        stats = case.score(rows_torch)
        assert case.gradient(self.rows, stats, torch.bfloat16).shape == (0, 301)

    def test_bits_do_not_depend_on_the_run_or_on_the_order_of_rows(self):
        case = Case(6, 2500, rich=True)
        stats = case.score(self.rows)
        first = case.gradient(self.rows, stats)
        assert torch.equal(first, case.gradient(self.rows, case.score(self.rows)))
        order = torch.tensor([3, 0, 5, 1, 4, 2])
        case.x, case.target = case.x[order].contiguous(), case.target[order]
        case.map = replace(case.map, inv_temperature=case.map.inv_temperature[order])
        case.coefficients = {name: c[order] for name, c in case.coefficients.items()}
        again = case.score(self.rows)
        assert all(torch.equal(again[name], value[order]) for name, value in stats.items())
        assert torch.equal(case.gradient(self.rows, again), first[order])
