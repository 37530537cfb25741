"""Reading a model's language-model head: the weights, and what its forward does to the logits after them.

Families scale their logits under many names, and the same name multiplies in one (HyperCLOVAX) and divides in another
(Granite). So the rule is a measurement: the model's own forward runs with its decoder replaced by known hidden states,
and the scale and the softcap are read from the logits that come out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastalign.errors import HeadMismatchError, ModelError
from fastalign.head.api import linear_logps, linear_loss
from fastalign.head.autograd import LossFn
from fastalign.head.divergence import linear_divergence, linear_divergence_loss
from fastalign.head.divergence_autograd import LossFn as DivergenceLossFn
from fastalign.models.divided_head import divided_head
from fastalign.models.trunk import causal_lm, decoder, evaluation
from fastalign.types import HeadOutput


class HeadLora(NamedTuple):
    """A low-rank adapter on the head: logits gain scaling * dropout(hidden) A^T B^T."""

    a: Tensor  # (r, D)
    b: Tensor  # (V, r)
    scaling: float
    dropout: nn.Module


@dataclass(frozen=True)
class HeadSpec:
    """The head: logits = softcap tanh(logit_scale (hidden weight^T + bias + LoRA) / softcap), without the cap where None.

    The tensors are the model's own, so the spec stays right while they are trained, and gradients go to them.
    """

    weight: Tensor  # (V, D), possibly the embedding too
    bias: Tensor | None = None  # (V,)
    logit_scale: float = 1.0
    softcap: float | None = None
    lora: HeadLora | None = None

    def logps(self, hidden: Tensor, target: Tensor, **options: Any) -> HeadOutput:
        """`linear_logps` of `hidden` (..., D) and `target` (...) under this head; same options. Without gradient where it is divided."""
        if (divided := divided_head(self.weight)) is not None:
            return divided.logps(self._cast(hidden), target, b=self._lora_b, **self._options(hidden), **options)
        return linear_logps(self._cast(hidden), self.weight, target, **self._options(hidden), **options)

    def loss(
        self, hidden: Tensor, target: Tensor, loss_fn: LossFn, *, groups: Sequence[int] | Tensor | None = None, **options: Any
    ) -> Tensor:
        """`linear_loss` under this head; same options.

        Where `weight` is trained and its gradient's buffer exists already (`weight.main_grad` in float32, as an optimizer with
        float32 copies of 16-bit weights has it, or `weight.grad`), its gradient is added there in place (option d_weight) and the
        result must be differentiated with a gradient of 1.
        """
        options = {**self._gradient_buffer(), **self._options(hidden), **options}
        if (divided := divided_head(self.weight)) is not None:
            return divided.loss(self._cast(hidden), target, loss_fn, groups=groups, b=self._lora_b, **options)
        return linear_loss(self._cast(hidden), self.weight, target, loss_fn, groups=groups, **options)

    def divergence(self, hidden: Tensor, teacher: HeadSpec, teacher_hidden: Tensor, **options: Any) -> Tensor:
        """`linear_divergence` of this head from a `teacher`'s with the same vocabulary; same options."""
        operands = (self._cast(hidden), self.weight, teacher._cast(teacher_hidden), teacher.weight)
        options = {**self._options(hidden), **teacher._as_reference(teacher_hidden), **options}
        return linear_divergence(*operands, **options)

    def divergence_loss(
        self, hidden: Tensor, teacher: HeadSpec, teacher_hidden: Tensor, loss_fn: DivergenceLossFn, target: Tensor, **options: Any
    ) -> Tensor:
        """`linear_divergence_loss` of this head from a `teacher`'s; same options, and the gradient's buffer as in `loss`."""
        operands = (self._cast(hidden), self.weight, teacher._cast(teacher_hidden), teacher.weight)
        options = {**self._gradient_buffer(), **self._options(hidden), **teacher._as_reference(teacher_hidden), **options}
        return linear_divergence_loss(*operands, loss_fn, target, **options)

    def _cast(self, hidden: Tensor) -> Tensor:
        return hidden.to(self.weight.dtype)  # norms kept in float32 hand float32 to a bfloat16 head

    def _gradient_buffer(self) -> dict[str, Any]:
        if not (torch.is_grad_enabled() and self.weight.requires_grad and self.weight.is_leaf):
            return {}
        return {"d_weight": getattr(self.weight, "main_grad", self.weight.grad)}

    @property
    def _lora_b(self) -> Tensor | None:
        return None if self.lora is None else self.lora.b

    def _as_reference(self, hidden: Tensor) -> dict[str, Any]:
        return {f"ref_{name}": value for name, value in self._options(hidden).items()}

    def _options(self, hidden: Tensor) -> dict[str, Any]:
        options: dict[str, Any] = {"bias": self.bias, "logit_scale": self.logit_scale, "softcap": self.softcap}
        if self.lora is not None:
            a, b, scaling, dropout = self.lora
            u = F.linear(dropout(hidden.to(a.dtype)), a) * scaling
            options["lora"] = (u.to(self.weight.dtype), b.to(self.weight.dtype))
        return options


