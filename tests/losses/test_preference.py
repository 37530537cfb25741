"""Preference losses with a reference: closed forms, gradcheck, edges, errors. Their equality with TRL's is in tests/parity."""

import math
from functools import partial

import pytest
import torch

from fastalign.losses import PREFERENCE_LOSSES, aot, aot_unpaired, discopop, dpo, exo, hinge, ipo, robust, sigmoid_norm
from fastalign.losses.divergence import SCORES, alpha_divergence, forward_kl, reverse_kl
from fastalign.losses.preference import matched

LENGTHS = {"chosen_lengths": torch.tensor([3, 5, 1, 4]), "rejected_lengths": torch.tensor([2, 9, 4, 1])}
WITH_SCORE = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop")


def options(name, p=4):
    return {key: value[:p] for key, value in LENGTHS.items()} if name == "sigmoid_norm" else {}


def scores(p=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [(-30 * torch.rand(p, generator=g, dtype=torch.float64)).requires_grad_(i < 2) for i in range(4)]


@pytest.mark.parametrize("name", sorted(PREFERENCE_LOSSES))
def test_gradcheck_and_no_gradient_for_the_reference(name):
    given, loss = scores(), partial(PREFERENCE_LOSSES[name], **options(name))
    assert torch.autograd.gradcheck(lambda c, r: loss(c, r, *given[2:], beta=0.03).loss, given[:2])
    for x in given:
        x.requires_grad_()
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        torch.autograd.grad(loss(*given).loss.sum(), given[2:])


@pytest.mark.parametrize("name", WITH_SCORE)
@pytest.mark.parametrize("divergence", sorted(SCORES))
def test_gradcheck_with_every_divergence(name, divergence):
    given, loss = scores(), partial(PREFERENCE_LOSSES[name], **options(name), score=SCORES[divergence])
    assert torch.autograd.gradcheck(lambda c, r: loss(0.1 * c, 0.1 * r, *given[2:], beta=0.03).loss, given[:2])


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
    assert torch.allclose(out.chosen_rewards, 0.1 * (c - rc))
    assert not out.chosen_rewards.requires_grad


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


def test_exo_is_a_kl_divergence():
    """0 where the policy's preference is the smoothed label, as at beta (D+ - D-) = log((1-e)/e), and positive elsewhere."""
    e = 0.2
    gap = torch.tensor([math.log((1 - e) / e), 0.0, 5.0], dtype=torch.float64)
    loss = exo(gap, *[torch.zeros_like(gap)] * 3, beta=1.0, label_smoothing=e).loss
    assert loss[0].item() == pytest.approx(0.0, abs=1e-15)
    assert loss[1].item() == pytest.approx(0.5 * math.log(0.5 / (1 - e)) + 0.5 * math.log(0.5 / e))
    assert (loss[1:] > 0).all()


def test_robust_is_unbiased():
    """Its mean over labels that are flipped with probability e is the loss of DPO on clean labels: what eq. 12 is made for."""
    e, (c, r, rc, rr) = 0.3, scores()
    mean = (1 - e) * robust(c, r, rc, rr, label_smoothing=e).loss + e * robust(r, c, rr, rc, label_smoothing=e).loss
    torch.testing.assert_close(mean, dpo(c, r, rc, rr).loss)


def test_alpha_divergence_contains_the_others():
    x = torch.linspace(-3, 3, 13, dtype=torch.float64)
    torch.testing.assert_close(alpha_divergence(x, alpha=0.0), forward_kl(x))
    assert torch.equal(alpha_divergence(x, alpha=1.0), reverse_kl(x))
    torch.testing.assert_close(alpha_divergence(x, alpha=1 + 1e-5), x, rtol=1e-4, atol=0)


@pytest.mark.parametrize("divergence", sorted(SCORES))
def test_scores_rise_and_stay_finite(divergence):
    x = torch.tensor([-1e4, -100.0, -1.0, 0.0, 1.0, 100.0, 1e4], requires_grad=True)
    y = SCORES[divergence](x)
    (d,) = torch.autograd.grad(y.sum(), [x])
    assert y.isfinite().all()
    assert d.isfinite().all()
    assert (d >= 0).all()
    assert (y.diff() >= 0).all()
    assert y[3] == 0


def test_discopop_without_overflow():
    """At z = -200 the weight of the exponential is 0: the loss is 200. TRL's 0 * infinity is NaN (tests/parity)."""
    c = torch.tensor([-200.0], requires_grad=True)
    loss = discopop(c, *[torch.zeros(1)] * 3, beta=1.0).loss
    assert loss.item() == pytest.approx(200.0)
    assert float(torch.autograd.grad(loss.sum(), [c])[0]) == pytest.approx(-1.0)


def test_optimal_transport_couples_equal_ranks():
    c, r, rc, rr = (torch.tensor(x) for x in ([3.0, 9.0, 1.0], [0.0, 0.0, 0.0], [5.0, 1.0, 2.0], [0.0, 0.0, 0.0]))
    # policy gaps 1, 3, 9 meet the reference's 1, 2, 5
    assert aot(c, r, rc, rr, beta=1.0).loss.tolist() == pytest.approx([math.log1p(math.exp(-d)) for d in (1, 4, 0)])
    # D+ = -2, 8, -1 in order of the pairs; D- = 0, 0, 0 of any rank
    assert aot_unpaired(c, r, rc, rr, beta=1.0).loss.tolist() == pytest.approx([math.log1p(math.exp(-d)) for d in (-2, 8, -1)])


def test_optimal_transport_of_a_cut_batch_is_that_of_the_whole():
    """With the ranks found beforehand, the parts' losses and gradients are those of all pairs together."""
    c, r, rc, rr = scores(7, seed=2)
    whole = {}
    for loss in (aot, aot_unpaired):
        value = loss(c, r, rc, rr).loss.sum()
        whole[loss] = (value, *torch.autograd.grad(value, [c, r]))
    with torch.no_grad():
        gaps = matched(c - r, rc - rr)
        quantiles = matched(c - rc, r - rr), matched(r - rr, c - rc)
    for loss in (aot, aot_unpaired):
        total, grads = 0.0, [torch.zeros_like(c), torch.zeros_like(r)]
        for part in (slice(0, 3), slice(3, 4), slice(4, 7)):
            known = {"ref_quantiles": gaps[part]} if loss is aot else {"quantiles": (quantiles[0][part], quantiles[1][part])}
            value = loss(c[part], r[part], rc[part], rr[part], **known).loss.sum()
            total += value
            for sum_, d in zip(grads, torch.autograd.grad(value, [c, r])):
                sum_ += d
        for found, expected in zip((total, *grads), whole[loss]):
            torch.testing.assert_close(found, expected)
    alone = sum(aot(c[part], r[part], rc[part], rr[part]).loss.sum() for part in (slice(0, 3), slice(3, 7)))
    assert abs(alone - whole[aot][0]) > 1e-3  # ranks of a part are not those of the whole


@pytest.mark.parametrize("name", sorted(PREFERENCE_LOSSES))
@pytest.mark.parametrize("value", [0.0, -1e4, 1e4])
@pytest.mark.parametrize("divergence", [None, "forward_kl", "alpha_divergence"])
def test_gradients_are_finite_at_the_edges(name, value, divergence):
    if divergence and name not in WITH_SCORE:
        return
    c, r = torch.full((2,), value, requires_grad=True), torch.zeros(2, requires_grad=True)
    given = options(name, 2) | ({"score": SCORES[divergence]} if divergence else {})
    loss = PREFERENCE_LOSSES[name](c, r, torch.zeros(2), torch.zeros(2), **given).loss
    assert loss.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss.sum(), [c, r]))


