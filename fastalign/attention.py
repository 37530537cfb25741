"""Causal attention over packed sequences, exact per sequence, as one Transformers attention implementation.

Backends, by this rule: on CUDA in half precision, `flash_attn` where installed, else `torch.nn.attention.varlen`
(where it has windows, torch 2.11 and later); everything else, and softcaps, sinks or widths of heads that the chosen kernel
lacks, runs per sequence: SDPA, or plain matrix products where SDPA has no such option. Transformers is told nothing about
masks: it builds none for an implementation that it does not know, and the sequence boundaries come with the forward's keyword
arguments, which gradient checkpointing keeps. Gradients of fused kernels add up in a fixed order.

Where a batch shares prompts, the queries of a piece see the keys of its prefix and its own, aligned at the end: the kernels
get the keys gathered piece by piece, and SDPA a mask.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastalign.errors import ModelError
from fastalign.types import PackedBatch, SharedPrompts

NAME = "fastalign"
WINDOW_BLOCK = 128  # queries that share one band mask where the window is smaller


class Segments:
    """The pieces of one packed forward on the host, what they share, and how often attention was computed with them."""

    def __init__(self, bounds: tuple[int, ...], shared: SharedPrompts | None = None) -> None:
        self.lengths = [stop - start for start, stop in pairwise(bounds)]
        self.shared = shared
        self.calls = 0
        self._masks: dict[tuple[Any, ...], Tensor] = {}

    def with_prefix(self, values: Tensor) -> list[Tensor]:
        """Keys or values (1, H, N, d), for each piece those that its queries may see."""
        own = values.split(self.lengths, dim=2)
        if self.shared is None:
            return list(own)
        return [x if p < 0 else torch.cat([own[p], x], dim=2) for p, x in zip(self.shared.prefix, own)]

    def mask(self, rows: int, columns: int, offset: int, window: int | None, device: torch.device) -> Tensor:
        """`_band` of these, made once for all layers."""
        key = (rows, columns, offset, window, device)
        if key not in self._masks:
            self._masks[key] = _band(*key)
        return self._masks[key]


def register() -> None:
    """Make `attn_implementation="fastalign"` known to Transformers. Idempotent."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attention_forward)


def attention_kwargs(batch: PackedBatch) -> dict[str, Any]:
    """The keyword arguments that a model's forward must hand down to its attention layers for `batch`."""
    shared = batch.shared
    return {
        "cu_seq_lens_q": batch.cu_seqlens,
        "cu_seq_lens_k": batch.cu_seqlens if shared is None else shared.cu_seqlens_k,
        "max_length_q": batch.max_seqlen,
        "max_length_k": batch.max_seqlen if shared is None else shared.max_seqlen_k,
        "segments": Segments(batch.bounds, shared),
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
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as Transformers calls it; returns ((1, N, H, d_v), None).

    Raises ModelError for what would not be exact: a model that drops the sequence boundaries, brings a mask or a
    position bias of its own, keeps a cache, or attends in both directions.
    """
    name = type(module).__name__
    if segments is None or cu_seq_lens_q is None or cu_seq_lens_k is None or max_length_q is None or max_length_k is None:
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
    window = sliding_window if sliding_window is not None and sliding_window < max_length_k else None
    softcap = softcap or None
    kernel = _varlen_kernel(query, value, softcap, s_aux)
    if kernel is not None:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        if segments.shared is not None:
            k, v = (_GatherKeys.apply(x, segments.shared) for x in (k, v))
        out = kernel(q, k, v, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, dropout, scaling, window, softcap)
        return fixed_order(out).unsqueeze(0), None
    outs = []
    for q, k, v in zip(query.split(segments.lengths, dim=2), segments.with_prefix(key), segments.with_prefix(value)):
        outs.append(_one_piece(q, k, v, segments, dropout, scaling, window, softcap, s_aux))
    return torch.cat(outs, dim=1), None


def _one_piece(
    query: Tensor,  # (1, H, L, d)
    key: Tensor,  # (1, H_kv, K, d), the last L of them the queries' own
    value: Tensor,
    segments: Segments,
    dropout: float,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """-> (1, L, H, d_v). A window is walked in blocks of queries, each with the keys that it can see."""
    length, before = query.shape[2], key.shape[2] - query.shape[2]
    compute = _sdpa if softcap is None and sinks is None else _matmul
    if window is not None and window >= length + before:
        window = None
    block = length if window is None else max(window, WINDOW_BLOCK)
    outs = []
    for start in range(0, max(length, 1), max(block, 1)):
        stop = min(start + block, length)
        first = 0 if window is None else max(0, before + start - window + 1)
        mask = None
        if window is not None or before or compute is _matmul:
            mask = segments.mask(stop - start, before + stop - first, before + start - first, window, query.device)
        k, v = key[:, :, first : before + stop], value[:, :, first : before + stop]
        outs.append(compute(query[:, :, start:stop], k, v, mask, dropout, scaling, softcap, sinks))
    return (outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)).transpose(1, 2)


def _band(rows: int, columns: int, offset: int, window: int | None, device: torch.device) -> Tensor:
    """(rows, columns) bool: query i, at key `i + offset`, sees itself and the `window - 1` keys before it, or all."""
    distance = torch.arange(rows, device=device)[:, None] + offset - torch.arange(columns, device=device)[None]
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


class _GatherKeys(torch.autograd.Function):
    """(N, H, d) -> (K, H, d), the rows `shared.key_rows`. The gradient adds up in float32 and in a fixed order, without atomics."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, shared: SharedPrompts) -> Tensor:
        ctx.shared = shared
        return values.index_select(0, shared.key_rows)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        shared, (grad,) = ctx.shared, upstream
        turns = [shared.key_order[start:stop] for start, stop in pairwise(shared.key_turns)]
        total = grad.index_select(0, turns[0]).float()  # every row once, in order
        for turn in turns[1:]:
            total.index_add_(0, shared.key_rows[turn], grad.index_select(0, turn).float())
        return total.to(grad.dtype), None


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, scaling: float | None, *_: Any) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling, enable_gqa=grouped
    )
    return fixed_order(out) if out.is_cuda else out


