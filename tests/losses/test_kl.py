"""KL estimates: expectations over a categorical distribution, gradients, edges."""

import pytest
import torch

from fastalign.losses import kl_k1, kl_k2, kl_k3
from fastalign.losses.kl import bounded_exp

ALL = [kl_k1, kl_k2, kl_k3]


def policies(v=7):
    g = torch.Generator().manual_seed(0)
    logits, ref_logits = torch.randn(2, v, generator=g, dtype=torch.float64)
    return logits.requires_grad_(), ref_logits.log_softmax(0)


@pytest.mark.parametrize("estimate", [kl_k1, kl_k3])
def test_unbiased_over_all_tokens(estimate):
    """Weighted by the probability of its token, the estimate adds up to the KL; with the ratio to an older policy, by the older one's."""
    logits, ref = policies()
    logps = logits.log_softmax(0).detach()
    truth = (logps.exp() * (logps - ref)).sum()
    assert float((logps.exp() * estimate(logps, ref)).sum()) == pytest.approx(float(truth))
    old = torch.linspace(-1, 1, len(ref), dtype=torch.float64).log_softmax(0)
    assert float((old.exp() * estimate(logps, ref, ratio=(logps - old).exp())).sum()) == pytest.approx(float(truth))


@pytest.mark.parametrize(("estimate", "right"), [(kl_k1, False), (kl_k2, True), (kl_k3, False)])
def test_whose_gradient_is_that_of_the_kl(estimate, right):
    """On-policy, differentiating the estimate under fixed sampling: k2 gives the KL's gradient; k1's is 0; k3 needs its ratio."""
    logits, ref = policies()
    logps = logits.log_softmax(0)
    p = logps.detach().exp()
    (truth,) = torch.autograd.grad((logps.exp() * (logps - ref)).sum(), logits, retain_graph=True)
    (plain,) = torch.autograd.grad((p * estimate(logps, ref)).sum(), logits, retain_graph=True)
    (corrected,) = torch.autograd.grad((p * estimate(logps, ref, ratio=(logps - logps.detach()).exp())).sum(), logits)
    assert torch.allclose(plain, truth) == right
    assert torch.allclose(corrected, truth) == (estimate is not kl_k2)
    assert (estimate is not kl_k1) or plain.abs().max() < 1e-12


@pytest.mark.parametrize("estimate", ALL)
def test_values_gradcheck_and_no_gradient_for_the_reference(estimate):
    g = torch.Generator().manual_seed(1)
    logps, ref, ratio = (torch.randn(6, generator=g, dtype=torch.float64).requires_grad_() for _ in range(3))
    assert torch.autograd.gradcheck(lambda x, r: estimate(x, ref, ratio=r), (logps, ratio))
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        torch.autograd.grad(estimate(logps, ref).sum(), ref)
    d = -2.0
    expected = {kl_k1: -d, kl_k2: d * d / 2, kl_k3: torch.tensor(d).exp() - d - 1}[estimate]
    assert float(estimate(torch.tensor([-1.0]), torch.tensor([-3.0]))) == pytest.approx(float(expected))


@pytest.mark.parametrize("estimate", ALL)
@pytest.mark.parametrize(("logp", "ref"), [(0.0, 0.0), (0.0, -200.0), (-200.0, 0.0)])
def test_finite_at_the_edges_and_pulls_towards_the_reference(estimate, logp, ref):
    x = torch.tensor([logp], requires_grad=True)
    kl = estimate(x, torch.tensor([ref]))
    (d,) = torch.autograd.grad(kl.sum(), x)
    assert kl.isfinite().all() and d.isfinite().all()
    if estimate is not kl_k1:
        assert float(d.sign()) == float(torch.tensor(logp - ref).sign())
    assert kl.abs().item() == 0 or logp != ref


def test_bounded_exp():
    x = torch.tensor([-300.0, -3.0, 0.0, 19.9, 20.0, 21.0, 300.0], dtype=torch.float64, requires_grad=True)
    y = bounded_exp(x)
    (d,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(y[:5], x[:5].exp())
    torch.testing.assert_close(d[:5], x[:5].exp())
    top = torch.tensor(20.0, dtype=torch.float64).exp()
    torch.testing.assert_close(y[5:].detach(), top * torch.tensor([2.0, 281.0], dtype=torch.float64))
    torch.testing.assert_close(d[5:], top.expand(2))
    assert bounded_exp(torch.tensor(1e4)).isfinite()
