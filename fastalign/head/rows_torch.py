"""The row kernels in plain torch: the definition that every other implementation must equal (contract: `rows.py`).

Rows are handled in blocks that stay in cache, so the scratch is a few MiB.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastalign.head.rows import LogitMap, RowState, is_one

BLOCK_BYTES = {"cpu": 1 << 20, "cuda": 1 << 26}  # per temporary: L2-sized on a CPU, launch-bound below this on a GPU
LOWEST = -1e4  # stands for -inf where it is multiplied by a probability: exp(LOWEST) is 0, and coefficients times it are finite


def start(rows: int, outputs: frozenset[str], *, dtype: torch.dtype, device: torch.device) -> RowState:
    """Statistics of zero columns."""

    def full(value: float) -> Tensor:
        return torch.full((rows,), value, dtype=dtype, device=device)

    return RowState(
        outputs,
        target_logit=full(float("nan")),
        m=full(float("-inf")),
        s=full(0.0),
        t=full(0.0) if "entropy" in outputs else None,
        q=full(0.0) if "log_sum_sq_probs" in outputs else None,
        z_sum=full(0.0) if "mean_logits" in outputs else None,
    )


def update(state: RowState, x: Tensor, target: Tensor, first: int, logits: LogitMap) -> None:
    """Fold the tile `x (R, C)` into the statistics; `target (R,)` counts from column 0 of the whole row."""
    columns = x.shape[1]
    for rows in row_blocks(x):
        z = logits_of(x[rows], logits, rows, state.m.dtype)
        old = state.m[rows]
        new = torch.maximum(old, z.amax(dim=1))
        shift = torch.where(old == new, 0.0, old - new)  # (-inf) - (-inf) is no shift
        decay = shift.exp()
        if state.z_sum is not None:
            state.z_sum[rows] += z.sum(dim=1)
        at = target[rows] - first
        inside = (at >= 0) & (at < columns)
        hit = z.gather(1, at.clamp(0, columns - 1).unsqueeze(1)).squeeze(1)
        state.target_logit[rows] = torch.where(inside, hit, state.target_logit[rows])
        centre = new.masked_fill(new.isneginf(), 0).unsqueeze(1)  # a row of -inf so far stays at s = 0
        centred = z - centre if z.data_ptr() == x[rows].data_ptr() else z.sub_(centre)
        e = centred.exp() if state.t is not None else centred.exp_()
        if state.t is not None:
            carried = state.t[rows] + shift.clamp(min=LOWEST) * state.s[rows]
            state.t[rows] = decay * carried + centred.clamp_(min=LOWEST).mul_(e).sum(dim=1)
        if state.q is not None:
            state.q[rows] = decay.square() * state.q[rows] + torch.linalg.vecdot(e, e)
        state.s[rows] = decay * state.s[rows] + e.sum(dim=1)
        state.m[rows] = new
    state.columns += columns


def finish(state: RowState) -> dict[str, Tensor]:
    """The outputs asked for, each (R,); `logps` and `lse` always. A target outside all columns gives NaN log-probs."""
    log_s = state.s.log()
    lse = state.m + log_s
    out = {"logps": (state.target_logit - state.m) - log_s, "lse": lse}
    if state.t is not None:
        out["entropy"] = (log_s - state.t / state.s).clamp(min=0)
    if state.q is not None:
        out["log_sum_sq_probs"] = state.q.log() - 2 * log_s
    if state.z_sum is not None:
        out["mean_logits"] = state.z_sum / state.columns
    if "is_top1" in state.outputs:
        out["is_top1"] = state.target_logit >= state.m
    return out


def gradient_(
    x: Tensor,  # (R, C) raw products, overwritten
    target: Tensor,  # (R,)
    first: int,
    logits: LogitMap,
    lse: Tensor,  # (R,)
    coefficients: dict[str, Tensor],  # dL/d output, each (R,): logps, entropy, lse, mean_logits
    *,
    entropy: Tensor | None,  # (R,), needed with an entropy coefficient
    vocabulary: int,
    dtype: torch.dtype,
) -> Tensor:
    """dL/dx (R, C) in `dtype`, in the storage of the tile: row r of the result begins where row r of `x` began.

    dL/dz_v = c_logps (1[v = target] - p_v) + c_lse p_v - c_entropy p_v (log p_v + entropy) + c_mean / V
    """
    c_logps, c_lse = coefficients.get("logps"), coefficients.get("lse")
    c_entropy, c_mean = coefficients.get("entropy"), coefficients.get("mean_logits")
    c_p = c_lse if c_logps is None else -c_logps if c_lse is None else c_lse - c_logps  # the coefficient of p_v
    columns = x.shape[1]
    result = x if dtype == x.dtype else x.view(dtype)[:, :columns]
    for rows in row_blocks(x):
        block = x[rows]
        z = logits_of(block, logits, rows, lse.dtype)
        slope = slope_of(z, logits, rows)
        log_p = torch.sub(z, lse[rows].unsqueeze(1), out=z)
        if c_entropy is None:
            d = log_p.exp_()
            d.mul_(c_p[rows].unsqueeze(1)) if c_p is not None else d.zero_()
        else:
            assert entropy is not None
            log_p.clamp_(min=LOWEST)
            p = log_p.exp()
            d = log_p.add_(entropy[rows].unsqueeze(1)).mul_(-c_entropy[rows].unsqueeze(1))
            if c_p is not None:
                d.add_(c_p[rows].unsqueeze(1))
            d.mul_(p)
        if c_mean is not None:
            d.add_((c_mean[rows] / vocabulary).unsqueeze(1))
        if c_logps is not None:
            at = target[rows] - first
            inside = (at >= 0) & (at < columns)
            d.scatter_add_(1, at.clamp(0, columns - 1).unsqueeze(1), (c_logps[rows] * inside).unsqueeze(1))
        if slope is not None:
            d.mul_(slope)
        if dtype != x.dtype:
            result[rows] = d.to(dtype)  # a copy first: the two overlap
        elif d.data_ptr() != block.data_ptr():
            block.copy_(d)
    return result


def logits_of(x: Tensor, logits: LogitMap, rows: slice, dtype: torch.dtype) -> Tensor:
    """z of a block: a fresh tensor, or `x` itself where nothing lies between."""
    z = x.to(dtype)
    if logits.is_identity:
        return z
    z = z + logits.bias if logits.bias is not None else z.clone() if z is x else z
    if logits.softcap is not None:
        z.mul_(logits.logit_scale / logits.softcap).tanh_().mul_(logits.softcap)
    elif logits.logit_scale != 1.0:
        z.mul_(logits.logit_scale)
    if not is_one(logits.inv_temperature):
        z.mul_(_per_row(logits.inv_temperature, rows))
    return z


def slope_of(z: Tensor, logits: LogitMap, rows: slice) -> Tensor | float | None:
    """dz/dx of a block, from z; None for 1."""
    if logits.logit_scale == 1.0 and logits.softcap is None and is_one(logits.inv_temperature):
        return None
    scale = logits.logit_scale * _per_row(logits.inv_temperature, rows)
    if logits.softcap is None:
        return scale
    capped = z / (_per_row(logits.inv_temperature, rows) * logits.softcap)
    return capped.square_().neg_().add_(1).mul_(scale)


def _per_row(value: float | Tensor, rows: slice) -> float | Tensor:
    return value[rows].unsqueeze(1) if isinstance(value, Tensor) else value


def row_blocks(x: Tensor) -> Iterator[slice]:
    rows, columns = x.shape
    step = max(1, BLOCK_BYTES.get(x.device.type, 1 << 26) // (4 * max(1, columns)))
    return (slice(r, min(r + step, rows)) for r in range(0, rows, step))
