"""Direct preference optimisation and its family: the losses that score a pair by its log-ratios to a reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fastalign.data.preferences import load_preferences
from fastalign.data.samples import Samples
from fastalign.losses import PREFERENCE_LOSSES
from fastalign.losses.divergence import SCORES
from fastalign.losses.preference import matched
from fastalign.models.heads import head_spec
from fastalign.models.reference import CopyReference, Reference, build_reference, sequence_logps
from fastalign.models.trunk import trunk
from fastalign.objectives.base import Dataset, RunConfig
from fastalign.objectives.pairs import (
    METRIC_OUTPUTS,
    PairSlab,
    Sums,
    add_aux_loss,
    add_sums,
    count_pairs,
    likelihood_weights,
    mean_metrics,
    pair_loss,
    pair_metrics,
)
from fastalign.packing import per_sample
from fastalign.types import PackedBatch, Sample

_COUPLED = ("aot", "aot_unpaired")
_SCORED = (
    "sigmoid",
    "sigmoid_norm",
    "hinge",
    "ipo",
    "exo_pair",
    "robust",
    "discopop",
)  # whose beta log Z cancels: others take no f-divergence
_SMOOTHED = ("sigmoid", "robust", "exo_pair", *_COUPLED)
PER_TOKEN = ("ipo", "sigmoid_norm")


@dataclass
class DPOConfig(RunConfig):
    """Direct preference optimisation: makes a model prefer the chosen to the rejected answers, within reach of where it started."""

    name: ClassVar[str] = "dpo"

    beta: float = 0.1
    """Strength of the pull towards the reference (IPO: its tau)."""
    loss_type: str | list[str] = "sigmoid"
    """One of sigmoid (DPO), ipo, hinge (SLiC), robust, exo_pair, nca_pair, bco_pair, sppo_hard, apo_zero, apo_down, aot,
    aot_unpaired, discopop, sigmoid_norm, sft (likelihood of the chosen answers); or several, to be added up."""
    loss_weights: list[float] | None = None
    """Factors of the losses in `loss_type`; null: 1 each."""
    label_smoothing: float = 0.0
    """Probability that a preference label is wrong; sigmoid (cDPO), robust, exo_pair (more than 0, usually 0.001), aot."""
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl"
    """What holds the policy to the reference (Wang 2023); reverse_kl is DPO."""
    f_alpha_divergence_coef: float = 0.5
    """Alpha of alpha_divergence."""
    discopop_tau: float = 0.05
    """Temperature of discopop."""
    ld_alpha: float | None = None
    """LD-DPO: weight of the tokens beyond the length of a pair's shorter answer, from 0 to 1; null: 1."""
    use_weighting: bool = False
    """WPO: weight every pair by how likely the policy itself would have written it."""
    rpo_alpha: float | None = None
    """Weight of an anchor, the negative log-likelihood per token of the chosen answers: short for a loss_type sft."""
    reference_free: bool = False
    """A uniform reference: log-ratios are log-probs."""
    reference: Literal["auto", "adapter", "cache", "copy"] = "auto"
    """adapter: the model with its adapter off; cache: log-probs computed once and kept on disk; copy: a second model.
    auto: adapter when training LoRA, else cache; copy with sync_ref_model."""
    sync_ref_model: bool = False
    """TR-DPO: let the reference follow the policy."""
    ref_model_mixup_alpha: float = 0.6
    """Share of the policy's weights in the reference's new ones, with sync_ref_model."""
    ref_model_sync_steps: int = 512
    """Optimizer steps from one update of the reference to the next, with sync_ref_model."""

    @property
    def losses(self) -> list[tuple[str, float]]:
        """Every loss and its factor."""
        names = [self.loss_type] if isinstance(self.loss_type, str) else list(self.loss_type)
        weights = [1.0] * len(names) if self.loss_weights is None else self.loss_weights
        anchor = [] if self.rpo_alpha is None else [("sft", self.rpo_alpha)]
        return [*zip(names, weights), *anchor]

    def validate(self) -> None:
        super().validate()
        names = [self.loss_type] if isinstance(self.loss_type, str) else list(self.loss_type)
        known = (*PREFERENCE_LOSSES, "sft")
        self._require("loss_type", bool(names) and all(name in known for name in names), f"one or more of {', '.join(known)}")
        self._require(
            "loss_weights", self.loss_weights is None or len(self.loss_weights) == len(names), f"{len(names)} numbers, as loss_type"
        )
        self._require("beta", self.beta > 0, "positive")
        self._require("discopop_tau", self.discopop_tau > 0, "positive")
        self._require("label_smoothing", 0 <= self.label_smoothing < 0.5, "in [0, 0.5)")
        if self.label_smoothing and not set(names) & set(_SMOOTHED):
            self._require("label_smoothing", False, f"0 with loss_type={self.loss_type}: only {', '.join(_SMOOTHED)} have a smoothed form")
        if "exo_pair" in names and not self.label_smoothing:
            self._require("label_smoothing", False, "more than 0 with exo_pair, whose loss is infinite at 0; set --label_smoothing 0.001")
        self._require_choice("f_divergence_type", tuple(SCORES))
        if self.f_divergence_type != "reverse_kl" and (wrong := set(names) - {*_SCORED, "sft"}):
            self._require("f_divergence_type", False, f"reverse_kl with {', '.join(sorted(wrong))}; others go with {', '.join(_SCORED)}")
        self._require_use("f_alpha_divergence_coef", self.f_divergence_type == "alpha_divergence", "f_divergence_type=alpha_divergence")
        self._require_use("discopop_tau", "discopop" in names, "loss_type=discopop")
        self._require_use("ref_model_mixup_alpha", self.sync_ref_model, "sync_ref_model")
        self._require_use("ref_model_sync_steps", self.sync_ref_model, "sync_ref_model")
        self._require_use("reference", not self.reference_free, "a reference, not with reference_free")
        self._require("ld_alpha", self.ld_alpha is None or 0 <= self.ld_alpha <= 1, "in [0, 1], or null")
        self._require("rpo_alpha", self.rpo_alpha is None or self.rpo_alpha >= 0, "0 or more, or null")
        if self.use_weighting and (coupled := set(names) & set(_COUPLED)):
            self._require("use_weighting", False, f"false with {', '.join(sorted(coupled))}, which compares a pair with others than itself")
        self._require_choice("reference", ("auto", "adapter", "cache", "copy"))
        if self.reference == "adapter" and not self.lora.enabled:
            self._require("reference", False, "cache, copy or auto when all weights are trained (lora.r 0)")
        self._require("ref_model_mixup_alpha", 0 < self.ref_model_mixup_alpha <= 1, "in (0, 1]")
        self._require("ref_model_sync_steps", self.ref_model_sync_steps >= 1, "at least 1")
        if self.sync_ref_model:
            self._require("sync_ref_model", not self.lora.enabled, "false with an adapter: the reference has no weights of its own to move")
            self._require("sync_ref_model", not self.reference_free, "false with reference_free")
            self._require("reference", self.reference in ("auto", "copy"), "auto or copy with sync_ref_model: another one cannot follow")

    def load_data(self, tokenizer: Any, vocab_size: int | None) -> Samples:
        return load_preferences(self.data, tokenizer, vocab_size=vocab_size)

    def objective(self, model: Any, data: Dataset, folder: Path) -> DPO:
        if self.reference_free:
            return DPO(self, model, None)
        if self.sync_ref_model:
            return DPO(self, model, CopyReference(model, budget=self.logits_budget, ld_alpha=self.ld_alpha))
        return DPO(self, model, build_reference(model, self, data, folder, ld_alpha=self.ld_alpha))


