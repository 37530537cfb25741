"""The critic of PPO: the value of every state of an answer, read from a trunk that is there already.

shared   a value head on the policy's trunk: one forward gives log-probs and values, and both losses train the trunk
adapter  a value head under a LoRA adapter of its own on the policy's frozen base: a second forward, but no second model

The value head is a submodule of the causal LM, so that the optimizer and checkpoints find its weights among the model's. Exports
leave it out (`without_critic`); `save_critic` writes it to a file of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from fastalign.errors import ConfigError
from fastalign.models.adapters import CRITIC, POLICY, has_adapter, kept_flags
from fastalign.models.heads import head_spec
from fastalign.models.trunk import causal_lm

HEAD = "value_head"
FILE = "critic.safetensors"


class ValueHead(nn.Module):
    """value = hidden . weight + bias, in float32 at least. It begins at 0, so no state is worth anything before the first step."""

    def __init__(self, size: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, size, device=device))
        self.bias = nn.Parameter(torch.zeros(1, device=device))

    def forward(self, hidden: Tensor) -> Tensor:
        """(L,) values of `hidden` (L, D), with gradient to it and to the head."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        return F.linear(hidden.to(wide), self.weight.to(wide), self.bias.to(wide))[:, 0]


def add_critic(model: Any, *, adapter: bool, rate_factor: float = 1.0) -> Any:
    """`model` with a value head and, with `adapter`, a fresh adapter for it: as many ranks on as many layers as the policy's has.

    `rate_factor` times the run's learning rate is that of the critic's own weights. The adapter's first weights, whose update
    is 0, are drawn from torch's global generator. Raises ConfigError when the model has a critic, or no adapter to copy.
    """
    causal = causal_lm(model)
    if hasattr(causal, HEAD):
        raise ConfigError(f"{type(causal).__name__} has a {HEAD} already; give the model without its critic")
    if adapter:
        _add_adapter(model)
    weight = head_spec(model).weight
    setattr(causal, HEAD, ValueHead(weight.shape[1], weight.device))
    for own in critic_weights(model).values():
        own.requires_grad_(True)
        own.rate_factor = rate_factor  # type: ignore[attr-defined]
    return model


def value_head(model: Any) -> ValueHead:
    """The value head that `add_critic` gave to `model`."""
    head = getattr(causal_lm(model), HEAD)
    assert isinstance(head, ValueHead)
    return head


def critic_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that only the critic has, by the names they have in `model`; {} without a critic."""
    return {name: p for name, p in model.named_parameters() if {HEAD, CRITIC} & set(name.split("."))}


def save_critic(model: nn.Module, folder: str | Path) -> Path | None:
    """Write the critic's own weights to `folder/critic.safetensors`; None for a model that has no critic."""
    weights = {name: weight.detach().contiguous() for name, weight in critic_weights(model).items()}
    if not weights:
        return None
    save_file(weights, Path(folder) / FILE, metadata={"format": "pt"})
    return Path(folder) / FILE


@contextmanager
def without_critic(model: Any) -> Iterator[None]:
    """`model` as Transformers knows it, inside."""
    causal = causal_lm(model)
    head = causal._modules.pop(HEAD, None)
    try:
        yield
    finally:
        if head is not None:
            causal._modules[HEAD] = head


def _add_adapter(model: Any) -> None:
    if not has_adapter(model):
        raise ConfigError("critic=adapter needs an adapter: set lora.r, or use critic=shared for full fine-tuning")
    policy, causal = model.peft_config[POLICY], causal_lm(model)
    head = next(name for name, module in causal.named_modules() if module is causal.get_output_embeddings())
    targets = policy.target_modules
    if isinstance(targets, (set, list, tuple)):
        targets = {name for name in targets if name.rsplit(".", 1)[-1] != head.rsplit(".", 1)[-1]}  # a critic has no use for the head
    with kept_flags(model):
        model.add_adapter(CRITIC, replace(policy, target_modules=targets, modules_to_save=None))
