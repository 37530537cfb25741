# mypy: disallow-untyped-defs=False
"""The row kernels in Triton, for CUDA and ROCm (contract: `rows.py`, definition: `rows_torch.py`).

Two kernels, each one pass over a tile. A program owns one row and walks its columns from left to right; nothing is
shared between programs, so there are no atomics and results are bitwise reproducible. All arithmetic is in float32,
whatever the tile's dtype; row offsets are int64. An argument of None switches its part of a kernel off when it is compiled.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastalign.head import rows_torch
from fastalign.head.rows import LogitMap, RowState

finish = rows_torch.finish  # some launches over (R,): nothing beside a pass over (R, C)
WARPS, BLOCK = 4, 2048  # BLOCK: columns of a row at a time
LAUNCH = {"num_warps": WARPS, "enable_fp_fusion": True}  # fusion: the default until Triton 3.9, not after it
ROCM = torch.version.hip is not None
LOWEST = tl.constexpr(rows_torch.LOWEST)


@triton.jit
def tanh(y):
    """tanh to a few ulp (the hardware's own is good to 2^-11): Cephes tanhf below 0.625, exp above."""
    y2 = y * y
    poly = -5.70498872745e-3 * y2 + 2.06390887954e-2
    poly = (poly * y2 - 5.37397155531e-2) * y2 + 1.33314422036e-1
    poly = (poly * y2 - 3.33332819422e-1) * y2
    large = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(y)) + 1.0)
    return tl.where(tl.abs(y) < 0.625, poly * y + y, tl.where(y < 0, -large, large))