@pytest.mark.parametrize("name", sorted(PREFERENCE_LOSSES))
def test_errors(name):
    loss, zero = partial(PREFERENCE_LOSSES[name], **options(name, 2)), torch.zeros(2)
    with pytest.raises(ValueError, match="beta must be positive, got 0"):
        loss(zero, zero, zero, zero, beta=0)
    with pytest.raises(ValueError, match=r"one shape \(P,\).*'ref_rejected_logps': \(3,\)"):
        loss(zero, zero, zero, torch.zeros(3))


@pytest.mark.parametrize("loss", [dpo, robust, exo, aot, aot_unpaired])
def test_smoothing_out_of_range(loss):
    zero = torch.zeros(2)
    for value in (0.5, -0.1, *([0.0] if loss is exo else [])):
        with pytest.raises(ValueError, match=rf"label_smoothing must be in [\[(]0, 0.5\).*, got {value}"):
            loss(zero, zero, zero, zero, label_smoothing=value)
    with pytest.raises(ValueError, match="tau must be positive"):
        discopop(zero, zero, zero, zero, tau=0.0)


def test_sigmoid_norm_of_unit_lengths_is_dpo():
    c, r, rc, rr = scores()
    one = torch.ones(4, dtype=torch.int64)
    torch.testing.assert_close(sigmoid_norm(c, r, rc, rr, chosen_lengths=one, rejected_lengths=one).loss, dpo(c, r, rc, rr).loss)
