# mypy: disallow-untyped-defs=False
"""The row kernels of the divergences in Triton, for CUDA and ROCm (definition and formulas: `divergence_torch.py`).

Three kernels, each one pass over the float32 tiles of both heads. As in `rows_triton` a program owns one row and walks its
columns from left to right, without atomics; sums are float32 and row offsets int64. Nothing is contracted to fused
multiply-adds: what is the same on both sides must cancel exactly.

Bytes per logit, of both tiles: statistics 8, `mix_kernel` 8 (jsd alone), gradient 8 and its result.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastalign.head import divergence_torch, rows_triton
from fastalign.head.divergence_torch import PairState
from fastalign.head.rows import LogitMap
from fastalign.head.rows_triton import LOWEST, load_logits, map_arguments

finish = divergence_torch.finish
BLOCK, ROCM = rows_triton.BLOCK, rows_triton.ROCM
STEP = BLOCK // 2  # columns at a time of the kernels that hold most per column of two tiles: no registers are spilled
LAUNCH = {"num_warps": rows_triton.WARPS, "enable_fp_fusion": False}


@triton.jit
def fold(z, m, s):
    """Running maximum and sum of exponentials over the columns of a block, and what is needed to fold other sums likewise."""
    new = tl.maximum(m, tl.max(z, 0))
    shift = tl.where(m == new, 0.0, m - new)  # (-inf) - (-inf) is no shift
    decay = tl.exp(shift)
    centred = z - tl.where(new == float("-inf"), 0.0, new)[None, :]  # a lane of -inf so far stays at s = 0
    e = tl.exp(centred)
    return new, decay * s + tl.sum(e, 0), shift, decay, centred, e


@triton.jit
def merge(m, s):
    """Maximum and sum of a row from those of its lanes; NaN in any makes both NaN."""
    top = tl.max(m, 0)
    shift = tl.where(m == top, 0.0, m - top)
    decay = tl.exp(shift)
    total = tl.sum(decay * s, 0)
    return tl.where(total == total, top, total), total, shift, decay


@triton.jit
def weighted_gap(e, a, b):
    """sum_v e_v (a_v - b_v) over the columns of a block; a weight of 0 leaves infinities out."""
    return tl.sum(tl.where(e > 0, e * (a - b), 0.0), 0)


@triton.jit
def log_mixture(log_p, log_q, beta):
    """log (m / p) and log (m / q), from the smaller of the two; what a probability of 0 is divided into is not defined."""
    d = log_q - log_p
    below = d <= 0
    share = tl.where(below, beta, 1.0 - beta)
    r = tl.log(1.0 + share * (tl.exp(-tl.abs(d)) - 1.0))
    return tl.where(below, r, d + r), tl.where(below, r - d, r)


@triton.jit(do_not_specialize=["first"])
def statistics_kernel(
    x_ptr,  # (R, C) raw products of the student
    ref_ptr,  # (R, C) of the teacher
    stride_xn,
    stride_rn,
    columns,  # C
    first,
    target_ptr,  # (R,) int64
    bias_ptr,  # (C,) or None
    ref_bias_ptr,  # (C,) or None
    inv_temperature_ptr,  # (R,) or None
    inner,
    outer,
    ref_inner,
    ref_outer,
    target_logit_ptr,  # (R,) float32, as all that follow: read and written
    m_ptr,
    s_ptr,
    t_ptr,  # or None
    ref_m_ptr,
    ref_s_ptr,
    gap_ptr,  # or None
    KIND: tl.constexpr,
    CAPPED: tl.constexpr,
    REF_CAPPED: tl.constexpr,
    LANES: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Fold two tiles into the online statistics of their rows.

    Grid (R,). Lanes as in `rows_triton.statistics_kernel`. Reads both tiles once, target, and the state (and the biases,
    once per program, from cache); writes the state: 8 R C + O(R) bytes.
    """
    row = tl.program_id(0).to(tl.int64)
    x_row, ref_row = x_ptr + row * stride_xn, ref_ptr + row * stride_rn
    if inv_temperature_ptr is not None:
        inv_temperature = tl.load(inv_temperature_ptr + row)
        outer *= inv_temperature
        ref_outer *= inv_temperature
    lane = tl.arange(0, LANES)
    m = tl.where(lane == 0, tl.load(m_ptr + row), float("-inf"))
    s = tl.where(lane == 0, tl.load(s_ptr + row), 0.0)
    ref_m = tl.where(lane == 0, tl.load(ref_m_ptr + row), float("-inf"))
    ref_s = tl.where(lane == 0, tl.load(ref_s_ptr + row), 0.0)
    if t_ptr is not None:
        t = tl.where(lane == 0, tl.load(t_ptr + row), 0.0)
    if gap_ptr is not None:
        gap = tl.where(lane == 0, tl.load(gap_ptr + row), 0.0)

    for start in range(0, columns, DEPTH * LANES):
        cols = start + tl.arange(0, DEPTH)[:, None] * LANES + lane[None, :]
        inside = cols < columns
        _, z = load_logits(x_row, bias_ptr, cols, inside, inner, outer, CAPPED)
        _, w = load_logits(ref_row, ref_bias_ptr, cols, inside, ref_inner, ref_outer, REF_CAPPED)
        z = tl.where(inside, z, float("-inf"))
        w = tl.where(inside, w, float("-inf"))
        m, new_s, shift, decay, centred, e = fold(z, m, s)
        ref_m, ref_s, _, ref_decay, _, ref_e = fold(w, ref_m, ref_s)
        if t_ptr is not None:
            t = decay * (t + tl.maximum(shift, LOWEST) * s) + tl.sum(tl.maximum(centred, LOWEST) * e, 0)
        s = new_s
        if gap_ptr is not None:
            if KIND == "forward_kl":
                gap = tl.where(ref_decay > 0, ref_decay * gap, 0.0) + weighted_gap(ref_e, w, z)
            else:
                gap = tl.where(decay > 0, decay * gap, 0.0) + weighted_gap(e, z, w)

    top, total, shift, decay = merge(m, s)
    ref_top, ref_total, _, ref_decay = merge(ref_m, ref_s)
    tl.store(m_ptr + row, top)
    tl.store(s_ptr + row, total)
    tl.store(ref_m_ptr + row, ref_top)
    tl.store(ref_s_ptr + row, ref_total)
    if t_ptr is not None:
        tl.store(t_ptr + row, tl.sum(decay * (t + tl.maximum(shift, LOWEST) * s), 0))
    if gap_ptr is not None:
        weight = ref_decay if KIND == "forward_kl" else decay
        tl.store(gap_ptr + row, tl.sum(tl.where(weight > 0, weight * gap, 0.0), 0))

    at = tl.load(target_ptr + row) - first
    here = (at >= 0) & (at < columns)
    _, hit = load_logits(x_row, bias_ptr, at, here, inner, outer, CAPPED)
    tl.store(target_logit_ptr + row, hit, mask=here)