class DPO:
    """loss = sum_i w_i sum_k weight_k loss_ik / (pairs of the step), w_i the pair's weight in the data (1 where it has none), times
    WPO's where that is used. The loss "sft" is sum_i w_i NLL_i / (chosen tokens of the step); TRL 1.16 fails on it with WPO.

    aot and aot_unpaired couple all pairs of the step by their ranks, for which the policy scores the step once more beforehand,
    without gradient; so they do not depend on the cut either, where TRL sorts each micro-batch by itself.

    Metrics are those of TRL's DPOTrainer: rewards/* and logps/* are unweighted means over the step's pairs, logits/* and
    mean_token_accuracy means over its chosen (rejected) completion tokens, entropy over both.
    """

    def __init__(self, config: DPOConfig, model: Any, reference: Reference | None) -> None:
        self.model = model
        self.reference = reference  # None: uniform
        self.head = head_spec(model)
        self.config = config
        self.losses = [(name, weight, loss_function(name, config)) for name, weight in config.losses]
        full = METRIC_OUTPUTS if config.metrics == "full" else ()
        self.outputs = ("logps", *full, *(("log_sum_sq_probs",) if config.use_weighting else ()))
        self.coupled = any(name in _COUPLED for name, _ in config.losses)
        self.quantiles: dict[int, tuple[float, ...]] = {}

    @property
    def prepares(self) -> bool:
        return self.coupled

    def prepare(self, samples: Sequence[Sample]) -> None:
        """The ranks of every pair among those of the step, for the losses that need them."""
        logps, ref_logps = self._score(samples)
        ratios = logps - ref_logps
        gaps = matched(logps[:, 0] - logps[:, 1], ref_logps[:, 0] - ref_logps[:, 1])
        columns = torch.stack([gaps, matched(ratios[:, 0], ratios[:, 1]), matched(ratios[:, 1], ratios[:, 0])], dim=1)
        self.quantiles = {sample.index: tuple(row) for sample, row in zip(samples, columns.tolist())}

    def denominators(self, samples: Sequence[Sample]) -> dict[str, float]:
        return count_pairs(samples)

    def loss(self, batch: PackedBatch, denominators: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        beta = self.config.beta
        ref_logps = self._ref_logps(batch)  # (2P,), chosen and rejected in turn
        policy = trunk(self.model, batch)
        quantiles = batch.weight.new_tensor([self.quantiles[i] for i in batch.index]) if self.coupled else None
        sums: Sums = {}

        def loss_of_slab(slab: PairSlab) -> Tensor:
            logps, ref = slab.logps, slab.of_sequences(ref_logps)
            four = (logps[0::2], logps[1::2], ref[0::2], ref[1::2])
            weight = slab.of_pairs(batch.weight)
            if self.config.use_weighting:
                weight = weight * likelihood_weights(slab)
            total = logps.new_zeros(())
            for name, factor, pair_loss_of in self.losses:
                if pair_loss_of is None:
                    total = total - factor * (slab.sums[0::2] * weight).sum() / max(1.0, denominators["chosen_tokens"])
                    continue
                known: dict[str, Any] = {}
                if name in PER_TOKEN:
                    known = {"chosen_lengths": slab.lengths[0::2], "rejected_lengths": slab.lengths[1::2]}
                elif quantiles is not None and name in _COUPLED:
                    gaps, rejected, chosen = slab.of_pairs(quantiles).unbind(1)
                    known = {"ref_quantiles": gaps} if name == "aot" else {"quantiles": (rejected, chosen)}
                total = total + factor * (pair_loss_of(*four, **known).loss * weight).sum() / denominators["samples"]
            add_sums(sums, pair_metrics(beta * (logps - ref), logps, slab))
            return total

        options: dict[str, Any] = {"outputs": self.outputs, "budget": self.config.logits_budget, "ld_alpha": self.config.ld_alpha}
        loss = pair_loss(self.head, policy.hidden, batch, loss_of_slab, **options)
        loss = add_aux_loss(loss, policy.aux_loss, batch, denominators, sums)
        sums["loss"] = loss.detach()
        return loss, sums

    def metrics(self, sums: dict[str, float], denominators: dict[str, float]) -> dict[str, float]:
        return mean_metrics(sums, denominators)

    def after_step(self, step: int) -> None:
        """TR-DPO: every so often the reference moves towards the policy."""
        if isinstance(self.reference, CopyReference) and self.config.sync_ref_model and step % self.config.ref_model_sync_steps == 0:
            self.reference.mix(self.model, self.config.ref_model_mixup_alpha)

    def state(self) -> dict[str, Tensor]:
        if not self.config.sync_ref_model or not isinstance(self.reference, CopyReference):
            return {}
        return dict(self.reference.model.named_parameters())

    def load_state(self, state: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.state().items():
                parameter.copy_(state[name])

    def _ref_logps(self, batch: PackedBatch) -> Tensor:
        return batch.weight.new_zeros(len(batch.live_bounds) - 1) if self.reference is None else self.reference.logps(batch)

    def _score(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
        """(P, 2) log-probs of the samples under the policy and the reference, without gradient."""
        config = self.config

        def score(packed: PackedBatch) -> Tensor:
            batch = packed.to(self.head.weight.device)
            scored = sequence_logps(self.model, batch, head=self.head, budget=config.logits_budget, ld_alpha=config.ld_alpha)
            return torch.stack([scored, self._ref_logps(batch)], dim=1)

        found = per_sample(samples, config.max_tokens, score, rows=[2] * len(samples), share=config.share_prompts)
        logps, ref_logps = torch.stack(found).unbind(2)
        return logps, ref_logps


def loss_function(name: str, config: DPOConfig) -> Any:
    """The pair loss `name` with its options of the run; None for "sft", which is no loss of a pair."""
    if name == "sft":
        return None
    options: dict[str, Any] = {"beta": config.beta}
    if name in _SMOOTHED:
        options["label_smoothing"] = config.label_smoothing
    if name == "discopop":
        options["tau"] = config.discopop_tau
    if name in _SCORED:
        alpha = {"alpha": config.f_alpha_divergence_coef} if config.f_divergence_type == "alpha_divergence" else {}
        options["score"] = partial(SCORES[config.f_divergence_type], **alpha)
    return partial(PREFERENCE_LOSSES[name], **options)
