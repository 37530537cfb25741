"""Autocast at a door: the operator multiplies its operands as they come, so they are cast before it as `torch.matmul` would do."""

from __future__ import annotations

import torch
from torch import Tensor


def as_multiplied(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Floating-point tensors in the dtype of autocast where it is on for their device, else as they are; gradients flow back.

    >>> with torch.autocast("cpu", torch.bfloat16):
    ...     as_multiplied(torch.zeros(1), None)[0].dtype
    torch.bfloat16
    """
    return tuple(x if x is None else x.to(_dtype(x)) for x in tensors)


def _dtype(x: Tensor) -> torch.dtype:
    on = torch.is_autocast_enabled(x.device.type) and x.is_floating_point() and x.dtype != torch.float64
    return torch.get_autocast_dtype(x.device.type) if on else x.dtype
