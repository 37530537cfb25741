"""The row kernels in C++, for CPUs (contract: `rows.py`, definition: `rows_torch.py`, interface: `kernels/include`).

One pass over a tile each, in float32 whatever the tile's dtype. A row is the work of one thread, so results are bitwise
the same for any number of threads; as many work as torch uses, on its own OpenMP threads. Calls release the GIL.
"""

from __future__ import annotations

from ctypes import POINTER, Structure, byref, c_float, c_int32, c_int64, c_void_p
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastalign.head import native, rows_torch
from fastalign.head.rows import LogitMap, RowState

finish = rows_torch.finish  # O(R)


class Tile(Structure):
    """fastalign_tile"""

    _fields_ = (
        ("x", c_void_p),
        ("dtype", c_int32),
        ("rows", c_int64),
        ("columns", c_int64),
        ("row_stride", c_int64),
        ("first", c_int64),
        ("target", c_void_p),
    )


class Map(Structure):
    """fastalign_logit_map"""

    _fields_ = (
        ("bias", c_void_p),
        ("inv_temperature", c_void_p),
        ("common_inv_temperature", c_float),
        ("logit_scale", c_float),
        ("softcap", c_float),
    )


class State(Structure):
    """fastalign_row_state"""

    _fields_ = tuple((name, c_void_p) for name in ("target_logit", "m", "s", "t", "q", "z_sum"))


class Gradient(Structure):
    """fastalign_row_gradient"""

    _fields_ = (
        *((name, c_void_p) for name in ("lse", "entropy", "c_logps", "c_lse", "c_entropy", "c_mean")),
        ("vocabulary", c_int64),
        ("dtype", c_int32),
    )


@lru_cache
def _functions() -> tuple[Any, Any]:
    update, gradient = native.library().fastalign_rows_update, native.library().fastalign_rows_gradient
    update.argtypes = [POINTER(Tile), POINTER(Map), POINTER(State), c_int32]
    gradient.argtypes = [POINTER(Tile), POINTER(Map), POINTER(Gradient), c_int32]
    return update, gradient


def start(rows: int, outputs: frozenset[str], *, dtype: torch.dtype, device: torch.device) -> RowState:
    """Statistics of zero columns."""
    if dtype != torch.float32 or device.type != "cpu":
        raise ValueError(f'the native row kernels compute in float32 on a CPU, got {dtype} on {device}: use impl="torch"')
    return rows_torch.start(rows, outputs, dtype=dtype, device=device)


def update(state: RowState, x: Tensor, target: Tensor, first: int, logits: LogitMap) -> None:
    """Fold the tile `x (R, C)` into the statistics; `target (R,)` counts from column 0 of the whole row."""
    held: list[Tensor] = []
    names = ("target_logit", "m", "s", "t", "q", "z_sum")
    sums = State(*(_pointer(getattr(state, name), held, in_place=True) for name in names))
    tile, logit_map = _tile(x, target, first, held), _map(logits, held)
    native.check(_functions()[0](byref(tile), byref(logit_map), byref(sums), torch.get_num_threads()), "fastalign_rows_update")
    state.columns += x.shape[1]


def gradient_(
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
) -> Tensor:
    """dL/dx (R, C) in `dtype`, in the storage of the tile: row r of the result begins where row r of `x` began."""
    held: list[Tensor] = []
    tile, logit_map = _tile(x, target, first, held), _map(logits, held)
    if dtype != x.dtype and (x.dtype != torch.float32 or dtype not in native.DTYPES):
        raise ValueError(f"the native row kernels write a gradient of a {x.dtype} tile as that or in half precision, not as {dtype}")
    result = x if dtype == x.dtype else x.view(dtype)[:, : x.shape[1]]
    inputs = [lse, entropy, *(coefficients.get(name) for name in ("logps", "lse", "entropy", "mean_logits"))]
    given = Gradient(*(_pointer(value, held) for value in inputs), vocabulary, native.DTYPES[dtype])
    native.check(_functions()[1](byref(tile), byref(logit_map), byref(given), torch.get_num_threads()), "fastalign_rows_gradient")
    return result


def _tile(x: Tensor, target: Tensor, first: int, held: list[Tensor]) -> Tile:
    rows, columns = x.shape
    apart = (columns < 2 or x.stride(1) == 1) and (rows < 2 or x.stride(0) >= columns)
    if x.dtype not in native.DTYPES or x.device.type != "cpu" or not apart:
        raise ValueError(
            f"a tile must be fp32, bf16 or fp16 on a CPU, with contiguous rows that do not overlap, "
            f"got {x.dtype} on {x.device}, strides {x.stride()}: use impl='torch'"
        )
    assert target.shape == (rows,) and target.dtype == torch.int64
    held.append(target := target.contiguous())
    return Tile(x.data_ptr(), native.DTYPES[x.dtype], rows, columns, x.stride(0), first, target.data_ptr())


def _map(logits: LogitMap, held: list[Tensor]) -> Map:
    given = logits.inv_temperature
    per_row, common = (given, 1.0) if isinstance(given, Tensor) else (None, float(given))
    return Map(_pointer(logits.bias, held), _pointer(per_row, held), common, logits.logit_scale, logits.softcap or 0.0)


def _pointer(x: Tensor | None, held: list[Tensor], *, in_place: bool = False) -> int | None:
    """Where the float32 elements of a vector begin; `held` keeps a copy alive during the call, if one was needed."""
    if x is None:
        return None
    ready = x.to(torch.float32).contiguous()
    assert not in_place or ready is x, "statistics are contiguous float32"
    held.append(ready)
    return ready.data_ptr()
