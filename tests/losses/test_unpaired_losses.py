"""KTO and its sibling without KL: closed forms, gradcheck, one class, empty batches. Their equality with TRL's is in tests/parity."""

import math

import pytest
import torch

from fastalign.losses import UNPAIRED_LOSSES, apo_zero_unpaired, kto
from fastalign.losses.unpaired import mismatched_kl

DESIRABLE = torch.tensor([True, False, True, False, False])


def batch():
    g = torch.Generator().manual_seed(0)
    return [(-20 * torch.rand(5, generator=g, dtype=torch.float64)).requires_grad_(i < 1) for i in range(2)]


def call(name, *args, **options):
    kl = [torch.tensor(1.5, dtype=torch.float64)] if name == "kto" else []
    return UNPAIRED_LOSSES[name](*args, *kl, **options)


@pytest.mark.parametrize("name", sorted(UNPAIRED_LOSSES))
@pytest.mark.parametrize("desirable", [DESIRABLE, torch.ones(5, dtype=torch.bool), torch.zeros(5, dtype=torch.bool)])
def test_gradcheck_and_no_gradient_for_the_reference(name, desirable):
    logps, ref = batch()
    assert torch.autograd.gradcheck(lambda x: call(name, x, ref, desirable, desirable_weight=1.3, undesirable_weight=0.7).loss, [logps])
    ref.requires_grad_()
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        torch.autograd.grad(call(name, logps, ref, desirable).loss.sum(), [ref])


def test_closed_form():
    logps, ref, kl = torch.tensor([-2.0, -2.0]), torch.tensor([-5.0, -5.0]), 1.0
    out = kto(logps, ref, torch.tensor([True, False]), kl, beta=0.5, desirable_weight=3.0, undesirable_weight=2.0)
    sigmoid = 1 / (1 + math.exp(-0.5 * (3 - kl)))
    assert out.loss.tolist() == pytest.approx([3 * (1 - sigmoid), 2 * sigmoid])
    assert out.rewards.tolist() == pytest.approx([1.5, 1.5])
    zero = apo_zero_unpaired(logps, ref, torch.tensor([True, False]), beta=0.5)
    assert zero.loss.tolist() == pytest.approx([1 / (1 + math.exp(1.5)), 1 / (1 + math.exp(-1.5))])


def test_the_kl_gets_no_gradient():
    logps, ref = batch()
    kl = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        torch.autograd.grad(kto(logps, ref, DESIRABLE, kl).loss.sum(), [kl])


def test_mismatched_kl_is_a_mean_clamped_at_zero():
    logps, ref = torch.tensor([-1.0, -2.0, -9.0], requires_grad=True), torch.tensor([-3.0, -2.5, 0.0])
    assert float(mismatched_kl(logps, ref)) == 0.0  # the mean is negative
    counts = torch.tensor([True, True, False])
    assert float(mismatched_kl(logps, ref, counts)) == pytest.approx(1.25)
    assert float(mismatched_kl(logps, ref, torch.zeros(3, dtype=torch.bool))) == 0.0
    assert not mismatched_kl(logps, ref).requires_grad


@pytest.mark.parametrize("name", sorted(UNPAIRED_LOSSES))
@pytest.mark.parametrize("value", [0.0, -1e4, 1e4])
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_gradients_are_finite_at_the_edges(name, value, rows):
    for desirable in (torch.zeros(rows, dtype=torch.bool), torch.ones(rows, dtype=torch.bool)):
        logps = torch.full((rows,), value, requires_grad=True)
        loss = call(name, logps, torch.zeros(rows), desirable).loss
        assert loss.shape == (rows,)
        assert loss.isfinite().all()
        assert torch.autograd.grad(loss.sum(), [logps])[0].isfinite().all()


@pytest.mark.parametrize("name", sorted(UNPAIRED_LOSSES))
def test_errors(name):
    zero = torch.zeros(5)
    with pytest.raises(ValueError, match="beta must be positive, got 0"):
        call(name, zero, zero, DESIRABLE, beta=0)
    with pytest.raises(ValueError, match=r"one shape \(S,\).*'ref_logps': \(4,\)"):
        call(name, zero, zero[:4], DESIRABLE)
    with pytest.raises(ValueError, match=r"desirable of bool.*torch\.float32"):
        call(name, zero, zero, zero)
