"""Group relative policy optimisation: answers to a prompt are compared with each other, and the better ones become more likely."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_type_hints

import torch
from torch import Tensor, nn

from fastalign.advantages import group_relative
from fastalign.data.prompts import Prompts
from fastalign.losses import fused_triton
from fastalign.losses.aggregate import fixed_length, sequence_mean, token_mean
from fastalign.losses.policy import KL_ESTIMATES, POLICY_LOSSES, PolicyLoss, PolicyOutput, cispo, options_of, policy_loss, ppo_clip, vespo
from fastalign.losses.weights import importance_weights, off_policy_mask, sampling_drift, top_entropy_mask
from fastalign.models.reference import copied
from fastalign.models.trunk import trunk
from fastalign.objectives import own
from fastalign.objectives.base import Dataset
from fastalign.objectives.online import OnlineConfig
from fastalign.objectives.pairs import add_sums
from fastalign.objectives.rollouts import Buffered, Rollout, Rollouts
from fastalign.segments import segments_in
from fastalign.types import HeadOutput, PackedBatch, Sample, on_device

CORRECTIONS = ("auto", "none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


@dataclass
class GRPOConfig(OnlineConfig):
    """GRPO and its relatives: makes the answers more likely that are rewarded above the others to the same prompt."""

    name: ClassVar[str] = "grpo"
    penalty_in_loss: ClassVar[bool] = True

    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo", "gspo"] | str = "dapo"
    """What is clipped and what is averaged; dapo: clipped ratios of tokens, every token of the step weighs the same.
    FILE.py:FUNCTION: a loss of your own."""
    importance_sampling_level: Literal["token", "sequence"] | None = None
    """Whose ratio to the policy that answered a token has; null: that of the loss type."""
    epsilon: float = 0.2
    """A ratio below 1 - epsilon is clipped."""
    epsilon_high: float | None = None
    """A ratio above 1 + epsilon_high is clipped (null: epsilon); cispo: the largest weight (null: 5)."""
    delta: float | None = None
    """Bound of the ratio for answers with a negative advantage; null: none."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Whose standard deviation the advantages are divided by."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimate of the KL divergence from the reference."""
    use_bias_correction_kl: bool = True
    """Multiply it by the importance ratio, as TRL does."""
    off_policy_mask_threshold: float | None = None
    """Answers with a negative advantage that have become less likely by more than this many nats per token are not learned from."""
    importance_sampling_correction: Literal["auto", "none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = "auto"
    """Weight of the policy term by the trainer's probability over that of the engine which drew, of a token or of its whole answer; out of
    bounds it is clamped (truncate) or 0 (mask). auto: token_truncate with top_k, top_p or min_p, else sequence_mask (vespo: token_truncate)
    with engine vllm_server, else none."""
    importance_sampling_clip_max: float | None = 3.0
    """Upper bound of this weight; null: none."""
    importance_sampling_clip_min: float | None = None
    """Lower bound of it; null: none."""
    top_entropy_quantile: float = 1.0
    """The policy term is that of this share of the step's tokens, those whose distribution has the highest entropy; 1: of all."""
    entropy_coef: float = 0.0
    """Bonus for the entropy of the answers' tokens."""
    loss_options: dict[str, float] = field(default_factory=dict)
    """Further options of the loss by its own names, such as {temperature_neg: 1.05} of sapo."""

    def validate(self) -> None:
        super().validate()
        kind = get_type_hints(type(self))["loss_type"]
        if not (own.is_own(self.loss_type) and str in get_args(kind)):
            self._require_choice("loss_type", own.choices(kind))
        self._require_choice("scale_rewards", ("group", "batch", "none"))
        self._require_choice("kl_estimator", get_args(get_type_hints(type(self))["kl_estimator"]))
        if self.importance_sampling_level is not None:
            self._require_choice("importance_sampling_level", ("token", "sequence"))
        self._require("num_generations", self.num_generations >= 2 or not self.compares, "at least 2: answers are compared with each other")
        self._require("epsilon", 0 < self.epsilon <= 1, "in (0, 1]")
        for option in ("epsilon_high", "delta"):
            self._require(option, getattr(self, option) is None or getattr(self, option) > 0, "positive, or null")
        threshold = self.off_policy_mask_threshold
        self._require("off_policy_mask_threshold", threshold is None or threshold > 0, "positive, or null")
        self._require_use("off_policy_mask_threshold", self.steps_per_draw > 1, "steps_per_generation or num_iterations above 1")
        self._require("top_entropy_quantile", 0 < self.top_entropy_quantile <= 1, "in (0, 1]")
        self._require_correction()
        self._require("entropy_coef", 0 <= self.entropy_coef < float("inf"), "0 or more and finite")
        token_loss = self.policy_loss.token_loss
        takes = own.takes_of(token_loss)
        for option, bound in (("epsilon", "clip_low"), ("delta", "delta")):
            self._require_use(option, bound in takes, "a loss type that clips ratios")
        self._require_use("epsilon_high", "clip_high" in takes, "a loss type that bounds ratios")
        self._require_use("importance_sampling_level", "log_ratio" in takes or token_loss is vespo, "a loss that takes log_ratio")
        self._require_penalty()
        try:
            options_of(token_loss, loss_options(self))
        except TypeError as error:
            self._require("loss_options", False, f"options of {self.loss_type} ({error})")

    def _require_penalty(self) -> None:
        for option in ("kl_estimator", "use_bias_correction_kl"):
            self._require_use(option, self.beta > 0 and self.penalty_in_loss, "a KL penalty in the loss (grpo with beta above 0)")

    def _require_correction(self) -> None:
        self._require_choice("importance_sampling_correction", CORRECTIONS)
        highest, lowest = self.importance_sampling_clip_max, self.importance_sampling_clip_min
        self._require("importance_sampling_clip_max", highest is None or 0 < highest < float("inf"), "positive and finite, or null")
        below = float("inf") if highest is None else highest
        self._require("importance_sampling_clip_min", lowest is None or 0 <= lowest < below, "0 or more and less than the maximum, or null")
        for option in ("importance_sampling_clip_max", "importance_sampling_clip_min"):
            self._require_use(option, self.correction != "none", "an importance_sampling_correction, top_k, top_p, min_p or vllm_server")
        if self.loss_type == "vespo" and self.correction.startswith("sequence"):
            self._require("importance_sampling_correction", False, "one of tokens for vespo, which multiplies them to its answer's weight")

    @property
    def compares(self) -> bool:
        """Whether the answers to a prompt are compared with each other."""
        return True

    @property
    def correction(self) -> str:
        """`importance_sampling_correction`, auto decided."""
        if self.importance_sampling_correction != "auto":
            return self.importance_sampling_correction
        if self.truncated_sampling:
            return "token_truncate"
        if self.engine == "transformers":
            return "none"
        return "token_truncate" if self.loss_type == "vespo" else "sequence_mask"

    @property
    def policy_loss(self) -> PolicyLoss:
        """What `loss_type` names."""
        if own.is_own(self.loss_type):
            return own.policy_loss(self.loss_type, _bounds(self), self.loss_options)[0]
        return POLICY_LOSSES[self.loss_type]

    def named_code(self) -> dict[str, str | list[str]]:
        return super().named_code() | ({"loss_type": self.loss_type} if own.is_own(self.loss_type) else {})

    def sources(self) -> dict[str, str]:
        return own.digests(self.loss_type)

    def objective(self, model: Any, data: Dataset, folder: Path) -> GRPO:
        assert isinstance(data, Prompts)
        return GRPO(self, model, data)


