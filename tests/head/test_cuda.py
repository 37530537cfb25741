"""The operator on a GPU: every schedule and dtype against float64, bitwise reruns, memory. Run by `make gpu`."""

from dataclasses import replace

import pytest
import torch
from problems import ALL_OUTPUTS, Problem, make
from support import assert_close_to_gold

import fastalign

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the operator on a GPU is unproven here"),
]
V = 4099
SLABS, TILES = 2 * V * 4 * 1024, 2 * V * 4 * 64


def on_gpu(**options) -> Problem:
    problem = make(v=V, d=64, **options)

    def move(x):
        return x.detach().cuda().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x

    moved = {name: move(getattr(problem, name)) for name in ("hidden", "weight", "target", "bias", "temperature")}
    lora = None if problem.lora is None else tuple(move(x) for x in problem.lora)
    return replace(problem, **moved, lora=lora, coefficients={k: c.cuda() for k, c in problem.coefficients.items()})


@pytest.mark.parametrize("rich", [False, True], ids=["plain", "rich"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("how", ["keep", "recompute", "slab", "frozen"])
@pytest.mark.parametrize("budget", [SLABS, TILES], ids=["slabs", "tiles"])
def test_values_and_gradients(how, dtype, rich, budget):
    problem = on_gpu(n=2500, dtype=dtype, rich=rich, frozen=how == "frozen")
    gold = problem.to(torch.float64)
    truth = gold.reference()
    with torch.no_grad():
        out = fastalign.linear_logps(problem.hidden, problem.weight, problem.target, outputs=ALL_OUTPUTS, budget=budget, **problem.options)
    bound = 8 * torch.finfo(torch.float32).eps * max(1.0, float((gold.hidden @ gold.weight.T).abs().max()))
    assert (out.logps.double() - truth.logps).abs().max() <= bound

    def run():
        return problem.slab_gradients(budget=budget) if how == "slab" else problem.gradients(schedule=how, budget=budget)

    got, again = run(), run()
    assert all(torch.equal(a, b) for a, b in zip(got, again))
    for x, base, g in zip(got, problem.plain_gradients(), torch.autograd.grad(gold.loss(truth), gold.leaves)):
        assert_close_to_gold(x, base, g)


def test_target_outside_the_vocabulary_gives_nan():
    problem = on_gpu(n=8, ignored=0)
    problem.target[3] = V
    logps = fastalign.linear_logps(problem.hidden, problem.weight, problem.target).logps
    assert logps.isnan().nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("how", ["logps", "loss"])
def test_peak_memory(how):
    n, v, d, budget = 8192, 151936, 1024, 512 << 20
    hidden = torch.randn(n, d, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(v, d, device="cuda") / d**0.5).to(torch.bfloat16).requires_grad_()
    target = torch.randint(0, v, (n,), device="cuda")
    total = torch.zeros(v, d, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    if how == "logps":
        loss = fastalign.linear_logps(hidden, weight, target, d_weight=total, budget=budget, live_rows=n).logps.sum()
    else:
        loss = fastalign.linear_loss(hidden, weight, target, lambda out, rows: out.logps.sum(), d_weight=total, budget=budget, live_rows=n)
    loss.backward()
    torch.cuda.synchronize()
    assert total.any()
    # float32 gradient of a slab's hidden states, temporaries of the row pass, and the gradient itself
    assert torch.cuda.max_memory_allocated() - before <= budget + 4 * n * d * 2 + (512 << 20)
