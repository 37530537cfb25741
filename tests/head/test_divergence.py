"""Divergences of a student's head from a teacher's: values and gradients against float64, and what must hold whatever the numbers."""

import math

import pytest
import torch
from pairs import BETA, KINDS, pair
from support import assert_close_to_gold, relative_error
from torch.nn.functional import kl_div, log_softmax

from fastalign import DivergenceOutput, linear_divergence, linear_divergence_loss, linear_divergence_outputs, linear_logps
from fastalign.head.reference import reference_divergence

V = 301
WHOLE, SLABS, TILES = None, 2 * 2 * V * 4 * 64, V * 4 * 16  # budgets: one slab; slabs of 64 rows or fewer; tiles over the vocabulary


def each_way(problem, **options):
    yield problem.gradients(**options)
    yield problem.slab_gradients(**options)


@pytest.mark.parametrize("rich", [False, True], ids=["plain", "rich"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", [WHOLE, SLABS, TILES], ids=["whole", "slabs", "tiles"])
def test_values_and_gradients_equal_float64(kind, dtype, rich, budget):
    problem = pair(kind, n=150, dtype=dtype, rich=rich)
    gold = problem.to(torch.float64)
    truth = gold.score(impl="reference")
    with torch.no_grad():
        out = problem.score(budget=budget)
        size = max(float((side.hidden @ side.weight.T).detach().abs().max()) for side in (gold.student, gold.teacher))
    bound = 8 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps * max(1.0, size)
    for name, value, want in zip(out._fields, out, truth):
        if value is not None:
            assert value.dtype == torch.promote_types(dtype, torch.float32)
            assert (value.double() - want).abs().max() <= bound < 0.01 * want.abs().max(), name
            assert not value[problem.student.target == -100].any()
    wanted = torch.autograd.grad(gold.student.loss(truth), gold.leaves)
    for got in each_way(problem, budget=budget):
        for i, (x, base, g) in enumerate(zip(got, problem.plain_gradients(), wanted)):
            if dtype == torch.float64:
                assert relative_error(x, g) < 1e-12
            else:
                assert_close_to_gold(x, base, g, f"gradient {i}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", [WHOLE, TILES], ids=["whole", "tiles"])
def test_frozen_head_equals_float64(kind, budget):
    problem = pair(kind, n=100, dtype=torch.float64, rich=True, frozen=True)
    want = torch.autograd.grad(problem.student.loss(problem.score(impl="reference")), problem.leaves)
    for got in each_way(problem, budget=budget):
        assert len(got) == 2 and max(relative_error(a, b) for a, b in zip(got, want)) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_the_definition_equals_torch(kind):
    p, q = (log_softmax(torch.randn(6, 11, generator=torch.Generator().manual_seed(s), dtype=torch.float64), 1) for s in (0, 1))

    def kl(a, b):
        return kl_div(b, a, reduction="none", log_target=True).sum(1)

    m = ((1 - BETA) * p.exp() + BETA * q.exp()).log()
    want = {"forward_kl": kl(q, p), "reverse_kl": kl(p, q), "jsd": BETA * kl(q, m) + (1 - BETA) * kl(p, m)}[kind]
    assert torch.allclose(reference_divergence(p, q, kind, BETA), want, rtol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    problem = pair(kind, n=5, v=11, d=3, d2=4, dtype=torch.float64, rich=True, ignored=3, terms=("divergence",))

    def score(hidden, weight, bias, u, b):
        options = dict(problem.options, bias=bias, lora=(u, b))
        return linear_divergence(hidden, weight, *problem.arguments[2:], **options)

    assert torch.autograd.gradcheck(score, problem.leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", [WHOLE, TILES], ids=["whole", "tiles"])
def test_identical_heads_diverge_by_exactly_nothing(kind, budget, dtype):
    problem = pair(kind, d2=16, dtype=dtype, rich=True, terms=("divergence",))
    problem.teacher = problem.student
    assert not problem.score(budget=budget).divergence.any()
    assert not any(x.any() for got in each_way(problem, budget=budget) for x in got)


def test_small_and_large_beta():
    """jsd / beta -> forward_kl and jsd / (1 - beta) -> reverse_kl; 0 and 1 themselves are the divergences."""
    arguments, small = pair(dtype=torch.float64).arguments, 1e-7
    forward, reverse = (linear_divergence(*arguments, kind=kind) for kind in ("forward_kl", "reverse_kl"))
    for beta, want in ((small, forward), (1 - small, reverse)):
        assert torch.allclose(linear_divergence(*arguments, kind="jsd", beta=beta) / small, want, rtol=1e-3)
        assert not torch.allclose(forward, reverse, rtol=0.1)
    assert torch.equal(linear_divergence(*arguments, kind="jsd", beta=0.0), forward)
    assert torch.equal(linear_divergence(*arguments, kind="jsd", beta=1.0), reverse)
    assert linear_divergence(*arguments, kind="jsd", beta=0.5).max() <= math.log(2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", [WHOLE, TILES], ids=["whole", "tiles"])
def test_vocabulary_masked_by_infinite_biases(kind, budget):
    """Tokens that both sides exclude do not count: as if the vocabulary were shorter."""
    terms = ("divergence", "logps", "entropy")
    problem, short = (pair(kind, dtype=torch.float64, terms=terms) for _ in range(2))
    bias = torch.zeros(V, dtype=torch.float64).index_fill_(0, torch.arange(100, V), float("-inf"))
    for full, cut in ((problem.student, short.student), (problem.teacher, short.teacher)):
        full.target.clamp_(max=99)
        full.bias, cut.target, cut.weight = bias, full.target, full.weight.detach()[:100].clone().requires_grad_()
    assert relative_error(problem.score(budget=budget).divergence, short.score(budget=budget).divergence) < 1e-12
    for got, want in zip(each_way(problem, budget=budget), each_way(short, budget=budget)):
        assert relative_error(got[0], want[0]) < 1e-12
        assert relative_error(got[1][:100], want[1]) < 1e-12 and not got[1][100:].any()


@pytest.mark.parametrize("budget", [WHOLE, TILES], ids=["whole", "tiles"])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_what_one_side_excludes(side, budget):
    """Infinite where probability is divided by nothing, else finite; the gradient of forward_kl and jsd always is."""
    for kind in KINDS:
        problem = pair(kind, dtype=torch.float64, terms=("divergence",))
        problem.student.target.clamp_(max=99)
        getattr(problem, side).bias = torch.zeros(V, dtype=torch.float64).index_fill_(0, torch.arange(100, V), float("-inf"))
        live = problem.student.target != -100
        out = problem.score(budget=budget).divergence[live]
        infinite = (kind, side) in (("forward_kl", "student"), ("reverse_kl", "teacher"))
        assert out.isposinf().all() if infinite else (out > 0).all() and out.isfinite().all()
        if (kind, side) != ("reverse_kl", "teacher"):
            want = torch.autograd.grad(problem.student.loss(problem.score(impl="reference")), problem.leaves) if not infinite else None
            for got in each_way(problem, budget=budget):
                assert all(x.isfinite().all() and x.any() for x in got)
                assert want is None or max(relative_error(a, b) for a, b in zip(got, want)) < 1e-11


def test_large_logits_stay_finite():
    for kind in KINDS:
        problem = pair(kind, dtype=torch.float32)
        problem.student.hidden = (problem.student.hidden.detach() * 1e4).requires_grad_()
        problem.teacher.hidden = problem.teacher.hidden.detach() * 3e3
        assert all(x.isfinite().all() for x in problem.score(budget=TILES) if x is not None)
        assert all(x.isfinite().all() for got in each_way(problem, budget=TILES) for x in got)


@pytest.mark.parametrize("kind", KINDS)
def test_masked_rows_may_hold_nan_and_get_zero_gradient(kind):
    clean, poisoned = pair(kind, ignored=0, terms=("divergence",)), pair(kind, ignored=0, terms=("divergence",))
    mask = torch.arange(37) % 3 > 0
    for side in (poisoned.student, poisoned.teacher):
        side.hidden = side.hidden.detach().masked_fill(~mask.unsqueeze(1), float("nan")).requires_grad_()
    results = []
    for problem in (clean, poisoned):
        out = linear_divergence(*problem.arguments, kind=kind, mask=mask)
        loss = linear_divergence_loss(*problem.arguments, lambda out, rows: out.divergence.square().sum(), kind=kind, mask=mask)
        results.append([out, *torch.autograd.grad(out.square().sum(), problem.leaves), *torch.autograd.grad(loss, problem.leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results))
    assert not any(x[~mask].any() and x[mask].any() for x in (results[0][i] for i in (0, 1, 3)))
    assert linear_divergence(*clean.arguments, kind=kind)[~mask].all()


def test_mask_and_target_both_say_which_rows_count():
    problem = pair()
    mask = torch.arange(37) % 2 > 0
    out = linear_divergence_outputs(*problem.arguments, problem.student.target, mask=mask)
    counts = mask & (problem.student.target != -100)
    assert torch.equal(out.divergence != 0, counts) and torch.equal(out.logps != 0, counts)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_outputs_of_the_student_are_those_of_linear_logps(impl):
    problem = pair("jsd", dtype=torch.float64, rich=True)
    student = problem.student
    out = linear_divergence_outputs(*problem.arguments, **problem.options, outputs=("entropy", "lse", "is_top1"), impl=impl)
    want = linear_logps(student.hidden, student.weight, student.target, outputs=("entropy", "lse", "is_top1"), **student.options)
    for name in ("logps", "entropy", "lse"):
        assert relative_error(getattr(out, name), getattr(want, name)) < 1e-13
    assert torch.equal(out.is_top1, want.is_top1)
    assert out.divergence.requires_grad and not out.is_top1.requires_grad


def test_teacher_gets_no_gradient():
    problem = pair()
    for x in problem.arguments[2:]:
        x.requires_grad_()
    out = linear_divergence(*problem.arguments)
    loss = linear_divergence_loss(*problem.arguments, lambda out, rows: out.divergence.sum())
    for value in (out.sum(), loss):
        given = torch.autograd.grad(value, problem.arguments, allow_unused=True)
        assert [x is None for x in given] == [False, False, True, True]
    with torch.no_grad():
        assert not linear_divergence(*problem.arguments).requires_grad


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("ignored", [0, 1], ids=["live", "all ignored"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_rows_and_one_row(kind, n, ignored):
    problem = pair(kind, n=n, ignored=ignored)
    assert problem.score().divergence.shape == (n,)
    for got in each_way(problem):
        assert got[0].shape == problem.student.hidden.shape
        assert bool(got[1].any()) == bool(n and not ignored) and got[1].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_one_token_vocabulary_has_no_divergence(kind):
    problem = pair(kind, v=1, ignored=0, rich=True, terms=("divergence",))
    assert not problem.score().divergence.any()
    assert not any(x.any() for got in each_way(problem) for x in got)


def test_leading_shapes_and_strided_weights():
    problem = pair(n=24, dtype=torch.float64, ignored=0, terms=("divergence",))
    hidden, weight, ref_hidden, ref_weight = problem.arguments

    def strided(x):
        wide = torch.zeros(x.shape[0], 2 * x.shape[1], dtype=x.dtype)
        wide[:, ::2] = x.detach()
        return wide[:, ::2].requires_grad_()

    flat = linear_divergence(*problem.arguments)
    apart = strided(weight)
    assert not apart.is_contiguous()
    folded = linear_divergence(hidden.view(2, 3, 4, -1), apart, ref_hidden.view(2, 3, 4, -1), strided(ref_weight), budget=TILES)
    assert folded.shape == (2, 3, 4) and torch.allclose(folded.flatten(), flat, rtol=1e-12)
    assert relative_error(torch.autograd.grad(folded.sum(), apart)[0], torch.autograd.grad(flat.sum(), weight)[0]) < 1e-12


def test_order_of_rows_and_precision_of_the_teacher():
    problem = pair("jsd", n=64, dtype=torch.float64, ignored=0)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    hidden, weight, ref_hidden, ref_weight = problem.arguments
    out = linear_divergence(*problem.arguments, kind="jsd")
    assert relative_error(linear_divergence(hidden[order], weight, ref_hidden[order], ref_weight, kind="jsd"), out[order]) < 1e-12
    half = [x.detach().bfloat16() for x in (ref_hidden, ref_weight)]
    mixed = linear_divergence(hidden.float(), weight.float(), *half, kind="jsd")
    want = linear_divergence(hidden, weight, *(x.double() for x in half), kind="jsd")
    assert mixed.dtype == torch.float32 and relative_error(mixed, want) < 1e-5


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_second_backward_gives_the_same(frozen):
    problem = pair("jsd", rich=True, frozen=frozen)
    value = problem.student.loss(problem.score())
    first = torch.autograd.grad(value, problem.leaves, retain_graph=True)
    second = torch.autograd.grad(value, problem.leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    loss = linear_divergence_loss(*problem.arguments, problem.student.loss, outputs=problem.outputs, **problem.options)
    first = [g.clone() for g in torch.autograd.grad(loss, problem.leaves, retain_graph=True)]
    assert all(torch.equal(2 * a, b) for a, b in zip(first, torch.autograd.grad(2 * loss, problem.leaves)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_reruns_are_bitwise_equal(kind, dtype):
    problem = pair(kind, n=300, dtype=dtype, rich=True)
    runs = [[*problem.gradients(budget=180000), *problem.slab_gradients(budget=180000)] for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", [WHOLE, SLABS, TILES], ids=["whole", "slabs", "tiles"])
def test_rows_without_a_coefficient_are_dropped_exactly(kind, budget):
    problem = pair(kind, n=200, dtype=torch.float64, rich=True)
    for c in problem.student.coefficients.values():
        c[10:160] = 0
    want = torch.autograd.grad(problem.student.loss(problem.score(impl="reference")), problem.leaves)
    active = (torch.arange(200) < 10) | (torch.arange(200) >= 160)
    for options in ({}, {"active": active}, {"live_rows": int((problem.student.target != -100).sum())}):
        for got in each_way(problem, budget=budget, **options):
            assert max(relative_error(a, b) for a, b in zip(got, want)) < 1e-11
            assert not got[0][10:160].any()


def test_weight_gradient_added_into_a_buffer():
    problem = pair(n=80, dtype=torch.bfloat16)
    want = problem.to(torch.float64).gradients()[1]
    problem.student.weight.requires_grad_(False)
    for run in (problem.gradients, problem.slab_gradients):
        start = torch.randn(V, 16)
        total = start.clone()
        assert len(run(d_weight=total)) == 1
        assert relative_error(total - start, want) < 5e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "kl"}, r"kind must be one of \('forward_kl', 'reverse_kl', 'jsd'\), got 'kl'"),
        ({"beta": 1.5}, r"beta must be in \[0, 1\], got 1.5"),
        ({"mask": torch.ones(37)}, r"mask must be bool of shape \(37,\) on cpu to match hidden, got torch.float32"),
        ({"mask": torch.ones(36, dtype=torch.bool)}, r"got torch.bool \(36,\)"),
        ({"ref_hidden": torch.zeros(36, 24)}, r"ref_hidden must hold the rows \(37,\) of hidden"),
        ({"ref_hidden": torch.zeros(37, 24, dtype=torch.float64)}, "hidden is torch.float32 and ref_hidden torch.float64: cast"),
        ({"ref_weight": torch.zeros(300, 24)}, "weight and ref_weight must have one vocabulary.*cut the rows that pad"),
        ({"ref_weight": torch.zeros(V, 23)}, "the reference: hidden .* must share D"),
        ({"ref_softcap": -1.0}, "the reference: softcap must be positive"),
        ({"ref_bias": torch.zeros(300)}, r"the reference: bias must be \(301,\)"),
        ({"weight": torch.zeros(V, 15)}, "^hidden .* must share D"),
        ({"target": torch.full((37,), V)}, r"target\[0\] = 301 is outside the vocabulary"),
        ({"outputs": ("logps",)}, "got 'logps': it needs a target"),
        ({"outputs": ("mean_logits",)}, r"outputs takes names out of \('divergence', 'entropy', 'lse'\), got 'mean_logits'"),
        ({"differentiable": ("is_top1",)}, "differentiable takes names out of"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"schedule": "keep"}, "has no schedule 'keep': use 'auto', or linear_divergence_loss"),
        ({"schedule": "slab"}, "call linear_divergence_loss, or use 'auto'"),
        ({"schedule": "frozen"}, "weight, bias or lora requires one"),
        ({"budget": 0}, "budget must be a positive number of bytes"),
    ],
)
def test_errors_name_the_argument_and_the_remedy(changes, message):
    given = dict(zip(("hidden", "weight", "ref_hidden", "ref_weight"), pair().arguments)) | changes
    with pytest.raises(ValueError, match=message):
        linear_divergence_outputs(**given)


def test_outputs_have_a_function_of_their_own():
    with pytest.raises(TypeError, match="outputs"):
        linear_divergence(*pair().arguments, outputs=("entropy",))


def test_the_loss_sees_every_row_once():
    problem, seen = pair(n=200, ignored=3), []

    def loss_fn(out, rows):
        assert isinstance(out, DivergenceOutput) and out.entropy is None
        seen.append((rows.start, rows.stop))
        assert out.divergence.shape == (rows.stop - rows.start,)
        return out.divergence.sum()

    loss = linear_divergence_loss(*problem.arguments, loss_fn, problem.student.target, budget=SLABS)
    assert len(seen) > 1 and [a for a, _ in seen[1:]] == [b for _, b in seen[:-1]] and seen[0][0] == 0 and seen[-1][1] == 200
    assert torch.allclose(loss, linear_divergence(*problem.arguments, target=problem.student.target).sum())