@triton.jit
def load_logits(x_ptr, bias_ptr, cols, inside, inner, outer, CAPPED: tl.constexpr):
    """(u, z) at `cols` of a row: z = outer u, and u = tanh(inner (x + bias)) if CAPPED, else x + bias."""
    u = tl.load(x_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        u += tl.load(bias_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    if CAPPED:
        u = tanh(inner * u)
    return u, outer * u


@triton.jit(do_not_specialize=["first"])
def statistics_kernel(
    x_ptr,  # (R, C) raw products
    stride_xn,
    columns,  # C
    first,
    target_ptr,  # (R,) int64
    bias_ptr,  # (C,) or None
    inv_temperature_ptr,  # (R,) or None
    inner,
    outer,
    target_logit_ptr,  # (R,) float32, as all that follow: read and written
    m_ptr,
    s_ptr,
    t_ptr,  # or None
    q_ptr,  # or None
    z_sum_ptr,  # or None
    CAPPED: tl.constexpr,
    LANES: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Fold a tile into the online statistics of its rows.

    Grid (R,). A program owns row `program_id(0)` of the tile and of the state. Lane l keeps statistics of the columns
    that are l modulo LANES, relative to a maximum of its own, so that no thread waits for another before the lanes are
    merged at the end; lane 0 starts from the state. Reads x once, target, and the state (and bias, once per program,
    from cache); writes the state: R C x.itemsize + O(R) bytes. Accumulates in float32.
    """
    row = tl.program_id(0).to(tl.int64)
    x_row = x_ptr + row * stride_xn
    if inv_temperature_ptr is not None:
        outer *= tl.load(inv_temperature_ptr + row)
    lane = tl.arange(0, LANES)
    m = tl.where(lane == 0, tl.load(m_ptr + row), float("-inf"))
    s = tl.where(lane == 0, tl.load(s_ptr + row), 0.0)
    if t_ptr is not None:
        t = tl.where(lane == 0, tl.load(t_ptr + row), 0.0)
    if q_ptr is not None:
        q = tl.where(lane == 0, tl.load(q_ptr + row), 0.0)
    if z_sum_ptr is not None:
        z_sum = tl.where(lane == 0, tl.load(z_sum_ptr + row), 0.0)

    for start in range(0, columns, DEPTH * LANES):
        cols = start + tl.arange(0, DEPTH)[:, None] * LANES + lane[None, :]
        inside = cols < columns
        _, z = load_logits(x_row, bias_ptr, cols, inside, inner, outer, CAPPED)
        if z_sum_ptr is not None:
            z_sum += tl.sum(z, 0)  # z is 0 outside
        z = tl.where(inside, z, float("-inf"))
        new = tl.maximum(m, tl.max(z, 0))
        shift = tl.where(m == new, 0.0, m - new)  # (-inf) - (-inf) is no shift
        decay = tl.exp(shift)
        centred = z - tl.where(new == float("-inf"), 0.0, new)[None, :]  # a lane of -inf so far stays at s = 0
        e = tl.exp(centred)
        if t_ptr is not None:
            t = decay * (t + tl.maximum(shift, LOWEST) * s) + tl.sum(tl.maximum(centred, LOWEST) * e, 0)
        if q_ptr is not None:
            q = decay * decay * q + tl.sum(e * e, 0)
        s = decay * s + tl.sum(e, 0)
        m = new

    top = tl.max(m, 0)
    shift = tl.where(m == top, 0.0, m - top)
    decay = tl.exp(shift)
    total = tl.sum(decay * s, 0)
    tl.store(s_ptr + row, total)
    tl.store(m_ptr + row, tl.where(total == total, top, total))  # max skips NaN, the sum does not
    if t_ptr is not None:
        tl.store(t_ptr + row, tl.sum(decay * (t + tl.maximum(shift, LOWEST) * s), 0))
    if q_ptr is not None:
        tl.store(q_ptr + row, tl.sum(decay * decay * q, 0))
    if z_sum_ptr is not None:
        tl.store(z_sum_ptr + row, tl.sum(z_sum, 0))

    at = tl.load(target_ptr + row) - first
    here = (at >= 0) & (at < columns)
    _, hit = load_logits(x_row, bias_ptr, at, here, inner, outer, CAPPED)
    tl.store(target_logit_ptr + row, hit, mask=here)


@triton.jit(do_not_specialize=["first", "vocabulary"])
def gradient_kernel(
    x_ptr,  # (R, C) raw products
    d_ptr,  # (R, C) result: the memory of x, in the dtype of x or a narrower one
    stride_xn,
    stride_dn,
    columns,  # C
    first,
    target_ptr,  # (R,) int64
    bias_ptr,  # (C,) or None
    inv_temperature_ptr,  # (R,) or None
    inner,
    outer,
    vocabulary,  # V
    lse_ptr,  # (R,)
    entropy_ptr,  # (R,) or None, as all that follow
    c_logps_ptr,
    c_lse_ptr,
    c_entropy_ptr,
    c_mean_ptr,
    CAPPED: tl.constexpr,
    NARROW: tl.constexpr,  # the result's elements are half as wide
    BLOCK: tl.constexpr,
    ROCM: tl.constexpr,
):
    """Overwrite a tile by dL/dx (the formula is in `rows_torch.gradient_`).

    Grid (R,). A program owns row `program_id(0)`; it reads x once, target, lse, entropy and the coefficients (and bias,
    from cache), and writes d once: R C (x.itemsize + d.itemsize) + O(R) bytes. Computes in float32, rounds once.

    A narrow result overlaps columns of its own row that are still to be read. With B the bytes of a narrow block, storing
    block k covers [kB, (k+1)B), wide columns of block k // 2 alone. So nothing that any thread has yet to load is lost if
    all of them have loaded blocks 0 to k // 2, which a barrier after the loads of blocks 0, 1, 3, 7, ... ensures. On CUDA
    a barrier waits for the loads before it; on ROCm it does not, and each thread waits for its own first.
    """
    row = tl.program_id(0).to(tl.int64)
    x_row, d_row = x_ptr + row * stride_xn, d_ptr + row * stride_dn
    if inv_temperature_ptr is not None:
        outer *= tl.load(inv_temperature_ptr + row)
    lse = tl.load(lse_ptr + row)
    at = tl.load(target_ptr + row) - first
    at = tl.where((at >= 0) & (at < columns), at, -1).to(tl.int32)
    c_p = 0.0  # the coefficient of p_v
    if c_lse_ptr is not None:
        c_p += tl.load(c_lse_ptr + row).to(tl.float32)
    if c_logps_ptr is not None:
        c_logps = tl.load(c_logps_ptr + row).to(tl.float32)
        c_p -= c_logps
    if c_entropy_ptr is not None:
        c_entropy = tl.load(c_entropy_ptr + row).to(tl.float32)
        entropy = tl.load(entropy_ptr + row)
    if c_mean_ptr is not None:
        c_mean = tl.load(c_mean_ptr + row).to(tl.float32) / vocabulary
    for start in range(0, columns, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        u, z = load_logits(x_row, bias_ptr, cols, cols < columns, inner, outer, CAPPED)
        if NARROW:
            block = start // BLOCK
            if (block & (block + 1)) == 0:
                if ROCM:
                    u = tl.inline_asm_elementwise("s_waitcnt vmcnt(0)", "=v,0", [u], dtype=tl.float32, is_pure=False, pack=1)
                tl.debug_barrier()
        log_p = z - lse
        p = tl.exp(log_p)
        d = c_p * p
        if c_entropy_ptr is not None:
            d = (c_p - c_entropy * (tl.maximum(log_p, LOWEST) + entropy)) * p
        if c_mean_ptr is not None:
            d += c_mean
        if c_logps_ptr is not None:
            d += tl.where(cols == at, c_logps, 0.0)
        slope = outer * inner * (1.0 - u * u) if CAPPED else outer
        tl.store(d_row + cols, (d * slope).to(d_ptr.dtype.element_ty), mask=cols < columns)


def lanes(itemsize: int, rocm: bool) -> dict[str, int]:
    """Lanes of a row, so many that every thread owns neighbours of 128 bits and shares no lane: its statistics stay in registers."""
    count = WARPS * (64 if rocm else 32) * (16 // itemsize)
    return {"LANES": count, "DEPTH": BLOCK // count}


def start(rows: int, outputs: frozenset[str], *, dtype: torch.dtype, device: torch.device) -> RowState:
    """Statistics of zero columns."""
    if dtype != torch.float32:
        raise ValueError(f'the Triton row kernels compute in float32, got {dtype}: use impl="torch"')
    return rows_torch.start(rows, outputs, dtype=dtype, device=device)


def update(state: RowState, x: Tensor, target: Tensor, first: int, logits: LogitMap) -> None:
    """Fold the tile `x (R, C)` into the statistics; `target (R,)` counts from column 0 of the whole row."""
    rows, columns = x.shape
    _check(x)
    if rows:
        with torch.cuda.device_of(x):
            statistics_kernel[(rows,)](
                x,
                x.stride(0),
                columns,
                first,
                target.contiguous(),
                *map_arguments(logits),
                state.target_logit,
                state.m,
                state.s,
                state.t,
                state.q,
                state.z_sum,
                CAPPED=logits.softcap is not None,
                **lanes(x.element_size(), ROCM),
                **LAUNCH,
            )
    state.columns += columns


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
    rows, columns = x.shape
    _check(x)
    assert dtype.itemsize in (x.dtype.itemsize, x.dtype.itemsize // 2), (dtype, x.dtype)
    result = x if dtype == x.dtype else x.view(dtype)[:, :columns]
    if rows:
        c = {name: value.contiguous() for name, value in coefficients.items()}
        with torch.cuda.device_of(x):
            gradient_kernel[(rows,)](
                x,
                result,
                x.stride(0),
                result.stride(0),
                columns,
                first,
                target.contiguous(),
                *map_arguments(logits),
                vocabulary,
                lse.contiguous(),
                entropy.contiguous() if entropy is not None else None,
                c.get("logps"),
                c.get("lse"),
                c.get("entropy"),
                c.get("mean_logits"),
                CAPPED=logits.softcap is not None,
                NARROW=dtype.itemsize < x.dtype.itemsize,
                BLOCK=BLOCK,
                ROCM=ROCM,
                **LAUNCH,
            )
    return result


def _check(x: Tensor) -> None:
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16) or (x.shape[1] > 1 and x.stride(1) != 1):
        raise ValueError(f"a tile must be fp32, bf16 or fp16 with contiguous rows, got {x.dtype}, strides {x.stride()}: use impl='torch'")


def map_arguments(logits: LogitMap) -> tuple[Tensor | None, Tensor | None, float, float]:
    """(bias, per-row 1 / temperature, inner, outer) of `load_logits`."""
    bias = None if logits.bias is None else logits.bias.contiguous()
    given = logits.inv_temperature
    inv_temperature, outer = (given.contiguous(), 1.0) if isinstance(given, Tensor) else (None, float(given))
    if logits.softcap is None:
        return bias, inv_temperature, 1.0, outer * logits.logit_scale
    return bias, inv_temperature, logits.logit_scale / logits.softcap, outer * logits.softcap
