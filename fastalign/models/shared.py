"""One set of weights in memory, and several models on it: one that answers, others that train an adapter on the same weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from fastalign.models.config import LoraConfig, ModelConfig
from fastalign.models.load import place, prepare, read_model


def share_weights(model: nn.Module) -> Any:
    """Another model with the very weights of `model`: the same tensors, in modules, hooks and configs of its own.

    It takes no memory to speak of. Adapters, modes, attention and checkpointing of one are nothing to the other; a weight that one
    of them changed would change in both.
    """
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for module in model.modules():
        if (state := getattr(module, "quant_state", None)) is not None:  # bitsandbytes' scales, which its weight has, too
            memo[id(state)] = state
    return copy.deepcopy(model, memo)


class SharedWeights:
    """The weights of the base model at `options.path`, frozen, on their device. Raises what `load_model` raises."""

    def __init__(self, options: ModelConfig) -> None:
        from transformers import AutoModelForCausalLM

        self.options = options
        self._bare = place(read_model(options, AutoModelForCausalLM), options).requires_grad_(False)

    @property
    def dtype(self) -> str:
        """Of the weights, as a ModelConfig names it."""
        return str(self._bare.dtype).removeprefix("torch.")

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self._bare.device

    def model(self, options: ModelConfig | None = None, lora: LoraConfig | None = None) -> Any:
        """What `load_model(options, lora=lora)` gives, with these weights in place of those that it would read.

        `options` (None: those that the weights were read with) name this base model, and its dtype, device and quantization.
        """
        return prepare(share_weights(self._bare), options or self.options, lora)
