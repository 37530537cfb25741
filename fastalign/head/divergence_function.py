"""The schedules of the divergences: the GEMMs of both heads around the row kernels, and what they cost.

As in `function.py` a slab is whole rows, here of two tiles, and the gradient takes the storage of the student's tile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastalign.head.call import Call
from fastalign.head.function import Gradients, Operands, products, scratch_tile
from fastalign.head.plan import Plan, default_budget, make_plan
from fastalign.head.products import reads_half, slabs

STUDENT_OUTPUTS = ("logps", "entropy", "lse", "is_top1")
DIFFERENTIABLE = ("divergence", "logps", "entropy", "lse")


class DivergenceOutput(NamedTuple):
    """Per-token results, each of the shape of `hidden` without its last dimension; a field that was not asked for is None.

    Rows that do not count are 0 (False) and have zero gradient. All float32 (float64 for float64 inputs), in nats. The
    fields after the first are the student's, as in HeadOutput.
    """

    divergence: Tensor  # differentiable
    logps: Tensor | None = None  # log p(target), differentiable
    entropy: Tensor | None = None  # differentiable
    lse: Tensor | None = None  # differentiable
    is_top1: Tensor | None = None  # bool


FIELDS = DivergenceOutput._fields
SCORES = (*FIELDS, "ref_lse", "student_kl")  # what a schedule keeps of a row


@dataclass(frozen=True)
class PairPlan:
    """The planner's choice for two heads. `plan.scratch` and `plan.budget` count the tiles of both."""

    plan: Plan
    student_gemms: int  # of 2 N V D floating-point operations
    ref_gemms: int  # of 2 N V D2

    def flops(self, rows: int, vocabulary: int, hidden_size: int, ref_hidden_size: int) -> int:
        """Of forward and backward together, without the thin products of a LoRA."""
        return 2 * rows * vocabulary * (self.student_gemms * hidden_size + self.ref_gemms * ref_hidden_size)

    def __str__(self) -> str:
        return f"{self.plan}\n  {self.student_gemms} GEMMs of the student's head, {self.ref_gemms} of the teacher's"


@dataclass(frozen=True)
class PairCall:
    """One checked call."""

    student: Call
    ref: Call
    kind: str
    beta: float
    outputs: frozenset[str]  # fields of DivergenceOutput
    grad_outputs: tuple[str, ...]

    def plan(self, rows: int, *, schedule: str, budget: int | None, impl: str, local_loss: bool = False) -> PairPlan:
        hidden, weight = self.student.tensors[:2]
        return plan_divergence(
            rows,
            *weight.shape,
            kind=self.kind,
            dtype=hidden.dtype,
            device=hidden.device,
            hidden_grad=self.student.hidden_grad,
            head_grad=self.student.head_grad,
            grad_outputs=max(1, len(self.grad_outputs)),
            schedule=schedule,
            budget=budget,
            impl=impl,
            local_loss=local_loss,
        )

    def sides(self, tensors: Sequence[Tensor | None], rows: Tensor | None) -> Sides:
        """Both heads over some rows; `tensors` are the student's as autograd hands them back."""
        hidden, weight, *others = tensors
        assert hidden is not None and weight is not None
        return Sides(self.student.operands(hidden, weight, *others), self.ref.operands(*self.ref.tensors), self).take(rows)

    def output(self, scores: Tensor) -> DivergenceOutput:
        """Fields from the (len(SCORES), N) scores."""

        def one(name: str) -> Tensor | None:
            if name not in self.outputs:
                return None
            value = scores[SCORES.index(name)]
            value = value if name in self.grad_outputs else value.detach()
            return (value != 0 if name == "is_top1" else value).view(self.student.shape)

        divergence, *others = map(one, FIELDS)
        assert divergence is not None
        return DivergenceOutput(divergence, *others)