def loss_options(config: GRPOConfig) -> dict[str, Any]:
    """Of the token loss, from TRL's names and `loss_options`."""
    if own.is_own(config.loss_type):
        return own.policy_loss(config.loss_type, _bounds(config), config.loss_options)[1]
    token_loss = POLICY_LOSSES[config.loss_type].token_loss
    options: dict[str, Any] = {}
    if token_loss is ppo_clip:
        options = _bounds(config)
    elif token_loss is cispo and config.epsilon_high is not None:
        options = {"clip_high": config.epsilon_high}
    return options | config.loss_options


def _bounds(config: GRPOConfig) -> dict[str, Any]:
    return {"clip_low": config.epsilon, "clip_high": config.epsilon_high or config.epsilon, "delta": config.delta}


class GRPO(Buffered):
    """loss = aggregate over the step's answers of (policy loss + beta KL) - entropy_coef * mean entropy; see losses.policy.

    An answer whose advantage is 0 has no gradient where there is neither penalty nor bonus: it is left out of the forward, too,
    but not of the counts. Counts are those of the optimizer step, where TRL counts tokens over a whole generation, which differs
    for steps_per_generation > 1. The weight of a prompt multiplies its advantages. Metrics are TRL's: of rewards and lengths over
    the generation, of ratios, KL and entropy over the tokens that were trained on.
    """

    config: GRPOConfig

    def __init__(self, config: GRPOConfig, model: Any, data: Prompts) -> None:
        self.config, self.model = config, model
        self.corrected = config.correction != "none"
        needs_logps = config.steps_per_draw > 1 or self.needs_logps(config)
        self.rollout = Rollout(config, model, data, needs_logps=needs_logps, needs_sampling_logps=self.corrected)
        self.head = self.rollout.head
        self.spec = config.policy_loss
        self.level = config.importance_sampling_level
        self.kl_coef, self.kl = config.beta, config.kl_estimator
        self.entropy_coef, self.options = config.entropy_coef, loss_options(config)
        self.outputs = ("logps", "entropy") if config.metrics == "full" or self.entropy_coef else ("logps",)
        self.high_entropy: Tensor | None = None  # (T,) bool, the tokens of this step that have a policy term; None: all

    @staticmethod
    def needs_logps(config: GRPOConfig) -> bool:
        """Whether advantages are made from log-probs."""
        return False

    def advantages(self, rollouts: Rollouts) -> Tensor:
        """(B,), or (T,) where tokens have their own; before the weights of the prompts."""
        return group_relative(self.rollout.total(rollouts.rewards), self.rollout.groups(rollouts), scale=self.config.scale_rewards)

    def penalties(self, rollouts: Rollouts) -> Tensor:
        """(T,) estimates of the KL divergence from the reference, where the reward has the penalty and not the loss."""
        return KL_ESTIMATES["k1"](rollouts.logps, rollouts.ref_logps)

    def samples(self, step: int, prompts: Sequence[Sample]) -> Sequence[Sample]:
        config = self.config
        if (generation := self._begin(step)) is not None:
            self.rollouts = self.rollout.roll(prompts, (config.seed, 1 + generation), refill=config.refill)
            weight = torch.tensor([self.rollout.prompt_of[index].weight for index in self.rollouts.prompts.tolist()])
            self.rollouts.advantages = self.rollouts.weighted(self.advantages(self.rollouts), weight)
        assert self.rollouts is not None
        self.answers = self._answers_of(step, len(prompts))
        samples, rollouts = self.rollout.samples(self.rollouts), self.rollouts
        trained = [i for i in self.answers if self._counts(rollouts, i)]
        if not (self.kl_coef or self.entropy_coef):
            learned = rollouts.have_advantage
            trained = [i for i in trained if learned[i]]
        return [samples[i] for i in trained or self.answers[:1]]

    def _counts(self, rollouts: Rollouts, answer: int) -> bool:
        return bool(rollouts.finished[answer]) or not self.config.mask_truncated_completions

    @property
    def copies(self) -> list[nn.Module]:
        return copied(self.rollout.reference)

    def denominators(self, samples: Sequence[Sample]) -> dict[str, float]:
        assert self.rollouts is not None
        counted = [i for i in self.answers if self._counts(self.rollouts, i)]
        tokens = float(sum(int(self.rollouts.lengths[i]) for i in counted))
        count = tokens if self.spec.aggregate is token_mean else len(counted if self.spec.aggregate is sequence_mean else self.answers)
        return {"count": max(1.0, float(count)), "tokens": max(1.0, tokens)}

    @property
    def prepares(self) -> bool:
        return self.config.top_entropy_quantile < 1

    def prepare(self, samples: Sequence[Sample], max_tokens: int | None = None) -> None:
        """Which tokens have a policy term: a quantile is known only when the entropies of all of the step's answers are.

        A mask rather than a bound is kept, so that a token at the bound is on one side of it, however `loss` is cut.
        """
        assert self.rollouts is not None
        everything, bounds = self.rollout.samples(self.rollouts), self.rollouts.bounds
        counted = [i for i in self.answers if self._counts(self.rollouts, i)]
        high = torch.zeros(bounds[-1], dtype=torch.bool)
        if counted:
            places = self.rollouts.of_tokens(torch.arange(bounds[-1]), counted)
            entropy = self.rollout.entropies([everything[i] for i in counted], max_tokens)
            high[places] = top_entropy_mask(entropy, quantile=self.config.top_entropy_quantile)
        self.high_entropy = high

    def loss(self, batch: PackedBatch, denominators: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        assert self.rollouts is not None
        rollouts, config, device = self.rollouts, self.config, batch.live_target.device
        found = trunk(self.model, batch)
        advantages = on_device(rollouts.of_tokens(rollouts.token_advantages, batch.index), device)
        stored = (rollouts.logps, rollouts.ref_logps, rollouts.sampling_logps)
        old, ref, drawn = (on_device(rollouts.of_tokens(x, batch.index), device) if x.numel() else None for x in stored)
        if config.steps_per_draw == 1:
            old = None  # the policy is still the one that answered
        mask = self._mask(rollouts, batch)
        high, bonus_tokens = None, denominators["tokens"]
        if self.high_entropy is not None:
            high = on_device(rollouts.of_tokens(self.high_entropy, batch.index), device)
            bonus_tokens = max(1.0, float(self.high_entropy.sum())) if math.isfinite(bonus_tokens) else bonus_tokens
        sums: dict[str, Tensor] = {}

        def loss_of_slab(out: HeadOutput, rows: slice) -> Tensor:
            first, last = segments_in(batch.live_bounds, rows)
            cu_seqlens = batch.live_cu_seqlens[first : last + 1] - rows.start
            counted, keep, weights = None if mask is None else mask[rows], None, None
            before = out.logps.detach() if old is None else old[rows]
            if config.off_policy_mask_threshold is not None:
                since = before if drawn is None else drawn[rows]
                keep = off_policy_mask(out.logps, since, advantages[rows], cu_seqlens, counted, threshold=config.off_policy_mask_threshold)
            if high is not None:
                keep = high[rows] if keep is None else keep & high[rows]
            if drawn is not None:
                weights = self._importance_weights(before, drawn[rows], cu_seqlens, counted, sums)
            fused = config.loss_type in POLICY_LOSSES and fused_triton.available(out.logps)
            result: PolicyOutput = (fused_triton.policy_loss if fused else policy_loss)(
                config.loss_type if fused else self.spec,  # type: ignore[arg-type]
                out.logps,
                before,
                advantages[rows],
                cu_seqlens,
                mask=counted,
                keep=keep,
                importance_weights=weights,
                denominator=denominators["count"],
                level=self.level,
                ref_logps=ref[rows] if ref is not None and self.kl_coef else None,
                kl_coef=self.kl_coef,
                kl=self.kl,
                kl_correction=config.use_bias_correction_kl,
                entropy=out.entropy if self.entropy_coef else None,
                entropy_coef=self.entropy_coef / bonus_tokens,
                entropy_mask=high[rows] if high is not None and self.entropy_coef else None,
                length=config.max_completion_length if self.spec.aggregate is fixed_length else None,
                **self.options,
            )
            part = {"tokens": result.tokens, "clipped_low": result.clipped_low, "clipped_high": result.clipped_high, "kl": result.kl}
            if out.entropy is not None:
                part["entropy"] = out.entropy.detach()
            add_sums(sums, {name: value.sum() for name, value in part.items()})
            return result.loss

        loss = self.head.loss(
            found.hidden.index_select(0, batch.live),
            batch.live_target,
            loss_of_slab,
            groups=batch.live_bounds,
            outputs=self.outputs,
            differentiable=("logps", "entropy") if self.entropy_coef else ("logps",),
            temperature=config.temperature,
            live_rows=batch.live_target.shape[0],
            budget=config.logits_budget,
        )
        if found.aux_loss is not None:
            share = batch.live_target.shape[0] / denominators["tokens"]
            loss, sums["aux_loss"] = loss + share * found.aux_loss, share * found.aux_loss.detach()
        sums["loss"] = loss.detach()
        return loss, sums

    def _importance_weights(self, old: Tensor, drawn: Tensor, cu_seqlens: Tensor, mask: Tensor | None, sums: dict[str, Tensor]) -> Tensor:
        """(L,) weights of a slab's tokens; what they come from is added to `sums`."""
        config, mode = self.config, self.config.correction
        for name, value in sampling_drift(old, drawn, cu_seqlens, mask, mode=mode).items():
            if name in sums:
                value = {"min": torch.minimum, "max": torch.maximum}.get(name[:3], torch.add)(sums[name], value)
            sums[name] = value
        bounds = {"clip_min": config.importance_sampling_clip_min, "clip_max": config.importance_sampling_clip_max}
        return importance_weights(old, drawn, cu_seqlens, mask, mode=mode, **bounds)  # type: ignore[arg-type]

    def counted(self, rollouts: Rollouts) -> Tensor:
        """(T,) bool, tokens of answers that count."""
        return torch.tensor([self._counts(rollouts, i) for i in range(len(rollouts.lengths))]).repeat_interleave(rollouts.lengths)

    def _mask(self, rollouts: Rollouts, batch: PackedBatch) -> Tensor | None:
        """(L,) bool, scored tokens of answers that count; None where all do."""
        counts = [self._counts(rollouts, i) for i in batch.index]
        if all(counts):
            return None
        lengths = torch.tensor([stop - start for start, stop in pairwise(batch.live_bounds)])
        return on_device(torch.tensor(counts).repeat_interleave(lengths), batch.live.device)

    def metrics(self, sums: dict[str, float], denominators: dict[str, float]) -> dict[str, float]:
        assert self.rollouts is not None
        tokens = max(1.0, sums["tokens"])
        low, high = sums["clipped_low"] / tokens, sums["clipped_high"] / tokens
        metrics = {"loss": sums["loss"], **self.rollout.metrics(self.rollouts)}
        metrics |= {"clip_ratio/low_mean": low, "clip_ratio/high_mean": high, "clip_ratio/region_mean": low + high}
        if self.rollouts.ref_logps.numel():
            metrics["kl"] = sums["kl"] / tokens if self.kl_coef else self._mean_penalty(self.rollouts)
        if "entropy" in sums:
            metrics["entropy"] = sums["entropy"] / tokens
        if sums.get("sampling_tokens"):
            metrics |= {
                "sampling/sampling_logp_difference/mean": sums["sampling_difference"] / sums["sampling_tokens"],
                "sampling/sampling_logp_difference/max": sums["max_sampling_difference"],
                "sampling/importance_sampling_ratio/min": sums["min_sampling_ratio"],
                "sampling/importance_sampling_ratio/mean": sums["sampling_ratio"] / sums["sampling_ratios"],
                "sampling/importance_sampling_ratio/max": sums["max_sampling_ratio"],
            }
        return metrics | ({"aux_loss": sums["aux_loss"]} if "aux_loss" in sums else {})

    def _mean_penalty(self, rollouts: Rollouts) -> float:
        """Over the tokens of the generation that count."""
        counted = self.counted(rollouts)
        return float(self.penalties(rollouts)[counted].sum() / counted.sum().clamp(min=1))
