"""The critic's loss in PPO."""

from __future__ import annotations

from torch import Tensor


def clipped_value_loss(
    values: Tensor,  # (N,) predicted, with gradient
    old_values: Tensor,  # (N,) predicted when the responses were sampled, no gradient
    returns: Tensor,  # (N,) advantages + old_values, no gradient
    *,
    clip: float | None = 0.2,
) -> Tensor:
    """Squared error per token, unreduced, with a step of at most `clip` from the old value. Schulman 2017; TRL 1.12 PPOTrainer.

    loss_t = max((v - R)^2, (clamp(v, v_old - clip, v_old + clip) - R)^2)_t / 2; None: no clipping

    A token whose clipped error is the larger has zero gradient. `clip` is in units of the return.

    >>> import torch
    >>> clipped_value_loss(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([2.0]))
    tensor([1.6200])
    """
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be positive, or None for no clipping, got {clip}")
    returns, old_values = returns.detach(), old_values.detach()
    error = (values - returns) ** 2
    if clip is not None:
        error = error.maximum((values.clamp(old_values - clip, old_values + clip) - returns) ** 2)
    return 0.5 * error
