"""Direct preference optimisation and its family: the losses that score a pair by its log-ratios to a reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fastalign.data.preferences import load_preferences
from fastalign.data.samples import Samples
from fastalign.losses import PREFERENCE_LOSSES
from fastalign.losses.divergence import SCORES
from fastalign.losses.preference import matched
from fastalign.models.heads import head_spec
from fastalign.models.reference import CopyReference, Reference, build_reference, copied, sequence_logps
from fastalign.models.trunk import trunk
from fastalign.objectives import own
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
    aot_unpaired, discopop, sigmoid_norm, sft (likelihood of the chosen answers), or FILE.py:FUNCTION, a loss of your own; or
    several, to be added up."""
    loss_weights: list[float] | None = None
    """Factors of the losses in `loss_type`; null: 1 each."""
    loss_options: dict[str, float] = field(default_factory=dict)
    """Further options of a loss of your own, by its own names."""
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
    reference: Literal["auto", "adapter", "cache", "copy", "stream"] = "auto"
    """adapter: the model with its adapter off; cache: log-probs computed once and kept on disk; copy: a second model; stream: a
    second model in host memory, whose layers come to the device one by one. auto: adapter when training LoRA, else cache; copy
    with sync_ref_model."""
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
        self._require(
            "loss_type",
            bool(names) and all(name in known or own.is_own(name) for name in names),
            f"one or more of {', '.join(known)}, or FILE.py:FUNCTION",
        )
        self._require(
            "loss_weights", self.loss_weights is None or len(self.loss_weights) == len(names), f"{len(names)} numbers, as loss_type"
        )
        self._require("beta", self.beta > 0, "positive")
        self._require("discopop_tau", self.discopop_tau > 0, "positive")
        self._require("label_smoothing", 0 <= self.label_smoothing < 0.5, "in [0, 0.5)")
        owns = [own_pair_loss(name, self) for name in names if own.is_own(name)]
        taken = {option for loss in owns for option in loss.takes}
        if self.loss_options and not owns:
            self._require("loss_options", False, "left out: they are those of a loss of your own, FILE.py:FUNCTION")
        if self.label_smoothing and not set(names) & set(_SMOOTHED) and "label_smoothing" not in taken:
            self._require("label_smoothing", False, f"0 with loss_type={self.loss_type}: only {', '.join(_SMOOTHED)} have a smoothed form")
        if "exo_pair" in names and not self.label_smoothing:
            self._require("label_smoothing", False, "more than 0 with exo_pair, whose loss is infinite at 0; set --label_smoothing 0.001")
        self._require_choice("f_divergence_type", tuple(SCORES))
        scored = {*_SCORED, "sft", *(loss.name for loss in owns if "score" in loss.takes)}
        if self.f_divergence_type != "reverse_kl" and (wrong := set(names) - scored):
            self._require("f_divergence_type", False, f"reverse_kl with {', '.join(sorted(wrong))}; others go with {', '.join(_SCORED)}")
        self._require_use("f_alpha_divergence_coef", self.f_divergence_type == "alpha_divergence", "f_divergence_type=alpha_divergence")
        self._require_use("discopop_tau", "discopop" in names, "loss_type=discopop")
        self._require_use("ref_model_mixup_alpha", self.sync_ref_model, "sync_ref_model")
        self._require_use("ref_model_sync_steps", self.sync_ref_model, "sync_ref_model")
        self._require_use("reference", not self.reference_free, "a reference, not with reference_free")
        self._require("ld_alpha", self.ld_alpha is None or 0 <= self.ld_alpha <= 1, "in [0, 1], or null")
        self._require("rpo_alpha", self.rpo_alpha is None or self.rpo_alpha >= 0, "0 or more, or null")
        coupling = {*_COUPLED, *(loss.name for loss in owns if loss.couples == "step")}
        if self.use_weighting and (coupled := set(names) & coupling):
            self._require("use_weighting", False, f"false with {', '.join(sorted(coupled))}, which compares a pair with others than itself")
        self._require_choice("reference", ("auto", "adapter", "cache", "copy", "stream"))
        if self.reference == "adapter" and not self.adapts:
            self._require("reference", False, "cache, copy or auto when all weights are trained (lora.r 0)")
        self._require("ref_model_mixup_alpha", 0 < self.ref_model_mixup_alpha <= 1, "in (0, 1]")
        self._require("ref_model_sync_steps", self.ref_model_sync_steps >= 1, "at least 1")
        if self.sync_ref_model:
            self._require("sync_ref_model", not self.adapts, "false with an adapter: the reference has no weights of its own to move")
            self._require("sync_ref_model", not self.reference_free, "false with reference_free")
            self._require(
                "reference",
                self.reference in ("auto", "copy", "stream"),
                "auto, copy or stream with sync_ref_model: another one cannot follow",
            )

    def named_code(self) -> dict[str, str | list[str]]:
        names = any(own.is_own(name) for name, _ in self.losses)
        return super().named_code() | ({"loss_type": self.loss_type} if names else {})

    def sources(self) -> dict[str, str]:
        return own.digests(*(name for name, _ in self.losses))

    def load_data(self, tokenizer: Any, vocab_size: int | None) -> Samples:
        return load_preferences(self.data, tokenizer, vocab_size=vocab_size)

    def objective(self, model: Any, data: Dataset, folder: Path) -> DPO:
        if self.reference_free:
            return DPO(self, model, None)
        if self.sync_ref_model and self.reference == "auto":
            return DPO(self, model, CopyReference(model, budget=self.logits_budget, ld_alpha=self.ld_alpha))
        return DPO(self, model, build_reference(model, self, data, folder, ld_alpha=self.ld_alpha))


