"""The schedules: GEMMs of slabs and tiles around the row kernels, forward and backward.

Everything here works on the live rows of one call (`Operands`), with n rows, and knows nothing of autograd; `api.py` and
`ops.py` wrap it. The logits of at most one slab exist at a time, and a slab's gradient takes the logits' own storage.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastalign.head.plan import Plan
from fastalign.head.products import add_product, multiply, reads_half, slabs
from fastalign.head.rows import LogitMap, rows_of
from fastalign.types import HeadOutput

FIELDS = HeadOutput._fields
DIFFERENTIABLE = ("logps", "entropy", "lse", "mean_logits")
PITCH = 16  # a row of the scratch is a multiple of this many elements, so that it begins where wide loads may


class Operands(NamedTuple):
    """The head and its live rows."""

    hidden: Tensor  # (n, D)
    weight: Tensor  # (V, D)
    target: Tensor  # (n,) int64
    bias: Tensor | None = None  # (V,)
    u: Tensor | None = None  # (n, r), logits gain u @ lora_weight.T
    lora_weight: Tensor | None = None  # (V, r)
    temperature: float | Tensor = 1.0  # or (n,)
    logit_scale: float = 1.0
    softcap: float | None = None

    @property
    def work_dtype(self) -> torch.dtype:
        return torch.promote_types(self.hidden.dtype, torch.float32)

    def take(self, index: Tensor | None) -> Operands:
        """The same head over the rows `index`; None is all rows, without a copy."""
        if index is None:
            return self
        u = None if self.u is None else self.u.index_select(0, index)
        temperature = self.temperature.index_select(0, index) if isinstance(self.temperature, Tensor) else self.temperature
        return self._replace(
            hidden=self.hidden.index_select(0, index), target=self.target.index_select(0, index), u=u, temperature=temperature
        )

    def logit_map(self, rows: slice, cols: slice) -> LogitMap:
        bias = None if self.bias is None else self.bias[cols].to(self.work_dtype)
        if isinstance(self.temperature, Tensor):
            return LogitMap(bias, self.logit_scale, self.softcap, self.temperature[rows].to(self.work_dtype).reciprocal())
        return LogitMap(bias, self.logit_scale, self.softcap, 1.0 / self.temperature)


class Gradients:
    """Accumulates dL/d operand over slabs and tiles: float32 sums, each rounded once to the dtype of its operand."""

    def __init__(self, operands: Operands, needs: Sequence[bool], d_weight: Tensor | None) -> None:
        hidden, weight, bias, u, lora_weight = needs  # a gradient is wanted

        def zeros(like: Tensor | None) -> Tensor | None:
            return None if like is None else torch.zeros(like.shape, dtype=operands.work_dtype, device=like.device)

        def rows(like: Tensor | None) -> Tensor | None:
            return None if like is None else torch.empty_like(like, memory_format=torch.contiguous_format)

        self.operands = operands
        self.hidden = rows(operands.hidden) if hidden else None
        self.u = rows(operands.u) if u else None
        self.weight = d_weight if d_weight is not None else zeros(operands.weight) if weight else None
        self.bias = zeros(operands.bias) if bias else None
        self.lora_weight = zeros(operands.lora_weight) if lora_weight else None

    def over(self, operands: Operands) -> Gradients:
        """The same sums over the vocabulary, with rows of their own for other live rows."""
        part = Gradients(operands, (self.hidden is not None, False, False, self.u is not None, False), None)
        part.weight, part.bias, part.lora_weight = self.weight, self.bias, self.lora_weight
        return part

    def add(self, rows: slice, tiles: Iterator[tuple[slice, Tensor]]) -> None:
        """Add one slab: `tiles` yields its column ranges with dL/d(raw product) in the dtype of the gradient GEMMs."""
        o, work = self.operands, self.operands.work_dtype
        d_hidden: Tensor | None = None
        d_u: Tensor | None = None
        for cols, d in tiles:
            if self.hidden is not None:
                d_hidden = add_product(d_hidden, d, o.weight[cols], work)
            if self.u is not None and o.lora_weight is not None:
                d_u = add_product(d_u, d, o.lora_weight[cols], work)
            if self.weight is not None:
                add_product(self.weight[cols], d.T, o.hidden[rows], work)
            if self.bias is not None:
                self.bias[cols] += d.sum(0, dtype=work)
            if self.lora_weight is not None and o.u is not None:
                add_product(self.lora_weight[cols], d.T, o.u[rows], work)
        if self.hidden is not None and d_hidden is not None:
            self.hidden[rows] = d_hidden
        if self.u is not None and d_u is not None:
            self.u[rows] = d_u


def scratch_tile(operands: Operands, plan: Plan) -> Tensor:
    """Room for one tile, (slab_rows, tile_cols or a few more); every slab of the call reuses it."""
    columns = -(-plan.tile_cols // PITCH) * PITCH
    return torch.empty(plan.slab_rows, columns, dtype=operands.work_dtype, device=operands.hidden.device)


def products(operands: Operands, rows: slice, cols: slice, scratch: Tensor, impl: str) -> Tensor:
    """Raw products of a tile, (R, C) in the working dtype, written into `scratch`."""
    hidden, weight = operands.hidden[rows], operands.weight[cols]
    tile = scratch[: hidden.shape[0], : weight.shape[0]]
    half = reads_half(hidden, impl)
    multiply(tile, hidden, weight.T, half=half)
    if operands.u is not None and operands.lora_weight is not None:
        multiply(tile, operands.u[rows], operands.lora_weight[cols].T, half=half, accumulate=True)
    return tile


def score_slab(
    operands: Operands, plan: Plan, rows: slice, outputs: frozenset[str], scratch: Tensor, store: Tensor | None = None
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Statistics of one slab, and its raw products if they were not tiled; `store (R, V)` receives a copy of them."""
    target, kernels = operands.target[rows], rows_of(plan.impl)
    state = kernels.start(target.shape[0], outputs, dtype=operands.work_dtype, device=target.device)
    tile = None
    for cols in slabs(operands.weight.shape[0], plan.tile_cols):
        tile = products(operands, rows, cols, scratch, plan.impl)
        if store is not None:
            store[:, cols] = tile
        kernels.update(state, tile, target, cols.start, operands.logit_map(rows, cols))
    return kernels.finish(state), None if plan.tiled else tile


