"""The row kernels of the divergences in plain torch: the definition that `divergence_triton` must equal.

They see two tiles at a time, `x` of the student and `ref_x` of the teacher, (R, C) each: columns `first : first + C` of
the raw products of the same R rows (`rows.py` says what lies between those and the logits). With p the student's
probabilities, q the teacher's and m = (1 - beta) p + beta q,

    forward_kl  D = sum_v q_v (log q_v - log p_v)               dD/dz_v = p_v - q_v
    reverse_kl  D = sum_v p_v (log p_v - log q_v)               dD/dz_v = p_v (log p_v - log q_v - D)
    jsd         D = beta KL(q || m) + (1 - beta) KL(p || m)     dD/dz_v = (1 - beta) p_v (log p_v - log m_v - KL(p || m))

by the softmax's Jacobian, dD/dz_v = p_v (a_v - sum_w p_w a_w) with a_v = dD/dp_v. For jsd
a_v = (1 - beta) (log (p_v / m_v) + 1) - m_v^-1 ((1 - beta) p_v + beta q_v) (1 - beta) = (1 - beta) log (p_v / m_v), for the
fraction is 1. A term whose weight (p_v or q_v) is 0 is 0, also where its logarithms are infinite.

The KLs come out of the online statistics: sum_v q_v (log q_v - log p_v) = sum_v q_v (w_v - z_v) + lse - ref_lse with the
teacher's logits w. jsd needs both log-sum-exps first, hence a second pass, `mix`. Sides that are bitwise equal are treated by
the same operations, so their divergence and its gradient are exactly 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastalign.head import rows_torch
from fastalign.head.rows import LogitMap, RowState
from fastalign.head.rows_torch import logits_of, row_blocks, slope_of

KINDS = ("forward_kl", "reverse_kl", "jsd")


@dataclass
class PairState:
    """Online statistics of R rows of both sides."""

    kind: str
    student: RowState
    ref: RowState
    gap: Tensor | None  # (R,) sum_v exp(a_v - max a) (a_v - b_v); a is the side that weighs the logarithms; None for jsd


def start(rows: int, kind: str, outputs: frozenset[str], *, dtype: torch.dtype, device: torch.device) -> PairState:
    """Statistics of zero columns; `outputs` are those of the student."""
    student = rows_torch.start(rows, outputs, dtype=dtype, device=device)
    ref = rows_torch.start(rows, frozenset(), dtype=dtype, device=device)
    return PairState(kind, student, ref, None if kind == "jsd" else torch.zeros_like(ref.s))


def update(state: PairState, x: Tensor, ref_x: Tensor, target: Tensor, first: int, logits: LogitMap, ref_logits: LogitMap) -> None:
    """Fold the tiles of the same columns into the statistics; `target (R,)` counts from column 0 of the whole row."""
    weighing = state.ref if state.kind == "forward_kl" else state.student
    old = weighing.m.clone()
    rows_torch.update(state.student, x, target, first, logits)
    rows_torch.update(state.ref, ref_x, target, first, ref_logits)
    if state.gap is None:
        return
    for rows in row_blocks(x):
        a, b = logits_of(ref_x[rows], ref_logits, rows, old.dtype), logits_of(x[rows], logits, rows, old.dtype)
        if state.kind == "reverse_kl":
            a, b = b, a
        new = weighing.m[rows]
        decay = torch.where(old[rows] == new, 0.0, old[rows] - new).exp()
        e = (a - new.masked_fill(new.isneginf(), 0).unsqueeze(1)).exp_()
        terms = torch.where(e > 0, e * (a - b), 0.0)
        state.gap[rows] = torch.where(decay > 0, decay * state.gap[rows], 0.0) + terms.sum(1)


def finish(state: PairState) -> dict[str, Tensor]:
    """The student's outputs, `ref_lse`, and for the KLs `divergence`, each (R,)."""
    out = rows_torch.finish(state.student)
    log_s = state.ref.s.log()
    out["ref_lse"] = state.ref.m + log_s
    if state.gap is not None:
        offset = (state.student.m - state.ref.m) + (state.student.s.log() - log_s)
        weighing, sign = (state.ref, 1) if state.kind == "forward_kl" else (state.student, -1)
        out["divergence"] = (state.gap / weighing.s + sign * offset).clamp(min=0)
    return out


