"""The contract of the row kernels, what passes between them and the schedules, and the choice of an implementation.

A tile is `x (R, C)`, columns `first : first + C` of the raw products `hidden @ weight.T` of R rows. The logits are

    y = logit_scale (x + bias),   z = softcap tanh(y / softcap) / temperature   (without softcap: z = y / temperature)

and every statistic is one of softmax(z). `update` sees the tiles of a row in any order and keeps online statistics;
`finish` turns them into outputs; `gradient_` overwrites a tile by dL/dx. All arithmetic is in the dtype of the state
(float32, or float64 for float64 inputs). An implementation is a module with these four functions; `rows_torch` is the
definition.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor


@dataclass(frozen=True)
class LogitMap:
    """What lies between the raw products and the logits; `inv_temperature` is a number or (R,)."""

    bias: Tensor | None = None  # (C,) of this tile
    logit_scale: float = 1.0
    softcap: float | None = None
    inv_temperature: float | Tensor = 1.0

    @property
    def is_identity(self) -> bool:
        return self.bias is None and self.logit_scale == 1.0 and self.softcap is None and is_one(self.inv_temperature)


@dataclass
class RowState:
    """Online statistics of R rows, each (R,). `scale` is the running maximum m that the sums are relative to."""

    outputs: frozenset[str]
    target_logit: Tensor  # NaN until the tile that holds the target has been seen
    m: Tensor  # max_v z_v
    s: Tensor  # sum_v exp(z_v - m)
    t: Tensor | None = None  # sum_v exp(z_v - m) (z_v - m), for the entropy
    q: Tensor | None = None  # sum_v exp(2 (z_v - m))
    z_sum: Tensor | None = None  # sum_v z_v
    columns: int = 0


class Rows(Protocol):
    """What an implementation provides; the arguments are explained in `rows_torch`."""

    def start(self, rows: int, outputs: frozenset[str], *, dtype: torch.dtype, device: torch.device) -> RowState: ...
    def update(self, state: RowState, x: Tensor, target: Tensor, first: int, logits: LogitMap) -> None: ...
    def finish(self, state: RowState) -> dict[str, Tensor]: ...
    def gradient_(
        self,
        x: Tensor,
        target: Tensor,
        first: int,
        logits: LogitMap,
        lse: Tensor,
        coefficients: dict[str, Tensor],
        *,
        entropy: Tensor | None,
        vocabulary: int,
        dtype: torch.dtype,
    ) -> Tensor: ...


def rows_of(impl: str) -> Rows:
    """The row kernels of a plan's implementation."""
    if impl == "triton":
        from fastalign.head import rows_triton

        return cast(Rows, rows_triton)
    if impl == "native":
        from fastalign.head import rows_native

        return cast(Rows, rows_native)
    assert impl == "torch", impl
    from fastalign.head import rows_torch

    return cast(Rows, rows_torch)


def is_one(value: float | Tensor) -> bool:
    return not isinstance(value, Tensor) and value == 1.0
