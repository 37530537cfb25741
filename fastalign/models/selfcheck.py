"""A run's first question: do the fused log-probs equal those of the model's own logits?"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fastalign.errors import HeadMismatchError
from fastalign.models.heads import head_spec
from fastalign.models.trunk import causal_lm, evaluation, stock_attention, text_config, trunk
from fastalign.packing import collate
from fastalign.types import PackedBatch, Sample

# Largest difference of a log-prob, per nat of its size: orders above rounding in deep models, orders below a wrong head.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.05}


def self_check(model: Any, batch: PackedBatch, *, sequences: int = 4, tokens: int = 1024, rows: int = 8) -> float:
    """Compare fused log-probs with the model's own logits, and return the largest difference.

    The first `sequences` sequences of `batch` (each cut to `tokens`) run packed through our attention and head, and one
    at a time through the model's own forward with Transformers' attention; the last `rows` positions of each are compared.
    Dropout is off, no gradient is kept, no random number is drawn. Raises HeadMismatchError beyond the tolerance.
    """
    samples: list[Sample] = []
    for start, stop in list(pairwise(batch.bounds))[:sequences]:
        ids = tuple(batch.input_ids[start : min(stop, start + tokens)].tolist())
        if len(ids) > 1:
            scored = min(rows, len(ids) - 1)
            samples.append(Sample(len(samples), ids[:-scored], (ids[-scored:],)))
    if not samples:
        return 0.0
    packed = collate(samples).to(batch.input_ids.device)
    with evaluation(model):
        head = head_spec(model)
        fused = head.logps(trunk(model, packed).hidden[packed.live], packed.live_target).logps
        own = own_logps(model, packed)
    difference = (fused - own).abs() / own.abs().clamp(min=1.0)
    worst = float(difference.max())
    if not worst <= _TOLERANCE[head.weight.dtype]:
        raise HeadMismatchError(
            f"{type(causal_lm(model)).__name__}: fused log-probs differ from the model's own logits by up to {worst:.3g} "
            f"(tolerance {_TOLERANCE[head.weight.dtype]:g}; read from the head: logit_scale={head.logit_scale:g}, softcap={head.softcap}). "
            "Training would optimise another model than the one that generates, so it does not start"
        )
    return worst


def own_logps(model: Any, batch: PackedBatch) -> Tensor:
    """(L,) log-probs of the live rows by the model's own forward, one sequence at a time, with Transformers' attention."""
    causal = causal_lm(model)
    router = {"output_router_logits": False} if hasattr(text_config(causal), "output_router_logits") else {}
    found = []
    with stock_attention(model):
        for (start, stop), (first, last) in zip(pairwise(batch.bounds), pairwise(batch.live_bounds)):
            rows = batch.live[first:last] - start
            logits = causal(input_ids=batch.input_ids[None, start:stop], use_cache=False, **router).logits[0, rows]
            logps = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32).log_softmax(-1)
            found.append(logps.gather(1, batch.live_target[first:last, None])[:, 0])
    return torch.cat(found)