def head_spec(model: nn.Module) -> HeadSpec:
    """The head of `model`, a causal LM of Transformers, bare or in a PeftModel, as its active adapter makes it.

    Raises ModelError for a head that is no plain linear layer, HeadMismatchError when the model does more to its logits
    than scale and cap them.
    """
    causal = causal_lm(model)
    head = active_module(causal.get_output_embeddings())
    if head is None:
        raise ModelError(f"{type(causal).__name__} has no output embeddings; only causal language models can be trained")
    linear, lora = _split_lora(head)
    if not isinstance(linear, nn.Linear) or type(linear).forward is not nn.Linear.forward:
        raise ModelError(f"{type(causal).__name__}: its head is a {type(linear).__name__}; a plain linear layer is needed (not quantized)")
    scale, softcap = _measure(model, causal)
    if linear.bias is not None and scale.before != 1.0:
        raise ModelError(f"{type(causal).__name__} scales the hidden states of a head with a bias, which the head operator cannot express")
    return HeadSpec(linear.weight, linear.bias, scale.before * scale.after, softcap, lora)


def current_head(spec: HeadSpec, model: nn.Module) -> HeadSpec:
    """`spec`, once measured of `model`, with the tensors and the adapter that its head has now; scale and cap are not measured again."""
    linear, lora = _split_lora(active_module(causal_lm(model).get_output_embeddings()))
    return replace(spec, weight=linear.weight, bias=linear.bias, lora=lora)


def lm_head_weight(model: nn.Module) -> Tensor | None:
    """(V, D) weight of the language-model head of `model`; None of a model that has another head."""
    return None if causal_lm(model).get_output_embeddings() is None else head_spec(model).weight


def active_module(head: Any) -> Any:
    """Look through PEFT's copy of a module that is trained in full."""
    if hasattr(head, "modules_to_save") and hasattr(head, "original_module"):
        if head.disable_adapters or not head.active_adapters:
            return head.original_module
        return head.modules_to_save[head.active_adapters[0]]
    return head


def _split_lora(head: Any) -> tuple[Any, HeadLora | None]:
    """The linear layer inside PEFT's LoRA layer, and its active adapter."""
    if not hasattr(head, "base_layer"):
        return head, None
    names = [name for name in head.active_adapters if name in getattr(head, "lora_A", ())]
    if head.disable_adapters or head.merged or not names:
        return head.base_layer, None
    if len(names) > 1:
        raise ModelError(f"the head has several active adapters ({', '.join(names)}); activate one with model.set_adapter(name)")
    name = names[0]
    if getattr(head, "lora_variant", {}).get(name) is not None or head.lora_B[name].bias is not None:
        raise ModelError(
            "the adapter of the head is no plain LoRA (DoRA, a LoRA bias or another variant); leave lm_head out of its targets"
        )
    lora = HeadLora(head.lora_A[name].weight, head.lora_B[name].weight, head.scaling[name], head.lora_dropout[name])
    return head.base_layer, lora


class _Scale(NamedTuple):
    before: float  # of the hidden states, in front of the head
    after: float  # of what the head returns


