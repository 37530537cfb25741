"""What the online objectives share: the model answers prompts, the answers are rewarded, and optimizer steps train on them.

A generation takes `batch_size` prompts for each of its `steps_per_generation` optimizer steps and draws `num_generations` answers
to each; its steps are repeated `num_iterations` times. What a generation leaves behind, `Rollouts`, is part of a checkpoint.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fastalign.data.config import PromptDataConfig
from fastalign.data.prompts import Prompts, load_prompts
from fastalign.data.tokenizer import context_window
from fastalign.errors import ConfigError
from fastalign.models.adapters import has_adapter
from fastalign.models.heads import head_spec
from fastalign.models.reference import AdapterReference, CopyReference, token_logps
from fastalign.models.trunk import evaluation, trunk
from fastalign.objectives.base import RunConfig
from fastalign.packing import per_sample
from fastalign.ranks import current
from fastalign.rollout.engine import Engine, FirstRank, Sampling, TransformersEngine
from fastalign.rollout.generate import Completion
from fastalign.rollout.judges import as_text
from fastalign.rollout.judging import JudgeConfig, JudgeReward, build_judge
from fastalign.rollout.reward_model import RewardModel
from fastalign.rollout.rewards import Reward, load_rewards, score
from fastalign.rollout.vllm_server import VLLMServerConfig, VLLMServerEngine, check_server
from fastalign.segments import segment_mean, segment_sum
from fastalign.types import PackedBatch, Sample

logger = logging.getLogger("fastalign")

ALIKE = 1e-8  # standard deviation of rewards below which they are equal


@dataclass
class OnlineConfig(RunConfig):
    """Options of every algorithm that trains on the model's own answers."""

    data: PromptDataConfig = field(default_factory=PromptDataConfig)
    vllm: VLLMServerConfig = field(default_factory=VLLMServerConfig)
    engine: Literal["transformers", "vllm_server"] = "transformers"
    """What answers: the trained model itself, or a running vLLM server that is given the adapter (vllm.*; LoRA only)."""
    batch_size: int = 8
    """Prompts per optimizer step."""
    rewards: list[str] = field(default_factory=list)
    """Reward functions: built in (exact_match, numeric_match, tagged_format, repetition[:N], soft_overlong:LENGTH:MARGIN),
    FILE.py:FUNCTION, folders of reward models, or judge, which judge.* names."""
    reward_weights: list[float] | None = None
    """Weight of each in the sum; null: 1."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    reward_timeout: float | None = None
    """Seconds that one call of a reward function may take; null: any."""
    num_generations: int = 8
    """Answers to each prompt."""
    max_completion_length: int = 256
    """Longest answer, in tokens."""
    temperature: float = 1.0
    """Of sampling; log-probs are those of the tempered distribution."""
    top_k: int = 0
    """Only the so many most probable tokens are drawn; 0: all."""
    top_p: float = 1.0
    """Only the fewest most probable tokens that together have this probability are drawn."""
    min_p: float = 0.0
    """Only tokens with at least this share of the probability of the most probable one are drawn."""
    steps_per_generation: int = 1
    """Optimizer steps whose prompts are answered together."""
    num_iterations: int = 1
    """Times that each of these steps is made."""
    mask_truncated_completions: bool = False
    """Answers that reached max_completion_length do not count in the loss."""
    refill: int = 0
    """How often prompts whose answers were all rewarded alike are answered anew, with other random numbers (dynamic sampling)."""
    completions_every: int = 10
    """Steps between samples of answers and rewards in completions.jsonl; 0: none."""
    generation_tokens: int = 16384
    """Prompt and answer tokens that are generated together; bounds the memory of the cache."""
    beta: float = 0.0
    """Weight of the KL penalty to the reference; 0: there is no reference."""
    reference: Literal["auto", "adapter", "copy"] = "auto"
    """adapter: the model with its adapter off; copy: a second model. auto: adapter when training LoRA, else copy."""

    def validate(self) -> None:
        super().validate()
        for option in ("num_generations", "max_completion_length", "steps_per_generation", "num_iterations", "generation_tokens"):
            self._require(option, getattr(self, option) >= 1, "at least 1")
        for option in ("refill", "completions_every"):
            self._require(option, getattr(self, option) >= 0, "0 or more")
        self._require("temperature", 0 < self.temperature < math.inf, "positive and finite")
        self._require("top_k", self.top_k >= 0, "0 or more")
        self._require("top_p", 0 < self.top_p <= 1, "in (0, 1]")
        self._require("min_p", 0 <= self.min_p <= 1, "in [0, 1]")
        self._require("beta", 0 <= self.beta < math.inf, "0 or more and finite")
        self._require(
            "rewards", bool(self.reward_names), "at least one reward function, such as numeric_match or my_rewards.py:good, or a judge"
        )
        self._require_judge()
        self._require("reward_timeout", self.reward_timeout is None or self.reward_timeout > 0, "positive, or null")
        self._require_choice("reference", ("auto", "adapter", "copy"))
        if self.reference == "adapter" and not self.lora.enabled:
            self._require("reference", False, "copy or auto when all weights are trained (lora.r 0)")
        self._require_engine()

    def _require_engine(self) -> None:
        self._require_choice("engine", ("transformers", "vllm_server"))
        if self.engine == "transformers":
            if self.vllm != VLLMServerConfig():
                raise ConfigError("vllm: options of a vLLM server, but the trained model itself answers; set --engine vllm_server")
            return
        self.vllm.validate()
        self._require_use("generation_tokens", False, "engine transformers; a server bounds its own memory")
        if not self.lora.enabled and not (Path(self.model.path) / "adapter_config.json").is_file():
            raise ConfigError(
                "engine: only an adapter is sent to a vLLM server, and all weights are trained (lora.r 0); set --lora.r 16, or "
                "--engine transformers"
            )
        if self.lora.modules_to_save:
            raise ConfigError(
                "lora.modules_to_save: vLLM takes no adapter with whole layers in it; leave it out, or set --engine transformers"
            )

    def make_engine(self, model: Any) -> Engine:
        """What answers prompts by the weights of `model`."""
        if self.engine == "vllm_server":
            if current().size > 1 and self.parallel.shard == "full":
                raise ConfigError("engine vllm_server is given whole weights; with several processes set --parallel.shard optimizer")
            return FirstRank(VLLMServerEngine(model, self.vllm, output=self.output))
        return TransformersEngine(model, max_tokens=self.generation_tokens)

    def _require_judge(self) -> None:
        if "judge" not in self.reward_names:
            self._require("rewards", not self.judge.is_named, "left out, or contain judge, which judge.* names")
            if self.judge != JudgeConfig():
                raise ConfigError("judge: options of a judge, but none is named; set --judge.function, --judge.url or --judge.model")
            return
        self.judge.validate()
        if self.judge.url and self.judge.mode == "compare":
            self._require("num_generations", self.num_generations >= 2, "at least 2 for a judge that compares; or set --judge.mode rate")

    @property
    def reward_names(self) -> list[str]:
        """`rewards`; a judge that is named is one of them, and the only one where there is none."""
        return self.rewards or (["judge"] if self.judge.is_named else [])

    @property
    def truncated_sampling(self) -> bool:
        """Whether answers are not drawn from the distribution that training computes."""
        return self.sampling(0).truncated

    def sampling(self, eos_token_id: int) -> Sampling:
        """How answers are drawn."""
        options = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p}
        return Sampling(self.max_completion_length, eos_token_id, **options)  # type: ignore[arg-type]

    @property
    def steps_per_draw(self) -> int:
        return self.steps_per_generation * self.num_iterations

    @property
    def draw_size(self) -> int:
        return self.batch_size * self.steps_per_generation

    def groups_of(self, step: int, asked: int) -> range:
        """Which of the `asked` prompts of its generation optimizer step `step`, counted from 0, trains on: one at least."""
        part, parts = step % self.steps_per_generation, self.steps_per_generation
        first = part * asked // parts
        return range(first, max((part + 1) * asked // parts, first + 1))

    def load_data(self, tokenizer: Any, vocab_size: int | None) -> Prompts:
        reward_functions(self, models=False)  # mistakes in names show before anything is loaded or written
        if self.engine == "vllm_server":
            check_server(self.vllm, self.model.path)
        data = load_prompts(self.data, tokenizer, vocab_size=vocab_size)
        longest = max((*data.samples, *data.eval_samples), key=lambda sample: len(sample.prompt))
        if (needed := len(longest.prompt) + self.max_completion_length) > self.max_tokens:
            raise ConfigError(
                f"max_tokens {self.max_tokens} is less than the longest prompt (row {longest.index}, {len(longest.prompt)} tokens) and "
                f"the longest answer ({self.max_completion_length}) together; set --max_tokens {needed} or more"
            )
        if (window := context_window(self.model.path)) is not None and needed > window:
            raise ConfigError(
                f"the model's window of {window} tokens is less than the longest prompt (row {longest.index}, {len(longest.prompt)} "
                f"tokens) and the longest answer ({self.max_completion_length}) together; set a smaller --max_completion_length, or a "
                "smaller --data.max_length, which leaves long prompts out"
            )
        return data


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

    def of_tokens(self, values: Tensor, answers: Sequence[int]) -> Tensor:
        """The part of `values` (T,) that belongs to these answers, in their order."""
        bounds = self.bounds
        return torch.cat([values[bounds[i] : bounds[i + 1]] for i in answers]) if answers else values[:0]


class Buffered:
    """An online objective that keeps the answers of a generation, over the steps that train on them and in checkpoints."""

    config: OnlineConfig
    rollouts: Rollouts | None = None
    generation: int = -1

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

    def _is_shown(self, step: int) -> bool:
        """Whether there are answers to be shown after optimizer step `step`, counted from 1."""
        return self.rollouts is not None and is_due(step, self.config.completions_every)


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
            self.reference = (AdapterReference if adapter else CopyReference)(model, budget=config.logits_budget)

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
            rollouts.logps = self._score(samples, lambda batch: token_logps(self.model, batch, **how))
        if self.reference is not None:
            reference = self.reference
            rollouts.ref_logps = self._score(samples, lambda batch: reference.token_logps(batch, temperature=temperature))
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

    def entropies(self, samples: Sequence[Sample]) -> Tensor:
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
            return self._score(samples, of)

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

    def _score(self, samples: Sequence[Sample], logps: Callable[[PackedBatch], Tensor]) -> Tensor:
        """(T,) in the order of `samples`."""
        device, rows = next(self.model.parameters()).device, [len(sample.completions[0]) for sample in samples]

        def score(batch: PackedBatch) -> Tensor:
            return logps(batch.to(device)).float().cpu()

        return torch.cat(per_sample(samples, self.config.max_tokens, score, rows=rows, share=self.config.share_prompts))


def reward_functions(config: OnlineConfig, *, models: bool = True) -> list[Reward]:
    """What `config.rewards` names: functions, a judge, and reward models where a name is that of a folder.

    Without `models` those are left out that need a model or an endpoint.
    """
    names = config.reward_names
    weights = [1.0] * len(names) if config.reward_weights is None else config.reward_weights
    if len(weights) != len(names):
        raise ConfigError(f"reward_weights: {len(weights)} weights for {len(names)} reward functions; give one for each")
    found = []
    for name, weight in zip(names, weights):
        if name == "judge":
            if models or config.judge.function:
                judge = JudgeReward(build_judge(config.judge), config.num_generations, config.judge.workers)
                found.append(Reward("judge", judge, weight))
        elif Path(name).is_dir():
            if not models:
                continue
            model = RewardModel(name, max_tokens=config.max_tokens)
            found.append(Reward(model.name, model, weight))
        else:
            found += load_rewards([name], [weight])
    if len({reward.name for reward in found}) < len(found):
        raise ConfigError(f"rewards: two of them have the same name, which their metrics could not tell apart: {', '.join(names)}")
    return found


def is_due(step: int, every: int) -> bool:
    """Whether answers are shown after optimizer step `step`, counted from 1: the first one and every `every`; 0: never."""
    return bool(every) and (step == 1 or step % every == 0)


def nan_std(values: Tensor) -> Tensor:
    """Unbiased standard deviation of what is not NaN; 0 for fewer than two values."""
    there = values[~values.isnan()]
    return there.std() if there.numel() > 1 else torch.zeros(())
