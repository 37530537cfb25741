"""Kahneman-Tversky optimisation: learning from single answers that are desirable or not."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fastalign.data.config import UnpairedDataConfig
from fastalign.data.samples import Samples
from fastalign.data.unpaired import load_unpaired
from fastalign.losses.unpaired import apo_zero_unpaired, kto, mismatched_kl
from fastalign.models.heads import head_spec
from fastalign.models.reference import CachedReference, Reference, build_reference, copied, sequence_logps
from fastalign.models.trunk import trunk
from fastalign.objectives.base import Dataset, RunConfig
from fastalign.objectives.pairs import METRIC_OUTPUTS, Sums, add_aux_loss, add_sums
from fastalign.packing import per_sample
from fastalign.segments import segment_sum, segments_in
from fastalign.types import HeadOutput, PackedBatch, Sample

logger = logging.getLogger("fastalign")


@dataclass
class KTOConfig(RunConfig):
    """Kahneman-Tversky optimisation: makes a model write what is desirable and not what is not, from single labelled answers."""

    name: ClassVar[str] = "kto"

    data: UnpairedDataConfig = field(default_factory=UnpairedDataConfig)
    beta: float = 0.1
    """Strength of the pull towards the reference."""
    loss_type: Literal["kto", "apo_zero_unpaired"] = "kto"
    """kto (Ethayarajh 2024), or apo_zero_unpaired, which needs no KL (D'Oosterlinck 2024)."""
    desirable_weight: float = 1.0
    """Weight of desirable answers. Times their number it should be 1 to 4/3 of the same product of undesirable ones."""
    undesirable_weight: float = 1.0
    """Weight of undesirable answers."""
    kl_scope: Literal["step", "microbatch"] = "step"
    """Over which samples the KL to the reference is estimated. microbatch is TRL's, and the result depends on max_tokens."""
    reference: Literal["auto", "adapter", "cache", "copy", "stream"] = "auto"
    """adapter: the model with its adapter off; cache: log-probs computed once and kept on disk; copy: a second model; stream: a
    second model in host memory, whose layers come to the device one by one. auto: adapter when training LoRA, else cache."""

    def validate(self) -> None:
        super().validate()
        self._require("beta", self.beta > 0, "positive")
        self._require_choice("loss_type", ("kto", "apo_zero_unpaired"))
        self._require_choice("kl_scope", ("step", "microbatch"))
        self._require_use("kl_scope", self.loss_type == "kto", "loss_type=kto")
        self._require_choice("reference", ("auto", "adapter", "cache", "copy", "stream"))
        for option in ("desirable_weight", "undesirable_weight"):
            self._require(option, 0 <= getattr(self, option) < float("inf"), "0 or more and finite")
        if self.reference == "adapter" and not self.adapts:
            self._require("reference", False, "cache, copy or auto when all weights are trained (lora.r 0)")
        if self.kl_scope == "microbatch":
            self._require("reference", self.reference != "cache", "auto, adapter, copy or stream with kl_scope=microbatch, whose rows vary")

    @property
    def unpredicted(self) -> str | None:
        return "with kl_scope microbatch the result depends on it" if self.kl_scope == "microbatch" else super().unpredicted

    @property
    def unsettled(self) -> str | None:
        return super().unpredicted

    def load_data(self, tokenizer: Any, vocab_size: int | None) -> Samples:
        data = load_unpaired(self.data, tokenizer, vocab_size=vocab_size)
        if (self.desirable_weight, self.undesirable_weight) != (1.0, 1.0):
            _report_balance(data.samples, self.desirable_weight, self.undesirable_weight)
        return data

    def objective(self, model: Any, data: Dataset, folder: Path) -> KTO:
        uncached = self.kl_scope == "microbatch" and self.reference == "auto" and not self.adapts  # its rows cannot be known before
        config = replace(self, reference="copy") if uncached else self
        return KTO(self, model, data, build_reference(model, config, data, folder), folder)


@dataclass
class Mismatched:
    """The rows of the KL, for `build_reference`."""

    samples: list[Sample]
    eval_samples: list[Sample]
    fingerprint: str


class KTO:
    """loss = sum_i w_i loss_i / (samples of the step), w_i the sample's weight in the data (1 where it has none).

    The KL is the mean log-ratio of mismatched rows, 0 at least: of those of all samples of the step, scored without gradient before
    its first micro-batch, or (kl_scope microbatch) of the micro-batch's own, its completions handed on by one in order of index.
    Rows without a scored token do not count. Policy and reference score them without dropout.

    Metrics are those of TRL's KTOTrainer: kl; rewards/*, logps/* and logits/* of the desirable ("chosen") and the undesirable
    ("rejected"), left out for a class that the step does not have; entropy.
    """

    def __init__(self, config: KTOConfig, model: Any, data: Dataset, reference: Reference, folder: Path) -> None:
        self.model, self.reference = model, reference
        self.head = head_spec(model)
        self.config = config
        self.outputs = ("logps", *(METRIC_OUTPUTS[:2] if config.metrics == "full" else ()))
        self.kl: Tensor | float = 0.0
        self.samples = {sample.index: sample for sample in (*data.samples, *data.eval_samples)}
        self.longest = max(sample.num_tokens for sample in self.samples.values())
        self.mismatched: dict[int, Sample] = {}
        self.mismatched_reference = reference
        if config.loss_type == "kto" and config.kl_scope == "step":
            rows = Mismatched(mismatch(data.samples, self.longest), mismatch(data.eval_samples, self.longest), data.fingerprint)
            self.mismatched = {row.index: row for row in (*rows.samples, *rows.eval_samples)}
            if isinstance(reference, CachedReference):
                self.mismatched_reference = build_reference(model, config, rows, folder)

    @property
    def prepares(self) -> bool:
        return bool(self.mismatched)

    def prepare(self, samples: Sequence[Sample], max_tokens: int | None = None) -> None:
        """The step's KL."""
        self.kl = self._estimate([self.mismatched[sample.index] for sample in samples], max_tokens)

    @property
    def copies(self) -> list[nn.Module]:
        return copied(self.reference)

    def denominators(self, samples: Sequence[Sample]) -> dict[str, float]:
        counts = {"samples": float(len(samples)), "desirable": 0.0, "undesirable": 0.0, "chosen_tokens": 0.0, "rejected_tokens": 0.0}
        for sample in samples:
            names = ("desirable", "chosen_tokens") if _is_desirable(sample) else ("undesirable", "rejected_tokens")
            for name, more in zip(names, (1, sample.num_targets)):
                counts[name] += more
        return counts

    def loss(self, batch: PackedBatch, denominators: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.labels is not None
        config, desirable = self.config, batch.labels > 0.5
        ref_logps = self.reference.logps(batch)
        kl = self._kl_of_batch(batch) if config.kl_scope == "microbatch" else self.kl
        policy = trunk(self.model, batch)
        options: dict[str, Any] = {name: getattr(config, name) for name in ("beta", "desirable_weight", "undesirable_weight")}
        sums: Sums = {}
        if config.loss_type == "kto":
            sums["kl"] = batch.weight.new_tensor(len(batch.index) / denominators["samples"]) * kl

        def loss_of_slab(out: HeadOutput, rows: slice) -> Tensor:
            first, last = segments_in(batch.live_bounds, rows)
            cu_seqlens, wanted = batch.live_cu_seqlens[first : last + 1] - rows.start, desirable[first:last]
            logps = segment_sum(out.logps, cu_seqlens)
            if config.loss_type == "kto":
                found = kto(logps, ref_logps[first:last], wanted, kl, **options)
            else:
                found = apo_zero_unpaired(logps, ref_logps[first:last], wanted, **options)
            add_sums(sums, _metric_sums(out, found.rewards, logps.detach(), wanted, cu_seqlens))
            return (found.loss * batch.weight[first:last]).sum() / denominators["samples"]

        loss = self.head.loss(
            policy.hidden.index_select(0, batch.live),
            batch.live_target,
            loss_of_slab,
            groups=batch.live_bounds,
            outputs=self.outputs,
            differentiable=("logps",),
            live_rows=batch.live_target.shape[0],
            budget=config.logits_budget,
        )
        loss = add_aux_loss(loss, policy.aux_loss, batch, denominators, sums)
        sums["loss"] = loss.detach()
        return loss, sums

    def metrics(self, sums: dict[str, float], denominators: dict[str, float]) -> dict[str, float]:
        count = {"entropy": denominators["chosen_tokens"] + denominators["rejected_tokens"]}
        for side, name in (("chosen", "desirable"), ("rejected", "undesirable")):
            count |= {f"rewards/{side}": denominators[name], f"logps/{side}": denominators[name]}
            count |= {f"logits/{side}": denominators[f"{side}_tokens"]}
        found = {name: total / count.get(name, 1.0) for name, total in sums.items() if count.get(name, 1.0)}
        if "rewards/chosen" in found and "rewards/rejected" in found:
            found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
        return found

    def _kl_of_batch(self, batch: PackedBatch) -> Tensor | float:
        """KL among the samples of one micro-batch; 0 for a sample alone."""
        samples = [self.samples[index] for index in sorted(batch.index)]
        if len(samples) == 1 or self.config.loss_type != "kto":
            return 0.0
        return self._estimate([_with_completion(own, other, self.longest) for own, other in zip(samples, [samples[-1], *samples])])

    @torch.no_grad()
    def _estimate(self, rows: Sequence[Sample], max_tokens: int | None = None) -> Tensor:
        """The KL from mismatched rows, a scalar; policy and reference score them in packs of their own."""
        device, longest = self.head.weight.device, max(row.num_tokens for row in rows)  # which may be longer than the samples
        limit = max(longest, max_tokens or self.config.token_limit)

        def score(packed: PackedBatch) -> Tensor:
            batch = packed.to(device)
            policy = sequence_logps(self.model, batch, head=self.head, budget=self.config.logits_budget)
            return torch.stack([policy, self.mismatched_reference.logps(batch)], dim=1)

        found = per_sample(rows, limit, score, rows=[1] * len(rows), share=self.config.share_prompts)
        logps, ref_logps = torch.cat(found).to(device).unbind(1)
        return mismatched_kl(logps, ref_logps, torch.tensor([row.num_targets > 0 for row in rows]).to(device))


def mismatch(samples: Sequence[Sample], longest: int) -> list[Sample]:
    """Every sample with the completion of the nearest one before it, by index and around, that has another prompt.

    Where all have one prompt it is the one right before. The rows have the samples' indices and at most `longest` tokens.
    """
    ordered = sorted(samples, key=lambda sample: sample.index)
    others = [other for other in ordered if other.prompt != ordered[0].prompt]
    partners: dict[int, Sample] = {}
    for k, sample in enumerate(ordered):
        previous = ordered[k - 1]
        if others and previous.prompt == sample.prompt:
            previous = partners[previous.index] if k else others[-1]
        partners[sample.index] = previous
    return [_with_completion(sample, partners[sample.index], longest) for sample in samples]


def _with_completion(sample: Sample, other: Sample, longest: int) -> Sample:
    prompt = sample.contexts[0]
    return Sample(sample.index, prompt, (other.completions[0][: max(0, longest - len(prompt))],))


def _is_desirable(sample: Sample) -> bool:
    return sample.labels[0] > 0.5


def _metric_sums(out: HeadOutput, rewards: Tensor, logps: Tensor, desirable: Tensor, cu_seqlens: Tensor) -> Sums:
    per_sequence = {"rewards": rewards, "logps": logps}
    sums: Sums = {}
    if out.entropy is not None and out.mean_logits is not None:
        sums["entropy"] = out.entropy.detach().sum()
        per_sequence["logits"] = segment_sum(out.mean_logits.detach(), cu_seqlens)
    for name, values in per_sequence.items():
        sums[f"{name}/chosen"] = values.masked_fill(~desirable, 0.0).sum()
        sums[f"{name}/rejected"] = values.masked_fill(desirable, 0.0).sum()
    return sums


def _report_balance(samples: Sequence[Sample], desirable_weight: float, undesirable_weight: float) -> None:
    """Say so when the weights are out of the range that the paper recommends (section 4.2), both classes being there."""
    desirable = sum(map(_is_desirable, samples))
    a, b = desirable_weight * desirable, undesirable_weight * (len(samples) - desirable)
    if not a or not b or 1 <= a / b <= 4 / 3:
        return
    least = b / desirable
    logger.warning(
        "desirable_weight %g times %d samples is %.3g times undesirable_weight %g times %d; KTO recommends 1 to 4/3, here a "
        "desirable_weight between %.3g and %.3g",
        desirable_weight, desirable, a / b, undesirable_weight, len(samples) - desirable, least, 4 / 3 * least,
    )  # fmt: skip
