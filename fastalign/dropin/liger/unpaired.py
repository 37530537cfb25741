"""KTO under Liger's name: sequences that are each desirable or not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastalign.dropin.liger.scoring import check_padded, logits_sums, need_reference, padded_logps, padded_loss, per_sequence
from fastalign.losses.unpaired import kto
from fastalign.types import HeadOutput


class LigerFusedLinearKTOLoss(nn.Module):
    """KTO, Liger's call: `module(_input, lin_weight, target, bias, preference_labels, ref_input, ref_weight, ref_bias, kl)`.

    _input (B, T, D) and lin_weight (V, D) with gradients, target (B, T) int64, preference_labels (B,) bool, kl a scalar in nats or None
    for 0. Returns loss, metrics: sums over the desirable and over the other sequences of logps, logits and rewards, in the order
    chosen_logps, rejected_logps, chosen_logits, rejected_logits, chosen_rewards, rejected_rewards.
    Without use_ref_model the reference's log-probs are 0.
    Raises ValueError for absent labels, a kl of several numbers, and shapes that do not fit.

    >>> hidden, weight, target = torch.zeros(2, 1, 4), torch.zeros(8, 4), torch.tensor([[1], [3]])
    >>> module, labels = LigerFusedLinearKTOLoss(use_ref_model=True), torch.tensor([True, False])
    >>> float(module(hidden, weight, target, preference_labels=labels, ref_input=hidden, ref_weight=weight)[0])
    0.5
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compiled: bool = True,
        use_ref_model: bool = False,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        *,
        budget: int | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        self.ignore_index, self.beta, self.use_ref_model, self.average_log_prob = ignore_index, beta, use_ref_model, average_log_prob
        self.compiled, self.chunk_size = compiled, chunk_size
        self.options: dict[str, Any] = {"ignore_index": ignore_index, "budget": budget, "impl": impl}

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        preference_labels: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        kl: Tensor | float | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        check_padded(_input, target)
        sequences, length = target.shape
        if preference_labels is None or preference_labels.shape != (sequences,) or preference_labels.dtype != torch.bool:
            got = None if preference_labels is None else f"{preference_labels.dtype} {tuple(preference_labels.shape)}"
            raise ValueError(f"preference_labels must be bool of shape ({sequences},), one per sequence, got {got}")
        if isinstance(kl, Tensor) and kl.numel() != 1:
            raise ValueError(f"kl is one number for the batch (its mean, at least 0), got {tuple(kl.shape)}")
        shift = 0.0 if kl is None else kl.detach().reshape(()) if isinstance(kl, Tensor) else kl
        desirable, counted = preference_labels, target != self.ignore_index
        kept = torch.zeros(2, sequences, dtype=torch.promote_types(_input.dtype, torch.float32), device=_input.device)
        reference = torch.zeros_like(kept[0])
        if self.use_ref_model:
            states, weight = need_reference(ref_input, ref_weight, "; without a reference pass use_ref_model=False")
            check_padded(states, target, ("ref_input", "target"))
            reference = per_sequence(padded_logps(states, weight, target, ref_bias, **self.options), counted, self.average_log_prob)

        def loss_fn(out: HeadOutput, rows: slice) -> Tensor:
            here = slice(rows.start // length, rows.stop // length) if length else slice(0, sequences)
            logps = per_sequence(out.logps.view(-1, length), counted[here], self.average_log_prob)
            result = kto(logps, reference[here], desirable[here], shift, beta=self.beta)
            kept[:, here] = torch.stack([logps.detach(), result.rewards])
            return result.loss.sum() / sequences

        loss = padded_loss(_input, lin_weight, target, bias, loss_fn, 1, **self.options)
        logits = logits_sums(_input, lin_weight, bias)
        chosen, rejected = desirable.to(kept.dtype), (~desirable).to(kept.dtype)
        sums = [values @ side for values in (kept[0], logits.to(kept.dtype), kept[1]) for side in (chosen, rejected)]
        return loss, tuple(sums)
