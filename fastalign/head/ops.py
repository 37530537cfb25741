"""The operator as `torch.library` ops, for callers under torch.compile.

Eager calls do not pass through here: they plan with exact row counts and keep their saved tensors compact. A trace
knows no row counts, so `auto` means `frozen` or `recompute`, and what is kept has room for every row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastalign.head import function
from fastalign.head.autograd import pull_back, spread
from fastalign.head.call import Call, live_index
from fastalign.head.function import FIELDS, Operands
from fastalign.head.plan import Plan, make_plan


def traced(call: Call, *, schedule: str, budget: int | None, impl: str) -> Tensor:
    """(6, N) statistics through the registered op."""
    hidden, weight, bias, u, b = call.tensors
    if call.d_weight is not None:
        raise ValueError("d_weight cannot be used inside torch.compile: leave the gradient of weight to autograd there")
    if schedule == "auto":
        schedule = "recompute" if call.head_grad else "frozen" if call.hidden_grad else "none"
    per_token = isinstance(call.temperature, Tensor)
    stats, _, _ = linear_logps_op(
        hidden,
        weight,
        call.target,
        bias,
        u,
        b,
        call.temperature if per_token else None,
        1.0 if per_token else float(call.temperature),
        call.logit_scale,
        call.softcap,
        call.ignore_index,
        ",".join(sorted(call.outputs)),
        ",".join(call.grad_outputs),
        schedule,
        budget,
        impl,
    )
    return stats


@torch.library.custom_op("fastalign::linear_logps", mutates_args=())
def linear_logps_op(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (N,)
    bias: Tensor | None,
    u: Tensor | None,
    lora_weight: Tensor | None,
    temperatures: Tensor | None,  # (N,)
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    outputs: str,  # comma-separated fields of HeadOutput
    grad_outputs: str,
    schedule: str,
    budget: int | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics (6, N) in the order of HeadOutput, and what the schedule keeps, with room for N rows."""
    operands = Operands(
        hidden, weight, target, bias, u, lora_weight, temperature if temperatures is None else temperatures, logit_scale, softcap
    )
    live = live_index(target, ignore_index)
    n, wanted = hidden.shape[0] if live is None else live.shape[0], tuple(filter(None, grad_outputs.split(",")))
    plan = _plan(operands, n, schedule, budget, impl, len(wanted))
    some = operands.take(live)
    found, kept, kept_u = function.forward(some, plan, frozenset(outputs.split(",")), wanted, hidden.shape[0])
    for rows in (kept, kept_u):
        if rows.numel():
            rows[..., n:, :].zero_()
    return found if live is None else spread(found.T, live, hidden.shape[0]).T.contiguous(), kept, kept_u


@linear_logps_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    u: Tensor | None,
    lora_weight: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    outputs: str,
    grad_outputs: str,
    schedule: str,
    budget: int | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    n, d = hidden.shape
    stats = hidden.new_empty(len(FIELDS), n, dtype=torch.promote_types(hidden.dtype, torch.float32))
    if schedule == "keep":
        return stats, hidden.new_empty(n, weight.shape[0]), hidden.new_empty(0)
    if schedule == "frozen":
        k = len([g for g in grad_outputs.split(",") if g])
        return stats, hidden.new_empty(k, n, d), hidden.new_empty(0) if u is None else hidden.new_empty(k, n, u.shape[1])
    return stats, hidden.new_empty(0), hidden.new_empty(0)


@torch.library.custom_op("fastalign::linear_logps_backward", mutates_args=())
def linear_logps_backward_op(
    d_stats: Tensor,  # (6, N)
    stats: Tensor,  # (6, N)
    kept: Tensor,
    kept_u: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    u: Tensor | None,
    lora_weight: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    grad_outputs: str,
    schedule: str,
    budget: int | None,
    impl: str,
    needs: list[bool],  # hidden, weight, bias, u, lora_weight
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the five operands; an empty tensor where none is needed."""
    operands = Operands(
        hidden, weight, target, bias, u, lora_weight, temperature if temperatures is None else temperatures, logit_scale, softcap
    )
    live = live_index(target, ignore_index)
    wanted = [g for g in grad_outputs.split(",") if g]
    found, d_live = (stats, d_stats) if live is None else (stats[:, live], d_stats[:, live])
    plan = _plan(operands, found.shape[1], schedule, budget, impl, len(wanted))
    coefficients = {name: d_live[FIELDS.index(name)] for name in wanted}
    grads = pull_back(operands, plan, live, found, coefficients, kept, kept_u, needs, None)
    return tuple(hidden.new_empty(0) if g is None else g.contiguous() for g in grads)  # type: ignore[return-value]


@linear_logps_backward_op.register_fake
def _(
    d_stats: Tensor,
    stats: Tensor,
    kept: Tensor,
    kept_u: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    u: Tensor | None,
    lora_weight: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    grad_outputs: str,
    schedule: str,
    budget: int | None,
    impl: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    operands = (hidden, weight, bias, u, lora_weight)
    made = [x.new_empty(x.shape) if need and x is not None else hidden.new_empty(0) for x, need in zip(operands, needs)]
    return tuple(made)  # type: ignore[return-value]


OPERANDS = (0, 1, 3, 4, 5)  # positions of the five differentiable arguments of linear_logps_op
ARGUMENTS = 16


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    stats, kept, kept_u = output
    ctx.save_for_backward(stats, kept, kept_u, *inputs[:7])
    ctx.scalars = (*inputs[7:11], inputs[12], *inputs[13:])
    ctx.mark_non_differentiable(kept, kept_u)


def _backward(ctx: Any, d_stats: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    needs = [bool(ctx.needs_input_grad[i]) for i in OPERANDS]
    grads = linear_logps_backward_op(d_stats.contiguous(), *ctx.saved_tensors, *ctx.scalars, needs)
    result: list[Tensor | None] = [None] * ARGUMENTS
    for position, need, grad in zip(OPERANDS, needs, grads):
        result[position] = grad if need else None
    return tuple(result)


linear_logps_op.register_autograd(_backward, setup_context=_setup_context)


def _plan(operands: Operands, rows: int, schedule: str, budget: int | None, impl: str, grad_outputs: int) -> Plan:
    return make_plan(
        rows,
        operands.weight.shape[0],
        operands.hidden.shape[1],
        dtype=operands.hidden.dtype,
        device=operands.hidden.device,
        hidden_grad=schedule != "none",
        head_grad=schedule in ("keep", "recompute"),
        grad_outputs=max(1, grad_outputs),
        schedule=schedule,
        budget=budget,
        impl=impl,
    )
