"""The floating-point operations that a model's arithmetic needs, and the fastest that a device does them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastalign.models.heads import active_module
from fastalign.models.trunk import causal_lm, text_config
from fastalign.train.cards import card_of

GEMM = {"cpu": 1024, "cuda": 8192}  # rows and columns of the product that is measured where no peak is known


class Flops(NamedTuple):
    """Of the linear layers, of attention (the causal half of its scores), and of the language-model head."""

    trunk: float
    attention: float
    head: float

    @property
    def total(self) -> float:
        return sum(self)


def model_flops(model: Any, tokens: int, lengths: Sequence[int], rows: int, *, backward: bool = True) -> Flops:
    """FLOPs of one forward over `tokens` packed tokens in sequences of `lengths`, `rows` of them scored, and of its backward.

    A product of (N, K) and (K, M) is 2 N K M; its backward is two of them where the weight is trained and one where it is frozen.
    What is only a choice of memory (checkpointing, a head that forms its logits twice) is not counted; nor is what is no product.
    Of a mixture of experts the active ones count. Works on the meta device, too.
    """
    causal = causal_lm(model)
    config = text_config(causal)
    embeddings = {id(p) for p in causal.get_input_embeddings().parameters()}
    head = head_weight(model)
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or 1
    active = (getattr(config, "num_experts_per_tok", None) or experts) / experts
    trunk = 0.0
    for name, weight in model.named_parameters():
        if weight.ndim >= 2 and id(weight) not in embeddings and weight is not head and ".reference." not in name:
            passes = 1 + backward * (2 if weight.requires_grad else 1)
            trunk += passes * 2.0 * tokens * weight.numel() * (active if ".experts." in name else 1)
    heads = int(config.num_attention_heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    layers = int(config.num_hidden_layers)
    attention = (1 + 2 * backward) * 2.0 * layers * heads * head_dim * sum(length * length for length in lengths)
    passes = 1 + backward * (2 if head is not None and head.requires_grad else 1)
    return Flops(trunk, attention, 0.0 if head is None else passes * 2.0 * rows * head.numel())


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """FLOP/s that the device could do, and where the number is from: a data sheet, or the fastest of a few large products."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        if card := card_of(name):
            return card.teraflops * 1e12, f"{name}, data sheet"
    size = GEMM.get(device.type, 1024)
    a, b = torch.ones(size, size, dtype=dtype, device=device), torch.ones(size, size, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        (a @ b).view(-1)[0].item()  # waits for the device
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best, f"the fastest of four products of {size} x {size}, {str(dtype).removeprefix('torch.')}, measured"


def head_weight(model: Any) -> Tensor | None:
    """(V, D) weight of the language-model head, read off its module without running it; None of a model that has another head."""
    head = active_module(causal_lm(model).get_output_embeddings())
    return None if head is None else getattr(head, "base_layer", head).weight


def main_dtype(model: nn.Module) -> torch.dtype:
    """The dtype that most of the model's weights have, which its products run in."""
    sizes: dict[torch.dtype, int] = {}
    for weight in model.parameters():
        sizes[weight.dtype] = sizes.get(weight.dtype, 0) + weight.numel()
    return max(sizes, key=lambda dtype: sizes[dtype])
