"""Liger's Triton kernels for norms, rotary embedding and gated MLPs, installed in a model by Liger's own patching."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from fastalign.errors import ConfigError, DependencyError, ModelError
from fastalign.models.trunk import causal_lm, evaluation, text_config, trunk
from fastalign.packing import collate
from fastalign.types import Sample

_ROPE = "apply_rotary_pos_emb"
_PROBE = (24, 9)  # tokens of two sequences
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}  # of the largest hidden state


def install_liger_kernels(model: Any) -> None:
    """Patch `model`, on a CUDA device, in place: Liger decides by its model_type what it has kernels for. The head stays ours.

    Liger also replaces functions and classes in the module of the architecture. The classes are put back, as they would change models
    that are built later; the rotary embedding, which the layers look up there, asks for the tensor's device from then on.
    The kernels are installed by the architecture's name alone, so hidden states of a few random tokens are compared before and after.
    Raises DependencyError without liger-kernel or Triton, ConfigError without CUDA, ModelError for an architecture that Liger does not
    know and for one that computes something else than its kernels do.
    """
    causal = causal_lm(model)
    name, kind = type(causal).__name__, causal.config.model_type
    if causal.device.type != "cuda":
        raise ConfigError(f"model.liger_kernels are Triton kernels for CUDA, the model is on {causal.device.type}; leave the option out")
    if missing := [package for package in ("liger_kernel", "triton") if find_spec(package) is None]:
        raise DependencyError(f"model.liger_kernels needs {missing[0]}: pip install 'fastalign[liger]', or leave the option out")
    from liger_kernel.transformers import _apply_liger_kernel_to_instance
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ModelError(f"model.liger_kernels: Liger has no kernels for {kind} models ({name}); leave the option out")
    before = _hidden(model)
    module = sys.modules[type(causal).__module__]
    own = dict(vars(module))
    try:
        _apply_liger_kernel_to_instance(causal, fused_linear_cross_entropy=False, cross_entropy=False)
    except TypeError as error:
        raise ModelError(f"model.liger_kernels: Liger cannot patch a {name} ({error}); leave the option out") from error
    for key, value in own.items():
        new = vars(module)[key]
        if new is not value:
            setattr(module, key, _by_device(new, value) if key == _ROPE else value)
    worst = float((_hidden(model) - before).abs().max() / before.abs().max())
    if not worst <= _TOLERANCE.get(causal.dtype, 1e-3):
        raise ModelError(
            f"model.liger_kernels: with Liger's kernels the hidden states of {name} differ by {worst:.2g} of their size, so it computes "
            "something else than they do (another activation function, another norm); leave the option out"
        )


def _by_device(liger: Callable[..., Any], own: Callable[..., Any]) -> Callable[..., Any]:
    own = getattr(own, "own", own)  # of a model that was patched before

    def apply(q: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (liger if q.device.type == "cuda" else own)(q, *args, **kwargs)

    apply.own = own  # type: ignore[attr-defined]
    return apply


def _hidden(model: Any) -> Tensor:
    """(N, D) float32 hidden states of two sequences of random tokens."""
    causal = causal_lm(model)
    generator = torch.Generator().manual_seed(0)
    rows = [tuple(torch.randint(text_config(causal).vocab_size, (n,), generator=generator).tolist()) for n in _PROBE]
    batch = collate([Sample(k, row[:1], (row[1:],)) for k, row in enumerate(rows)])
    with evaluation(model):
        return trunk(model, batch.to(causal.get_input_embeddings().weight.device)).hidden.float()
