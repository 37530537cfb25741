"""AdamW on float32 or 16-bit weights, learning-rate schedules as functions of the step, and gradient clipping."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

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


class Optimizer:
    """AdamW over the trainable weights of a model.

    With `config.master_weights` every trainable 16-bit weight has a float32 copy here: its gradient is accumulated in float32,
    the update happens on the copy, and the weight is the rounded copy. Such a weight carries the float32 buffer as
    `weight.main_grad`, which the head and the embedding add their gradients to; where these are float32 they keep their `.grad`
    allocated for the same purpose.
    The rate of a weight that has a `rate_factor` (PPO's critic) is that many times the schedule's.
    """

    def __init__(
        self, model: nn.Module, config: RunConfig, *, head_weight: Tensor | None = None, embedding: nn.Module | None = None
    ) -> None:
        self.named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.named:
            raise ConfigError("the model has no trainable weight; set lora.r above 0, or load the model without frozen weights")
        if half := [name for name, p in self.named.items() if p.dtype == torch.float16]:
            raise ConfigError(f"model.dtype float16 cannot be trained without loss scaling ({half[0]}); use bfloat16 or float32")
        self.masters: dict[str, nn.Parameter] = {}
        if config.master_weights:
            self.masters = {n: nn.Parameter(p.detach().float()) for n, p in self.named.items() if p.dtype != torch.float32}
        for name, master in self.masters.items():
            _accumulate_in_float32(self.named[name], master)
        self.updated: dict[str, nn.Parameter] = {name: self.masters.get(name, p) for name, p in self.named.items()}
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
        buffers = [m.grad for m in self.masters.values() if m.grad is not None]
        if buffers:
            torch._foreach_zero_(buffers)

    def grad_norm(self) -> Tensor:
        """L2 norm of the whole gradient, a float32 scalar on the device."""
        return nn.utils.get_total_norm([p.grad for p in self.updated.values() if p.grad is not None]).float()

    def nonfinite_gradients(self) -> list[str]:
        """Names of the weights whose gradient holds NaN or infinity."""
        return [n for n, p in self.updated.items() if p.grad is not None and not bool(p.grad.isfinite().all())]

    def step(self, rate: float, grad_norm: Tensor) -> None:
        """Clip by the given norm and update the weights at learning rate `rate`."""
        if self.max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(list(self.updated.values()), self.max_grad_norm, grad_norm)
        for group in self.adamw.param_groups:
            group["lr"] = rate * group["factor"]
        self.adamw.step()
        if self.masters:
            with torch.no_grad():
                torch._foreach_copy_([self.named[n] for n in self.masters], list(self.masters.values()))

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


def _accumulate_in_float32(weight: nn.Parameter, master: nn.Parameter) -> None:
    main_grad = master.grad = torch.zeros_like(master)
    weight.main_grad = main_grad  # type: ignore[attr-defined]

    def move(p: Tensor) -> None:
        if p.grad is not None:  # None where all of it went into the buffer already
            main_grad.add_(p.grad)
            p.grad = None

    weight.register_post_accumulate_grad_hook(move)
