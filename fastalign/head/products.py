"""The GEMMs of the schedules: half-precision operands, sums that are never rounded below float32.

| operands                | product                                                                              |
|-------------------------|--------------------------------------------------------------------------------------|
| float32, float64        | `torch.mm`                                                                           |
| bf16, fp16 on a device  | `torch.mm(out_dtype=torch.float32)`                                                  |
| bf16 on a CPU           | impl "native": `products_native`, at twice the speed of float32, where the CPU has it |
| bf16, fp16 on a CPU     | otherwise upcast, some columns at a time, then `torch.mm` in float32                 |
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastalign.head import products_native

UPCAST_BYTES = 8 << 20  # of an operand at a time


def reads_half(like: Tensor, impl: str) -> bool:
    """Whether operands like this one are multiplied as they are, so that gradients too are narrowed for their GEMMs."""
    if like.device.type == "cpu":
        return impl == "native" and like.dtype == torch.bfloat16 and products_native.supported()
    return like.device.type == "cuda" and like.dtype in (torch.bfloat16, torch.float16)


def multiply(out: Tensor, a: Tensor, b: Tensor, *, half: bool, accumulate: bool = False) -> None:
    """out (M, C) = a (M, K) @ b (K, C), or out += it; `out` is float32 or float64, `half` is what `reads_half` says.

    A half-precision `a` or `b` beside an operand of out's dtype is upcast.
    """
    work = out.dtype
    if half and a.dtype == b.dtype != work:
        if a.device.type == "cpu":
            products_native.multiply(out, a, b, accumulate=accumulate)
        elif accumulate:
            torch.addmm(out, a, b, out_dtype=work, out=out)
        else:
            torch.mm(a, b, out_dtype=work, out=out)
        return
    a = a.to(work)
    if b.dtype != work and b.stride(0) == 1:  # the columns of b lie one after the other
        for cols in slabs(b.shape[1], _chunk(b.shape[0], work)):
            _multiply_alike(out[:, cols], a, b[:, cols].to(work), accumulate)
    elif b.dtype != work:
        for first, inner in enumerate(slabs(b.shape[0], _chunk(b.shape[1], work))):
            _multiply_alike(out, a[:, inner], b[inner].to(work), accumulate or first > 0)
    else:
        _multiply_alike(out, a, b, accumulate)


def add_product(total: Tensor | None, a: Tensor, b: Tensor, work: torch.dtype) -> Tensor:
    """total + a @ b with sums in `work`, in place if there is a total; a is (M, K), b (K, C).

    Operands narrower than `work` are multiplied as they are: `a` comes narrow only where `reads_half` holds.
    """
    half = a.dtype != work
    if total is None:
        total = torch.empty(a.shape[0], b.shape[1], dtype=work, device=a.device)
        multiply(total, a, b, half=half)
    elif total.dtype == work:
        multiply(total, a, b, half=half, accumulate=True)
    elif half and a.device.type != "cpu":
        torch.addmm(total, a, b, out=total)
    else:  # a total in half precision takes each sum with one rounding
        for rows in slabs(a.shape[0], _chunk(b.shape[1], work)):
            total[rows] += add_product(None, a[rows], b, work)
    return total


def slabs(n: int, step: int) -> Iterator[slice]:
    return (slice(r, min(r + step, n)) for r in range(0, n, step))


def _multiply_alike(out: Tensor, a: Tensor, b: Tensor, accumulate: bool) -> None:
    torch.addmm(out, a, b, out=out) if accumulate else torch.mm(a, b, out=out)


def _chunk(columns: int, dtype: torch.dtype) -> int:
    return max(64, UPCAST_BYTES // max(1, columns * dtype.itemsize))
