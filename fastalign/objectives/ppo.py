"""Proximal policy optimisation: every token of an answer is compared with what a critic expected of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastalign.advantages import gae, whiten
from fastalign.data.prompts import Prompts
from fastalign.losses.kl import bounded_exp
from fastalign.losses.policy import KL_ESTIMATES, ppo_clip
from fastalign.losses.value import clipped_value_loss
from fastalign.models.adapters import critic_adapter
from fastalign.models.critic import add_critic, value_head
from fastalign.models.reference import copied, token_logps
from fastalign.models.trunk import evaluation, trunk
from fastalign.objectives.base import Dataset
from fastalign.objectives.online import OnlineConfig
from fastalign.objectives.pairs import add_sums
from fastalign.objectives.rollouts import Buffered, Rollout, Rollouts
from fastalign.segments import segment_expand, segment_sum
from fastalign.types import HeadOutput, PackedBatch, Sample, on_device


@dataclass
class PPOConfig(OnlineConfig):
    """PPO: makes the tokens more likely that turned out better than a critic expected, which is trained along."""

    name: ClassVar[str] = "ppo"

    critic: Literal["shared", "adapter"] = "shared"
    """What the value head reads: the policy's trunk, or the frozen base model under a LoRA adapter of the critic's own."""
    num_generations: int = 1
    """Answers to each prompt."""
    num_iterations: int = 4
    """Times that each of these steps is made (TRL's num_ppo_epochs)."""
    learning_rate: float = 3e-6
    """Peak of the schedule. The default is for full fine-tuning; an adapter wants about ten times more."""
    value_learning_rate: float | None = None
    """Peak for the weights that only the critic has; null: learning_rate."""
    beta: float = 0.05
    """Weight of the KL penalty in the reward of every token (TRL's kl_coef); 0: there is no reference."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimate of the KL divergence from the reference."""
    missing_eos_penalty: float | None = None
    """Taken from the score of answers that reached max_completion_length; null: nothing."""
    whiten_rewards: bool = False
    """Scale the rewards of a generation's tokens to variance 1."""
    gamma: float = 1.0
    """Discount of later rewards, per token."""
    lam: float = 0.95
    """Of GAE: how little the critic is trusted; 1: not at all, 0: for all but the next token."""
    cliprange: float = 0.2
    """A ratio to the policy that answered is clipped when it leaves 1 +- cliprange."""
    cliprange_value: float | None = 0.2
    """A value is clipped when it leaves the one at the time of the answer +- cliprange_value, in units of the reward; null: never."""
    vf_coef: float = 0.1
    """Weight of the critic's loss."""

    def validate(self) -> None:
        super().validate()
        self._require_choice("critic", ("shared", "adapter"))
        self._require_choice("kl_estimator", tuple(KL_ESTIMATES))
        if self.critic == "adapter":
            self._require("critic", self.adapts, "shared when all weights are trained (lora.r 0)")
        self._require("cliprange", 0 < self.cliprange <= 1, "in (0, 1]")
        self._require("vf_coef", 0 < self.vf_coef < float("inf"), "positive and finite: a critic that is not trained expects nothing")
        for option in ("cliprange_value", "missing_eos_penalty", "value_learning_rate"):
            value = getattr(self, option)
            self._require(option, value is None or 0 < value < float("inf"), "positive and finite, or null")
        for option in ("gamma", "lam"):
            self._require(option, 0 <= getattr(self, option) <= 1, "in [0, 1]")
        self._require_use("kl_estimator", self.beta > 0, "a KL penalty (beta above 0)")
        self._require_use("missing_eos_penalty", not self.mask_truncated_completions, "truncated answers that are trained on")
        self._require_use("value_learning_rate", self.learning_rate > 0, "a learning_rate above 0")
        for option in ("top_k", "top_p", "min_p"):
            self._require_use(option, False, "grpo and rloo, which weigh what another distribution drew")
        self._require_use("refill", False, "grpo and rloo: a critic learns from answers that were all rewarded alike, too")

    @property
    def unpredicted(self) -> str | None:
        return "critic adapter runs the model a second time" if self.critic == "adapter" else super().unpredicted

    def load_model(self, tokenizer: Any) -> Any:
        factor = self.value_learning_rate / self.learning_rate if self.value_learning_rate is not None else 1.0
        return add_critic(super().load_model(tokenizer), adapter=self.critic == "adapter", rate_factor=factor)

    def objective(self, model: Any, data: Dataset, folder: Path) -> PPO:
        assert isinstance(data, Prompts)
        return PPO(self, model, data)


class TokenRewards(NamedTuple):
    """What the tokens of B answers earn, T tokens in all, and whether an answer counts."""

    rewards: Tensor  # (T,)
    kl: Tensor  # (T,) estimate of the divergence from the reference; 0 without one
    scores: Tensor  # (B,) of the reward functions, less the penalty for a missing end; NaN where they had nothing to say
    counts: Tensor  # (B,) bool, answers that are trained on


def token_rewards(config: PPOConfig, rollouts: Rollouts, totals: Tensor) -> TokenRewards:
    """Stiennon 2020, arXiv:2009.01325: -beta KL_t for every token, and the score of the answer, `totals` (B,), for its last one.

    TRL 1.12 pays the score one token later, after the end-of-sequence token, unless the answer fills its row of the batch: there
    the end has a value of its own and another step of GAE. Here the answer is over with its last token.
    """
    scores = totals
    if config.missing_eos_penalty is not None:
        scores = scores - config.missing_eos_penalty * (~rollouts.finished)
    counts = ~scores.isnan()
    if config.mask_truncated_completions:
        counts = counts & rollouts.finished
    kl = torch.zeros_like(rollouts.logps)
    if config.beta:
        kl = KL_ESTIMATES[config.kl_estimator](rollouts.logps, rollouts.ref_logps)
    rewards = -config.beta * kl
    rewards[rollouts.lengths.cumsum(0) - 1] += scores.nan_to_num(0.0)
    if config.whiten_rewards:
        rewards = whiten(rewards, rollouts.token_mask(counts), shift_mean=False)
    return TokenRewards(rewards, kl, scores, counts)


class PPO(Buffered):
    """loss = mean over the step's tokens of (clipped policy loss + vf_coef * clipped value loss). Schulman 2017, arXiv:1707.06347 eq. 9.

    As in TRL 1.12's PPOTrainer, but for where the score is paid (see `token_rewards`), and for means that are those of the
    optimizer step, where TRL's are of a micro-batch. Values and log-probs of the policy that answered are computed once a
    generation. The weight of a prompt multiplies both losses of its answers. Metrics have TRL's names: objective/* of the
    generation, the others of the tokens that were trained on.
    """

    config: PPOConfig

    def __init__(self, config: PPOConfig, model: Any, data: Prompts) -> None:
        self.config, self.model = config, model
        self.rollout = Rollout(config, model, data, needs_logps=False)  # they come with the values
        self.head, self.value = self.rollout.head, value_head(model)
        self.outputs = ("logps", "entropy") if config.metrics == "full" else ("logps",)
        self.earned: TokenRewards | None = None  # by the answers of the generation, of which they follow

    def samples(self, step: int, prompts: Sequence[Sample]) -> Sequence[Sample]:
        if (generation := self._begin(step)) is not None:
            self.rollouts = self._generate(prompts, generation)
        assert self.rollouts is not None
        self.earned = self._earned(self.rollouts)
        self.answers = self._answers_of(step, len(prompts))
        samples = self.rollout.samples(self.rollouts)
        return [samples[i] for i in self.answers if self.earned.counts[i]] or [samples[self.answers[0]]]

    def _generate(self, prompts: Sequence[Sample], generation: int) -> Rollouts:
        """With the critic's values, and advantages of tokens, which are whitened over those of answers that count."""
        config, rollouts = self.config, self.rollout.roll(prompts, (self.config.seed, 1 + generation))
        found = self.rollout.scored(self.rollout.samples(rollouts), self._look)
        rollouts.logps, rollouts.values = (x.contiguous() for x in found.unbind(1))
        earned = self._earned(rollouts)
        advantages, rollouts.returns = gae(earned.rewards, rollouts.values, rollouts.boundaries, gamma=config.gamma, lam=config.lam)
        rollouts.advantages = whiten(advantages, rollouts.token_mask(earned.counts))
        return rollouts

    def _earned(self, rollouts: Rollouts) -> TokenRewards:
        return token_rewards(self.config, rollouts, self.rollout.total(rollouts.rewards))

    def _look(self, batch: PackedBatch) -> Tensor:
        """(L, 2) log-probs and values of the scored tokens, from one forward where the trunk is shared."""
        how: dict[str, Any] = {"budget": self.config.logits_budget, "temperature": self.config.temperature}
        if self.config.critic == "adapter":
            with critic_adapter(self.model), evaluation(self.model):
                values = self.value(trunk(self.model, batch).hidden.index_select(0, batch.live))
            return torch.stack((token_logps(self.model, batch, head=self.head, **how), values), 1)
        with evaluation(self.model):
            hidden = trunk(self.model, batch).hidden.index_select(0, batch.live)
            logps = self.head.logps(hidden, batch.live_target, live_rows=len(batch.live_target), **how).logps
            return torch.stack((logps, self.value(hidden)), 1)

    @property
    def copies(self) -> list[nn.Module]:
        return copied(self.rollout.reference)

    def denominators(self, samples: Sequence[Sample]) -> dict[str, float]:
        assert self.rollouts is not None and self.earned is not None
        return {"tokens": max(1.0, float((self.rollouts.lengths * self.earned.counts)[self.answers].sum()))}

    def loss(self, batch: PackedBatch, denominators: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        assert self.rollouts is not None and self.earned is not None
        config, tokens, length = self.config, denominators["tokens"], batch.live_target.shape[0]
        kept = self.rollouts
        old, advantages, counted = self._of(batch, kept.logps, kept.token_advantages, kept.token_mask(self.earned.counts))
        scale = segment_expand(batch.weight, batch.live_cu_seqlens, length) * counted / tokens
        sums = {"tokens": counted.sum()}
        value_loss = self._adapter_value_loss(batch, scale, counted, sums) if config.critic == "adapter" else None
        found = trunk(self.model, batch)
        hidden = found.hidden.index_select(0, batch.live)

        def loss_of_slab(out: HeadOutput, rows: slice) -> Tensor:
            loss = ppo_clip(out.logps, old[rows], advantages[rows], clip_low=config.cliprange, clip_high=config.cliprange)
            with torch.no_grad():
                moved, better = (out.logps - old[rows]), advantages[rows] > 0
                ratio = bounded_exp(moved)
                clipped = torch.where(better, ratio > 1 + config.cliprange, (ratio < 1 - config.cliprange) & (advantages[rows] < 0))
                part = {"clipped": clipped, "approxkl": 0.5 * moved**2, "ratio": ratio}
                if out.entropy is not None:
                    part["entropy"] = out.entropy
                add_sums(sums, {name: (value * counted[rows]).sum() for name, value in part.items()})
            return (loss * scale[rows]).sum()

        policy_loss = self.head.loss(
            hidden,
            batch.live_target,
            loss_of_slab,
            outputs=self.outputs,
            differentiable=("logps",),
            temperature=config.temperature,
            live_rows=length,
            budget=config.logits_budget,
        )
        if value_loss is None:
            value_loss = self._value_loss(batch, hidden, scale, counted, sums)
        add_sums(sums, {"policy": policy_loss.detach(), "value": value_loss.detach()})
        loss = policy_loss + config.vf_coef * value_loss
        if found.aux_loss is not None:
            share = length / tokens
            loss, sums["aux_loss"] = loss + share * found.aux_loss, share * found.aux_loss.detach()
        sums["loss"] = loss.detach()
        return loss, sums

    def _value_loss(self, batch: PackedBatch, hidden: Tensor, scale: Tensor, counted: Tensor, sums: dict[str, Tensor]) -> Tensor:
        """The micro-batch's share of the critic's loss, from the trunk's `hidden` states (L, D) of the scored tokens."""
        assert self.rollouts is not None
        clip, values = self.config.cliprange_value, self.value(hidden)
        old, returns = self._of(batch, self.rollouts.values, self.rollouts.returns)
        if clip is not None:
            with torch.no_grad():
                worse = (values.clamp(old - clip, old + clip) - returns) ** 2 > (values - returns) ** 2
            add_sums(sums, {"value_clipped": (worse * counted).sum()})
        return (clipped_value_loss(values, old, returns, clip=clip) * scale).sum()

    def _adapter_value_loss(self, batch: PackedBatch, scale: Tensor, counted: Tensor, sums: dict[str, Tensor]) -> Tensor:
        """The same under the critic's own adapter, without gradient.

        Its backward has run already, with that adapter on: its activations are gone before those of the policy are made, and
        gradient checkpointing makes the right ones again.
        """
        with critic_adapter(self.model):
            hidden = trunk(self.model, batch).hidden.index_select(0, batch.live)
            loss = self._value_loss(batch, hidden, scale, counted, sums)
            if torch.is_grad_enabled():
                (self.config.vf_coef * loss).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _of(self, batch: PackedBatch, *values: Tensor) -> list[Tensor]:
        """(L,) each: the parts of `values` (T,) that belong to the scored tokens of `batch`, on its device."""
        assert self.rollouts is not None
        return [on_device(self.rollouts.of_tokens(x, batch.index), batch.live_target.device) for x in values]

    def metrics(self, sums: dict[str, float], denominators: dict[str, float]) -> dict[str, float]:
        assert self.rollouts is not None and self.earned is not None
        tokens = max(1.0, sums["tokens"])
        metrics = {"loss": sums["loss"], **self.rollout.metrics(self.rollouts), **self._of_generation(self.rollouts, self.earned)}
        metrics |= {"loss/policy_avg": sums["policy"], "loss/value_avg": sums["value"]}
        names = {"policy/approxkl_avg": "approxkl", "policy/clipfrac_avg": "clipped", "policy/entropy_avg": "entropy"}
        names |= {"val/clipfrac_avg": "value_clipped", "val/ratio": "ratio"}
        metrics |= {name: sums[key] / tokens for name, key in names.items() if key in sums}
        return metrics | ({"aux_loss": sums["aux_loss"]} if "aux_loss" in sums else {})

    def _of_generation(self, rollouts: Rollouts, earned: TokenRewards) -> dict[str, float]:
        """objective/*: means over answers of sums over their tokens; and how well the critic foresaw the returns."""
        score, kl = float(earned.scores.nanmean()), float(segment_sum(earned.kl, rollouts.boundaries).mean())
        metrics = {"objective/scores": score, "objective/entropy": float(segment_sum(-rollouts.logps, rollouts.boundaries).mean())}
        if self.config.beta:
            penalty = 0.0 - self.config.beta * kl
            metrics |= {"objective/kl": kl, "objective/non_score_reward": penalty, "objective/rlhf_reward": score + penalty}
        counted = rollouts.token_mask(earned.counts)
        values, returns = rollouts.values[counted].double(), rollouts.returns[counted].double()
        if len(returns) > 1 and float(returns.var()) > 0:
            metrics["val/explained_variance"] = float(1 - (returns - values).var() / returns.var())
        end = self.rollout.data.tokenizer.eos_token_id
        return metrics | {"val/num_eos_tokens": float((rollouts.tokens == end).sum())}
