"""Which architectures can be packed exactly, decided from the config and the classes of Transformers, with the reason."""

from __future__ import annotations

import inspect
import re
from typing import Any

from fastalign.errors import ModelError
from fastalign.models.trunk import decoder

_STATE = re.compile("linear|mamba|ssm|recurrent|conv|rwkv|hybrid|delta")
_ATTENTION = {"full_attention", "sliding_attention", "attention", "global", "local"}


def check_config(config: Any, path: str) -> None:
    """Raise ModelError, before any weight is read, when the architecture of `config` cannot be trained on packed sequences."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    text = config.get_text_config(decoder=True)
    if getattr(config, "is_encoder_decoder", False):
        _refuse(config, path, "it is an encoder-decoder; only decoder-only models can be trained")
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    others = sorted(set(getattr(text, "layer_types", None) or ()) - _ATTENTION)
    if getattr(model_class, "_is_stateful", False) or any(_STATE.search(kind) for kind in others):
        named = ", ".join(others) or "state-space or linear-attention"
        _refuse(config, path, f"it has recurrent layers ({named}), whose state would run on from one packed sequence into the next")
    if others:
        _refuse(config, path, f"it has {', '.join(others)} layers; packed attention is causal, full or with a sliding window")
    if model_class is None and not getattr(config, "auto_map", None):
        _refuse(config, path, "Transformers has no causal language model of this type")
    if getattr(text, "use_bidirectional_attention", None):
        _refuse(config, path, "it attends in both directions")


def check_model(model: Any, path: str) -> None:
    """Raise ModelError when a built model does not route attention and positions so that packing is exact."""
    if getattr(model, "_is_stateful", False):
        _refuse(model.config, path, "it has recurrent layers, whose state would run on from one packed sequence into the next")
    if not model._can_set_attn_implementation():
        _refuse(model.config, path, "its attention does not go through Transformers' attention interface, so packing would not be exact")
    parameters = inspect.signature(decoder(model).forward).parameters
    if "position_ids" not in parameters:
        _refuse(model.config, path, "its decoder takes no position_ids, so packed sequences could not restart at position 0")


def _refuse(config: Any, path: str, reason: str) -> None:
    raise ModelError(f"{path or 'the model'}: {getattr(config, 'model_type', type(config).__name__)} models are not supported: {reason}")