def mix(
    sums: Tensor,  # (2, R): jsd and KL(p || m) of the columns so far, added to
    x: Tensor,
    ref_x: Tensor,
    logits: LogitMap,
    ref_logits: LogitMap,
    lse: Tensor,  # (R,)
    ref_lse: Tensor,  # (R,)
    beta: float,
) -> None:
    """Add the terms of two tiles to the generalised Jensen-Shannon divergence and to its student part."""
    for rows in row_blocks(x):
        log_p = logits_of(x[rows], logits, rows, lse.dtype) - lse[rows].unsqueeze(1)
        log_q = logits_of(ref_x[rows], ref_logits, rows, lse.dtype) - ref_lse[rows].unsqueeze(1)
        p, q = log_p.exp(), log_q.exp()
        m_over_p, m_over_q = _log_ratios(log_p, log_q, beta)
        student = torch.where(p > 0, -p * m_over_p, 0.0).sum(1)
        sums[0, rows] += beta * torch.where(q > 0, -q * m_over_q, 0.0).sum(1) + (1 - beta) * student
        sums[1, rows] += student


def gradient_(
    x: Tensor,  # (R, C) raw products of the student, overwritten
    ref_x: Tensor,  # (R, C)
    target: Tensor,  # (R,)
    first: int,
    logits: LogitMap,
    ref_logits: LogitMap,
    found: dict[str, Tensor],  # (R,) each: lse, ref_lse; entropy, divergence, student_kl where a coefficient needs it
    coefficients: dict[str, Tensor],  # dL/d output, each (R,): divergence, logps, entropy, lse
    *,
    kind: str,
    beta: float,
    dtype: torch.dtype,
) -> Tensor:
    """dL/dx (R, C) in `dtype`, in the storage of the student's tile, as `rows_torch.gradient_` lays it out.

    dL/dz_v = c_divergence dD/dz_v + c_logps (1[v = target] - p_v) + c_lse p_v - c_entropy p_v (log p_v + entropy)
    """
    c_div, c_logps, c_entropy, c_lse = (coefficients.get(name) for name in ("divergence", "logps", "entropy", "lse"))
    columns = x.shape[1]
    result = x if dtype == x.dtype else x.view(dtype)[:, :columns]
    for rows in row_blocks(x):
        z = logits_of(x[rows], logits, rows, found["lse"].dtype)
        slope = slope_of(z, logits, rows)
        log_p = z - found["lse"][rows].unsqueeze(1)
        p = log_p.exp()
        d = torch.zeros_like(p)
        if c_div is not None:
            log_q = logits_of(ref_x[rows], ref_logits, rows, p.dtype) - found["ref_lse"][rows].unsqueeze(1)
            if kind == "forward_kl":
                d = p - log_q.exp()
            elif kind == "reverse_kl":
                d = torch.where(p > 0, p * ((log_p - log_q) - found["divergence"][rows].unsqueeze(1)), 0.0)
            else:
                m_over_p, _ = _log_ratios(log_p, log_q, beta)
                d = torch.where(p > 0, (beta - 1) * p * (m_over_p + found["student_kl"][rows].unsqueeze(1)), 0.0)
            d *= c_div[rows].unsqueeze(1)
        if c_entropy is not None:
            d -= torch.where(p > 0, p * (log_p + found["entropy"][rows].unsqueeze(1)), 0.0) * c_entropy[rows].unsqueeze(1)
        if c_lse is not None:
            d += c_lse[rows].unsqueeze(1) * p
        if c_logps is not None:
            d -= c_logps[rows].unsqueeze(1) * p
            at = target[rows] - first
            inside = (at >= 0) & (at < columns)
            d.scatter_add_(1, at.clamp(0, columns - 1).unsqueeze(1), (c_logps[rows] * inside).unsqueeze(1))
        if slope is not None:
            d *= slope
        result[rows] = d.to(dtype)
    return result


def _log_ratios(log_p: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """log (m / p) and log (m / q); what a probability of 0 is divided into is not defined.

    From the smaller of the two: log (m / p) = log (1 + beta (q / p - 1)) for q <= p, and likewise by q for p < q.
    """
    d = log_q - log_p
    below = d <= 0
    share = torch.full_like(d, 1 - beta).masked_fill_(below, beta)
    r = torch.log1p(share * torch.expm1(-d.abs()))
    return torch.where(below, r, d + r), torch.where(below, r - d, r)
