"""The operator on a GPU (`make gpu`): schedules, dtypes and outputs against float64, reruns, memory, syncs, CUDA graphs, edges.

What needs no GPU runs on a CPU too, by the same functions, with slabs of a CPU's size.
"""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from pairs import KINDS, pair
from problems import ALL_OUTPUTS, Problem, make
from support import assert_close_to_gold

import fastalign
from fastalign.head import autograd
from fastalign.head.plan import MIN_ROWS, default_budget, make_plan

ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the operator on a GPU is unproven here"),
]
V, D = 4099, 64
ROWS = {"cpu": 150, "cuda": 2500}  # more than one slab of MIN_ROWS
SCHEDULES = ["none", "frozen", "keep", "recompute", "slab"]
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=ON_GPU)])
def device(request) -> str:
    return request.param


def budget_of(device: str, cut: str) -> int:
    """Room for some slabs of whole rows, or for tiles of the vocabulary."""
    return 2 * V * 4 * MIN_ROWS[device] // {"slabs": 1, "tiles": 16}[cut]


def on(device: str, **options) -> Problem:
    return to_device(make(**{"n": ROWS[device], "v": V, "d": D, **options}), device)


def to_device(problem: Problem, device: str) -> Problem:
    def move(x):
        return x.detach().to(device).requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x

    moved = {name: move(getattr(problem, name)) for name in ("hidden", "weight", "target", "bias", "temperature")}
    lora = None if problem.lora is None else tuple(move(x) for x in problem.lora)
    return replace(problem, **moved, lora=lora, coefficients={k: c.to(device) for k, c in problem.coefficients.items()})


def run(problem: Problem, how: str, **options) -> list[torch.Tensor]:
    """Gradients under a schedule; for `none` the outputs."""
    if how == "none":
        with torch.no_grad():
            out = fastalign.linear_logps(problem.hidden, problem.weight, problem.target, outputs=ALL_OUTPUTS, **problem.options, **options)
        return list(out)
    return problem.slab_gradients(**options) if how == "slab" else problem.gradients(schedule=how, **options)


def assert_outputs(found: list[torch.Tensor], gold: Problem) -> None:
    """Each output to 8 eps(fp32) of the largest logit, whatever the dtype of the inputs."""
    logits = gold.hidden.detach() @ gold.weight.detach().T
    bound = 8 * EPS * max(1.0, float(logits.abs().max()))
    for name, x, want in zip(ALL_OUTPUTS, found, gold.reference()):
        if name == "is_top1":
            assert torch.equal(x, want)
        else:
            assert x.dtype == torch.float32
            assert (x.double() - want).abs().max() <= bound, name
            assert want.abs().max() > 100 * bound, f"{name}: zeros would pass"


def gold_gradients(problem: Problem) -> tuple[torch.Tensor, ...]:
    gold = problem.to(torch.float64)
    return torch.autograd.grad(gold.loss(gold.reference()), gold.leaves)


def assert_gradients(problem: Problem, how: str, **options) -> None:
    """As near to float64 as plain autograd in the same dtype, and the same bits on a rerun."""
    got, again = run(problem, how, **options), run(problem, how, **options)
    assert all(torch.equal(a, b) for a, b in zip(got, again))
    for x, base, gold in zip(got, problem.plain_gradients(), gold_gradients(problem)):
        assert_close_to_gold(x, base, gold)


