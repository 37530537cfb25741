"""What the optimizer of a run holds of each trained weight, by the options that choose it (`train.optim`)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastalign.objectives.base import RunConfig
from fastalign.train.blockwise import BLOCK, SMALLEST, scales_of

# float32 numbers for each element of a block while it is updated.
ROUNDING = 5  # the weight, its gradient, random bits, the bits of the sum, and where they are cut off
DEQUANTIZED = {"cpu": 6, "cuda": 0}  # bitsandbytes on a CPU: both moments, the gradient, two of the denominator, the new codes' input


@dataclass(frozen=True)
class Holdings:
    """Bytes of one weight."""

    master: int  # its copy
    moments: int
    gradient: int  # where it is accumulated
    update: int  # temporaries while it is updated
    on_host: int  # of the copy and the moments, those in the host's memory that are not counted above


def holdings(weight: Tensor, config: RunConfig, device: torch.device) -> Holdings:
    """Of one trained weight, for a run on `device`."""
    size, width = weight.numel(), weight.element_size()
    wide = config.master_weights and weight.dtype != torch.float32
    blockwise = config.optimizer == "adamw_8bit" or config.stochastic_rounding
    master = size * (4 if wide else width) if wide or config.optimizer == "adamw_offload" else 0
    if config.optimizer == "adamw_8bit" and size >= SMALLEST:
        moments = 2 * (size + 4 * (scales_of(weight, "_scale") or 0))
    else:
        moments = 2 * size * (4 if wide or blockwise else width)
    rounds = config.stochastic_rounding and weight.dtype == torch.bfloat16
    numbers = ROUNDING * rounds + (DEQUANTIZED.get(device.type, 0) if config.optimizer == "adamw_8bit" else 0)
    gradient, update = size * (4 if wide else width), 4 * numbers * min(size, BLOCK)
    if config.optimizer == "adamw_offload" and device.type != "cpu":
        return Holdings(0, 0, gradient, update, master + moments)
    return Holdings(master, moments, gradient, update, 0)


def total(found: Iterable[Holdings]) -> Holdings:
    """Of all weights; only one of them is updated at a time."""
    each = list(found)
    return Holdings(
        sum(h.master for h in each),
        sum(h.moments for h in each),
        sum(h.gradient for h in each),
        max((h.update for h in each), default=0),
        sum(h.on_host for h in each),
    )
