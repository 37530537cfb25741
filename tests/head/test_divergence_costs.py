"""FLOPs and bytes of the divergences: counted by torch's profiler tools and by the operating system, not taken from the planner."""

import sys
from functools import partial

import pytest
import torch
from growth import growth
from pairs import KINDS, pair
from torch.utils.flop_counter import FlopCounterMode

from fastalign import linear_divergence
from fastalign.head.divergence_function import plan_divergence

N, V, D, D2 = 96, 320, 32, 48
NVD = N * V * D
WHOLE, SLABS, TILES = None, 2 * V * 4 * 64 * 2, 2 * V * 4 * 16  # budgets


def flops(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def problem(kind, d2=D, frozen=False, ignored=0):
    return pair(kind, n=N, v=V, d=D, d2=d2, frozen=frozen, ignored=ignored, terms=("divergence",))


def run(p, schedule, budget, **options):
    if schedule == "none":
        with torch.no_grad():
            p.score(budget=budget, **options)
    elif schedule == "slab":
        p.slab_gradients(budget=budget, **options)
    else:
        p.gradients(schedule=schedule, budget=budget, differentiable=("divergence",), **options)


@pytest.mark.parametrize(
    ("schedule", "frozen", "whole", "tiles", "more_for_jsd"),
    [
        ("none", False, 4, 4, 4),
        ("frozen", True, 6, 10, 4),
        ("slab", False, 8, 12, 4),
        ("slab", True, 6, 10, 4),
        ("recompute", False, 12, 12, 4),
    ],
    ids=str,
)
@pytest.mark.parametrize("budget", [WHOLE, SLABS, TILES], ids=["whole", "slabs", "tiles"])
@pytest.mark.parametrize("kind", KINDS)
def test_flops_of_each_schedule(kind, budget, schedule, frozen, whole, tiles, more_for_jsd):
    nvd = tiles + more_for_jsd * (kind == "jsd") if budget == TILES else whole
    p = problem(kind, frozen=frozen)
    assert flops(lambda: run(p, schedule, budget)) == nvd * NVD
    gradients = {"hidden_grad": schedule != "none", "head_grad": schedule != "none" and not frozen, "local_loss": schedule == "slab"}
    plan = plan_divergence(N, V, D, kind=kind, schedule=schedule, budget=budget, **gradients)
    assert plan.plan.nvd == nvd and plan.plan.tiled == (budget == TILES) and plan.flops(N, V, D, D) == nvd * NVD
    assert plan.plan.scratch <= plan.plan.budget
    wide = problem(kind, d2=D2, frozen=frozen)
    assert flops(lambda: run(wide, schedule, budget)) == plan.flops(N, V, D, D2)


def test_masked_rows_reach_no_gemm():
    for schedule, nvd in (("slab", 8), ("recompute", 12)):
        p = problem("jsd", ignored=2)
        assert flops(lambda: run(p, schedule, WHOLE)) == nvd * NVD / 2  # noqa: B023
    p, mask = problem("jsd"), torch.arange(N) < N // 4
    assert flops(lambda: linear_divergence(*p.arguments, mask=mask)) == 4 * NVD / 4


def test_rows_without_a_coefficient_reach_no_gradient_gemm():
    for schedule, nvd in (("slab", 4 + 4 / 4), ("recompute", 4 + 8 / 4)):
        p = problem("jsd")
        p.student.coefficients["divergence"][N // 4 :] = 0
        assert flops(lambda: run(p, schedule, WHOLE)) == nvd * NVD  # noqa: B023


def test_outputs_of_the_student_cost_nothing_more():
    p = pair("reverse_kl", n=N, v=V, d=D, d2=D, ignored=0)
    assert set(p.outputs) == {"logps", "entropy", "lse"}
    assert flops(lambda: p.slab_gradients()) == 8 * NVD
    assert flops(lambda: p.gradients(schedule="recompute")) == 12 * NVD


@pytest.mark.parametrize(("budget", "first", "more"), [(WHOLE, 6, 2), (TILES, 10, 6)], ids=["whole", "tiles"])
def test_each_differentiable_output_of_a_frozen_head_costs_a_gradient(budget, first, more):
    p = pair("forward_kl", n=N, v=V, d=D, d2=D, ignored=0, frozen=True)
    for k, names in enumerate((("divergence",), ("divergence", "logps"), ("divergence", "logps", "entropy"))):
        out = p.score(budget=budget, differentiable=names)
        loss = sum(getattr(out, name).sum() for name in names)
        forward = flops(lambda: p.score(budget=budget, differentiable=names))  # noqa: B023
        assert forward == (first + more * k) * NVD and flops(lambda: loss.backward()) == 0  # noqa: B023
        assert plan_divergence(N, V, D, head_grad=False, budget=budget, grad_outputs=k + 1).plan.nvd == first + more * k


def test_plan_says_what_a_small_budget_costs():
    text = str(plan_divergence(4096, 151936, 512, kind="jsd", local_loss=True, budget=8 << 20))
    assert "16 NVD" in text and "slabs are cut into tiles of" in text and "5 GEMMs of the student's head, 3 of the teacher's" in text


INPUTS = """
    hidden = torch.randn(n, d, requires_grad=True)
    weight = (torch.randn(v, d) / d**0.5).requires_grad_()
    ref_hidden, ref_weight = torch.randn(n, d2), torch.randn(v, d2) / d2**0.5
"""
SMALL = "fastalign.linear_divergence(hidden, weight[:v // 8], ref_hidden, ref_weight[:v // 8], budget=budget).sum()"
DIVERGENCE = "fastalign.linear_divergence(hidden, weight, ref_hidden, ref_weight, kind='jsd', budget=budget).sum()"
LOSS = "fastalign.linear_divergence_loss(hidden, weight, ref_hidden, ref_weight, lambda out, rows: out.divergence.sum(), budget=budget)"
PLAIN = "torch.nn.functional.kl_div((hidden @ weight.T).log_softmax(1), (ref_hidden @ ref_weight.T).log_softmax(1), log_target=True)"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc; the bound is unproven elsewhere")
def test_memory_stays_within_gradients_and_budget():
    n, v, d, d2, budget = 1024, 151936, 64, 96, 64 << 20
    grown = partial(growth, INPUTS, small=SMALL, n=n, v=v, d=d, d2=d2, budget=budget)
    allowed = 1.05 * (4 * n * d + 4 * v * d + budget)
    assert grown(DIVERGENCE) <= allowed
    assert grown(LOSS) <= allowed
    assert grown(PLAIN) > 4 * allowed  # the measurement sees what it should
