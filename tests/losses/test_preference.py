"""Preference losses: closed forms, published values, gradcheck, edges."""

import math

import pytest
import torch

from fastalign.losses import PREFERENCE_LOSSES, dpo, hinge, ipo


def scores(p=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [(-30 * torch.rand(p, generator=g, dtype=torch.float64)).requires_grad_(i < 2) for i in range(4)]


@pytest.mark.parametrize("name", sorted(PREFERENCE_LOSSES))
def test_gradcheck_and_no_gradient_for_the_reference(name):
    given = scores()
    assert torch.autograd.gradcheck(lambda c, r: PREFERENCE_LOSSES[name](c, r, *given[2:], beta=0.03).loss, given[:2])
    for x in given:
        x.requires_grad_()
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        torch.autograd.grad(PREFERENCE_LOSSES[name](*given).loss.sum(), given[2:])


def test_dpo_closed_form_and_smoothing():
    c, r, rc, rr = (torch.tensor([x]) for x in (-10.0, -12.0, -11.0, -11.0))
    z = 0.5 * ((-10 + 11) - (-12 + 11))
    assert float(dpo(c, r, rc, rr, beta=0.5).loss) == pytest.approx(math.log1p(math.exp(-z)))
    smooth = 0.9 * math.log1p(math.exp(-z)) + 0.1 * math.log1p(math.exp(z))
    assert float(dpo(c, r, rc, rr, beta=0.5, label_smoothing=0.1).loss) == pytest.approx(smooth)


def test_dpo_gradient_is_that_of_the_paper():
    """Equation 7's gradient: -beta sigmoid(r_hat_l - r_hat_w) for the chosen log-prob."""
    c, r, rc, rr = scores()
    out = dpo(c, r, rc, rr, beta=0.1)
    (d,) = torch.autograd.grad(out.loss.sum(), [c])
    assert torch.allclose(d, -0.1 * torch.sigmoid(out.rejected_rewards - out.chosen_rewards))
    assert torch.allclose(out.chosen_rewards, 0.1 * (c - rc)) and not out.chosen_rewards.requires_grad


def test_hinge_has_no_gradient_beyond_the_margin():
    c = torch.tensor([20.0, 1.0], requires_grad=True)
    zero = torch.zeros(2)
    out = hinge(c, zero, zero, zero, beta=0.1)
    assert out.loss.tolist() == pytest.approx([0.0, 0.9])
    assert torch.autograd.grad(out.loss.sum(), [c])[0].tolist() == pytest.approx([0.0, -0.1])


def test_ipo_with_and_without_lengths():
    c, r, rc, rr = (torch.tensor([x]) for x in (-10.0, -12.0, -11.0, -11.0))
    assert float(ipo(c, r, rc, rr, beta=0.25).loss) == pytest.approx((2 - 2) ** 2)
    lengths = {"chosen_lengths": torch.tensor([2]), "rejected_lengths": torch.tensor([4])}
    assert float(ipo(c, r, rc, rr, beta=0.25, **lengths).loss) == pytest.approx((0.5 + 0.25 - 2) ** 2)
    empty = {"chosen_lengths": torch.tensor([0]), "rejected_lengths": torch.tensor([4])}
    assert ipo(c, r, rc, rr, **empty).loss.isfinite()
    with pytest.raises(ValueError, match="go together"):
        ipo(c, r, rc, rr, chosen_lengths=torch.tensor([2]))


@pytest.mark.parametrize("name", sorted(PREFERENCE_LOSSES))
@pytest.mark.parametrize("value", [0.0, -1e4, 1e4])
def test_gradients_are_finite_at_the_edges(name, value):
    c, r = torch.full((2,), value, requires_grad=True), torch.zeros(2, requires_grad=True)
    loss = PREFERENCE_LOSSES[name](c, r, torch.zeros(2), torch.zeros(2)).loss
    assert loss.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss.sum(), [c, r]))


@pytest.mark.parametrize("name", sorted(PREFERENCE_LOSSES))
def test_errors(name):
    loss, zero = PREFERENCE_LOSSES[name], torch.zeros(2)
    with pytest.raises(ValueError, match="beta must be positive, got 0"):
        loss(zero, zero, zero, zero, beta=0)
    with pytest.raises(ValueError, match=r"one shape \(P,\).*'ref_rejected_logps': \(3,\)"):
        loss(zero, zero, zero, torch.zeros(3))
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 0.5\), got 0.5"):
        dpo(zero, zero, zero, zero, label_smoothing=0.5)