class Sides(NamedTuple):
    """Both heads over the same rows."""

    student: Operands
    ref: Operands
    call: PairCall

    def take(self, index: Tensor | None) -> Sides:
        return self._replace(student=self.student.take(index), ref=self.ref.take(index))

    def tiles(self, rows: slice, cols: slice, scratch: tuple[Tensor, Tensor], impl: str) -> tuple[Tensor, Tensor]:
        return products(self.student, rows, cols, scratch[0], impl), products(self.ref, rows, cols, scratch[1], impl)

    def scratch(self, plan: Plan) -> tuple[Tensor, Tensor]:
        return scratch_tile(self.student, plan), scratch_tile(self.ref, plan)


def plan_divergence(
    rows: int,
    vocabulary: int,
    hidden_size: int,
    *,
    kind: str = "forward_kl",
    device: torch.device | str = "cpu",
    budget: int | None = None,
    schedule: str = "auto",
    hidden_grad: bool = True,
    head_grad: bool = True,
    grad_outputs: int = 1,
    local_loss: bool = False,
    **request: Any,
) -> PairPlan:
    """Slabs and schedule of a divergence; the requests are those of `plan.make_plan`. Each head's tile has half of the budget.

    | schedule          | GEMMs of the student | of the teacher | FLOPs at equal D | in tiles of the vocabulary |
    |-------------------|----------------------|----------------|------------------|----------------------------|
    | none              | 1                    | 1              | 4NVD             | 4NVD, jsd 8NVD             |
    | frozen            | 2                    | 1              | 6NVD             | 10NVD, jsd 14NVD           |
    | slab              | 3                    | 1              | 8NVD             | 12NVD, jsd 16NVD           |
    | slab, frozen head | 2                    | 1              | 6NVD             | 10NVD, jsd 14NVD           |
    | recompute         | 4                    | 2              | 12NVD            | 12NVD, jsd 16NVD           |

    In tiles `frozen` and `slab` form the logits of both heads again for the gradient, and jsd once more for its second pass;
    whole rows of logits are simply read again. Under `frozen` each further differentiable output costs 2NVD, 6NVD in tiles.
    Raises ValueError as `make_plan` does, and for schedule "keep": two (N, V) tensors are what this operator avoids.

    >>> print(plan_divergence(4096, 151936, 512, local_loss=True, budget=256 * 2**20, impl="torch"))
    schedule slab, impl torch: 8 NVD
      slabs of 208 rows x 151936 columns, 241.1 MiB scratch of 256.0 MiB budget, 0.0 MiB kept
      the loss is known slab by slab
      3 GEMMs of the student's head, 1 of the teacher's
    """
    if schedule == "keep":
        raise ValueError("a divergence has no schedule 'keep': use 'auto', or linear_divergence_loss for 8NVD")
    if schedule == "slab" and not local_loss:
        raise ValueError("schedule 'slab' needs the loss while the slab is there: call linear_divergence_loss, or use 'auto'")
    device = torch.device(device)
    budget = default_budget(device) if budget is None else int(budget)
    if budget <= 0:
        raise ValueError(f"budget must be a positive number of bytes, got {budget}")
    gradients = {"hidden_grad": hidden_grad, "head_grad": head_grad, "grad_outputs": grad_outputs, "local_loss": local_loss}
    half = {"device": device, "budget": max(1, budget // 2), **gradients, **request}
    plan = make_plan(rows, vocabulary, hidden_size, schedule=schedule, **half)
    if plan.schedule == "keep":
        plan = make_plan(rows, vocabulary, hidden_size, schedule="recompute", **half)
    gradient_gemms = {"frozen": grad_outputs, "slab": hidden_grad + head_grad, "recompute": hidden_grad + head_grad}
    again = {"frozen": plan.tiled * grad_outputs, "slab": int(plan.tiled), "recompute": 1}.get(plan.schedule, 0)
    ref = 1 + again + (plan.tiled and kind == "jsd")
    student = ref + gradient_gemms.get(plan.schedule, 0)
    plan = replace(plan, budget=budget, scratch=2 * plan.scratch, nvd=2 * (student + ref))
    return PairPlan(plan, student, ref)


def kernels_of(impl: str) -> ModuleType:
    """The row kernels of a plan's implementation; "native" has products of its own and the row kernels of torch."""
    if impl == "triton":
        from fastalign.head import divergence_triton

        return divergence_triton
    from fastalign.head import divergence_torch

    return divergence_torch


def score_slab(
    sides: Sides, plan: Plan, rows: slice, scratch: tuple[Tensor, Tensor]
) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor] | None]:
    """SCORES of one slab that its kind and outputs have, and the raw products of both heads if they were not tiled."""
    student, ref, call = sides
    kernels, target = kernels_of(plan.impl), student.target[rows]
    wanted = frozenset(call.outputs & set(STUDENT_OUTPUTS))
    state = kernels.start(target.shape[0], call.kind, wanted, dtype=student.work_dtype, device=target.device)
    cuts = list(slabs(student.weight.shape[0], plan.tile_cols))
    for cols in cuts:
        tiles = sides.tiles(rows, cols, scratch, plan.impl)
        kernels.update(state, *tiles, target, cols.start, student.logit_map(rows, cols), ref.logit_map(rows, cols))
    found: dict[str, Tensor] = kernels.finish(state)
    if call.kind == "jsd":
        sums = found["lse"].new_zeros(2, target.shape[0])
        for cols in cuts:
            if plan.tiled:
                tiles = sides.tiles(rows, cols, scratch, plan.impl)
            maps = student.logit_map(rows, cols), ref.logit_map(rows, cols)
            kernels.mix(sums, *tiles, *maps, found["lse"], found["ref_lse"], call.beta)
        found["divergence"], found["student_kl"] = sums[0].clamp(min=0), sums[1]
    return found, None if plan.tiled else tiles


