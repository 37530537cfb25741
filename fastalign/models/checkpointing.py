"""Gradient checkpointing of the decoder's layers: which of them, what is kept of one, and where its input waits.

What a layer keeps for its backward is dropped and computed again when the backward comes to it. Transformers installs that, by
torch.utils.checkpoint; the result is the same, bit for bit, as without.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from fastalign.errors import ConfigError, DependencyError
from fastalign.models.config import ModelConfig

# The operators whose results are kept (`ModelConfig.checkpoint_keep`): fused attention, and the products of linear layers and of
# grouped experts. Products of batches are not among them: they are attention in plain products, whose scores grow with the
# square of a sequence.
ATTENTION = frozenset(
    {
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "torch_attn::_varlen_attn",
        "flash_attn::_flash_attn_varlen_forward",
    }
)
PRODUCTS = ATTENTION | {"aten::mm", "aten::addmm", "aten::_grouped_mm"}
KEPT = {"attention": ATTENTION, "products": PRODUCTS}


def enable_checkpointing(causal: Any, options: ModelConfig) -> None:
    """Let the layers of a model of Transformers be computed again in the backward, as the checkpoint_* `options` say.

    Raises DependencyError for options that the installed Transformers does not know, ConfigError for an offload from a CPU to itself.
    """
    arguments: dict[str, Any] = {"use_reentrant": False}
    if options.checkpoint_keep != "nothing":
        policy = partial(_policy, KEPT[options.checkpoint_keep])
        arguments["context_fn"] = partial(create_selective_checkpoint_contexts, policy)
    enable = getattr(causal, "activation_checkpointing_enable", None) or causal.gradient_checkpointing_enable  # the older name
    further: dict[str, Any] = {}
    if options.checkpoint_every > 1:
        further["every_n_layers"] = options.checkpoint_every
    if options.checkpoint_offload:
        if causal.device.type == "cpu":
            raise ConfigError("model.checkpoint_offload moves activations of a device to the host; this model is on the CPU, leave it out")
        further["offload"] = True
    if missing := sorted(further.keys() - inspect.signature(enable).parameters):
        import transformers

        names = {"every_n_layers": "model.checkpoint_every", "offload": "model.checkpoint_offload"}
        raise DependencyError(
            f"{names[missing[0]]} needs a Transformers whose activation_checkpointing_enable has {missing[0]}, and "
            f"{transformers.__version__} has not: pip install -U transformers, or leave the option out"
        )
    enable(arguments, **further)


def _policy(kept: frozenset[str], context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = operator.name().partition(".")[0]
    save = name in kept and not _is_thin(name, args)
    return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE


def _is_thin(name: str, args: tuple[Any, ...]) -> bool:
    """Whether a product costs little for the size of its result, as the second one of a low-rank adapter does."""
    if name not in ("aten::mm", "aten::addmm"):
        return False
    left, right = args[:2] if name == "aten::mm" else args[1:3]
    return 8 * left.shape[1] < right.shape[1]