def gradient_tiles(
    operands: Operands,
    plan: Plan,
    rows: slice,
    stats: dict[str, Tensor],  # of these rows: lse, and entropy with an entropy coefficient
    coefficients: dict[str, Tensor],  # dL/d output of these rows
    scratch: Tensor,
    *,
    whole: Tensor | None = None,  # raw products of the slab, if at hand; overwritten
    kept: Tensor | None = None,  # raw products of all rows, if kept; copied
    index: Tensor | None = None,  # (n,) rows of `kept`; None: all
) -> Iterator[tuple[slice, Tensor]]:
    """The slab's dL/d(raw product), tile by tile, in the dtype of the gradient GEMMs."""
    vocabulary, kernels = operands.weight.shape[0], rows_of(plan.impl)
    narrow = operands.hidden.dtype if reads_half(operands.hidden, plan.impl) else operands.work_dtype
    for cols in slabs(vocabulary, vocabulary if whole is not None else plan.tile_cols):
        if whole is not None:
            tile = whole
        elif kept is not None:
            tile = _copy_of(kept, rows, cols, index, scratch)
        else:
            tile = products(operands, rows, cols, scratch, plan.impl)
        yield (
            cols,
            kernels.gradient_(
                tile,
                operands.target[rows],
                cols.start,
                operands.logit_map(rows, cols),
                stats["lse"],
                coefficients,
                entropy=stats.get("entropy"),
                vocabulary=vocabulary,
                dtype=narrow,
            ),
        )


def forward(
    operands: Operands, plan: Plan, outputs: frozenset[str], grad_outputs: tuple[str, ...], capacity: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics (6, n) in the order of HeadOutput, and what the schedule keeps.

    `keep`: the raw products (capacity, V). `frozen`: d output / d hidden (k, capacity, D) and, with a LoRA on the head,
    d output / d u (k, capacity, r). `capacity` >= n is the number of rows to allocate. Otherwise two empty tensors.
    """
    hidden, (n, d) = operands.hidden, operands.hidden.shape
    stats = hidden.new_zeros(len(FIELDS), n, dtype=operands.work_dtype)
    kept, kept_u = hidden.new_empty(0), hidden.new_empty(0)
    if plan.schedule == "keep":
        kept = hidden.new_empty(capacity, operands.weight.shape[0])
    elif plan.schedule == "frozen":
        kept = hidden.new_empty(len(grad_outputs), capacity, d)
        if operands.u is not None:
            kept_u = hidden.new_empty(len(grad_outputs), capacity, operands.u.shape[1])
    direct = plan.schedule == "keep" and not plan.tiled and kept.dtype == operands.work_dtype
    scratch = kept if direct else scratch_tile(operands, plan)
    for rows in slabs(n, plan.slab_rows):
        room = kept[rows] if direct else scratch
        store = kept[rows] if plan.schedule == "keep" and not direct else None
        found, tile = score_slab(operands, plan, rows, outputs, room, store)
        for name, value in found.items():
            stats[FIELDS.index(name), rows] = value.to(stats.dtype)
        if plan.schedule == "frozen":
            for k, name in enumerate(grad_outputs):
                last = k == len(grad_outputs) - 1
                unit = {name: torch.ones_like(found["lse"])}
                whole = tile if last or tile is None else tile.clone()
                grads = Gradients(operands, (False,) * 5, None)
                grads.hidden, grads.u = kept[k], kept_u[k] if operands.u is not None else None
                grads.add(rows, gradient_tiles(operands, plan, rows, found, unit, scratch, whole=whole))
    return stats, kept, kept_u


def backward(
    operands: Operands,
    plan: Plan,
    stats: dict[str, Tensor],  # (n,): lse, entropy
    coefficients: dict[str, Tensor],  # (n,) each
    kept: Tensor,
    index: Tensor | None,  # (n,) rows of `kept`; None: all
    grads: Gradients,
) -> None:
    """Fill `grads` under `keep` or `recompute`."""
    scratch = scratch_tile(operands, plan)
    for rows in slabs(operands.hidden.shape[0], plan.slab_rows):
        here = {k: v[rows] for k, v in stats.items()}
        c = {k: v[rows] for k, v in coefficients.items()}
        source = kept if plan.schedule == "keep" else None
        grads.add(rows, gradient_tiles(operands, plan, rows, here, c, scratch, kept=source, index=index))


def _copy_of(kept: Tensor, rows: slice, cols: slice, index: Tensor | None, scratch: Tensor) -> Tensor:
    """kept[rows, cols], or kept[index[rows], cols], in `scratch`; an index is followed some rows at a time, for it copies first."""
    n, columns = rows.stop - rows.start, cols.stop - cols.start
    tile = scratch[:n, :columns]
    for part in slabs(n, max(1, n) if index is None else 16):
        source = slice(rows.start + part.start, rows.start + part.stop)
        tile[part] = kept[source if index is None else index[source], cols]
    return tile