@pytest.mark.parametrize("rich", [False, True], ids=["plain", "rich"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cut", ["slabs", "tiles"])
def test_outputs(device, cut, dtype, rich):
    problem, budget = on(device, dtype=dtype, rich=rich), budget_of(device, cut)
    plan = make_plan(ROWS[device], V, D, dtype=dtype, device=device, hidden_grad=False, head_grad=False, budget=budget)
    assert plan.tiled or (cut == "slabs" and plan.slab_rows < ROWS[device])
    found, again = run(problem, "none", budget=budget), run(problem, "none", budget=budget)
    assert all(torch.equal(a, b) for a, b in zip(found, again))
    assert_outputs(found, problem.to(torch.float64))


@pytest.mark.parametrize("rich", [False, True], ids=["plain", "rich"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("how", SCHEDULES[1:])
@pytest.mark.parametrize("cut", ["slabs", "tiles"])
def test_gradients(device, cut, how, dtype, rich):
    assert_gradients(on(device, dtype=dtype, rich=rich, frozen=how == "frozen"), how, budget=budget_of(device, cut))


@pytest.mark.parametrize("how", SCHEDULES)
def test_rows_in_torch(device, how):
    problem = on(device, dtype=torch.bfloat16, rich=True, frozen=how == "frozen")
    options = {"impl": "torch", "budget": budget_of(device, "slabs")}
    if how == "none":
        assert_outputs(run(problem, how, **options), problem.to(torch.float64))
    else:
        assert_gradients(problem, how, **options)


@pytest.mark.parametrize("rich", [False, True], ids=["plain", "rich"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", ["slabs", "tiles"])
def test_divergence(device, cut, kind, dtype, rich):
    problem = pair(kind, n=ROWS[device], v=V, d=D, dtype=dtype, rich=rich)
    problem = replace(problem, student=to_device(problem.student, device), teacher=to_device(problem.teacher, device))
    gold, budget = problem.to(torch.float64), 2 * budget_of(device, cut)
    truth = gold.score(impl="reference")
    with torch.no_grad():
        out = problem.score(budget=budget)
        size = max(float((side.hidden @ side.weight.T).abs().max()) for side in (gold.student, gold.teacher))
    for name, value, want in zip(out._fields, out, truth):
        if value is not None:
            assert (value.double() - want).abs().max() <= 8 * EPS * max(1.0, size) < 0.01 * want.abs().max(), name
    wanted = torch.autograd.grad(gold.student.loss(truth), gold.leaves)
    for way in (problem.gradients, problem.slab_gradients):
        got, again = way(budget=budget), way(budget=budget)
        assert all(torch.equal(a, b) for a, b in zip(got, again))
        for x, base, g in zip(got, problem.plain_gradients(), wanted):
            assert_close_to_gold(x, base, g)


@pytest.mark.parametrize("how", ["keep", "recompute", "slab"])
def test_rows_that_are_not_active_change_nothing(device, how):
    problem, budget = on(device, ignored=0), budget_of(device, "slabs")
    for c in problem.coefficients.values():
        c[::3] = 0
    active = torch.arange(ROWS[device]) % 3 != 0
    for x, base, gold in zip(run(problem, how, budget=budget, active=active), run(problem, how, budget=budget), gold_gradients(problem)):
        assert_close_to_gold(x, base, gold)


def test_weight_in_another_order_of_memory(device):
    problem = on(device)
    apart = replace(problem, weight=problem.weight.detach().T.contiguous().T.requires_grad_())
    assert not apart.weight.is_contiguous()
    for how in ("recompute", "slab"):
        for x, base, gold in zip(run(apart, how), run(problem, how), gold_gradients(problem)):
            assert_close_to_gold(x, base, gold)


def test_target_outside_the_vocabulary(device):
    problem = on(device, n=8, ignored=0)
    clean = fastalign.linear_logps(problem.hidden, problem.weight, problem.target).logps
    problem.target[3], problem.target[5] = V, -7
    if device == "cpu":
        with pytest.raises(ValueError, match=rf"target\[3\] = {V} is outside the vocabulary"):
            fastalign.linear_logps(problem.hidden, problem.weight, problem.target)
        return
    logps = fastalign.linear_logps(problem.hidden, problem.weight, problem.target).logps
    assert logps.isnan().nonzero().flatten().tolist() == [3, 5]
    others = [0, 1, 2, 4, 6, 7]
    assert torch.equal(logps[others], clean[others])


@pytest.mark.parametrize("how", ["frozen", "keep", "recompute", "slab"])
def test_no_rows_and_one_word(device, how):
    empty = on(device, n=0, frozen=how == "frozen")
    assert [g.shape for g in run(empty, how)] == [x.shape for x in empty.leaves]
    assert not any(g.any() for g in run(empty, how))
    single = on(device, n=5, v=1, ignored=0, frozen=how == "frozen", terms=("logps",))
    assert not fastalign.linear_logps(single.hidden, single.weight, single.target).logps.any()
    assert not any(g.any() for g in run(single, how))


@pytest.mark.parametrize(("how", "ignored"), [*((how, 0) for how in SCHEDULES), *((how, 5) for how in SCHEDULES[:-1])])
def test_known_row_counts_cost_no_sync(how, ignored, monkeypatch):
    """On tensors without data, where every read by the host is an error. (`linear_loss` over ignored rows reads where they are.)"""
    monkeypatch.setattr(autograd, "no_autocast", lambda like: nullcontext())  # there is no autocast for such tensors
    problem = on("cpu", ignored=ignored, frozen=how == "frozen", terms=("logps",))
    count = int((problem.target >= 0).sum())
    empty = {name: torch.empty_like(getattr(problem, name), device="meta") for name in ("hidden", "weight", "target")}
    leaves = {name: empty[name].requires_grad_(getattr(problem, name).requires_grad) for name in ("hidden", "weight")}
    coefficients = {name: c.to("meta") for name, c in problem.coefficients.items()}
    problem = replace(problem, **(empty | leaves), coefficients=coefficients)
    for x in run(problem, how, impl="torch", budget=budget_of("cpu", "slabs"), live_rows=count):
        assert x.is_meta


@pytest.mark.parametrize(("how", "ignored"), [*((how, 0) for how in SCHEDULES), *((how, 5) for how in SCHEDULES[:-1])])
class TestOnlyOnGpu:
    pytestmark = ON_GPU

    def test_known_row_counts_cost_no_sync(self, how, ignored):
        problem = on("cuda", ignored=ignored, frozen=how == "frozen", dtype=torch.bfloat16)
        options = {"live_rows": int((problem.target >= 0).sum()), "budget": budget_of("cuda", "slabs")}
        run(problem, how, **options)  # compiles, and asks for the device's properties
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(problem, how, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_cuda_graph(self, how, ignored):
        """A captured pass, replayed on other inputs, gives the bits of an eager one."""
        problem, other = (on("cuda", ignored=ignored, frozen=how == "frozen", dtype=torch.bfloat16, seed=seed) for seed in (0, 1))
        options = {"live_rows": int((problem.target >= 0).sum()), "budget": budget_of("cuda", "slabs")}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                first = run(problem, how, **options)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run(problem, how, **options)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, first))
        with torch.no_grad():
            for name in ("hidden", "weight", "target"):
                getattr(problem, name).copy_(getattr(other, name))
        graph.replay()
        replayed = [x.clone() for x in captured]
        assert all(torch.equal(a, b) for a, b in zip(replayed, run(problem, how, **options)))
        assert not all(torch.equal(a, b) for a, b in zip(replayed, first))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: peak memory on a GPU is unproven here")
@pytest.mark.parametrize("how", ["none", "frozen", "recompute", "slab"])
def test_peak_memory(how):
    """The budget of logits, and nothing beyond it but rows of hidden size."""
    n, v, d, budget = 8192, 151936, 1024, 512 << 20
    hidden = torch.randn(n, d, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(v, d, device="cuda") / d**0.5).to(torch.bfloat16)
    target = torch.randint(0, v, (n,), device="cuda")
    options: dict = {"budget": budget, "live_rows": n}
    if how in ("recompute", "slab"):
        options["d_weight"] = torch.zeros(v, d, device="cuda")

    def once() -> None:
        hidden.grad = None
        if how == "slab":
            fastalign.linear_loss(hidden, weight, target, lambda out, rows: out.logps.sum(), **options).backward()
        elif how == "none":
            with torch.no_grad():
                fastalign.linear_logps(hidden, weight, target, **options)
        else:
            fastalign.linear_logps(hidden, weight, target, schedule=how, **options).logps.sum().backward()

    once()  # the libraries' own workspaces
    hidden.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    once()
    torch.cuda.synchronize()
    assert how == "none" or hidden.grad.any()
    assert "d_weight" not in options or options["d_weight"].any()
    assert torch.cuda.max_memory_allocated() - before <= budget + 16 * n * d + (32 << 20)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: refusals on a GPU are unproven here")
def test_what_does_not_fit_on_one_device_is_refused():
    problem = on("cuda", n=8)
    with pytest.raises(ValueError, match=r"weight is on cpu, hidden on cuda:0: move them to one device"):
        fastalign.linear_logps(problem.hidden, problem.weight.cpu(), problem.target)
    with pytest.raises(ValueError, match=r"weight is torch.float64, hidden torch.float32"):
        fastalign.linear_logps(problem.hidden, problem.weight.double(), problem.target)
    assert default_budget(torch.device("cuda")) <= 0.05 * torch.cuda.get_device_properties(0).total_memory
