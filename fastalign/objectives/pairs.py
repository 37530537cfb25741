"""What the objectives on preference pairs share: their slabs of the head, their counts and their metrics.

A batch of pairs has 2P sequences, chosen and rejected in turn. The head hands over its scored rows slab by slab, and no slab cuts
a pair; metrics are sums over slabs and micro-batches, divided once by counts over the whole step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fastalign.models.heads import HeadSpec
from fastalign.segments import segment_sum, segments_in, shared_length_sum
from fastalign.types import HeadOutput, PackedBatch, Sample

Sums = dict[str, Tensor]

METRIC_OUTPUTS = ("entropy", "mean_logits", "is_top1")  # what the "full" metrics ask of the head beside the log-probs


@dataclass
class PairSlab:
    """The pairs `first:last` of a batch and the head's outputs for all their scored rows."""

    out: HeadOutput
    cu_seqlens: Tensor  # (2p+1,) int32, sequences of these pairs in the slab's rows
    first: int
    last: int
    ld_alpha: float | None = None

    @cached_property
    def sums(self) -> Tensor:
        """(2p,) log-probs of the completions, with gradient."""
        return segment_sum(self.out.logps, self.cu_seqlens)

    @cached_property
    def logps(self) -> Tensor:
        """(2p,) `sums`, or with ld_alpha their length-desensitised form."""
        return self.sums if self.ld_alpha is None else shared_length_sum(self.out.logps, self.cu_seqlens, self.ld_alpha)

    @cached_property
    def lengths(self) -> Tensor:
        """(2p,) scored tokens."""
        return self.cu_seqlens.diff()

    @cached_property
    def means(self) -> Tensor:
        """(2p,) log-probs per token, with gradient; 0 of a completion without a scored token."""
        return self.sums / self.lengths.clamp(min=1)

    def of_pairs(self, values: Tensor) -> Tensor:
        """The part of `values` (P,) that belongs to these pairs."""
        return values[self.first : self.last]

    def of_sequences(self, values: Tensor) -> Tensor:
        """The part of `values` (2P,) that belongs to these pairs."""
        return values[2 * self.first : 2 * self.last]


def pair_loss(
    head: HeadSpec,
    hidden: Tensor,  # (N, D) of the whole batch; gradient
    batch: PackedBatch,
    loss_of_slab: Callable[[PairSlab], Tensor],
    *,
    outputs: Sequence[str],
    budget: int | None = None,
    ld_alpha: float | None = None,
) -> Tensor:
    """The sum of `loss_of_slab` over slabs of whole pairs, a scalar; the head's log-probs alone are differentiable."""
    bounds = batch.live_bounds[::2]

    def of_rows(out: HeadOutput, rows: slice) -> Tensor:
        first, last = segments_in(bounds, rows)
        cu_seqlens = batch.live_cu_seqlens[2 * first : 2 * last + 1] - rows.start
        return loss_of_slab(PairSlab(out, cu_seqlens, first, last, ld_alpha))

    return head.loss(
        hidden.index_select(0, batch.live),
        batch.live_target,
        of_rows,
        groups=bounds,
        outputs=outputs,
        differentiable=("logps",),
        live_rows=batch.live_target.shape[0],
        budget=budget,
    )


def add_aux_loss(loss: Tensor, aux_loss: Tensor | None, batch: PackedBatch, denominators: dict[str, float], sums: Sums) -> Tensor:
    """`loss` and a mixture of experts' own auxiliary loss, weighted by the micro-batch's share of the step's samples.

    That loss is no sum over samples, so this one term depends on how the step is cut, as in every trainer.
    """
    if aux_loss is None:
        return loss
    share = len(batch.index) / denominators["samples"]
    sums["aux_loss"] = share * aux_loss.detach()
    return loss + share * aux_loss


def count_pairs(samples: Sequence[Sample]) -> dict[str, float]:
    """The denominators of pairs: how many, and their chosen and rejected scored tokens."""
    chosen, rejected = (float(sum(lengths)) for lengths in zip(*(sample.scored for sample in samples)))
    return {"samples": float(len(samples)), "chosen_tokens": chosen, "rejected_tokens": rejected}


def pair_metrics(rewards: Tensor, logps: Tensor, slab: PairSlab) -> Sums:
    """Sums of TRL's metrics over the pairs of a slab: of `rewards` and `logps`, (2p,) each, and of the head's outputs if it gave them."""
    rewards, logps, out = rewards.detach(), logps.detach(), slab.out
    chosen, rejected = rewards[0::2], rewards[1::2]
    sums = {
        "rewards/chosen": chosen.sum(),
        "rewards/rejected": rejected.sum(),
        "rewards/accuracies": (chosen > rejected).float().sum(),
        "rewards/margins": (chosen - rejected).sum(),
        "logps/chosen": logps[0::2].sum(),
        "logps/rejected": logps[1::2].sum(),
    }
    if out.entropy is not None and out.mean_logits is not None and out.is_top1 is not None:
        mean_logits = segment_sum(out.mean_logits.detach(), slab.cu_seqlens)
        sums |= {
            "logits/chosen": mean_logits[0::2].sum(),
            "logits/rejected": mean_logits[1::2].sum(),
            "entropy": out.entropy.detach().sum(),
            "mean_token_accuracy": segment_sum(out.is_top1.float(), slab.cu_seqlens)[0::2].sum(),
        }
    return sums


def add_sums(sums: Sums, more: Sums) -> None:
    """Add `more` to `sums`, name by name."""
    for name, value in more.items():
        sums[name] = sums[name] + value if name in sums else value


def mean_metrics(sums: dict[str, float], denominators: dict[str, float]) -> dict[str, float]:
    """`sums` over what they are means of: tokens for the head's outputs, samples otherwise; losses are already divided."""
    count = {
        "logits/chosen": denominators["chosen_tokens"],
        "logits/rejected": denominators["rejected_tokens"],
        "mean_token_accuracy": denominators["chosen_tokens"],
        "entropy": denominators["chosen_tokens"] + denominators["rejected_tokens"],
        "loss": 1.0,
        "aux_loss": 1.0,
        "nll_loss": 1.0,
    }
    return {name: total / (count.get(name, denominators["samples"]) or 1.0) for name, total in sums.items()}


@torch.no_grad()
def likelihood_weights(slab: PairSlab) -> Tensor:
    """(p,) how likely the policy itself would have written both completions. Zhou 2024 (WPO), arXiv:2406.11827 eq. 2, aligned by sampling.

    w = w+ w-, log w+- = mean_t(log p(y_t) - log sum_v p_v^2). Asks the head for log_sum_sq_probs.
    """
    aligned = log_likelihood_weights(slab)
    return (aligned[0::2] + aligned[1::2]).exp()


def log_likelihood_weights(slab: PairSlab) -> Tensor:
    """(2p,) log w+ and log w- of `likelihood_weights`, in turn."""
    assert slab.out.log_sum_sq_probs is not None
    return segment_sum(slab.out.logps - slab.out.log_sum_sq_probs, slab.cu_seqlens) / slab.lengths.clamp(min=1)