class DPO:
    """loss = sum_i w_i sum_k weight_k loss_ik / (pairs of the step), w_i the pair's weight in the data (1 where it has none), times
    WPO's where that is used. The loss "sft" is sum_i w_i NLL_i / (chosen tokens of the step); TRL 1.16 fails on it with WPO.

    aot and aot_unpaired couple all pairs of the step by their ranks, for which the policy scores the step once more beforehand,
    without gradient; so they do not depend on the cut either, where TRL sorts each micro-batch by itself. So does a loss of the
    user's own that declares it: its derivatives by the log-probs are then known beforehand, and a micro-batch multiplies by them.

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
        self.ranked = any(name in _COUPLED for name, _ in config.losses)
        self.joint = [(factor, loss) for _, factor, loss in self.losses if isinstance(loss, own.OwnPairLoss) and loss.couples == "step"]
        self.coupled = self.ranked or bool(self.joint)
        self.quantiles: dict[int, tuple[float, ...]] = {}
        self.shares: dict[int, tuple[float, ...]] = {}  # of a pair in the losses that couple the step, and its derivatives by two log-probs

    @property
    def prepares(self) -> bool:
        return self.coupled

    def prepare(self, samples: Sequence[Sample], max_tokens: int | None = None) -> None:
        """What the losses that couple the step know of every pair: its ranks among the others, or its share and derivatives."""
        logps, ref_logps = self._score(samples, max_tokens or self.config.token_limit)
        if self.joint:
            self.shares = {sample.index: tuple(row) for sample, row in zip(samples, self._joint_shares(samples, logps, ref_logps).tolist())}
        ratios = logps - ref_logps
        gaps = matched(logps[:, 0] - logps[:, 1], ref_logps[:, 0] - ref_logps[:, 1])
        columns = torch.stack([gaps, matched(ratios[:, 0], ratios[:, 1]), matched(ratios[:, 1], ratios[:, 0])], dim=1)
        self.quantiles = {sample.index: tuple(row) for sample, row in zip(samples, columns.tolist())}

    @property
    def copies(self) -> list[nn.Module]:
        return copied(self.reference)

    def denominators(self, samples: Sequence[Sample]) -> dict[str, float]:
        return count_pairs(samples)

    def loss(self, batch: PackedBatch, denominators: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        beta = self.config.beta
        ref_logps = self._ref_logps(batch)  # (2P,), chosen and rejected in turn
        policy = trunk(self.model, batch)
        quantiles = batch.weight.new_tensor([self.quantiles[i] for i in batch.index]) if self.ranked else None
        shares = batch.weight.new_tensor([self.shares[i] for i in batch.index]) if self.joint else None
        sums: Sums = {}

        def loss_of_slab(slab: PairSlab) -> Tensor:
            logps, ref = slab.logps, slab.of_sequences(ref_logps)
            four = (logps[0::2], logps[1::2], ref[0::2], ref[1::2])
            weight = slab.of_pairs(batch.weight)
            if self.config.use_weighting:
                weight = weight * likelihood_weights(slab)
            total = logps.new_zeros(())
            if shares is not None:
                known_before, slopes = slab.of_pairs(shares)[:, 0], slab.of_pairs(shares)[:, 1:]
                moved = (slopes * (logps - logps.detach()).view(-1, 2)).sum(1)  # 0, with the gradient
                total = total + (known_before + moved).sum()
            for name, factor, pair_loss_of in self.losses:
                if isinstance(pair_loss_of, own.OwnPairLoss) and pair_loss_of.couples == "step":
                    continue
                if pair_loss_of is None:
                    total = total - factor * (slab.sums[0::2] * weight).sum() / max(1.0, denominators["chosen_tokens"])
                    continue
                known: dict[str, Any] = {}
                if name in PER_TOKEN or (isinstance(pair_loss_of, own.OwnPairLoss) and pair_loss_of.takes_lengths):
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

    def _joint_shares(self, samples: Sequence[Sample], logps: Tensor, ref_logps: Tensor) -> Tensor:
        """(P, 3) of every pair of the step: its share of the losses that couple them all, and their derivatives by its two log-probs."""
        weight = logps.new_tensor([sample.weight for sample in samples])
        lengths = dict(zip(own.LENGTHS, torch.tensor([sample.scored for sample in samples], device=logps.device).unbind(1)))
        with torch.enable_grad():
            leaves = logps.clone().requires_grad_()
            shares = torch.zeros_like(weight)
            for factor, loss in self.joint:
                known = lengths if loss.takes_lengths else {}
                found = loss(leaves[:, 0], leaves[:, 1], ref_logps[:, 0], ref_logps[:, 1], **known).loss
                shares = shares + factor * found * weight / len(samples)
            (slopes,) = torch.autograd.grad(shares.sum(), leaves)
        return torch.cat([shares.detach()[:, None], slopes], dim=1)

    def _score(self, samples: Sequence[Sample], max_tokens: int) -> tuple[Tensor, Tensor]:
        """(P, 2) log-probs of the samples under the policy and the reference, without gradient."""
        config = self.config

        def score(packed: PackedBatch) -> Tensor:
            batch = packed.to(self.head.weight.device)
            scored = sequence_logps(self.model, batch, head=self.head, budget=config.logits_budget, ld_alpha=config.ld_alpha)
            return torch.stack([scored, self._ref_logps(batch)], dim=1)

        found = per_sample(samples, max_tokens, score, rows=[2] * len(samples), share=config.share_prompts)
        logps, ref_logps = torch.stack(found).unbind(2)
        return logps, ref_logps


def own_pair_loss(name: str, config: DPOConfig) -> own.OwnPairLoss:
    """The loss of the user's own `name`, with the options of the run that it takes."""
    return own.pair_loss(
        name, {"beta": config.beta, "label_smoothing": config.label_smoothing, "score": _score_of(config)}, config.loss_options
    )


def _score_of(config: DPOConfig) -> Any:
    alpha = {"alpha": config.f_alpha_divergence_coef} if config.f_divergence_type == "alpha_divergence" else {}
    return partial(SCORES[config.f_divergence_type], **alpha)


def loss_function(name: str, config: DPOConfig) -> Any:
    """The pair loss `name` with its options of the run; None for "sft", which is no loss of a pair."""
    if name == "sft":
        return None
    if own.is_own(name):
        return own_pair_loss(name, config)
    options: dict[str, Any] = {"beta": config.beta}
    if name in _SMOOTHED:
        options["label_smoothing"] = config.label_smoothing
    if name == "discopop":
        options["tau"] = config.discopop_tau
    if name in _SCORED:
        options["score"] = _score_of(config)
    return partial(PREFERENCE_LOSSES[name], **options)
