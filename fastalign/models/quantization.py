"""Base models in 4 bits, for training an adapter on them (QLoRA, Dettmers 2023, arXiv:2305.14314), by bitsandbytes."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from fastalign.errors import DependencyError
from fastalign.models.config import ModelConfig


def quantization_config(options: ModelConfig, config: Any) -> Any:
    """What Transformers needs to quantize the linear layers as it loads them; None where `options` asks for nothing.

    NormalFloat4 in blocks of 64 with doubly quantized scales: 4.13 bits per weight. Embeddings, norms and the LM head stay as
    they are stored. Products are computed in the model's dtype. Raises DependencyError where bitsandbytes is missing.
    """
    if options.quantization is None:
        return None
    if find_spec("bitsandbytes") is None:
        raise DependencyError("model.quantization=nf4 needs bitsandbytes: pip install 'fastalign[qlora]', or leave the option out")
    from transformers import BitsAndBytesConfig

    stored = getattr(config.get_text_config(decoder=True), "dtype", None) or torch.float32
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=options.quantization,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=stored if options.dtype == "auto" else getattr(torch, options.dtype),
    )


def is_quantized(model: Any) -> bool:
    """Whether some weights of a Transformers model are held in fewer bits than they are computed with."""
    return getattr(model, "quantization_method", None) is not None


def keep_trainable(model: nn.Module) -> None:
    """Keep bitsandbytes from packing weights for inference on CPUs with AVX512-BF16.

    Its Linear4bit does so at the first forward in eval mode, for good, and what it runs then has no gradient and rounds to
    bfloat16 (bitsandbytes 0.50, nn/modules.py). Not needed once it packs only where gradients are off and unpacks again.
    """
    module: Any
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
