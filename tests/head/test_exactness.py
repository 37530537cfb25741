"""Values and gradients against float64, in every schedule, slab shape and dtype."""

import pytest
import torch
from problems import ALL_OUTPUTS, make
from support import assert_close_to_gold, relative_error

import fastalign
from fastalign.head import native

WHOLE, SLABS, TILES = None, 2 * 301 * 4 * 64, 301 * 4 * 8  # budgets: one slab; slabs of 64 rows or fewer; tiles over the vocabulary
NATIVE = pytest.mark.skipif(native.find() is None, reason="there is no native library: the operator over its rows is unproven here")
KINDS = [pytest.param("torch", dtype, id=f"torch-{dtype}") for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)]
KINDS += [pytest.param("native", dtype, id=f"native-{dtype}", marks=NATIVE) for dtype in (torch.float32, torch.bfloat16, torch.float16)]


@pytest.mark.parametrize("rich", [False, True], ids=["plain", "rich"])
@pytest.mark.parametrize(("impl", "dtype"), KINDS)
@pytest.mark.parametrize("budget", [WHOLE, TILES], ids=["whole", "tiles"])
def test_outputs_equal_float64(impl, dtype, budget, rich):
    problem = make(dtype=dtype, rich=rich)
    with torch.no_grad():
        options = dict(problem.options, outputs=ALL_OUTPUTS, budget=budget, impl=impl)
        out = fastalign.linear_logps(problem.hidden, problem.weight, problem.target, **options)
        gold = problem.to(torch.float64).reference()
        logits = problem.hidden.double() @ problem.weight.double().T
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    for name in ALL_OUTPUTS[:-1]:
        x, g = getattr(out, name), getattr(gold, name)
        assert x.dtype == torch.promote_types(dtype, torch.float32)
        assert (x.double() - g).abs().max() <= 8 * eps * max(1.0, float(logits.abs().max())), name
        assert g.abs().max() > 0.1
    assert torch.equal(out.is_top1, gold.is_top1)
    assert not out.logps[problem.target == -100].any()


@pytest.mark.parametrize("rich", [False, True], ids=["plain", "rich"])
@pytest.mark.parametrize(("impl", "dtype"), KINDS)
@pytest.mark.parametrize("how", ["keep", "recompute", "slab"])
@pytest.mark.parametrize("budget", [WHOLE, SLABS, TILES], ids=["whole", "slabs", "tiles"])
def test_gradients_equal_float64(how, impl, dtype, budget, rich):
    problem = make(n=150, dtype=dtype, rich=rich)
    options = {"budget": budget, "impl": impl}
    got = problem.slab_gradients(**options) if how == "slab" else problem.gradients(schedule=how, **options)
    gold = problem.to(torch.float64)
    gold_gradients = torch.autograd.grad(gold.loss(gold.reference()), gold.leaves)
    for i, (x, base, g) in enumerate(zip(got, problem.plain_gradients(), gold_gradients)):
        if dtype == torch.float64:
            assert relative_error(x, g) < 1e-13
        else:
            assert_close_to_gold(x, base, g, f"gradient {i}")


@pytest.mark.parametrize("rich", [False, True], ids=["plain", "rich"])
@pytest.mark.parametrize(("impl", "dtype"), KINDS)
@pytest.mark.parametrize("budget", [WHOLE, TILES], ids=["whole", "tiles"])
def test_frozen_head_equals_float64(impl, dtype, budget, rich):
    problem = make(n=150, dtype=dtype, rich=rich, frozen=True)
    gold = problem.to(torch.float64)
    gold_gradients = torch.autograd.grad(gold.loss(gold.reference()), gold.leaves)
    base = problem.plain_gradients()
    options = {"budget": budget, "impl": impl}
    for got in (problem.gradients(schedule="frozen", **options), problem.slab_gradients(**options)):
        assert len(got) == (2 if rich else 1)
        for x, b, g in zip(got, base, gold_gradients):
            if dtype == torch.float64:
                assert relative_error(x, g) < 1e-13
            else:
                assert_close_to_gold(x, b, g)


@pytest.mark.parametrize("term", ["logps", "entropy", "lse", "mean_logits"])
def test_each_output_alone_passes_gradcheck(term):
    problem = make(n=5, v=11, d=3, dtype=torch.float64, rich=True, ignored=3, terms=(term,))

    def score(hidden, weight, bias, u, b):
        options = dict(problem.options, bias=bias, lora=(u, b))
        return getattr(fastalign.linear_logps(hidden, weight, problem.target, outputs=(term,), **options), term)

    assert torch.autograd.gradcheck(score, problem.leaves)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_equals_torch(reduction, z_loss, label_smoothing):
    problem = make(dtype=torch.float64)
    hidden, weight, target = problem.hidden, problem.weight, problem.target
    got = fastalign.linear_cross_entropy(
        hidden, weight, target, reduction=reduction, label_smoothing=label_smoothing, z_loss=z_loss, budget=TILES
    )
    logits = hidden @ weight.T
    want = torch.nn.functional.cross_entropy(logits, target, reduction=reduction, label_smoothing=label_smoothing)
    z = z_loss * logits.logsumexp(1).square() * (target != -100)
    want = want + {"mean": z.sum() / (target != -100).sum(), "sum": z.sum(), "none": z}[reduction]
    assert torch.allclose(got, want, rtol=1e-12)
    for a, b in zip(torch.autograd.grad(got.sum(), [hidden, weight]), torch.autograd.grad(want.sum(), [hidden, weight])):
        assert relative_error(a, b) < 1e-12


def test_large_logits_stay_finite():
    problem = make(dtype=torch.float32)
    hidden = (problem.hidden.detach() * 1e4).requires_grad_()
    out = fastalign.linear_logps(hidden, problem.weight, problem.target, outputs=ALL_OUTPUTS, budget=TILES)
    (d,) = torch.autograd.grad(problem.loss(out), [hidden])
    assert all(x.isfinite().all() for x in out) and d.isfinite().all()


@pytest.mark.parametrize("budget", [WHOLE, TILES], ids=["whole", "tiles"])
def test_vocabulary_masked_by_an_infinite_bias(budget):
    problem = make(dtype=torch.float64, terms=("logps", "entropy"))
    problem.target.clamp_(max=99)
    problem.bias = torch.zeros(301, dtype=torch.float64).index_fill_(0, torch.arange(100, 301), float("-inf"))
    short = make(dtype=torch.float64, terms=("logps", "entropy"))
    short.target, short.weight = problem.target, problem.weight.detach()[:100].clone().requires_grad_()
    out, want = (
        fastalign.linear_logps(p.hidden, p.weight, p.target, bias=p.bias, outputs=("entropy", "log_sum_sq_probs"), budget=budget)
        for p in (problem, short)
    )
    for x, y in ((out.logps, want.logps), (out.entropy, want.entropy), (out.log_sum_sq_probs, want.log_sum_sq_probs)):
        assert relative_error(x, y) < 1e-12
    (d,) = torch.autograd.grad(problem.loss(out), [problem.hidden])
    (d_want,) = torch.autograd.grad(short.loss(want), [short.hidden])
    assert relative_error(d, d_want) < 1e-12
