"""The gradient of the token embedding, added to its buffer in place instead of being made as a (V, D) tensor of mostly zeros."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def accumulate_in_place(embedding: nn.Module) -> bool:
    """Let the backward of `embedding` add the rows of its tokens to `weight.main_grad` or `weight.grad`; whether that can be done.

    Autograd would fill V x D zeros, add the rows, and add all of it to the gradient: for 152k tokens of 4096 bfloat16 numbers
    1.2 GB at every micro-batch. Where the weight has no such buffer in a backward, it gets the gradient as ever. The loss must
    be differentiated with a gradient of 1 into the weights' own gradients, as an optimizer step does. Embeddings that scale or
    quantize what they look up, and those that autograd treats in a special way (max_norm, sparse, frequencies), are left alone.
    """
    if not isinstance(embedding, nn.Embedding) or type(embedding).forward is not nn.Embedding.forward:
        return False
    if embedding.max_norm is not None or embedding.sparse or embedding.scale_grad_by_freq or not embedding.weight.requires_grad:
        return False
    if _look_up not in embedding._forward_hooks.values():
        embedding.register_forward_hook(_look_up)
    return True


def _look_up(embedding: nn.Embedding, args: tuple[Any, ...], out: Tensor) -> Tensor:
    if not (out.requires_grad and torch.is_grad_enabled() and embedding.weight.is_leaf):
        return out
    return _LookUp.apply(embedding.weight, args[0], embedding.padding_idx)


class _LookUp(torch.autograd.Function):
    """Rows of `weight` (V, D); the gradient of a row is the sum over its tokens, in a fixed order and in the buffer's dtype."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, padding_idx: int | None) -> Tensor:
        ctx.weight, ctx.padding_idx = weight, padding_idx
        ctx.save_for_backward(ids)
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, None, None]:
        (ids,), (grad,), weight = ctx.saved_tensors, upstream, ctx.weight
        buffer = getattr(weight, "main_grad", weight.grad)
        if buffer is None:
            pad = -1 if ctx.padding_idx is None else ctx.padding_idx
            return torch.ops.aten.embedding_dense_backward(grad, ids, len(weight), pad, False), None, None
        if ctx.padding_idx is not None:
            grad = grad.masked_fill((ids == ctx.padding_idx)[..., None], 0)
        ids, rows = ids.flatten(), grad.flatten(0, -2).to(buffer.dtype)
        if buffer.device.type == "cuda":
            buffer.index_put_((ids,), rows, accumulate=True)  # sorts; index_add_ would use atomics
        else:
            buffer.index_add_(0, ids, rows)
        return None, None, None
