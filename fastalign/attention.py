"""Causal attention over packed sequences, exact per sequence, as one Transformers attention implementation.

Backends, by this rule: on CUDA in half precision, `flash_attn` where installed, else `torch.nn.attention.varlen`
(where it has windows and grouped heads); everything else, and softcaps or sinks that the chosen kernel lacks, runs per
sequence: SDPA, or plain matrix products where SDPA has no such option. Transformers is told nothing about masks: it
builds none for an implementation that it does not know, and the sequence boundaries come with the forward's keyword
arguments, which gradient checkpointing keeps.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastalign.errors import ModelError
from fastalign.types import PackedBatch

NAME = "fastalign"
WINDOW_BLOCK = 128  # queries that share one band mask where the window is smaller


class Segments:
    """Sequence boundaries of one packed forward on the host, and how often attention was computed with them."""

    def __init__(self, bounds: tuple[int, ...]) -> None:
        self.lengths = [stop - start for start, stop in pairwise(bounds)]
        self.calls = 0


def register() -> None:
    """Make `attn_implementation="fastalign"` known to Transformers. Idempotent."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attention_forward)


def attention_kwargs(batch: PackedBatch) -> dict[str, Any]:
    """The keyword arguments that a model's forward must hand down to its attention layers for `batch`."""
    return {
        "cu_seq_lens_q": batch.cu_seqlens,
        "cu_seq_lens_k": batch.cu_seqlens,
        "max_length_q": batch.max_seqlen,
        "max_length_k": batch.max_seqlen,
        "segments": Segments(batch.bounds),
    }


def attention_forward(
    module: nn.Module,
    query: Tensor,  # (1, H, N, d)
    key: Tensor,  # (1, H_kv, N, d)
    value: Tensor,  # (1, H_kv, N, d_v)
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,  # (H,) attention sinks
    segments: Segments | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as Transformers calls it; returns ((1, N, H, d_v), None).

    Raises ModelError for what would not be exact: a model that drops the sequence boundaries, brings a mask or a
    position bias of its own, keeps a cache, or attends in both directions.
    """
    name = type(module).__name__
    if segments is None or cu_seq_lens_q is None or max_length_q is None:
        raise ModelError(
            f"{name} was called without sequence boundaries: either the model drops keyword arguments on the way to its attention "
            'layers (then it cannot be packed), or it was called outside of fastalign (use model.set_attn_implementation("sdpa") first)'
        )
    if attention_mask is not None or kwargs.get("position_bias") is not None:
        raise ModelError(f"{name} passes its own attention mask or position bias; packed attention is causal per sequence and has none")
    if kwargs.get("is_causal") is False or not getattr(module, "is_causal", True):
        raise ModelError(f"{name} attends in both directions; only causal decoders can be trained")
    if query.shape[0] != 1 or query.shape[2] != sum(segments.lengths) or key.shape[2] != query.shape[2]:
        raise ModelError(
            f"{name} got queries {tuple(query.shape)} and keys {tuple(key.shape)} for {sum(segments.lengths)} packed tokens: "
            "packed attention takes one row of tokens and no key/value cache"
        )
    segments.calls += 1
    window = sliding_window if sliding_window is not None and sliding_window < max_length_q else None
    softcap = softcap or None
    kernel = _varlen_kernel(query, softcap, s_aux)
    if kernel is not None:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        return kernel(q, k, v, cu_seq_lens_q, max_length_q, dropout, scaling, window, softcap).unsqueeze(0), None
    outs = []
    for q, k, v in zip(*(x.split(segments.lengths, dim=2) for x in (query, key, value))):
        outs.append(_one_sequence(q, k, v, dropout, scaling, window, softcap, s_aux))
    return torch.cat(outs, dim=1), None


def _one_sequence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """(1, H, L, d) -> (1, L, H, d_v). A window is walked in blocks of queries, each with the keys that it can see."""
    length = query.shape[2]
    compute = _sdpa if softcap is None and sinks is None else _matmul
    block = length if window is None or window >= length else max(window, WINDOW_BLOCK)
    outs = []
    for start in range(0, max(length, 1), max(block, 1)):
        stop = min(start + block, length)
        first = 0 if window is None else max(0, start - window + 1)
        mask = None
        if window is not None and window < length:
            mask = _band(stop - start, stop - first, start - first, window, query.device)
        k, v = (key, value) if block == length else (key[:, :, first:stop], value[:, :, first:stop])
        q = query if block == length else query[:, :, start:stop]
        outs.append(compute(q, k, v, mask, dropout, scaling, softcap, sinks))
    return (outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)).transpose(1, 2)


@cache
def _band(rows: int, columns: int, offset: int, window: int, device: torch.device) -> Tensor:
    """(rows, columns) bool: query i, at key `i + offset`, sees itself and the `window - 1` keys before it."""
    distance = torch.arange(rows, device=device)[:, None] + offset - torch.arange(columns, device=device)[None]
    return (distance >= 0) & (distance < window)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, scaling: float | None, *_: Any) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling, enable_gqa=grouped
    )


def _matmul(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, scaling: float | None, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Attention in plain products, for softcaps and sinks; the softmax is float32 (float64 for float64)."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is None:
        mask = _band(q.shape[2], k.shape[2], 0, k.shape[2] + 1, q.device)
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(1, -1, scores.shape[2], 1)
        probs = torch.cat([scores, column], dim=-1).softmax(dim=-1, dtype=dtype)[..., :-1]
    else:
        probs = scores.softmax(dim=-1, dtype=dtype)
    return F.dropout(probs.to(v.dtype), dropout) @ v


# A varlen kernel: (q (N, H, d), k, v, cu_seqlens, max_seqlen, dropout, scaling, window, softcap) -> (N, H, d_v)
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, int, float, "float | None", "int | None", "float | None"], Tensor]


def _varlen_kernel(query: Tensor, softcap: float | None, sinks: Tensor | None) -> Kernel | None:
    if query.device.type != "cuda" or query.dtype not in (torch.float16, torch.bfloat16) or sinks is not None or query.shape[-1] > 256:
        return None
    if find_flash_attn():
        return _flash_attn
    return _torch_varlen if softcap is None and find_torch_varlen() else None


@cache
def find_flash_attn() -> bool:
    """Whether the flash-attn package is installed."""
    return find_spec("flash_attn") is not None


@cache
def find_torch_varlen() -> bool:
    """Whether torch has varlen attention with windows, scale and grouped heads (2.12 and later)."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return {"window_size", "scale", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters)


def _flash_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu: Tensor,
    longest: int,
    dropout: float,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu,
        cu,
        longest,
        longest,
        dropout_p=dropout,
        softmax_scale=scaling,
        causal=True,
        window_size=(-1 if window is None else window - 1, 0),
        softcap=softcap or 0.0,
        deterministic=True,
    )


def _torch_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu: Tensor,
    longest: int,
    dropout: float,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    if dropout:
        raise ModelError("torch's varlen attention has no dropout: set the model's attention dropout to 0 or install flash-attn")
    left = -1 if window is None else window - 1
    out = varlen_attn(q, k, v, cu, cu, longest, longest, scale=scaling, window_size=(left, 0), enable_gqa=q.shape[1] != k.shape[1])
    assert isinstance(out, Tensor)
    return out
