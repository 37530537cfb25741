"""The head by its definition: full logits, plain autograd, any dtype up to float64. For tests and small problems."""

from __future__ import annotations

import torch
from torch import Tensor

from fastalign.types import HeadOutput


def reference_logps(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (N,)
    *,
    bias: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    lora: tuple[Tensor, Tensor] | None = None,  # (N, r), (V, r)
) -> HeadOutput:
    """Every field of HeadOutput from the materialised (N, V) logits, computed in float32, or float64 for float64 inputs."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    live = target != ignore_index
    logits = hidden.masked_fill(~live.unsqueeze(1), 0).to(dtype) @ weight.to(dtype).T  # an ignored row may hold NaN
    if lora is not None:
        u, b = lora
        logits = logits + u.masked_fill(~live.unsqueeze(1), 0).to(dtype) @ b.to(dtype).T
    if bias is not None:
        logits = logits + bias.to(dtype)
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits / (temperature.to(dtype).unsqueeze(1) if isinstance(temperature, Tensor) else temperature)

    log_p = logits.log_softmax(dim=1)
    index = target.masked_fill(~live, 0).unsqueeze(1)
    target_logit = logits.gather(1, index).squeeze(1)
    return HeadOutput(
        logps=log_p.gather(1, index).squeeze(1).masked_fill(~live, 0),
        entropy=-(log_p.exp() * log_p.clamp(min=torch.finfo(dtype).min)).sum(1).masked_fill(~live, 0),
        lse=logits.logsumexp(1).masked_fill(~live, 0),
        log_sum_sq_probs=(2 * log_p.detach()).logsumexp(1).masked_fill(~live, 0),
        mean_logits=logits.mean(1).masked_fill(~live, 0),
        is_top1=(target_logit >= logits.amax(1)) & live,
    )