@triton.jit
def mix_kernel(
    x_ptr,  # (R, C)
    ref_ptr,  # (R, C)
    stride_xn,
    stride_rn,
    columns,  # C
    bias_ptr,  # (C,) or None
    ref_bias_ptr,  # (C,) or None
    inv_temperature_ptr,  # (R,) or None
    inner,
    outer,
    ref_inner,
    ref_outer,
    beta,
    lse_ptr,  # (R,)
    ref_lse_ptr,  # (R,)
    jsd_ptr,  # (R,) float32, as what follows: read and written
    student_kl_ptr,
    CAPPED: tl.constexpr,
    REF_CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the terms of two tiles to jsd and to KL(p || m).

    Grid (R,). A program owns row `program_id(0)`; it reads both tiles once: 8 R C + O(R) bytes. Each of its threads sums
    columns of its own; they are added up at the end.
    """
    row = tl.program_id(0).to(tl.int64)
    x_row, ref_row = x_ptr + row * stride_xn, ref_ptr + row * stride_rn
    if inv_temperature_ptr is not None:
        inv_temperature = tl.load(inv_temperature_ptr + row)
        outer *= inv_temperature
        ref_outer *= inv_temperature
    lse, ref_lse = tl.load(lse_ptr + row), tl.load(ref_lse_ptr + row)
    student, teacher = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < columns
        _, z = load_logits(x_row, bias_ptr, cols, inside, inner, outer, CAPPED)
        _, w = load_logits(ref_row, ref_bias_ptr, cols, inside, ref_inner, ref_outer, REF_CAPPED)
        log_p, log_q = z - lse, w - ref_lse
        p, q = tl.exp(log_p), tl.exp(log_q)
        m_over_p, m_over_q = log_mixture(log_p, log_q, beta)
        student -= tl.where(inside & (p > 0), p * m_over_p, 0.0)
        teacher -= tl.where(inside & (q > 0), q * m_over_q, 0.0)
    student_kl = tl.sum(student, 0)
    tl.store(student_kl_ptr + row, tl.load(student_kl_ptr + row) + student_kl)
    tl.store(jsd_ptr + row, tl.load(jsd_ptr + row) + (beta * tl.sum(teacher, 0) + (1.0 - beta) * student_kl))


@triton.jit(do_not_specialize=["first"])
def gradient_kernel(
    x_ptr,  # (R, C) raw products of the student
    d_ptr,  # (R, C) result: the memory of x, in the dtype of x or a narrower one
    ref_ptr,  # (R, C) raw products of the teacher
    stride_xn,
    stride_dn,
    stride_rn,
    columns,  # C
    first,
    target_ptr,  # (R,) int64
    bias_ptr,  # (C,) or None
    ref_bias_ptr,  # (C,) or None
    inv_temperature_ptr,  # (R,) or None
    inner,
    outer,
    ref_inner,
    ref_outer,
    beta,
    lse_ptr,  # (R,)
    ref_lse_ptr,  # (R,)
    mean_ptr,  # (R,): the divergence for reverse_kl, KL(p || m) for jsd; or None
    entropy_ptr,  # (R,) or None, as all that follow
    c_divergence_ptr,
    c_logps_ptr,
    c_lse_ptr,
    c_entropy_ptr,
    KIND: tl.constexpr,
    CAPPED: tl.constexpr,
    REF_CAPPED: tl.constexpr,
    NARROW: tl.constexpr,  # the result's elements are half as wide
    BLOCK: tl.constexpr,
    ROCM: tl.constexpr,
):
    """Overwrite the student's tile by dL/dx (the formula is in `divergence_torch.gradient_`).

    Grid (R,). A program owns row `program_id(0)`; it reads both tiles once and writes d once: R C (8 + d.itemsize) + O(R)
    bytes. A narrow result waits for the loads it overlaps as `rows_triton.gradient_kernel` explains.
    """
    row = tl.program_id(0).to(tl.int64)
    x_row, d_row, ref_row = x_ptr + row * stride_xn, d_ptr + row * stride_dn, ref_ptr + row * stride_rn
    if inv_temperature_ptr is not None:
        inv_temperature = tl.load(inv_temperature_ptr + row)
        outer *= inv_temperature
        ref_outer *= inv_temperature
    lse = tl.load(lse_ptr + row)
    at = tl.load(target_ptr + row) - first
    at = tl.where((at >= 0) & (at < columns), at, -1).to(tl.int32)
    c_p = 0.0  # the coefficient of p_v
    if c_lse_ptr is not None:
        c_p += tl.load(c_lse_ptr + row)
    if c_logps_ptr is not None:
        c_logps = tl.load(c_logps_ptr + row)
        c_p -= c_logps
    if c_entropy_ptr is not None:
        c_entropy = tl.load(c_entropy_ptr + row)
        entropy = tl.load(entropy_ptr + row)
    if c_divergence_ptr is not None:
        c_divergence = tl.load(c_divergence_ptr + row)
        ref_lse = tl.load(ref_lse_ptr + row)
    if mean_ptr is not None:
        mean = tl.load(mean_ptr + row)
    for start in range(0, columns, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < columns
        u, z = load_logits(x_row, bias_ptr, cols, inside, inner, outer, CAPPED)
        if c_divergence_ptr is not None:
            _, w = load_logits(ref_row, ref_bias_ptr, cols, inside, ref_inner, ref_outer, REF_CAPPED)
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
            d -= tl.where(p > 0, c_entropy * p * (log_p + entropy), 0.0)
        if c_divergence_ptr is not None:
            log_q = w - ref_lse
            if KIND == "forward_kl":
                slope_of_divergence = p - tl.exp(log_q)
            elif KIND == "reverse_kl":
                slope_of_divergence = tl.where(p > 0, p * ((log_p - log_q) - mean), 0.0)
            else:
                m_over_p, _ = log_mixture(log_p, log_q, beta)
                slope_of_divergence = tl.where(p > 0, (beta - 1.0) * p * (m_over_p + mean), 0.0)
            d += c_divergence * slope_of_divergence
        if c_logps_ptr is not None:
            d += tl.where(cols == at, c_logps, 0.0)
        slope = outer * inner * (1.0 - u * u) if CAPPED else outer
        tl.store(d_row + cols, (d * slope).to(d_ptr.dtype.element_ty), mask=inside)


def lanes(rocm: bool) -> dict[str, int]:
    """Lanes of a row, as in `rows_triton.lanes`, over STEP columns at a time."""
    count = rows_triton.lanes(4, rocm)["LANES"]
    return {"LANES": count, "DEPTH": STEP // count}


def start(rows: int, kind: str, outputs: frozenset[str], *, dtype: torch.dtype, device: torch.device) -> PairState:
    """Statistics of zero columns."""
    if dtype != torch.float32:
        raise ValueError(f'the Triton row kernels compute in float32, got {dtype}: use impl="torch"')
    return divergence_torch.start(rows, kind, outputs, dtype=dtype, device=device)


def update(state: PairState, x: Tensor, ref_x: Tensor, target: Tensor, first: int, logits: LogitMap, ref_logits: LogitMap) -> None:
    """Fold the tiles of the same columns into the statistics; `target (R,)` counts from column 0 of the whole row."""
    rows, columns = x.shape
    _check(x, ref_x)
    student, ref = state.student, state.ref
    if rows:
        sums = (student.target_logit, student.m, student.s, student.t, ref.m, ref.s, state.gap)
        with torch.cuda.device_of(x):
            statistics_kernel[(rows,)](
                x,
                ref_x,
                x.stride(0),
                ref_x.stride(0),
                columns,
                first,
                target.contiguous(),
                *_maps(logits, ref_logits),
                *sums,
                KIND=state.kind,
                **_capped(logits, ref_logits),
                **lanes(ROCM),
                **LAUNCH,
            )
    student.columns += columns


def mix(sums: Tensor, x: Tensor, ref_x: Tensor, logits: LogitMap, ref_logits: LogitMap, lse: Tensor, ref_lse: Tensor, beta: float) -> None:
    """Add the terms of two tiles to the generalised Jensen-Shannon divergence and to its student part, `sums (2, R)`."""
    rows, columns = x.shape
    _check(x, ref_x)
    if rows:
        maps, scores = _maps(logits, ref_logits), (lse.contiguous(), ref_lse.contiguous(), *sums)
        options = {**_capped(logits, ref_logits), "BLOCK": STEP, **LAUNCH}
        with torch.cuda.device_of(x):
            mix_kernel[(rows,)](x, ref_x, x.stride(0), ref_x.stride(0), columns, *maps, beta, *scores, **options)


def gradient_(
    x: Tensor,
    ref_x: Tensor,
    target: Tensor,
    first: int,
    logits: LogitMap,
    ref_logits: LogitMap,
    found: dict[str, Tensor],
    coefficients: dict[str, Tensor],
    *,
    kind: str,
    beta: float,
    dtype: torch.dtype,
) -> Tensor:
    """dL/dx (R, C) in `dtype`, in the storage of the student's tile: row r of the result begins where row r of `x` began."""
    rows, columns = x.shape
    _check(x, ref_x)
    assert dtype.itemsize in (x.dtype.itemsize, x.dtype.itemsize // 2), (dtype, x.dtype)
    result = x if dtype == x.dtype else x.view(dtype)[:, :columns]
    if rows:
        c = [coefficients.get(name) for name in ("divergence", "logps", "lse", "entropy")]
        mean = {"reverse_kl": found.get("divergence"), "jsd": found.get("student_kl")}.get(kind)
        scores = (found["lse"], found["ref_lse"], None if c[0] is None else mean, None if c[3] is None else found["entropy"], *c)
        vectors = [v if v is None else v.float().contiguous() for v in scores]
        with torch.cuda.device_of(x):
            gradient_kernel[(rows,)](
                x,
                result,
                ref_x,
                x.stride(0),
                result.stride(0),
                ref_x.stride(0),
                columns,
                first,
                target.contiguous(),
                *_maps(logits, ref_logits),
                beta,
                *vectors,
                KIND=kind,
                **_capped(logits, ref_logits),
                NARROW=dtype.itemsize < x.dtype.itemsize,
                BLOCK=BLOCK,
                ROCM=ROCM,
                **LAUNCH,
            )
    return result


def _check(x: Tensor, ref_x: Tensor) -> None:
    assert x.shape == ref_x.shape
    for tile in (x, ref_x):
        if tile.dtype != torch.float32 or (tile.shape[1] > 1 and tile.stride(1) != 1):
            raise ValueError(f"a tile must be float32 with contiguous rows, got {tile.dtype}, strides {tile.stride()}: use impl='torch'")


def _maps(logits: LogitMap, ref_logits: LogitMap) -> tuple[Tensor | float | None, ...]:
    """(bias, ref_bias, per-row 1 / temperature, inner, outer, ref_inner, ref_outer); both sides have one temperature."""
    bias, inv_temperature, inner, outer = map_arguments(logits)
    ref_bias, _, ref_inner, ref_outer = map_arguments(ref_logits)
    return bias, ref_bias, inv_temperature, inner, outer, ref_inner, ref_outer


def _capped(logits: LogitMap, ref_logits: LogitMap) -> dict[str, bool]:
    return {"CAPPED": logits.softcap is not None, "REF_CAPPED": ref_logits.softcap is not None}
