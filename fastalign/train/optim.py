"""AdamW on float32 or 16-bit weights, learning-rate schedules as functions of the step, and gradient clipping."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from fastalign.errors import CheckpointError, ConfigError
from fastalign.models.embedding import accumulate_in_place
from fastalign.objectives.base import RunConfig

# Transformers decays everything but these (Trainer.get_decay_parameter_names).
_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


def learning_rate(step: int, total_steps: int, config: RunConfig) -> float:
    """Rate of optimizer step `step`, counted from 0, as Transformers' schedules give it.

    It rises linearly from 0 over the first `warmup_ratio` of the steps, then falls to 0 along a line or half a cosine, or stays.

    >>> from fastalign.objectives.base import RunConfig
    >>> [learning_rate(s, 4, RunConfig(learning_rate=1.0)) for s in range(4)]
    [1.0, 0.75, 0.5, 0.25]
    """
    warmup = math.ceil(total_steps * config.warmup_ratio)
    if step < warmup:
        return config.learning_rate * step / warmup
    done = (step - warmup) / max(1, total_steps - warmup)
    factor = {"linear": max(0.0, 1 - done), "cosine": 0.5 * (1 + math.cos(math.pi * min(1.0, done))), "constant": 1.0}
    return config.learning_rate * factor[config.lr_schedule]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of `model` that require a gradient, by name. Raises ConfigError where there is none, or one in float16."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not named:
        raise ConfigError("the model has no trainable weight; set lora.r above 0, or load the model without frozen weights")
    if half := [name for name, p in named.items() if p.dtype == torch.float16]:
        raise ConfigError(f"model.dtype float16 cannot be trained without loss scaling ({half[0]}); use bfloat16 or float32")
    return named


class Division:
    """Which rows of the trainable weights this process updates. Here all of them: the process is alone."""

    def rows(self, tensor: Tensor) -> Tensor:
        """The part of `tensor`, of the shape of a weight, that this process updates."""
        return tensor

    def parameter(self, weight: nn.Parameter) -> nn.Parameter:
        """What is updated of a weight that has no float32 copy; its storage is the weight's."""
        return weight

    def masters(self, weights: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """Float32 copies that are the weights themselves, which run in 16 bits."""
        return {}

    def reduce(self, weights: Mapping[str, nn.Parameter], updated: Mapping[str, nn.Parameter]) -> None:
        """Give what is updated the gradient that all processes together have."""

    def norm(self, grads: Iterable[Tensor]) -> Tensor:
        """L2 norm of the gradient whose parts are `grads` here."""
        return nn.utils.get_total_norm(grads).float()

    def copy(self, weight: Tensor, value: Tensor) -> None:
        """Give `weight` the `value`, which is a whole one."""
        weight.copy_(value)

    def kept(self, weight: nn.Parameter) -> Tensor:
        """What this process writes of a weight."""
        return weight

    def spread(self, weights: Mapping[str, nn.Parameter]) -> None:
        """Fetch the rows of the weights that others have updated."""

    def names(self, names: list[str]) -> list[str]:
        """Those that any process gives."""
        return names


class Optimizer:
    """AdamW over the trainable weights of a model.

    With `config.master_weights` every trainable 16-bit weight has a float32 copy here: its gradient is accumulated in float32,
    the update happens on the copy, and the weight is the rounded copy. Such a weight carries the float32 buffer as
    `weight.main_grad`, which the head and the embedding add their gradients to; where these are float32 they keep their `.grad`
    allocated for the same purpose.
    The rate of a weight that has a `rate_factor` (PPO's critic) is that many times the schedule's.
    `division` says which rows of the weights this process updates: copies and moments are of these alone.
    """

    def __init__(
        self,
        model: nn.Module,
        config: RunConfig,
        *,
        head_weight: Tensor | None = None,
        embedding: nn.Module | None = None,
        division: Division | None = None,
    ) -> None:
        self.named = trainable(model)
        self.division = division = division or Division()
        self.masters: dict[str, nn.Parameter] = {}
        self.buffers: dict[str, Tensor] = {}  # of weights that their masters are rounded to
        if config.master_weights:
            self.masters = {n: nn.Parameter(division.rows(p.detach()).float()) for n, p in self.named.items() if p.dtype != torch.float32}
        for name, master in self.masters.items():
            self.buffers[name] = _accumulate_in_float32(self.named[name])
            master.grad = division.rows(self.buffers[name])
        self.masters |= division.masters(self.named)
        self.updated = {n: self.masters[n] if n in self.masters else division.parameter(p) for n, p in self.named.items()}
        in_place = [head_weight]
        if embedding is not None and accumulate_in_place(embedding):
            in_place.append(embedding.get_parameter("weight"))
        self.kept_grads = [p for n, p in self.named.items() if any(p is weight for weight in in_place) and n not in self.masters]
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}  # by decay and factor of the rate
        for name, p in self.updated.items():
            decay = 0.0 if _NO_DECAY.search(name.lower()) else config.weight_decay
            groups.setdefault((decay, getattr(self.named[name], "rate_factor", 1.0)), []).append(p)
        self.adamw = torch.optim.AdamW(
            [{"params": params, "weight_decay": decay, "factor": factor} for (decay, factor), params in groups.items()],
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            fused=True,
        )
        self.max_grad_norm = config.max_grad_norm

    def zero_grad(self) -> None:
        """Free the gradients, but keep and clear the buffers that head and embedding add to in place."""
        kept = {id(p) for p in self.kept_grads}
        for p in self.named.values():
            if id(p) not in kept:
                p.grad = None
            elif p.grad is None:
                p.grad = torch.zeros_like(p)
            else:
                p.grad.zero_()
        if self.buffers:
            torch._foreach_zero_(list(self.buffers.values()))

    def grad_norm(self) -> Tensor:
        """L2 norm of the whole gradient, a float32 scalar on the device; of several processes, their gradients are added up first."""
        self.division.reduce(self.named, self.updated)
        return self.division.norm([p.grad for p in self.updated.values() if p.grad is not None])

    def nonfinite_gradients(self) -> list[str]:
        """Names of the weights whose gradient holds NaN or infinity."""
        return self.division.names([n for n, p in self.updated.items() if p.grad is not None and not bool(p.grad.isfinite().all())])

    def step(self, rate: float, grad_norm: Tensor) -> None:
        """Clip by the given norm and update the weights at learning rate `rate`."""
        if self.max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(list(self.updated.values()), self.max_grad_norm, grad_norm)
        for group in self.adamw.param_groups:
            group["lr"] = rate * group["factor"]
        self.adamw.step()
        if self.buffers:
            with torch.no_grad():
                torch._foreach_copy_([self.division.rows(self.named[n]) for n in self.buffers], [self.masters[n] for n in self.buffers])
        self.division.spread(self.named)

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on besides the weights: `<weight>/<statistic>` -> tensor."""
        found = {f"{n}/{key}": value for n, p in self.updated.items() for key, value in self.adamw.state.get(p, {}).items()}
        return found | {f"{n}/master": m.detach() for n, m in self.masters.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state()` gave; CheckpointError when it belongs to other weights."""
        statistics: dict[str, dict[str, Tensor]] = {}
        for key, value in state.items():
            name, _, statistic = key.rpartition("/")
            if name not in self.updated or (value.ndim and value.shape != self.updated[name].shape):
                raise CheckpointError(f"optimizer state {key} fits no weight of this model; resume with the model that the run began with")
            statistics.setdefault(name, {})[statistic] = value
        if missing := [name for name in self.masters if "master" not in statistics.get(name, {})]:
            raise CheckpointError(f"optimizer state has no float32 copy of {missing[0]}; resume with the master_weights of the run")
        for name, p in self.updated.items():
            own = statistics.get(name, {})
            if name in self.masters:
                p.data.copy_(own.pop("master"))
            self.adamw.state[p] = {
                key: value.clone() if key == "step" and p.device.type == "cpu" else value.to(p.device) for key, value in own.items()
            }


def _accumulate_in_float32(weight: nn.Parameter) -> Tensor:
    main_grad = torch.zeros_like(weight, dtype=torch.float32)
    weight.main_grad = main_grad  # type: ignore[attr-defined]

    def move(p: Tensor) -> None:
        if p.grad is not None:  # None where all of it went into the buffer already
            main_grad.add_(p.grad)
            p.grad = None

    weight.register_post_accumulate_grad_hook(move)
    return main_grad
