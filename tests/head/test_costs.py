"""FLOPs and bytes: counted by torch's profiler tools and by the operating system, not taken from the planner."""

import sys
from functools import partial

import pytest
import torch
from growth import growth
from problems import make
from torch.utils.flop_counter import FlopCounterMode

from fastalign import linear_logps, linear_loss
from fastalign.head import plan

N, V, D = 96, 320, 32
NVD = N * V * D


def flops(run) -> float:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / NVD


def problem(frozen=False, ignored=0):
    return make(n=N, v=V, d=D, ignored=ignored, frozen=frozen, terms=("logps",))


@pytest.mark.parametrize(
    ("schedule", "frozen", "nvd"),
    [("none", False, 2), ("frozen", True, 4), ("slab", False, 6), ("slab", True, 4), ("keep", False, 6), ("recompute", False, 8)],
)
@pytest.mark.parametrize("budget", [None, V * 4 * 64 * 2], ids=["one slab", "two slabs"])
def test_flops_of_each_schedule(schedule, frozen, nvd, budget):
    p = problem(frozen)

    def run():
        with torch.set_grad_enabled(schedule != "none"):
            if schedule == "slab":
                linear_loss(p.hidden, p.weight, p.target, p.loss, budget=budget).backward()
            else:
                out = linear_logps(p.hidden, p.weight, p.target, schedule=schedule, budget=budget)
                if schedule != "none":
                    p.loss(out).backward()

    assert flops(run) == nvd
    request = {"hidden_grad": schedule != "none", "head_grad": schedule != "none" and not frozen, "local_loss": schedule == "slab"}
    assert plan.make_plan(N, V, D, schedule=schedule, budget=budget, **request).nvd == nvd


@pytest.mark.parametrize(("schedule", "nvd"), [("keep", 6), ("recompute", 8), ("slab", 6)])
def test_ignored_rows_reach_no_gemm(schedule, nvd):
    p = problem(ignored=2)

    def run():
        if schedule == "slab":
            linear_loss(p.hidden, p.weight, p.target, p.loss).backward()
        else:
            p.loss(linear_logps(p.hidden, p.weight, p.target, schedule=schedule)).backward()

    assert flops(run) == nvd / 2


@pytest.mark.parametrize(("schedule", "nvd"), [("keep", 2 + 1), ("recompute", 2 + 1.5), ("slab", 2 + 1)])
def test_rows_without_a_coefficient_reach_no_gradient_gemm(schedule, nvd):
    p = problem()
    p.coefficients["logps"][N // 4 :] = 0

    def run():
        if schedule == "slab":
            linear_loss(p.hidden, p.weight, p.target, p.loss).backward()
        else:
            p.loss(linear_logps(p.hidden, p.weight, p.target, schedule=schedule)).backward()

    assert flops(run) == nvd


def test_vocabulary_tiles_of_a_slab_cost_two_more():
    p = problem()
    budget = V * 4 * 16
    assert plan.make_plan(N, V, D, local_loss=True, budget=budget).tiled
    assert flops(lambda: linear_loss(p.hidden, p.weight, p.target, p.loss, budget=budget).backward()) == 8
    assert plan.make_plan(N, V, D, local_loss=True, budget=budget).nvd == 8


def test_vocabulary_tiles_of_kept_logits_cost_nothing_more():
    p = problem()
    request = {"schedule": "keep", "budget": V * 4 * 16}
    assert plan.make_plan(N, V, D, **request).tiled
    assert flops(lambda: p.loss(linear_logps(p.hidden, p.weight, p.target, **request)).backward()) == 6


@pytest.mark.parametrize(("budget", "nvd"), [(None, 2 + 4), (V * 4 * 16, 2 + 4 + 4)], ids=["whole", "tiles"])
def test_flops_of_a_frozen_head_with_two_outputs(budget, nvd):
    p = make(n=N, v=V, d=D, ignored=0, frozen=True, terms=("logps", "entropy"))
    assert flops(lambda: p.loss(linear_logps(p.hidden, p.weight, p.target, outputs=("entropy",), budget=budget)).backward()) == nvd
    assert plan.make_plan(N, V, D, head_grad=False, grad_outputs=2, budget=budget).nvd == nvd


INPUTS = """
    hidden = torch.randn(n, d, requires_grad=True)
    weight = (torch.randn(v, d) / d**0.5).requires_grad_()
    target, c = torch.randint(0, v, (n,)), torch.randn(n)
"""
SMALL = "fastalign.linear_logps(hidden, weight[:v // 8], target % (v // 8), budget=budget).logps.sum()"
LOGPS = "(fastalign.linear_logps(hidden, weight, target, budget=budget).logps * c).sum()"
SLAB = "fastalign.linear_loss(hidden, weight, target, lambda out, rows: (out.logps * c[rows]).sum(), budget=budget)"
FROZEN = (
    "(lambda out: (out.logps * c + out.entropy).sum())"
    "(fastalign.linear_logps(hidden, weight.detach(), target, outputs=('entropy',), budget=budget))"
)
PLAIN = "((hidden @ weight.T).log_softmax(1).gather(1, target[:, None])[:, 0] * c).sum()"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc; the bound is unproven elsewhere")
@pytest.mark.parametrize(
    ("n", "v", "d"), [(1024, 151936, 64), pytest.param(4096, 151936, 512, marks=pytest.mark.slow)], ids=["small", "large"]
)
def test_memory_stays_within_gradients_and_budget(n, v, d):
    budget = 64 << 20
    grown = partial(growth, INPUTS, small=SMALL, n=n, v=v, d=d, budget=budget)
    allowed = 1.05 * (4 * n * d + 4 * v * d + budget)
    assert grown(LOGPS) <= allowed
    assert grown(SLAB) <= allowed
    assert grown(FROZEN) <= 1.05 * (4 * n * d * 3 + budget)
    if n == 1024:
        assert grown(PLAIN) > 4 * allowed  # the measurement sees what it should


def test_plan_explains_itself():
    text = plan.explain(4096, 151936, 512, budget=64 << 20)
    assert "schedule recompute" in text and "all logits need 2374.0 MiB" in text
    assert "slabs of 1024 rows x 4096 columns" in text and "stay in cache" in text
    slab = plan.explain(4096, 151936, 512, budget=64 << 20, local_loss=True)
    assert "slabs of 103 rows x 151936 columns" in slab and "cache" not in slab
    tiled = plan.explain(4096, 262144, 512, budget=8 << 20, local_loss=True)
    assert "8 NVD" in tiled and "tiles of 1024 columns" in tiled


def test_default_budget_is_a_power_of_two_that_free_memory_does_not_change():
    budget = plan.default_budget(torch.device("cpu"))
    ballast = torch.ones(1 << 26)
    assert budget == plan.default_budget(torch.device("cpu")) and budget & (budget - 1) == 0 and ballast.sum() > 0