def gradient_tiles(
    sides: Sides,
    plan: Plan,
    rows: slice,
    found: dict[str, Tensor],  # of these rows
    coefficients: dict[str, Tensor],  # dL/d output of these rows
    scratch: tuple[Tensor, Tensor],
    *,
    whole: tuple[Tensor, Tensor] | None = None,  # raw products of the slab, if at hand; the student's are overwritten
) -> Iterator[tuple[slice, Tensor]]:
    """The slab's dL/d(raw product of the student), tile by tile, in the dtype of the gradient GEMMs."""
    student, ref, call = sides
    narrow = student.hidden.dtype if reads_half(student.hidden, plan.impl) else student.work_dtype
    vocabulary = student.weight.shape[0]
    for cols in slabs(vocabulary, vocabulary if whole is not None else plan.tile_cols):
        tiles = sides.tiles(rows, cols, scratch, plan.impl) if whole is None else whole
        maps = student.logit_map(rows, cols), ref.logit_map(rows, cols)
        options = {"kind": call.kind, "beta": call.beta, "dtype": narrow}
        yield cols, kernels_of(plan.impl).gradient_(*tiles, student.target[rows], cols.start, *maps, found, coefficients, **options)


def forward(sides: Sides, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """Scores (len(SCORES), n), and under `frozen` d output / d hidden (k, n, D) and d output / d u (k, n, r)."""
    student, _, call = sides
    hidden, (n, d) = student.hidden, student.hidden.shape
    scores = hidden.new_zeros(len(SCORES), n, dtype=student.work_dtype)
    kept, kept_u = hidden.new_empty(0), hidden.new_empty(0)
    if plan.schedule == "frozen":
        kept = hidden.new_empty(len(call.grad_outputs), n, d)
        kept_u = kept_u if student.u is None else hidden.new_empty(len(call.grad_outputs), n, student.u.shape[1])
    scratch = sides.scratch(plan)
    for rows in slabs(n, plan.slab_rows):
        found, tiles = score_slab(sides, plan, rows, scratch)
        for name, value in found.items():
            scores[SCORES.index(name), rows] = value.to(scores.dtype)
        for k, name in enumerate(call.grad_outputs if plan.schedule == "frozen" else ()):
            unit = {name: torch.ones_like(found["lse"])}
            last = k == len(call.grad_outputs) - 1
            whole = tiles if tiles is None or last else (tiles[0].clone(), tiles[1])
            grads = Gradients(student, (False,) * 5, None)
            grads.hidden, grads.u = kept[k], None if student.u is None else kept_u[k]
            grads.add(rows, gradient_tiles(sides, plan, rows, found, unit, scratch, whole=whole))
    return scores, kept, kept_u
