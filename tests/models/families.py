"""Batches and oracles that the model tests share."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from tiny import FAMILIES, VOCAB_SIZE, tiny_model
from torch import Tensor

from fastalign.models.heads import head_spec
from fastalign.models.trunk import causal_lm, trunk
from fastalign.packing import collate
from fastalign.types import PackedBatch, Sample

TRAINABLE = [family for family in FAMILIES if family != "falcon_h1"]
DENSE = [family for family in TRAINABLE if family not in ("mixtral", "qwen3_moe")]


def tokens(n: int, generator: torch.Generator) -> tuple[int, ...]:
    return tuple(torch.randint(0, VOCAB_SIZE, (n,), generator=generator).tolist())


def ragged_batch(seed: int = 1, *, share: bool = False) -> PackedBatch:
    """Eight sequences of 2 to 31 tokens: below, at and above the tiny windows of 8, with and without a prompt.

    With `share`, pairs whose prompt is long enough (`packing.SHARE_FROM`) have it once.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = [(5, 3, 20), (1, 1, 30), (0, 8, 2), (13, 9, 2)]
    pairs = [Sample(i, tokens(p, generator), (tokens(a, generator), tokens(b, generator))) for i, (p, a, b) in enumerate(lengths)]
    return collate(pairs, share=share)


def stock_twin(family: str, attention: str = "eager", **overrides: Any) -> Any:
    """The same random model with Transformers' own attention, untouched by fastalign."""
    model = tiny_model(family, **overrides)
    assert model.config._attn_implementation == attention
    return model


def stock_logps(model: Any, batch: PackedBatch) -> Tensor:
    """(L,) from the model's own logits, one sequence at a time, no packing and no mask."""
    out = []
    for rows, (first, last) in zip(batch.sequences(), pairwise(batch.live_bounds)):
        logps = model(input_ids=batch.input_ids[None, rows], use_cache=False).logits[0].log_softmax(-1)
        scored = [rows.index(row) for row in batch.live[first:last].tolist()]
        out.append(logps[scored].gather(1, batch.live_target[first:last, None])[:, 0])
    return torch.cat(out)


def fused_logps(model: Any, batch: PackedBatch, **options: Any) -> Tensor:
    """(L,) through the packed trunk and the head operator."""
    hidden = trunk(model, batch).hidden.index_select(0, batch.live)
    return head_spec(model).logps(hidden, batch.live_target, **options).logps


def gradients(model: Any, of: Tensor) -> dict[str, Tensor]:
    """Gradient of the scalar `of` for every trainable parameter, None as absent, under the names of the bare model."""
    model.zero_grad()
    of.backward()
    return {name: p.grad.clone() for name, p in causal_lm(model).named_parameters() if p.grad is not None}


def weights_of(batch: PackedBatch) -> Tensor:
    """An upstream gradient that differs per token, so that mixed-up rows show."""
    return torch.linspace(-1.0, 2.0, len(batch.live))
