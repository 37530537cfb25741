"""From a packed batch to the hidden states that the language-model head reads."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastalign.attention import NAME, Segments, attention_kwargs
from fastalign.errors import ModelError
from fastalign.types import PackedBatch


class TrunkOutput(NamedTuple):
    """What the model computes before its head."""

    hidden: Tensor  # (N, D), row i is the input of the head for predicting token i+1
    aux_loss: Tensor | None  # scalar, router_aux_loss_coef x the load-balancing loss of a mixture of experts; add it to the loss


def trunk(model: Any, batch: PackedBatch) -> TrunkOutput:
    """Run the decoder of `model` (a causal LM of Transformers, bare or in a PeftModel) on `batch`, without its head.

    The auxiliary loss is None unless the model's config says `output_router_logits`; it is taken over the tokens of this
    batch, prompts included, as the model's own forward does, and so is no sum over sequences.
    Raises ModelError when some layer mixes tokens without calling our attention.
    """
    causal = causal_lm(model)
    wants_router = bool(getattr(text_config(causal), "output_router_logits", False))
    kwargs = attention_kwargs(batch)
    if wants_router:
        kwargs["output_router_logits"] = True
    out: Any = decoder(causal)(
        input_ids=batch.input_ids[None], position_ids=batch.position_ids[None], attention_mask=None, use_cache=False, **kwargs
    )
    _check_attention_ran(causal, kwargs["segments"])
    hidden = out.last_hidden_state[0]
    return TrunkOutput(hidden, _aux_loss(causal, out.router_logits) if wants_router else None)


def causal_lm(model: Any) -> Any:
    """The Transformers model itself: `model`, or what a PeftModel wraps (its adapter layers stay in it)."""
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        return model.get_base_model()
    return model


def decoder(causal: Any) -> Any:
    """The text decoder of a causal LM: embeddings to final norm."""
    if callable(getattr(causal, "get_decoder", None)) and causal.get_decoder() not in (None, causal):
        return causal.get_decoder()
    prefix = causal.base_model_prefix
    if prefix and hasattr(causal, prefix):
        return getattr(causal, prefix)
    raise ModelError(
        f"{type(causal).__name__} has no decoder that can be run without its head; only AutoModelForCausalLM models can be used"
    )


def decoder_layers(causal: Any) -> nn.ModuleList:
    """The layers of the text decoder, in the order in which they run. Raises ModelError where they are no list of its own."""
    count = int(getattr(text_config(causal), "num_hidden_layers", 0) or 0)
    lists = [child for child in decoder(causal).children() if isinstance(child, nn.ModuleList) and len(child) == count]
    if len(lists) != 1:
        raise ModelError(f"{type(causal).__name__}: its decoder has no list of {count} layers that could be treated one by one")
    return lists[0]


def text_config(causal: Any) -> Any:
    """The config of the text decoder, also for a model that can see or hear."""
    return causal.config.get_text_config(decoder=True)


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """No gradient and no dropout inside; the mode of every module is put back."""
    training = [m for m in model.modules() if m.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def stock_attention(model: nn.Module, implementation: str = "sdpa") -> Iterator[None]:
    """Use one of Transformers' own attentions inside, for `generate` and for comparison; eager where sdpa cannot (softcaps)."""
    causal = causal_lm(model)
    configs = {id(m.config): m.config for m in causal.modules() if getattr(m, "config", None) is not None}
    before = {key: config._attn_implementation for key, config in configs.items()}
    capped = getattr(text_config(causal), "attn_logit_softcapping", None) is not None
    chosen = implementation if getattr(causal, "_supports_sdpa", False) and not capped else "eager"
    for config in configs.values():
        if config._attn_implementation == NAME:
            config._attn_implementation_internal = chosen
    try:
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]


def _check_attention_ran(causal: Any, segments: Segments) -> None:
    layers = int(getattr(text_config(causal), "num_hidden_layers", 0) or 0)
    if segments.calls < max(layers, 1):
        raise ModelError(
            f"{type(causal).__name__}: only {segments.calls} of {layers} layers called fastalign's attention. "
            "The others mix tokens by their own means (linear attention, state space, convolution, or attention outside of "
            "Transformers' attention interface) and would see across packed sequences; such models cannot be trained here. "
            "A model that was not loaded by fastalign.load_model needs `load_model(model)` first"
        )


def _aux_loss(causal: Any, router_logits: Any) -> Tensor:
    """The model's own load-balancing loss, from the function that its own forward calls."""
    balance = getattr(sys.modules[type(causal).__module__], "load_balancing_loss_func", None)
    coefficient = getattr(causal, "router_aux_loss_coef", getattr(text_config(causal), "router_aux_loss_coef", None))
    if balance is None or coefficient is None or not isinstance(router_logits, tuple) or not hasattr(causal, "num_experts"):
        raise ModelError(
            f"{type(causal).__name__} has output_router_logits set, but no load-balancing loss that fastalign knows how to call; "
            "set output_router_logits to false in its config.json to train without it"
        )
    return coefficient * balance(router_logits, causal.num_experts, causal.num_experts_per_tok, None)
