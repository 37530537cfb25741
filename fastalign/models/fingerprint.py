"""What identifies a model: every byte of its weights, and its config."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

from fastalign.models.trunk import causal_lm

_CHUNK = 1 << 26  # elements brought to the host at a time

_KEPT = "_fastalign_fingerprints"

# Of a config: where it came from and how it is run, not what the model computes.
_TRANSIENT = {"_name_or_path", "name_or_path", "transformers_version", "use_cache", "torch_dtype", "dtype", "architectures"}


def model_fingerprint(model: nn.Module, *, skip_adapter: str | None = None) -> str:
    """SHA-256, in hex, of all weights (names, dtypes, shapes, bytes) and of the config of `model`.

    `skip_adapter` names an adapter of PEFT that does not count: neither its weights nor the names of what it wraps.

    All bytes are read (one to two GB/s and core): sizes and dates of files would call two models equal that are not.
    """
    kept: dict[str | None, str] = vars(model).get(_KEPT, {})
    if skip_adapter in kept:
        return kept[skip_adapter]
    digest = hashlib.sha256()
    config: dict[str, Any] = causal_lm(model).config.to_dict()
    fields = {key: value for key, value in config.items() if key not in _TRANSIENT}
    digest.update(json.dumps(fields, sort_keys=True, default=str).encode())
    tensors = model.state_dict()
    if skip_adapter is not None:
        tensors = {_bare(name): tensor for name, tensor in tensors.items() if skip_adapter not in name.split(".")}
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        _update(digest, tensor)
    return digest.hexdigest()


def keep_fingerprint(model: nn.Module, fingerprint: str, *, skip_adapter: str | None = None) -> None:
    """Let `model_fingerprint` know that of the weights that `model` still has, but in parts on several processes."""
    vars(model).setdefault(_KEPT, {})[skip_adapter] = fingerprint


def _bare(name: str) -> str:
    """The name that a weight has without PEFT around it."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".original_module.", ".")


def _update(digest: Any, tensor: Tensor) -> None:
    for part in tensor.detach().reshape(-1).split(_CHUNK):
        digest.update(part.contiguous().cpu().view(torch.uint8).numpy())
