"""Rollouts: the answers of a generation, how they are made and rewarded, and how they outlast the steps that train on them.

What a generation leaves behind is part of a checkpoint.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from fastalign.data.prompts import Prompts
from fastalign.models.adapters import has_adapter
from fastalign.models.heads import head_spec
from fastalign.models.reference import AdapterReference, CopyReference, StreamReference, token_logps
from fastalign.models.trunk import evaluation, trunk
from fastalign.objectives.answers import is_due
from fastalign.objectives.online import OnlineConfig, reward_functions
from fastalign.packing import per_sample
from fastalign.ranks import current
from fastalign.rollout.engine import Engine
from fastalign.rollout.generate import Completion
from fastalign.rollout.judges import as_text
from fastalign.rollout.reward_model import RewardModel
from fastalign.rollout.rewards import score
from fastalign.segments import segment_mean, segment_sum
from fastalign.types import PackedBatch, Sample

logger = logging.getLogger("fastalign")

ALIKE = 1e-8  # standard deviation of rewards below which they are equal


@dataclass
class Rollouts:
    """The answers of one generation, B of them, T tokens in all, the answers to a prompt together. Tensors are on the CPU."""

    prompts: Tensor  # (B,) int64, data-set row of each answer's prompt
    tokens: Tensor  # (T,) int64
    lengths: Tensor  # (B,) int64
    finished: Tensor  # (B,) bool
    rewards: Tensor  # (B, F) float32, NaN where a function had nothing to say
    advantages: Tensor  # (B,) float32, or (T,) where every token has its own
    logps: Tensor  # (T,) float32, by the policy that answered
    ref_logps: Tensor  # (T,), or (0,) without a reference
    draws: Tensor  # (G,) int64, how often each prompt was answered; the last answers are kept
    sampling_logps: Tensor = field(default_factory=lambda: torch.empty(0))  # (T,) float32, as the engine drew; (0,) where not needed
    values: Tensor = field(default_factory=lambda: torch.empty(0))  # (T,) a critic's, of the state before each token; (0,) without one
    returns: Tensor = field(default_factory=lambda: torch.empty(0))  # (T,) what it should have said

    @property
    def bounds(self) -> list[int]:
        return list(accumulate(self.lengths.tolist(), initial=0))

    @property
    def boundaries(self) -> Tensor:
        """(B+1,) int32 boundaries of the answers."""
        return torch.tensor(self.bounds, dtype=torch.int32)

    @property
    def token_advantages(self) -> Tensor:
        """(T,) float32, of each token: that of its answer, unless it has its own."""
        return self.advantages if len(self.advantages) == len(self.tokens) else self.advantages.repeat_interleave(self.lengths)

    @property
    def have_advantage(self) -> list[bool]:
        """(B,) whether any token of an answer has an advantage that is not 0."""
        return (segment_sum((self.token_advantages != 0).float(), self.boundaries) > 0).tolist()  # type: ignore[no-any-return]

    def weighted(self, advantages: Tensor, weight: Tensor) -> Tensor:
        """`advantages`, (B,) or (T,), times `weight` (B,)."""
        return advantages * (weight if len(advantages) == len(weight) else weight.repeat_interleave(self.lengths))

    def token_mask(self, answers: Tensor) -> Tensor:
        """(T,) bool, the tokens of those answers that are True in `answers` (B,)."""
        return answers.repeat_interleave(self.lengths)

    def of_tokens(self, values: Tensor, answers: Sequence[int]) -> Tensor:
        """The part of `values` (T,) that belongs to these answers, in their order."""
        bounds = self.bounds
        return torch.cat([values[bounds[i] : bounds[i + 1]] for i in answers]) if answers else values[:0]


class Buffered:
    """An online objective that keeps the answers of a generation, over the steps that train on them and in checkpoints."""

    config: OnlineConfig
    rollout: Rollout
    rollouts: Rollouts | None = None
    generation: int = -1
    answers: Sequence[int] = ()  # of this step, the places of all its answers in the rollouts

    def after_step(self, step: int) -> None:
        """A generation that has been trained on is not needed again."""
        if step % self.config.steps_per_draw == 0:
            self.rollouts = None

    def state(self) -> dict[str, Tensor]:
        return {} if self.rollouts is None else asdict(self.rollouts) | {"generation": torch.tensor(self.generation)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        if state:
            self.generation = int(state["generation"])
            self.rollouts = Rollouts(**{name: value for name, value in state.items() if name != "generation"})

    def _begin(self, step: int) -> int | None:
        """The generation that optimizer step `step`, counted from 0, begins; None where its answers are there already."""
        generation = step // self.config.steps_per_draw
        if self.rollouts is not None and self.generation == generation:
            return None
        self.generation = generation
        return generation

    def _answers_of(self, step: int, asked: int) -> range:
        """The places of the answers that optimizer step `step`, counted from 0, trains on, in a generation of `asked` prompts."""
        groups, size = self.config.groups_of(step, asked), self.config.num_generations
        return range(groups.start * size, groups.stop * size)

    def _is_shown(self, step: int) -> bool:
        """Whether there are answers to be shown after optimizer step `step`, counted from 1."""
        return self.rollouts is not None and is_due(step, self.config.completions_every)

    def evaluate(self, prompts: Sequence[Sample]) -> dict[str, float]:
        return self.rollout.metrics(self.rollout.roll(prompts, (self.config.seed, 0)))

    def shown(self, step: int) -> list[dict[str, Any]]:
        """Four answers of the step, no more than two of them to one prompt, when answers are due."""
        if not self._is_shown(step):
            return []
        assert self.rollouts is not None
        return self.rollout.shown(self.rollouts, [i for i in self.answers if i % self.config.num_generations < 2][:4])


class Rollout:
    """Makes rollouts: the part of an online objective that knows the tokenizer, the reward functions and the reference."""

    def __init__(self, config: OnlineConfig, model: Any, data: Prompts, *, needs_logps: bool, needs_sampling_logps: bool = False) -> None:
        self.config, self.model, self.data, self.needs_logps = config, model, data, needs_logps
        self.needs_sampling_logps = needs_sampling_logps
        self.head = head_spec(model)
        self.rewards = reward_functions(config)
        for reward in self.rewards:
            judge = reward.function
            if isinstance(judge, RewardModel) and judge.tokenizer.get_vocab() != data.tokenizer.get_vocab():
                logger.info(
                    "reward %s has another tokenizer than the policy: it reads the text of the answers, tokenized anew", reward.name
                )
        self.engine: Engine = config.make_engine(model)
        self.sampling = config.sampling(data.tokenizer.eos_token_id)
        self.prompt_of = {sample.index: sample for sample in (*data.samples, *data.eval_samples)}
        self.reference: AdapterReference | CopyReference | None = None
        if config.beta:
            adapter = config.reference == "adapter" or (config.reference == "auto" and has_adapter(model))
            copied = StreamReference if config.reference == "stream" else CopyReference
            self.reference = (AdapterReference if adapter else copied)(model, budget=config.logits_budget)

    def roll(self, prompts: Sequence[Sample], seed: Sequence[int], *, refill: int = 0) -> Rollouts:
        """`num_generations` answers to each of `prompts`, rewarded, with log-probs; their advantages are still 0.

        Up to `refill` times, the prompts whose answers were all rewarded alike are answered again. Depends on nothing but the
        weights, the prompts and `seed`.
        """
        size = self.config.num_generations
        asked = [prompt for prompt in prompts for _ in range(size)]
        self.engine.sync()
        done = self._answers(asked, (*seed, 0))
        rewards, draws = self._rewards(asked, done), torch.ones(len(prompts), dtype=torch.int64)
        for attempt in range(1, refill + 1):
            again = [i for g in torch.nonzero(self._deviation(rewards) < ALIKE)[:, 0].tolist() for i in range(g * size, (g + 1) * size)]
            if not again:
                break
            anew = self._answers([asked[i] for i in again], (*seed, attempt))
            rewards[again] = self._rewards([asked[i] for i in again], anew)
            for i, completion in zip(again, anew):
                done[i] = completion
            draws[[i // size for i in again[::size]]] += 1
        self.engine.rest()
        rollouts = Rollouts(
            prompts=torch.tensor([prompt.index for prompt in asked]),
            tokens=torch.tensor([token for c in done for token in c.tokens]),
            lengths=torch.tensor([len(c.tokens) for c in done]),
            finished=torch.tensor([c.finished for c in done]),
            rewards=rewards,
            advantages=torch.zeros(len(done)),
            logps=torch.empty(0),
            ref_logps=torch.empty(0),
            draws=draws,
        )
        if self.needs_sampling_logps:
            rollouts.sampling_logps = torch.tensor([logp for c in done for logp in c.logps])
        samples, temperature = self.samples(rollouts), self.config.temperature
        if self.needs_logps:
            how: dict[str, Any] = {"head": self.head, "budget": self.config.logits_budget, "temperature": temperature}
            rollouts.logps = self.scored(samples, lambda batch: token_logps(self.model, batch, **how))
        if self.reference is not None:
            reference = self.reference
            rollouts.ref_logps = self.scored(samples, lambda batch: reference.token_logps(batch, temperature=temperature))
        return rollouts

    def total(self, rewards: Tensor) -> Tensor:
        """(B,) weighted sum of the reward functions, (B, F); NaN where none had anything to say."""
        weights = torch.tensor([reward.weight for reward in self.rewards])
        return torch.where(rewards.isnan().all(1), torch.nan, (rewards * weights).nansum(1))

    def groups(self, rollouts: Rollouts) -> Tensor:
        """(G+1,) int32 boundaries of the answers to one prompt."""
        return torch.arange(0, len(rollouts.lengths) + 1, self.config.num_generations, dtype=torch.int32)

    def metrics(self, rollouts: Rollouts) -> dict[str, float]:
        """Of rewards and lengths, under the names of TRL's GRPOTrainer."""
        lengths, ended = rollouts.lengths.float(), rollouts.finished
        total, deviation = self.total(rollouts.rewards), self._deviation(rollouts.rewards)
        terminated = lengths[ended] if bool(ended.any()) else torch.zeros(1)
        metrics = {
            "reward": total.nanmean(),
            "completions/mean_length": lengths.mean(),
            "completions/min_length": lengths.min(),
            "completions/max_length": lengths.max(),
            "completions/mean_terminated_length": terminated.mean(),
            "completions/clipped_ratio": 1 - ended.float().mean(),
        }
        if self.config.num_generations > 1:  # a group of one is always alike
            metrics |= {"reward_std": deviation.mean(), "frac_reward_zero_std": (deviation < ALIKE).float().mean()}
        if self.config.refill:
            metrics |= {"refill/frac_reward_zero_std": (rollouts.draws > 1).float().mean(), "refill/draws": rollouts.draws.float().mean()}
        for reward, column in zip(self.rewards, rollouts.rewards.unbind(1)):
            metrics |= {f"rewards/{reward.name}/mean": column.nanmean(), f"rewards/{reward.name}/std": nan_std(column)}
        return {name: float(value) for name, value in metrics.items()}

    def samples(self, rollouts: Rollouts) -> list[Sample]:
        """The answers as samples whose index is their place in `rollouts`."""
        parts = rollouts.tokens.split(rollouts.lengths.tolist())
        found = [self.prompt_of[index] for index in rollouts.prompts.tolist()]
        return [Sample(i, p.prompt, (tuple(part.tolist()),), p.weight) for i, (p, part) in enumerate(zip(found, parts))]

    def entropies(self, samples: Sequence[Sample], max_tokens: int | None = None) -> Tensor:
        """(T,) float32 on the CPU, nats, of the distribution before each token of these answers, in their order; without gradient."""

        def of(batch: PackedBatch) -> Tensor:
            with evaluation(self.model):
                hidden = trunk(self.model, batch).hidden.index_select(0, batch.live)
            target = batch.live_target
            options: dict[str, Any] = {"budget": self.config.logits_budget, "temperature": self.config.temperature}
            entropy = self.head.logps(hidden, target, outputs=("logps", "entropy"), live_rows=target.shape[0], **options).entropy
            assert entropy is not None
            return entropy

        with torch.no_grad():
            return self.scored(samples, of, max_tokens)

    def scored(self, samples: Sequence[Sample], found: Callable[[PackedBatch], Tensor], max_tokens: int | None = None) -> Tensor:
        """(T, ...) on the CPU, what `found` says of the scored tokens of a batch, for all these answers in their order.

        A batch has at most `max_tokens` tokens; None: as many as the options say.
        """
        device, rows = next(self.model.parameters()).device, [len(sample.completions[0]) for sample in samples]
        limit = max_tokens or self.config.token_limit

        def score(batch: PackedBatch) -> Tensor:
            return found(batch.to(device)).float().cpu()

        return torch.cat(per_sample(samples, limit, score, rows=rows, share=self.config.share_prompts))

    def shown(self, rollouts: Rollouts, answers: Sequence[int]) -> list[dict[str, Any]]:
        """These answers as a reader wants them: text, length, rewards by name (None where a function had nothing to say), and their
        advantage, the mean over their tokens."""
        parts, rows, advantages = rollouts.tokens.split(rollouts.lengths.tolist()), [], rollouts.advantages
        if len(advantages) != len(parts):
            advantages = segment_mean(advantages, rollouts.boundaries)
        for i in answers:
            index = int(rollouts.prompts[i])
            rewards = [None if math.isnan(value) else value for value in rollouts.rewards[i].tolist()]
            rows.append(
                {
                    "row": index,
                    "prompt": as_text(self.data.turns[index]),
                    "completion": self._text(parts[i].tolist()),
                    "tokens": len(parts[i]),
                    "finished": bool(rollouts.finished[i]),
                    "rewards": {reward.name: value for reward, value in zip(self.rewards, rewards)},
                    "advantage": float(advantages[i]),
                }
            )
        return rows

    def _deviation(self, rewards: Tensor) -> Tensor:
        """(G,) standard deviation of the total reward of the answers to a prompt."""
        return torch.stack([nan_std(group) for group in self.total(rewards).view(-1, self.config.num_generations)])

    def _text(self, tokens: Sequence[int]) -> str:
        return str(self.data.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def _answers(self, asked: Sequence[Sample], seed: Sequence[int]) -> list[Completion]:
        return self.engine.generate([prompt.prompt for prompt in asked], self.sampling, seed=seed)

    def _rewards(self, asked: Sequence[Sample], done: Sequence[Completion]) -> Tensor:
        """(B, F); every rank of a run rewards its share of the groups, whole ones."""
        size = self.config.num_generations

        def of_groups(numbers: Sequence[int]) -> list[Tensor]:
            own = [i for g in numbers for i in range(g * size, (g + 1) * size)]
            return list(self._rewards_of([asked[i] for i in own], [done[i] for i in own]).split(size)) if own else []

        return torch.cat(current().spread(len(asked) // size, of_groups))

    def _rewards_of(self, asked: Sequence[Sample], done: Sequence[Completion]) -> Tensor:
        turns = [self.data.turns[prompt.index] for prompt in asked]
        texts = [self._text(c.tokens) for c in done]
        said = [text if isinstance(turn, str) else [{"role": "assistant", "content": text}] for text, turn in zip(texts, turns)]
        rows = [self.data.columns[prompt.index] for prompt in asked]
        columns = {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}
        values = score(self.rewards, turns, said, [c.tokens for c in done], columns, timeout=self.config.reward_timeout)
        return torch.tensor(values, dtype=torch.float32).view(len(done), len(self.rewards))


def nan_std(values: Tensor) -> Tensor:
    """Unbiased standard deviation of what is not NaN; 0 for fewer than two values."""
    there = values[~values.isnan()]
    return there.std() if there.numel() > 1 else torch.zeros(())
