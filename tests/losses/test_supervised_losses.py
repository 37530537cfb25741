"""Losses of imitation: against torch's own cross-entropy, against numerical gradients through the head, and at the edges."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastalign import linear_loss
from fastalign.losses.supervised import dft, nll, z_loss


def operands() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 3, generator=generator, dtype=torch.float64, requires_grad=True) for n in (9, 5))
    return hidden, weight, torch.tensor([1, 0, 4, 2, 2, 3, 1, 0, 4])


def through_head(hidden: Tensor, weight: Tensor, target: Tensor, smoothing: float, z: float) -> Tensor:
    def loss_fn(out, rows):
        return (nll(out.logps, out.lse, out.mean_logits, label_smoothing=smoothing) + z * z_loss(out.lse)).sum()

    return linear_loss(hidden, weight, target, loss_fn, outputs=("logps", "lse", "mean_logits"))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_label_smoothing_is_that_of_torch(smoothing: float) -> None:
    hidden, weight, target = operands()
    expected = F.cross_entropy(hidden @ weight.T, target, label_smoothing=smoothing, reduction="sum")
    torch.testing.assert_close(through_head(hidden, weight, target, smoothing, 0.0), expected)


@pytest.mark.parametrize(("smoothing", "z"), [(0.0, 0.0), (0.3, 0.0), (0.0, 0.2), (0.3, 0.2)])
def test_gradients_through_the_head(smoothing: float, z: float) -> None:
    hidden, weight, target = operands()
    assert torch.autograd.gradcheck(lambda h, w: through_head(h, w, target, smoothing, z), [hidden, weight])


def test_dft_descends_on_minus_the_probability() -> None:
    logps = torch.tensor([-0.1, -2.0, 0.0, -1e4], dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(dft(logps).sum(), logps)
    torch.testing.assert_close(grad, -logps.detach().exp())
    assert dft(logps).tolist() == pytest.approx([0.1 * 0.904837, 2 * 0.135335, 0.0, 0.0], abs=1e-5)


def test_options_out_of_range_are_named() -> None:
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\), got 1.0"):
        nll(torch.zeros(1), label_smoothing=1.0)
    with pytest.raises(ValueError, match="needs lse and mean_logits of each token"):
        nll(torch.zeros(1), label_smoothing=0.1)
