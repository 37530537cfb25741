"""A run's first question: do the fused log-probs equal those of the model's own logits?"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fastalign.errors import HeadMismatchError, ModelError
from fastalign.models.heads import HeadSpec, head_spec
from fastalign.models.trunk import causal_lm, evaluation, stock_attention, text_config, trunk
from fastalign.packing import collate
from fastalign.types import PackedBatch, Sample

# Largest difference of a log-prob, per nat of its size: orders above rounding in deep models, orders below a wrong head.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.05}


def self_check(model: Any, batch: PackedBatch, *, share: bool = False, sequences: int = 4, tokens: int = 1024, rows: int = 8) -> float:
    """Compare fused log-probs with the model's own logits, and return the largest difference.

    The first `sequences` sequences of `batch` (each cut to `tokens`) run packed through our attention and head, and one
    at a time through the model's own forward with Transformers' attention; the last `rows` positions of each are compared.
    With `share` the same is asked of sequences that share their prompts. Dropout is off, no gradient is kept, no random
    number is drawn. Raises HeadMismatchError beyond the tolerance.
    """
    samples: list[Sample] = []
    for row in batch.sequences()[:sequences]:
        ids = tuple(batch.input_ids[row[:tokens]].tolist())
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
        if share:
            _check_shared(model, head, samples, fused)
    difference = (fused - own).abs() / own.abs().clamp(min=1.0)
    worst = float(difference.max())
    if not worst <= _TOLERANCE[head.weight.dtype]:
        raise HeadMismatchError(
            f"{type(causal_lm(model)).__name__}: fused log-probs differ from the model's own logits by up to {worst:.3g} "
            f"(tolerance {_TOLERANCE[head.weight.dtype]:g}; read from the head: logit_scale={head.logit_scale:g}, softcap={head.softcap}). "
            "Training would optimise another model than the one that generates, so it does not start"
        )
    return worst


def _check_shared(model: Any, head: HeadSpec, samples: list[Sample], packed: Tensor) -> None:
    """Raise ModelError unless two copies of every sequence give, with one prompt for both, what `packed` says of one."""
    twice: list[Sample] = []
    for sample in samples:
        ids = sample.prompt + sample.completions[0]
        scored = min(len(sample.completions[0]), len(ids) // 2)  # no more than half, so that short sequences have a prompt, too
        twice.append(replace(sample, prompt=ids[:-scored], completions=(ids[-scored:],) * 2))
    batch = collate(twice, share=True, share_from=2).to(packed.device)  # prompts of later samples may be longer than these
    if batch.shared is None:
        return
    fused = head.logps(trunk(model, batch).hidden[batch.live], batch.live_target).logps
    counts = [len(sample.completions[0]) for sample in twice]
    alone = [part[-n:] for part, n in zip(packed.split([len(sample.completions[0]) for sample in samples]), counts)]
    pairs = zip(fused.split([2 * n for n in counts]), alone)
    worst = max(float(((both.view(2, -1) - one).abs() / one.abs().clamp(min=1.0)).max()) for both, one in pairs)
    if not worst <= _TOLERANCE[head.weight.dtype]:
        raise ModelError(
            f"{type(causal_lm(model)).__name__}: log-probs of sequences that share their prompt differ by up to {worst:.3g} from those of "
            "separate ones, so its attention cannot branch; set --share_prompts false"
        )


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