# Sizes that the raw logits of the three probe rows are brought to: linear, bent by any softcap, flat at any softcap.
_PROBES = (0.01, 20.0, 5000.0)


def _measure(model: nn.Module, causal: Any) -> tuple[_Scale, float | None]:
    """What the forward of `causal` does before and after its head."""
    head = causal.get_output_embeddings()
    weight = _split_lora(active_module(head))[0].weight
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(weight.shape[1], generator=generator).to(weight.device, weight.dtype)
    with evaluation(model):
        unit = direction / head(direction[None, None]).float().abs().max().clamp(min=1e-20).to(weight.dtype)
        sent = torch.stack([unit * size for size in _PROBES])
        received, raw, logits = (x[0].double() for x in _run_head(causal, head, sent))
    eps = torch.finfo(weight.dtype).eps
    before = _named(_ratio(received, sent.double()), causal.config, eps)
    rough = _ratio(logits[:1], raw[:1])
    ceiling = float(logits[-1].abs().max())
    softcap = _named(ceiling, causal.config, eps) if ceiling < 0.5 * float((raw[-1] * rough).abs().max()) else None
    linear = logits[:1] if softcap is None else softcap * torch.atanh(logits[:1] / softcap)
    after = _named(_ratio(linear, raw[:1]), causal.config, eps)

    expected = raw * after
    if softcap is not None:
        expected = softcap * torch.tanh(expected / softcap)
    error = float(((logits - expected).abs().amax(1) / expected.abs().amax(1)).max())
    drift = float((received - sent.double() * before).abs().max() / received.abs().max())
    if not max(error, drift) <= 8 * eps:
        raise HeadMismatchError(
            f"{type(causal).__name__} does more to its logits than scale them ({before:g} in front of its head, {after:g} behind it) and "
            f"cap them (softcap {softcap}): relative error {max(error, drift):.2g}. Such a head cannot be fused"
        )
    return _Scale(before, after), softcap


def _run_head(causal: Any, head: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(what the head receives, what it returns, the logits) when the decoder returns `hidden` (T, D); each (1, T, ...)."""
    seen: list[Tensor] = []
    hook = head.register_forward_hook(lambda _, args, out: seen.extend((args[0], out)))
    tokens = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
    try:
        with _decoder_returns(decoder(causal), hidden[None]):
            logits = causal(input_ids=tokens, use_cache=False, **_no_router(causal)).logits
    finally:
        hook.remove()
    if len(seen) != 2:
        raise HeadMismatchError(
            f"{type(causal).__name__} computes its logits without calling its output embeddings once; it cannot be fused"
        )
    return seen[0], seen[1], logits


@contextmanager
def _decoder_returns(module: Any, hidden: Tensor) -> Iterator[None]:
    from transformers.modeling_outputs import BaseModelOutputWithPast

    class Fixed(BaseModelOutputWithPast):
        def __getattr__(self, name: str) -> None:  # what only some decoders return (cross_attentions, router_logits): none
            if name.startswith("_"):
                raise AttributeError(name)

    own = vars(module).get("forward")
    module.forward = lambda *args, **kwargs: Fixed(last_hidden_state=hidden)
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def _no_router(causal: Any) -> dict[str, bool]:
    return {"output_router_logits": False} if hasattr(causal.config, "output_router_logits") else {}


def _ratio(of: Tensor, to: Tensor) -> float:
    """Least-squares a of `of = a to`."""
    return float((of * to).sum() / (to * to).sum())


def _named(measured: float, config: Any, eps: float) -> float:
    """1, or the number in the config (or its inverse) that a measurement in limited precision stands for."""
    values = [v for v in config.get_text_config(decoder=True).to_dict().values() if isinstance(v, (int, float)) and not isinstance(v, bool)]
    candidates = [1.0, *(float(v) for v in values if v), *(1.0 / v for v in values if v)]
    best = min(candidates, key=lambda c: abs(c - measured))
    return best if abs(best - measured) <= max(eps / 4, 1e-6) * abs(measured) else measured
