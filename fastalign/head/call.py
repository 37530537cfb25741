"""One call of the operator, checked: flattened operands, what is wanted of them, and the result's shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastalign.head.function import DIFFERENTIABLE, FIELDS, Operands
from fastalign.head.plan import Plan, make_plan
from fastalign.head.reference import reference_logps
from fastalign.types import HeadOutput

Temperature = float | Tensor


@dataclass(frozen=True)
class Call:
    """One checked call: flattened operands and what is wanted of them."""

    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]  # hidden (N, D), weight, bias, u (N, r), B
    target: Tensor  # (N,)
    temperature: Temperature  # number or (N,)
    ignore_index: int
    shape: torch.Size
    outputs: frozenset[str]
    grad_outputs: tuple[str, ...]
    d_weight: Tensor | None
    live_rows: int | None
    active: Tensor | None  # (N,) bool, on the host
    hidden_grad: bool
    head_grad: bool
    logit_scale: float
    softcap: float | None

    @staticmethod
    def of(
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None,
        lora: tuple[Tensor, Tensor] | None,
        temperature: Temperature,
        ignore_index: int,
        outputs: Sequence[str],
        differentiable: Sequence[str],
        d_weight: Tensor | None,
        live_rows: int | None,
        active: Tensor | None,
        logit_scale: float,
        softcap: float | None,
    ) -> Call:
        u, b = (None, None) if lora is None else lora
        _check_operands(hidden, weight, target, bias, u, b, d_weight)
        wanted = frozenset(_names(outputs, FIELDS, "outputs")) | {"logps"}
        grads = tuple(f for f in _names(differentiable, DIFFERENTIABLE, "differentiable") if f in wanted)
        if isinstance(temperature, Tensor):
            if temperature.numel() not in (1, target.numel()):
                raise ValueError(
                    f"temperature must be a number or have the shape of target {tuple(target.shape)}, got {tuple(temperature.shape)}"
                )
            if temperature.requires_grad and torch.is_grad_enabled():
                raise ValueError("temperature gets no gradient, but requires one: detach it")
            temperature = temperature.detach().to(hidden.device).expand(target.shape).reshape(-1)
        elif not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        if active is not None and (active.shape != target.shape or active.dtype != torch.bool or active.device.type != "cpu"):
            raise ValueError(
                f"active must be bool of the shape of target {tuple(target.shape)} on the CPU, "
                f"got {active.dtype} {tuple(active.shape)} on {active.device}"
            )
        if softcap is not None and not softcap > 0:
            raise ValueError(f"softcap must be positive or None, got {softcap}")
        enabled = torch.is_grad_enabled() and bool(grads)
        head_grad = enabled and any(x is not None and x.requires_grad for x in (weight, bias, b))
        if d_weight is not None and not (enabled and (weight.requires_grad or hidden.requires_grad)):
            raise ValueError("d_weight asks for the gradient of weight, but no gradient is being recorded: make weight require one")
        flat_u = None if u is None else u.reshape(-1, u.shape[-1])
        return Call(
            tensors=(hidden.reshape(-1, hidden.shape[-1]), weight, bias, flat_u, b),
            target=target.reshape(-1),
            temperature=temperature,
            ignore_index=ignore_index,
            shape=target.shape,
            outputs=wanted,
            grad_outputs=grads,
            d_weight=d_weight,
            live_rows=live_rows,
            active=None if active is None else active.reshape(-1),
            hidden_grad=enabled and (hidden.requires_grad or (u is not None and u.requires_grad)),
            head_grad=head_grad or d_weight is not None,
            logit_scale=float(logit_scale),
            softcap=None if softcap is None else float(softcap),
        )

    def operands(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, u: Tensor | None, b: Tensor | None) -> Operands:
        """All rows of this call, over the tensors that autograd hands back."""
        return Operands(hidden, weight, self.target, bias, u, b, self.temperature, self.logit_scale, self.softcap)

    def live_index(self, vocabulary: int | None = None) -> Tensor | None:
        """(n,) rows with a target, or None for all of them; checks the targets where that costs no sync.

        `vocabulary` counts the rows of the weight where those of this call are not all.
        """
        target, live_rows = self.target, self.live_rows
        if live_rows == target.shape[0]:
            live = None
        elif live_rows is not None:
            live = torch.nonzero_static(target != self.ignore_index, size=live_rows).squeeze(1)
        else:
            live = live_index(target, self.ignore_index)
        if target.device.type == "cpu":
            vocabulary = self.tensors[1].shape[0] if vocabulary is None else vocabulary
            bad = (target != self.ignore_index) & ((target < 0) | (target >= vocabulary))
            if bad.any():
                row = int(bad.nonzero()[0])
                raise ValueError(
                    f"target[{row}] = {int(target[row])} is outside the vocabulary of weight, 0..{vocabulary - 1}; "
                    f"rows without a target take ignore_index = {self.ignore_index}"
                )
        return live

    def active_rows(self, live: Tensor | None) -> Tensor | None:
        """(a,) rising positions among the live rows of those whose gradient may be other than 0, on the host; None: any may."""
        if self.active is None:
            return None
        active = self.active if live is None else self.active[live.cpu()]
        return active.nonzero().squeeze(1)

    def count(self, live: Tensor | None) -> int:
        return self.target.shape[0] if live is None else live.shape[0]

    def plan(self, rows: int, **request: Any) -> Plan:
        hidden, weight = self.tensors[:2]
        return make_plan(
            rows,
            weight.shape[0],
            hidden.shape[1],
            dtype=hidden.dtype,
            device=hidden.device,
            hidden_grad=self.hidden_grad,
            head_grad=self.head_grad,
            grad_outputs=max(1, len(self.grad_outputs)),
            **request,
        )

    def output(self, stats: Tensor) -> HeadOutput:
        """Fields of HeadOutput from the (6, N) statistics."""

        def one(i: int, name: str) -> Tensor | None:
            if name not in self.outputs:
                return None
            value = stats[i] if name in self.grad_outputs else stats[i].detach()
            return (value != 0 if name == "is_top1" else value).view(self.shape)

        logps, *others = (one(i, name) for i, name in enumerate(FIELDS))
        assert logps is not None
        return HeadOutput(logps, *others)

    def reference(self) -> HeadOutput:
        """The same outputs by definition."""
        hidden, weight, bias, u, b = self.tensors
        lora = None if u is None or b is None else (u, b)
        full = reference_logps(
            hidden,
            weight,
            self.target,
            bias=bias,
            lora=lora,
            temperature=self.temperature,
            ignore_index=self.ignore_index,
            logit_scale=self.logit_scale,
            softcap=self.softcap,
        )
        chosen = (x if name in self.outputs else None for name, x in zip(FIELDS, full))
        fields = [x if x is None or name in self.grad_outputs else x.detach() for name, x in zip(FIELDS, chosen)]
        return HeadOutput(*(x if x is None else x.view(self.shape) for x in fields))  # type: ignore[arg-type]


def live_index(target: Tensor, ignore_index: int) -> Tensor | None:
    """(n,) rows with a target, or None for all of them; one sync on a device."""
    live = torch.nonzero(target != ignore_index).squeeze(1)
    return None if live.shape[0] == target.shape[0] else live


def _names(given: Sequence[str], allowed: Sequence[str], argument: str) -> list[str]:
    names = [given] if isinstance(given, str) else list(given)
    for name in names:
        if name not in allowed:
            raise ValueError(f"{argument} takes names out of {tuple(allowed)}, got {name!r}")
    return [name for name in allowed if name in names]


def _check_operands(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, u: Tensor | None, b: Tensor | None, d_weight: Tensor | None
) -> None:
    if not hidden.is_floating_point():
        raise ValueError(f"hidden must be floating point, got {hidden.dtype}")
    if weight.dim() != 2 or weight.shape[0] == 0 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"hidden (..., D) and weight (V, D) must share D, got {tuple(hidden.shape)} and {tuple(weight.shape)}")
    if target.shape != hidden.shape[:-1] or target.dtype != torch.int64:
        raise ValueError(
            f"target must be int64 of shape {tuple(hidden.shape[:-1])} to match hidden, got {target.dtype} {tuple(target.shape)}"
        )
    if (u is None) != (b is None) or (
        u is not None and b is not None and (u.shape != (*hidden.shape[:-1], b.shape[1]) or len(b) != len(weight))
    ):
        raise ValueError("lora must be a pair (u (..., r), B (V, r)) that matches hidden and weight")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({weight.shape[0]},) to match weight, got {tuple(bias.shape)}")
    if d_weight is not None and (d_weight.shape != weight.shape or d_weight.dtype not in (weight.dtype, torch.float32)):
        raise ValueError(
            f"d_weight must be {tuple(weight.shape)} in float32 or {weight.dtype}, got {tuple(d_weight.shape)} {d_weight.dtype}"
        )
    for name, x in (("weight", weight), ("target", target), ("bias", bias), ("lora u", u), ("lora B", b), ("d_weight", d_weight)):
        if x is None:
            continue
        if x.device != hidden.device:
            raise ValueError(f"{name} is on {x.device}, hidden on {hidden.device}: move them to one device")
        if name not in ("target", "d_weight", "bias") and x.dtype != hidden.dtype:
            raise ValueError(f"{name} is {x.dtype}, hidden {hidden.dtype}: cast one of them (under autocast too)")