def fixed_order(out: Tensor) -> Tensor:
    """`out` of a fused attention kernel, whose backward adds up in a fixed order from now on.

    Left to themselves, its blocks add to the gradient of the queries as they finish. Torch's kernels are told otherwise by a switch of
    the whole process, which is on while this one's backward is launched; the flash-attn package has an argument for it.
    """
    if _Switch.left_on is not None:  # its backward has failed, for want of memory maybe
        _Switch.left_on.back()
    node, hops = out.grad_fn, 0
    while node is not None and not _FUSED.search(node.name()) and hops < 3:  # below what cuts off padding
        node, hops = (node.next_functions[0][0] if node.next_functions else None), hops + 1
    if node is not None and _FUSED.search(node.name()):
        switch = _Switch()
        node.register_prehook(switch.on)
        node.register_hook(switch.back)
    return out


_FUSED = re.compile(r"varlen_attn|DotProduct.*Attention")


class _Switch:
    """Deterministic algorithms, on between two hooks of a node of the graph."""

    left_on: ClassVar[_Switch | None] = None  # the one that is on
    before: tuple[bool, bool, bool] | None = None

    def on(self, *_: Any) -> None:
        torch_c: Any = torch._C
        _Switch.left_on = self
        fill = torch_c._get_deterministic_fill_uninitialized_memory()
        self.before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(), fill
        torch_c._set_deterministic_algorithms(True, warn_only=False)
        torch_c._set_deterministic_fill_uninitialized_memory(False)

    def back(self, *_: Any) -> None:
        assert self.before is not None
        _Switch.left_on = None
        enabled, warn_only, fill = self.before
        torch_c: Any = torch._C
        torch_c._set_deterministic_algorithms(enabled, warn_only=warn_only)
        torch_c._set_deterministic_fill_uninitialized_memory(fill)


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
    assert mask is not None, "plain products know no causality of their own"
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(1, -1, scores.shape[2], 1)
        probs = torch.cat([scores, column], dim=-1).softmax(dim=-1, dtype=dtype)[..., :-1]
    else:
        probs = scores.softmax(dim=-1, dtype=dtype)
    return F.dropout(probs.to(v.dtype), dropout) @ v


# A varlen kernel: (q (N, H, d), k (K, H_kv, d), v, cu_seqlens of q and of k, their longest, dropout, scaling, window, softcap)
# -> (N, H, d_v); queries are aligned with the last keys of their piece.
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int, float, "float | None", "int | None", "float | None"], Tensor]


def _varlen_kernel(query: Tensor, value: Tensor, softcap: float | None, sinks: Tensor | None) -> Kernel | None:
    if query.device.type != "cuda" or query.dtype not in (torch.float16, torch.bfloat16) or sinks is not None:
        return None
    return _choose_kernel(query.shape[-1], value.shape[-1], softcap)


def _choose_kernel(width: int, value_width: int, softcap: float | None) -> Kernel | None:
    """The kernel for heads of these widths: both have heads of up to 256 numbers, values as wide as keys."""
    if width > 256 or value_width != width:
        return None
    if find_flash_attn():
        return _flash_attn
    return _torch_varlen if softcap is None and width % 8 == 0 and find_torch_varlen() else None


@cache
def find_flash_attn() -> bool:
    """Whether the flash-attn package is installed."""
    return find_spec("flash_attn") is not None


@cache
def find_torch_varlen() -> bool:
    """Whether torch has varlen attention with windows and a scale (2.11 and later)."""
    return {"window_size", "scale"} <= _varlen_options()


@cache
def _varlen_options() -> frozenset[str]:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


def _flash_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    longest_q: int,
    longest_k: int,
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
        cu_q,
        cu_k,
        longest_q,
        longest_k,
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
    cu_q: Tensor,
    cu_k: Tensor,
    longest_q: int,
    longest_k: int,
    dropout: float,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    if dropout:
        raise ModelError("torch's varlen attention has no dropout: set the model's attention dropout to 0 or install flash-attn")
    left = -1 if window is None else window - 1
    grouped: dict[str, Any] = {}
    if "enable_gqa" in _varlen_options():  # torch 2.11 groups heads unasked
        grouped["enable_gqa"] = q.shape[1] != k.shape[1]
    out = varlen_attn(q, k, v, cu_q, cu_k, longest_q, longest_k, scale=scaling, window_size=(left, 0), **grouped)
    assert isinstance(out, Tensor)
    return out
