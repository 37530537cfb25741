"""Products of bfloat16 operands with float32 sums in C++, for CPUs with AVX512-BF16 (interface: `kernels/include/fastalign_gemm.h`).

As many threads work as torch uses, on its own OpenMP threads; the result depends neither on their number nor on the sizes
that a product is cut into along its rows and columns. Calls release the GIL.
"""

from __future__ import annotations

from ctypes import POINTER, Structure, byref, c_int32, c_int64, c_void_p
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastalign.head import native


class Matrix(Structure):
    """fastalign_bf16_matrix"""

    _fields_ = (("data", c_void_p), ("row_stride", c_int64), ("column_stride", c_int64))


@lru_cache
def _function() -> Any:
    function = native.library().fastalign_gemm_bf16
    sizes, operand = [c_int64] * 3, POINTER(Matrix)
    function.argtypes = [*sizes, operand, operand, c_void_p, c_int64, c_int32, c_int32]
    return function


def supported() -> bool:
    """Whether this CPU, and the instruction set in use, have the product. DependencyError without the native library."""
    return bool(native.library().fastalign_gemm_bf16_supported())


def multiply(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool = False) -> None:
    """out (M, C) float32 = a (M, K) @ b (K, C), or out += it. `a` and `b` are bfloat16; all strides are allowed.

    An operand neither of whose strides is 1 is copied first, and so is the result. Subnormal numbers count as zero.
    Raises ValueError for other dtypes, devices or shapes, and where `supported` says no.
    """
    m, k, n = *a.shape, b.shape[1]
    kinds = [(x.dtype, x.device.type) for x in (a, b, out)]
    if kinds != [(torch.bfloat16, "cpu"), (torch.bfloat16, "cpu"), (torch.float32, "cpu")]:
        raise ValueError(f"the native product takes bfloat16 operands and a float32 result on a CPU, got {kinds}")
    if b.shape[0] != k or out.shape != (m, n):
        raise ValueError(f"shapes do not fit: {tuple(out.shape)} = {tuple(a.shape)} @ {tuple(b.shape)}")
    if not supported():
        raise ValueError(f"the native product needs AVX512-BF16, the instruction set in use is {native.isa()!r}: use impl='torch'")
    if n > 1 and out.stride(1) != 1:
        if m > 1 and out.stride(0) != 1:
            whole = out.contiguous()
            multiply(whole, a, b, accumulate=accumulate)
            out.copy_(whole)
        else:
            multiply(out.T, b.T, a.T, accumulate=accumulate)
        return
    a, b = _readable(a), _readable(b)
    status = _function()(
        m, n, k, byref(_matrix(a)), byref(_matrix(b)), out.data_ptr(), out.stride(0) if m > 1 else n, accumulate, torch.get_num_threads()
    )
    native.check(status, "fastalign_gemm_bf16")


def _readable(x: Tensor) -> Tensor:
    return x if 1 in _matrix_strides(x) else x.contiguous()


def _matrix_strides(x: Tensor) -> tuple[int, int]:
    """The strides of x; along a dimension of one element, where any would do, 1."""
    return (x.stride(0) if x.shape[0] > 1 else 1, x.stride(1) if x.shape[1] > 1 else 1)


def _matrix(x: Tensor) -> Matrix:
    return Matrix(x.data_ptr(), *_matrix_strides(x))
