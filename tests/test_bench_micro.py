"""What single calls take: `make microbench`. Each also checks its result, so that no time is shown for a wrong one."""

from __future__ import annotations

import random

import pytest
import torch
from support import relative_error

from fastalign import linear_logps, losses
from fastalign.head.reference import reference_logps
from fastalign.packing import collate, pack
from fastalign.types import Sample

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed: the times of single calls are not measured")
pytestmark = pytest.mark.micro

N, V, D = 256, 8192, 256


@pytest.fixture(scope="module")
def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, weight and targets of a head."""
    torch.manual_seed(0)
    return torch.randn(N, D, requires_grad=True), (torch.randn(V, D) / D**0.5).requires_grad_(), torch.randint(V, (N,))


def test_head_forward(benchmark, problem):
    hidden, weight, target = problem
    with torch.no_grad():
        found = benchmark(linear_logps, hidden, weight, target)
        assert relative_error(found.logps, reference_logps(hidden.double(), weight.double(), target).logps) < 1e-5


def test_head_forward_and_backward(benchmark, problem):
    hidden, weight, target = problem

    def run():
        return torch.autograd.grad(linear_logps(hidden, weight, target).logps.sum(), (hidden, weight))

    gold = reference_logps(h := hidden.detach().double().requires_grad_(), w := weight.detach().double().requires_grad_(), target)
    for x, want in zip(benchmark(run), torch.autograd.grad(gold.logps.sum(), (h, w))):
        assert relative_error(x, want) < 1e-4


@pytest.mark.parametrize("name", ["dpo", "ipo", "simpo", "orpo"])
def test_preference_loss(benchmark, name):
    """Forward and backward of 4096 pairs; the gradient against a difference quotient in float64."""
    torch.manual_seed(0)
    lengths = torch.full((4096,), 50.0)
    logps = [-50 - 10 * torch.rand(4096).double() for _ in range(4)]
    call = {
        "dpo": lambda chosen: losses.dpo(chosen, *logps[1:]),
        "ipo": lambda chosen: losses.ipo(chosen, *logps[1:], chosen_lengths=lengths, rejected_lengths=lengths),
        "simpo": lambda chosen: losses.simpo(chosen / 50, logps[1] / 50),
        "orpo": lambda chosen: losses.orpo(chosen / 50, logps[1] / 50),
    }[name]

    def run():
        chosen = logps[0].clone().requires_grad_()
        return torch.autograd.grad(call(chosen).loss.sum(), chosen)[0]

    step = 1e-4
    quotient = (call(logps[0] + step).loss - call(logps[0] - step).loss) / (2 * step)
    assert relative_error(benchmark(run), quotient) < 1e-5


def test_packing(benchmark):
    """Ten thousand lengths into bins."""
    rng = random.Random(0)
    lengths = [rng.randint(20, 1000) for _ in range(10_000)]
    bins = benchmark(pack, lengths, 4096)
    assert sorted(i for members in bins for i in members) == list(range(10_000))
    assert max(sum(lengths[i] for i in members) for members in bins) <= 4096
    assert len(bins) <= 1.02 * sum(lengths) / 4096


@pytest.mark.parametrize("share", [True, False])
def test_collate(benchmark, share):
    """Pairs of one bin into tensors."""
    rng = random.Random(0)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(V) for _ in range(count))

    samples = [Sample(i, tokens(128), (tokens(64), tokens(64))) for i in range(16)]
    batch = benchmark(collate, samples, share=share)
    rows = batch.sequences()
    assert [batch.input_ids[own].tolist() for own in rows] == [[*s.prompt, *own] for s in samples for own in s.completions]
    assert len(batch.input_ids) == 16 * (2 * 192 - 127 * share)
