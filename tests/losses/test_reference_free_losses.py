"""Losses without a reference: closed forms, gradcheck, edges. Their equality with TRL's is in tests/parity."""

import math

import pytest
import torch

from fastalign.losses import REFERENCE_FREE_LOSSES, alphapo, cpo, orpo, simpo
from fastalign.losses.reference_free import log1mexp, log_odds_ratio

NAMES = sorted(REFERENCE_FREE_LOSSES)


def pair():
    g = torch.Generator().manual_seed(0)
    return [(-3 * torch.rand(5, generator=g, dtype=torch.float64) - 0.01).requires_grad_() for _ in range(2)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_gradcheck(name, smoothing):
    options = {} if name == "orpo" else {"label_smoothing": smoothing}
    assert torch.autograd.gradcheck(lambda c, r: REFERENCE_FREE_LOSSES[name](c, r, beta=0.7, **options).loss, pair())


def test_orpo_is_the_log_sigmoid_of_the_log_odds_ratio():
    p, q = 0.8, 0.3
    c, r = torch.tensor([p]).log(), torch.tensor([q]).log()
    odds_ratio = (p / (1 - p)) / (q / (1 - q))
    out = orpo(c, r, beta=0.4)
    assert float(log_odds_ratio(c, r)) == pytest.approx(math.log(odds_ratio), rel=1e-5)
    assert float(out.loss) == pytest.approx(0.4 * math.log1p(1 / odds_ratio), rel=1e-5)
    assert float(out.chosen_rewards) == pytest.approx(0.4 * math.log(p))


def test_log1mexp_is_accurate_at_both_ends():
    x = torch.tensor([-1e-6, -0.5, -0.69, -0.7, -5.0, -60.0], dtype=torch.float64)
    expected = [math.log(-math.expm1(float(v))) for v in x[:4]] + [math.log1p(-math.exp(float(v))) for v in x[4:]]
    assert log1mexp(x).tolist() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [0.0, -1e-30, -1e-7, -1.0, -300.0, -1e4])
def test_gradients_are_finite_at_the_edges(name, value):
    """Log-prob exactly 0 is what an empty completion and a completion that the model is sure of have."""
    for other in (0.0, -0.5, -1e4):
        for values in ((value, other), (other, value)):
            c, r = (torch.tensor([v], requires_grad=True) for v in values)
            loss = REFERENCE_FREE_LOSSES[name](c, r).loss
            grads = torch.autograd.grad(loss.sum(), [c, r])
            assert loss.isfinite().all()
            assert all(g.isfinite().all() for g in grads)
            assert grads[0] <= 0 <= grads[1]


def test_orpo_at_log_prob_zero_still_pulls_on_the_other_side():
    c, r = torch.zeros(1, requires_grad=True), torch.full((1,), -2.0, requires_grad=True)
    grads = torch.autograd.grad(orpo(r, c, beta=1.0).loss.sum(), [c, r])
    assert float(grads[1]) == pytest.approx(-1 / (1 - math.exp(-2)), rel=1e-4)  # the chosen side: sigma(-log odds) is 1


def test_simpo_is_cpo_of_means_with_a_margin():
    c, r = pair()
    torch.testing.assert_close(simpo(c, r, beta=1.5, gamma=0.0, label_smoothing=0.1).loss, cpo(c, r, beta=1.5, label_smoothing=0.1).loss)
    torch.testing.assert_close(simpo(c, r, beta=1.5, gamma=0.3).loss, cpo(c - 0.2, r, beta=1.5).loss)


def test_alphapo_closed_form_and_its_limit():
    c, r = pair()
    z = 1.5 * ((1 - c.exp() ** -0.5) / 0.5 - (1 - r.exp() ** -0.5) / 0.5) - 0.3
    torch.testing.assert_close(alphapo(c, r, beta=1.5, gamma=0.3, alpha=0.5).loss, torch.log1p(torch.exp(-z)))
    torch.testing.assert_close(alphapo(c, r, alpha=0.0).loss, simpo(c, r).loss)
    torch.testing.assert_close(alphapo(c, r, alpha=1e-5).loss, simpo(c, r).loss, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_errors(name):
    loss, zero = REFERENCE_FREE_LOSSES[name], torch.zeros(2)
    with pytest.raises(ValueError, match="beta must be positive, got -1"):
        loss(zero, zero, beta=-1)
    with pytest.raises(ValueError, match=r"one shape \(P,\), got \(2,\) and \(3,\)"):
        loss(zero, torch.zeros(3))
    if name != "orpo":
        with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 0.5\)"):
            loss(zero, zero, label_smoothing=0.5)
