"""The head by its definition: full logits, plain autograd, any dtype up to float64. For tests and small problems."""

from __future__ import annotations

import math

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
    live = target != ignore_index
    logits = reference_logits(hidden, weight, live, bias, logit_scale, softcap, temperature, lora)
    log_p = logits.log_softmax(dim=1)
    index = target.masked_fill(~live, 0).unsqueeze(1)
    target_logit = logits.gather(1, index).squeeze(1)
    return HeadOutput(
        logps=log_p.gather(1, index).squeeze(1).masked_fill(~live, 0),
        entropy=-(log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(1).masked_fill(~live, 0),
        lse=logits.logsumexp(1).masked_fill(~live, 0),
        log_sum_sq_probs=(2 * log_p.detach()).logsumexp(1).masked_fill(~live, 0),
        mean_logits=logits.mean(1).masked_fill(~live, 0),
        is_top1=(target_logit >= logits.amax(1)) & live,
    )


def reference_divergence(log_p: Tensor, log_q: Tensor, kind: str, beta: float) -> Tensor:
    """(N,) divergence of the student `log_p` from the teacher `log_q`, both (N, V) log-probs; the definition of `divergence.py`."""

    def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
        a = log_a.exp()
        ratio = torch.where(a > 0, log_a, 0.0) - torch.where(a > 0, log_b, 0.0)  # 0 log 0 is 0
        return (a * ratio).sum(1)

    if kind == "forward_kl":
        return kl(log_q, log_p)
    if kind == "reverse_kl":
        return kl(log_p, log_q)
    log_m = torch.logaddexp(log_p + math.log1p(-beta), log_q + math.log(beta))
    return beta * kl(log_q, log_m) + (1 - beta) * kl(log_p, log_m)


def reference_logits(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    live: Tensor,  # (N,) bool; the other rows may hold NaN
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float | Tensor,
    lora: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """(N, V) logits; those of dead rows are what a row of zeros has."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    logits = hidden.masked_fill(~live.unsqueeze(1), 0).to(dtype) @ weight.to(dtype).T
    if lora is not None:
        u, b = lora
        logits = logits + u.masked_fill(~live.unsqueeze(1), 0).to(dtype) @ b.to(dtype).T
    if bias is not None:
        logits = logits + bias.to(dtype)
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits / (temperature.to(dtype).unsqueeze(1) if isinstance(temperature, Tensor) else temperature)
