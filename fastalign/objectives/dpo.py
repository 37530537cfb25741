"""Direct preference optimisation and its siblings that score a pair by its log-ratios: sigmoid (DPO, cDPO), ipo, hinge."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor

from fastalign.data.preferences import load_preferences
from fastalign.data.samples import Samples
from fastalign.losses import PREFERENCE_LOSSES
from fastalign.models.heads import head_spec
from fastalign.models.reference import Reference, build_reference
from fastalign.models.trunk import trunk
from fastalign.objectives.base import Dataset, RunConfig
from fastalign.segments import segment_sum
from fastalign.types import HeadOutput, PackedBatch, PreferenceLoss, Sample


@dataclass
class DPOConfig(RunConfig):
    """Direct preference optimisation: makes a model prefer the chosen to the rejected answers, within reach of where it started."""

    name: ClassVar[str] = "dpo"

    beta: float = 0.1
    """Strength of the pull towards the reference (IPO: its tau)."""
    loss_type: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    """sigmoid: DPO (Rafailov 2023); ipo: squared error of the log-ratio per token (Azar 2023); hinge: SLiC (Zhao 2023)."""
    label_smoothing: float = 0.0
    """cDPO: probability that a preference label is wrong; sigmoid only."""
    reference: Literal["auto", "adapter", "cache", "copy"] = "auto"
    """adapter: the model with its adapter off; cache: log-probs computed once and kept on disk; copy: a second model.
    auto: adapter when training LoRA, else cache."""

    def validate(self) -> None:
        super().validate()
        self._require("beta", self.beta > 0, "positive")
        self._require("label_smoothing", 0 <= self.label_smoothing < 0.5, "in [0, 0.5)")
        self._require_choice("loss_type", ("sigmoid", "hinge", "ipo"))
        self._require_choice("reference", ("auto", "adapter", "cache", "copy"))
        if self.reference == "adapter" and not self.lora.enabled:
            self._require("reference", False, "cache, copy or auto when all weights are trained (lora.r 0)")
        if self.label_smoothing and self.loss_type != "sigmoid":
            self._require("label_smoothing", False, f"0 with loss_type={self.loss_type}: only sigmoid has a smoothed form")

    def load_data(self, tokenizer: Any, vocab_size: int | None) -> Samples:
        return load_preferences(self.data, tokenizer, vocab_size=vocab_size)

    def objective(self, model: Any, data: Dataset, folder: Path) -> DPO:
        return DPO(self, model, build_reference(model, self, data, folder))


class DPO:
    """loss = sum_i w_i loss_i / (pairs of the step), with w_i the pair's weight in the data (1 where it has none).

    Metrics are those of TRL's DPOTrainer: rewards/* and logps/* are unweighted means over the step's pairs, logits/* and
    mean_token_accuracy means over its chosen (rejected) completion tokens, entropy over both. ipo divides by the number of
    scored tokens. The auxiliary loss of a mixture of experts is not a sum over pairs: each micro-batch adds its own, weighted by
    its share of the step's pairs, so this one term does depend on the cut, as in every trainer.
    """

    def __init__(self, config: DPOConfig, model: Any, reference: Reference) -> None:
        self.model = model
        self.reference = reference
        self.head = head_spec(model)
        self.pair_loss = PREFERENCE_LOSSES[config.loss_type]
        self.loss_type = config.loss_type
        self.options: dict[str, float] = {"beta": config.beta}
        if config.loss_type == "sigmoid":
            self.options["label_smoothing"] = config.label_smoothing
        self.outputs = ("logps", "entropy", "mean_logits", "is_top1") if config.metrics == "full" else ("logps",)
        self.budget = config.logits_budget

    def denominators(self, samples: Sequence[Sample]) -> dict[str, float]:
        scored = [s.scored for s in samples]
        chosen, rejected = (float(sum(lengths)) for lengths in zip(*scored))
        return {"pairs": float(len(samples)), "chosen_tokens": chosen, "rejected_tokens": rejected}

    def loss(self, batch: PackedBatch, denominators: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        ref_logps = self.reference.logps(batch)  # (S,), chosen and rejected in turn
        policy = trunk(self.model, batch)
        pair_bounds = batch.live_bounds[::2]
        sums: dict[str, Tensor] = {}

        def loss_of_slab(out: HeadOutput, rows: slice) -> Tensor:
            first, last = _segments_in(pair_bounds, rows)
            cu_seqlens = batch.live_cu_seqlens[2 * first : 2 * last + 1] - rows.start
            logps = segment_sum(out.logps, cu_seqlens)
            ref = ref_logps[2 * first : 2 * last]
            options: dict[str, Any] = dict(self.options)
            if self.loss_type == "ipo":
                lengths = cu_seqlens.diff()
                options |= {"chosen_lengths": lengths[0::2], "rejected_lengths": lengths[1::2]}
            pairs = self.pair_loss(logps[0::2], logps[1::2], ref[0::2], ref[1::2], **options)
            loss = (pairs.loss * batch.weight[first:last]).sum() / denominators["pairs"]
            _add(sums, _metric_sums(out, pairs, logps.detach(), cu_seqlens))
            return loss

        loss = self.head.loss(
            policy.hidden.index_select(0, batch.live),
            batch.live_target,
            loss_of_slab,
            groups=pair_bounds,
            outputs=self.outputs,
            differentiable=("logps",),
            live_rows=batch.live_target.shape[0],
            budget=self.budget,
        )
        if policy.aux_loss is not None:
            share = (len(pair_bounds) - 1) / denominators["pairs"]
            sums["aux_loss"] = share * policy.aux_loss.detach()
            loss = loss + share * policy.aux_loss
        sums["loss"] = loss.detach()
        return loss, sums

    def metrics(self, sums: dict[str, float], denominators: dict[str, float]) -> dict[str, float]:
        count = {
            "logits/chosen": denominators["chosen_tokens"],
            "logits/rejected": denominators["rejected_tokens"],
            "mean_token_accuracy": denominators["chosen_tokens"],
            "entropy": denominators["chosen_tokens"] + denominators["rejected_tokens"],
            "loss": 1.0,
            "aux_loss": 1.0,
        }
        return {name: total / (count.get(name, denominators["pairs"]) or 1.0) for name, total in sums.items()}


def _metric_sums(out: HeadOutput, pairs: PreferenceLoss, logps: Tensor, cu_seqlens: Tensor) -> dict[str, Tensor]:
    sums = {
        "rewards/chosen": pairs.chosen_rewards.sum(),
        "rewards/rejected": pairs.rejected_rewards.sum(),
        "rewards/accuracies": (pairs.chosen_rewards > pairs.rejected_rewards).float().sum(),
        "rewards/margins": (pairs.chosen_rewards - pairs.rejected_rewards).sum(),
        "logps/chosen": logps[0::2].sum(),
        "logps/rejected": logps[1::2].sum(),
    }
    if out.entropy is not None and out.mean_logits is not None and out.is_top1 is not None:
        mean_logits = segment_sum(out.mean_logits, cu_seqlens)
        sums |= {
            "logits/chosen": mean_logits[0::2].sum(),
            "logits/rejected": mean_logits[1::2].sum(),
            "entropy": out.entropy.detach().sum(),
            "mean_token_accuracy": segment_sum(out.is_top1.float(), cu_seqlens)[0::2].sum(),
        }
    return sums


def _add(totals: dict[str, Tensor], sums: dict[str, Tensor]) -> None:
    for name, value in sums.items():
        totals[name] = totals[name] + value if name in totals else value


def _segments_in(bounds: Sequence[int], rows: slice) -> tuple[int, int]:
    """First and last-plus-one of the segments whose rows are `rows`; a slab holds whole segments, empty ones included.

    >>> _segments_in((0, 5, 5, 8, 8), slice(5, 8))
    (1, 4)
    """
    last = len(bounds) - 1 if rows.stop == bounds[-1] else bisect_left(bounds, rows.stop)
    return bisect_left(bounds, rows.start), last
