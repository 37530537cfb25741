"""A language-model head whose rows lie on several processes: what stands for it in a model that is trained by a group of them.

`divide_head` leaves this process its rows, in the very tensor that the model and every HeadSpec of it have; it carries the
DividedHead, by which `HeadSpec` finds the others. All processes ask for log-probs or losses equally often in a micro-batch. Where they
need not, because each runs the model as often as it likes, a process that has nothing more to ask serves the others meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fastalign.errors import ConfigError
from fastalign.head.autograd import LossFn, group_bounds
from fastalign.head.call import Call
from fastalign.head.exchange import Exchange
from fastalign.head.function import DIFFERENTIABLE, Operands
from fastalign.head.parallel_loss import Request, divided_logps, divided_loss, serve
from fastalign.models.trunk import causal_lm
from fastalign.types import IGNORE_INDEX, HeadOutput


class _Logits(NamedTuple):
    """A request for the logits of so many rows."""

    rows: int
    head: int


class DividedHead:
    """The rows of a head that are here, `linear.weight` (v, D), and the way to the others. Bias and adapters are whole everywhere.

    `heads` are all that the same processes divide, in the same order everywhere: whoever serves, serves them all.
    """

    def __init__(self, linear: nn.Linear, module: Any, exchange: Exchange, heads: list[DividedHead]) -> None:
        self.linear, self.module, self.exchange = linear, module, exchange  # `module` is PEFT's layer, if there is one
        self.heads, self.place = heads, len(heads)
        heads.append(self)

    def logps(self, hidden: Tensor, target: Tensor, *, b: Tensor | None = None, **options: Any) -> HeadOutput:
        """`linear_logps` without gradient; `b` is the LoRA's B as it is trained, by which the others know it."""
        if torch.is_grad_enabled() and (hidden.requires_grad or self.linear.weight.requires_grad):
            raise RuntimeError("log-probs of a divided head have no gradient: call HeadSpec.loss, or enter torch.no_grad()")
        call, rest = self._call(hidden, target, options)
        return divided_logps(call, self.exchange, rest["budget"], rest["impl"], (self.place, self._name_of(b)))

    def loss(
        self,
        hidden: Tensor,
        target: Tensor,
        loss_fn: LossFn,
        *,
        groups: Sequence[int] | Tensor | None = None,
        b: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """`linear_loss` of the rows of this process; the gradient of the weight is of the losses of all of them."""
        call, rest = self._call(hidden, target, options)
        bounds = group_bounds(groups, call.target.shape[0])
        return divided_loss(call, loss_fn, bounds, self.exchange, rest["budget"], rest["impl"], (self.place, self._name_of(b)))

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """(..., V) what the whole linear layer makes of `hidden` (..., D)."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        return self._logits(rows, self.exchange.words(_Logits(len(rows), self.place))).view(*hidden.shape[:-1], -1)

    def serve(self) -> None:
        """Take part in what the other processes ask, until all of them have come here."""
        while any(asked := self.exchange.words(None)):
            request = next(filter(None, asked))
            if isinstance(request, _Logits):
                head = self.heads[request.head]
                head._logits(head.linear.weight.new_zeros(0, head.linear.weight.shape[1]), asked)
            else:
                serve(self.heads[request.which[0]]._nothing(request), self.exchange, asked)

    def make_whole(self) -> None:
        """Leave the first process of the group with the whole weight, on the host; the others keep their rows."""
        weight, exchange = self.linear.weight, self.exchange
        longest = max(exchange.sizes)
        sent = weight.new_zeros(longest, weight.shape[1])
        sent[: len(weight)] = weight.detach()
        parts = [torch.empty_like(sent) for _ in exchange.sizes] if exchange.index == 0 else None
        dist.gather(sent, parts, group=exchange.group, group_dst=0)
        if parts is not None:
            weight.data = torch.cat([part[:size].cpu() for part, size in zip(parts, exchange.sizes)])
            del self.linear.forward, weight.divided_head  # type: ignore[attr-defined]

    def _logits(self, rows: Tensor, requests: Sequence[_Logits | None]) -> Tensor:
        counts = [0 if request is None else request.rows for request in requests]
        bias = None if self.linear.bias is None else self.linear.bias[self.exchange.own]
        return self.exchange.turned(F.linear(self.exchange.gather(rows, counts), self.linear.weight, bias), counts)

    def _call(self, hidden: Tensor, target: Tensor, options: dict[str, Any]) -> tuple[Call, dict[str, Any]]:
        """The checked call over the rows here of weight, bias and B, and what it does not take."""
        own, known = self.exchange.own, {"budget": None, "impl": "auto", **options}
        bias, lora = known.pop("bias", None), known.pop("lora", None)
        rest = {name: known.pop(name) for name in ("budget", "impl")}
        defaults: dict[str, Any] = {
            "temperature": 1.0, "ignore_index": IGNORE_INDEX, "outputs": ("logps",), "differentiable": DIFFERENTIABLE, "d_weight": None,
            "live_rows": None, "active": None, "logit_scale": 1.0, "softcap": None,
        }  # fmt: skip
        call = Call.of(
            hidden,
            self.linear.weight,
            target,
            None if bias is None else bias[own],
            None if lora is None else (lora[0], lora[1][own]),
            **(defaults | known),
        )
        return call, rest

    def _nothing(self, request: Request) -> Operands:
        """No row, under the head that `request` is about."""
        weight, own = self.linear.weight.detach(), self.exchange.own
        b = u = None
        if request.rank:
            b, u = self.module.lora_B[request.which[1]].weight.detach()[own].to(weight.dtype), weight.new_zeros(0, request.rank)
        bias = None if self.linear.bias is None else self.linear.bias.detach()[own]
        target = torch.zeros(0, dtype=torch.int64, device=weight.device)
        temperature = weight.new_zeros(0, dtype=torch.float32) if request.temperature is None else request.temperature
        return Operands(weight.new_zeros(0, weight.shape[1]), weight, target, bias, u, b, temperature, request.logit_scale, request.softcap)

    def _name_of(self, b: Tensor | None) -> str | None:
        return None if b is None else next(name for name, layer in self.module.lora_B.items() if layer.weight is b)


def divide_head(model: nn.Module, group: Any, heads: list[DividedHead]) -> DividedHead:
    """Leave this process its rows of the head of `model`: as many as every other of `group`, but for the last ones.

    The weight keeps its identity. The model's own head, as generation calls it, asks the other processes. Added to `heads`.
    Raises ConfigError for a head that is the embedding, too, that an adapter trains in full, or that has fewer rows than there are
    processes.
    """
    causal = causal_lm(model)
    module: Any = causal.get_output_embeddings()
    linear = getattr(module, "base_layer", module)
    if hasattr(module, "modules_to_save"):
        raise ConfigError("parallel.head vocab divides one head, and lora.modules_to_save makes two; use lora.targets, or set it to whole")
    weight = linear.weight
    if weight is causal.get_input_embeddings().weight:
        raise ConfigError(
            "parallel.head vocab cannot divide a head that is the embedding, too (tie_word_embeddings), of which every process reads any "
            "row; set --parallel.head whole"
        )
    size = dist.get_world_size(group)
    rows = -(-len(weight) // size)
    sizes = [max(0, min(rows, len(weight) - i * rows)) for i in range(size)]
    if not sizes[-1]:
        raise ConfigError(f"parallel.head vocab: {len(weight)} rows of the head for {size} processes; set --parallel.head whole")
    divided = DividedHead(linear, module, Exchange(group, sizes), heads)
    weight.data = weight.data[divided.exchange.own].clone()
    weight.divided_head = divided
    linear.forward = divided.logits
    return divided


def divided_head(weight: Tensor) -> DividedHead | None:
    """The DividedHead whose rows `weight` is; None for a weight that is whole."""
    return getattr(weight, "divided_head", None)


def whole_shape(weight: Tensor) -> torch.Size:
    """The shape that `weight` has over all processes."""
    divided = divided_head(weight)
    return weight.shape if divided is None else torch.Size((divided.exchange.vocabulary, *weight.shape[1:]))
