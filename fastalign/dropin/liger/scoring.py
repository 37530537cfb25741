"""What the classes share: padded batches (B, T, D) put through the head operator, summed or averaged per sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastalign.dropin.precision import as_multiplied
from fastalign.head.api import linear_logps, linear_loss
from fastalign.head.autograd import LossFn


def padded_loss(
    hidden: Tensor,  # (B, T, D); gradient
    weight: Tensor,  # (V, D); gradient
    target: Tensor,  # (B, T)
    bias: Tensor | None,
    loss_fn: LossFn,
    group: int,  # sequences that belong together
    **options: Any,
) -> Tensor:
    """`linear_loss` over the B T rows, of which no slab splits `group` sequences."""
    rows = group * target.shape[1]
    hidden, weight, bias = as_multiplied(hidden, weight, bias)  # type: ignore[assignment]
    groups = range(0, target.numel() + 1, rows) if rows else None
    return linear_loss(hidden.flatten(0, 1), weight, target.flatten(), loss_fn, groups=groups, bias=bias, **options)


@torch.no_grad()
def padded_logps(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
    """(B, T) log-probs of a reference, 0 where there is no target; no gradient."""
    hidden, weight, bias = as_multiplied(hidden, weight, bias)  # type: ignore[assignment]
    return linear_logps(hidden, weight, target, bias=bias, **options).logps


def per_sequence(logps: Tensor, counted: Tensor, average: bool) -> Tensor:
    """(S,) sums of (S, T) log-probs that are 0 where not counted, or their means over what counts; 0 where nothing does."""
    total = logps.sum(1)
    return total / counted.sum(1).clamp(min=1) if average else total


@torch.no_grad()
def logits_sums(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(B,) sums of all T V logits of each sequence: a product of sums, since they are linear in the hidden states."""
    sums = hidden.sum(1, dtype=torch.float32) @ weight.sum(0, dtype=torch.float32)
    return sums if bias is None else sums + hidden.shape[1] * bias.sum(dtype=torch.float32)


def check_padded(hidden: Tensor, target: Tensor, names: tuple[str, str] = ("_input", "target")) -> None:
    if hidden.dim() != 3 or hidden.shape[:2] != target.shape:
        raise ValueError(
            f"{names[0]} must be (B, T, D) and {names[1]} (B, T), got {tuple(hidden.shape)} and {tuple(target.shape)}: "
            "give the hidden states before the head, shifted to their targets"
        )


def need_reference(hidden: Tensor | None, weight: Tensor | None, instead: str) -> tuple[Tensor, Tensor]:
    if hidden is None or weight is None:
        raise ValueError(f"use_ref_model is set, so the reference's ref_input and ref_weight are needed{instead}")
    return hidden, weight
