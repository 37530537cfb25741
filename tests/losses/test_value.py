"""The critic's clipped loss."""

import pytest
import torch

from fastalign.losses import clipped_value_loss


def test_values_and_gradients():
    values = torch.tensor([1.0, 0.1, 1.0, -1.0], requires_grad=True)
    old, returns = torch.zeros(4), torch.tensor([2.0, 2.0, 0.5, -3.0])
    loss = clipped_value_loss(values, old, returns, clip=0.2)
    assert loss.tolist() == pytest.approx([0.5 * 1.8**2, 0.5 * 1.9**2, 0.5 * 0.5**2, 0.5 * 2.8**2])
    (d,) = torch.autograd.grad(loss.sum(), values)
    assert d.tolist() == pytest.approx([0.0, -1.9, 0.5, 0.0])  # beyond the clip nothing pulls further, unless it is an overshoot
    plain = clipped_value_loss(values, old, returns, clip=None)
    assert plain.tolist() == pytest.approx([0.5, 0.5 * 1.9**2, 0.125, 2.0])


def test_gradcheck_and_no_gradient_for_the_targets():
    g = torch.Generator().manual_seed(0)
    values, old, returns = (torch.randn(8, generator=g, dtype=torch.float64).requires_grad_() for _ in range(3))
    assert torch.autograd.gradcheck(lambda v: clipped_value_loss(v, old, returns, clip=0.5), values)
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        torch.autograd.grad(clipped_value_loss(values, old, returns).sum(), (old, returns))
    with pytest.raises(ValueError, match="clip must be positive, or None for no clipping, got 0"):
        clipped_value_loss(values, old, returns, clip=0)
