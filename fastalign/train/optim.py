"""AdamW on float32 or 16-bit weights, on the device or the host, learning-rate schedules as functions of the step, and clipping."""

from __future__ import annotations

import math
import re
import weakref
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastalign.errors import CheckpointError, ConfigError
from fastalign.models.embedding import accumulate_in_place
from fastalign.objectives.base import RunConfig
from fastalign.train.blockwise import BlockwiseAdamW, scales_of

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

    is_whole = True

    def rows(self, tensor: Tensor, of: Tensor | None = None) -> Tensor:
        """The part of `tensor`, of the shape of a weight (that of the weight `of`, as it is here), that this process updates."""
        return tensor

    def place(self, weight: nn.Parameter) -> tuple[int, int]:
        """The first element of `weight` that this process updates, and how many it has over all processes."""
        return 0, weight.numel()

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

    `config.optimizer` says where and how the moments are held. adamw: beside the weights. adamw_8bit: there, in 8 bits
    (`BlockwiseAdamW`). adamw_offload: in the host's memory, with a copy of every weight, float32 under `master_weights`; the update
    happens there, and has the bits that adamw would have on the host.
    With `config.update_in_backward` a weight is updated as soon as its gradient is there in the last micro-batch, which `begin_update`
    announces, and its gradient is freed; `step` then updates what is left. After a gradient that is not finite no further weight is
    updated; those that the backward had reached before, nearer to the loss, are.
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
        if config.stochastic_rounding and all(p.dtype != torch.bfloat16 for p in self.named.values()):
            raise ConfigError("stochastic_rounding: no trained weight is bfloat16; set --model.dtype bfloat16, or leave it false")
        self.in_backward, self.max_grad_norm = config.update_in_backward, config.max_grad_norm
        self.on_host = config.optimizer == "adamw_offload"
        in_place = [head_weight]
        if embedding is not None and accumulate_in_place(embedding):
            in_place.append(embedding.get_parameter("weight"))
        kept = {name for name, p in self.named.items() if any(p is weight for weight in in_place)}
        wide = {name for name, p in self.named.items() if config.master_weights and p.dtype != torch.float32}
        self.masters = {
            name: _copy(division.rows(p.detach(), p), torch.float32 if name in wide else p.dtype, host=self.on_host)
            for name, p in self.named.items()
            if self.on_host or name in wide
        }
        self.copied = set(self.masters)  # to their weights, after an update
        running = division.masters(self.named)
        self.masters |= running
        self.saved_masters = wide | set(running)  # the others are their weights
        self.updated = {n: self.masters[n] if n in self.masters else division.parameter(p) for n, p in self.named.items()}
        # What holds the gradient in `.grad`: the weight, its float32 copy, a place of its own; of several processes, what is updated.
        self.holders: dict[str, Any] = dict(self.named if division.is_whole else self.updated)
        for name in wide:
            if division.is_whole:
                self.holders[name] = _Holder() if self.on_host else self.masters[name]
            if name in kept or not self.in_backward:
                weight = self.named[name]
                weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)  # type: ignore[attr-defined]
                self.holders[name].grad = division.rows(weight.main_grad, weight)  # type: ignore[attr-defined]
        for name, p in self.named.items():
            if name in wide or self.in_backward:
                p.register_post_accumulate_grad_hook(partial(_accumulated, weakref.ref(self), name))
        self.kept_grads = [self.named[name] for name in self.named if name in kept and name not in wide]
        self.engines = self._engines(config)
        self.engine_of = {id(p): engine for engine in self.engines for group in engine.param_groups for p in group["params"]}
        self.rate: float | None = None  # of the update that goes on in the backward
        self.skip: Tensor | None = None  # 1 once something in it was not finite
        self.norms: dict[str, Tensor] = {}  # of the gradients that it has used up

    @property
    def begun(self) -> bool:
        """Whether weights of the step in progress are updated already, so that it cannot be repeated."""
        return bool(self.norms)

    def zero_grad(self) -> None:
        """Free the gradients, but keep and clear the buffers that are added to in place."""
        self.rate, self.skip, self.norms = None, None, {}
        kept = {id(p) for p in self.kept_grads}
        for name, p in self.named.items():
            if id(p) not in kept:
                p.grad = None
            elif p.grad is None:
                p.grad = torch.zeros_like(p)
            else:
                p.grad.zero_()
            if self.holders[name] is not p and not (self.division.is_whole and hasattr(p, "main_grad")):
                self.holders[name].grad = None  # of several processes it is a sum of its own, not the buffer
        buffers = [p.main_grad for p in self.named.values() if hasattr(p, "main_grad")]
        if buffers:
            torch._foreach_zero_(buffers)

    def begin_update(self, rate: float, loss: Tensor) -> None:
        """Called before the backward of the last micro-batch, with the loss of the whole step: from here on weights are updated."""
        self.rate, self.skip = rate, (~loss.detach().isfinite()).float()

    def grad_norm(self) -> Tensor:
        """L2 norm of the whole gradient, a float32 scalar on the device; of several processes, their gradients are added up first."""
        if not self.norms:
            self.division.reduce(self.named, self.updated)
            return self.division.norm([h.grad for h in self.holders.values() if h.grad is not None])
        left = {n: torch.linalg.vector_norm(h.grad) for n, h in self._left().items()}
        norms = {**self.norms, **left}
        first = next(iter(norms.values()))
        return torch.linalg.vector_norm(torch.stack([norms[n].to(first.device) for n in self.named if n in norms])).float()

    def nonfinite_gradients(self) -> list[str]:
        """Names of the weights whose gradient holds NaN or infinity."""
        found = {n for n, norm in self.norms.items() if not bool(norm.isfinite())}
        left = self._left()
        return self.division.names([n for n in self.named if n in found or (n in left and not bool(left[n].grad.isfinite().all()))])

    def step(self, rate: float, grad_norm: Tensor) -> None:
        """Clip by the given norm and update the weights at learning rate `rate`: those that the backward has not updated yet."""
        left = self._left()
        if self.max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(list(left.values()), self.max_grad_norm, grad_norm)
        self._update(list(left), rate)
        self.division.spread(self.named)

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on besides the weights: `<weight>/<statistic>` -> tensor."""
        states = {n: self.engine_of[id(p)].state.get(p, {}) for n, p in self.updated.items()}
        found = {f"{n}/{key}": value for n, state in states.items() for key, value in state.items()}
        return found | {f"{n}/master": m.detach() for n, m in self.masters.items() if n in self.saved_masters}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state()` gave, after the weights; CheckpointError when it belongs to other weights."""
        statistics: dict[str, dict[str, Tensor]] = {}
        for key, value in state.items():
            name, _, statistic = key.rpartition("/")
            own = self.updated.get(name)
            good = own is not None and (not value.ndim or value.shape == own.shape or value.numel() == scales_of(own, statistic))
            if not good:
                raise CheckpointError(f"optimizer state {key} fits no weight of this model; resume with the model that the run began with")
            statistics.setdefault(name, {})[statistic] = value
        if missing := [name for name in self.saved_masters if "master" not in statistics.get(name, {})]:
            raise CheckpointError(f"optimizer state has no float32 copy of {min(missing)}; resume with the master_weights of the run")
        for name, p in self.updated.items():
            found = statistics.get(name, {})
            if name in self.masters:
                p.data.copy_(found.pop("master") if name in self.saved_masters else self.named[name].detach())
            engine = self.engine_of[id(p)]
            counts_on_host = p.device.type == "cpu" or isinstance(engine, BlockwiseAdamW)
            engine.state[p] = {
                key: value.clone() if key == "step" and counts_on_host else value.to(p.device) for key, value in found.items()
            }

    def _engines(self, config: RunConfig) -> list[torch.optim.Optimizer]:
        """One for all weights, or, to update each on its own, one for each."""
        options: dict[str, Any] = {
            "lr": config.learning_rate,
            "betas": (config.adam_beta1, config.adam_beta2),
            "eps": config.adam_epsilon,
        }
        groups: dict[tuple[object, ...], dict[str, Any]] = {}  # by decay and factor of the rate
        for name, p in self.updated.items():
            decay = 0.0 if _NO_DECAY.search(name.lower()) else config.weight_decay
            factor = getattr(self.named[name], "rate_factor", 1.0)
            key = (name,) if self.in_backward else (decay, factor)
            group = groups.setdefault(key, {"params": [], "names": [], "places": [], "weight_decay": decay, "factor": factor})
            group["params"].append(p)
            group["names"].append(name)
            group["places"].append(self.division.place(self.named[name]))
        found: list[torch.optim.Optimizer] = []
        for parts in [[group] for group in groups.values()] if self.in_backward else [list(groups.values())]:
            if config.optimizer == "adamw_8bit" or config.stochastic_rounding:
                bits, seed = 8 if config.optimizer == "adamw_8bit" else 32, config.seed if config.stochastic_rounding else None
                found.append(BlockwiseAdamW(parts, bits=bits, seed=seed, **options))
            else:
                found.append(torch.optim.AdamW(parts, fused=True, **options))
        return found

    def _left(self) -> dict[str, Any]:
        """The holders of gradients that were not used up in the backward."""
        return {n: h for n, h in self.holders.items() if h.grad is not None and n not in self.norms}

    def _accumulated(self, name: str, weight: Tensor) -> None:
        """After a micro-batch's gradient of a weight: it goes to where it is accumulated, and in the last one into the update."""
        holder = self.holders[name]
        if holder is not weight and weight.grad is not None:  # None where all of it went into the buffer already
            buffer = getattr(weight, "main_grad", holder.grad)
            if buffer is None:
                holder.grad = weight.grad.float()
            else:
                buffer.add_(weight.grad)
            weight.grad = None
        if self.rate is None or self.skip is None or holder.grad is None:
            return
        norm = self.norms[name] = torch.linalg.vector_norm(holder.grad)
        self.skip = torch.maximum(self.skip, (~norm.isfinite()).float())
        self._update([name], self.rate, self.skip)
        kept = holder.grad is getattr(weight, "main_grad", None) or any(weight is p for p in self.kept_grads)
        if not kept:
            holder.grad = None

    def _update(self, names: Sequence[str], rate: float, skip: Tensor | None = None) -> None:
        """Update the weights of these names, whose engines have no other with a gradient; where `skip` is 1, nothing happens."""
        if not names:
            return
        for name in names:
            if self.on_host:
                self.masters[name].grad = _to_host(self.holders[name].grad)
            elif name in self.masters:
                self.masters[name].grad = self.holders[name].grad
        if self.on_host and self.named[names[0]].device.type == "cuda":
            torch.cuda.current_stream(self.named[names[0]].device).synchronize()  # the gradients have arrived
        for engine in {id(e): e for e in (self.engine_of[id(self.updated[n])] for n in names)}.values():
            for group in engine.param_groups:
                group["lr"] = rate * group["factor"]
            if skip is not None:
                device = self.updated[names[0]].device
                engine.grad_scale, engine.found_inf = None, skip.to(device)  # type: ignore[attr-defined]
            engine.step()
        copied = [name for name in names if name in self.copied]
        if copied:
            with torch.no_grad():
                torch._foreach_copy_(
                    [self.division.rows(self.named[n], self.named[n]) for n in copied], [self.masters[n] for n in copied], non_blocking=True
                )
        if self.on_host:
            for name in names:
                self.masters[name].grad = None


def _accumulated(optimizer: weakref.ref[Optimizer], name: str, weight: Tensor) -> None:
    if (alive := optimizer()) is not None:  # a weight that held its optimizer would never be freed
        alive._accumulated(name, weight)


class _Holder:
    """Of a gradient whose weight and copy cannot hold it."""

    grad: Tensor | None = None


def _copy(weight: Tensor, dtype: torch.dtype, *, host: bool) -> nn.Parameter:
    copy = weight.detach().to("cpu" if host else weight.device, dtype, copy=True)
    return nn.Parameter(copy.pin_memory() if host and weight.device.type == "cuda" else copy)


def _to_host(grad: Tensor) -> Tensor:
    if grad.device.type == "cpu":
        return grad
    return torch.empty(grad.shape, dtype=grad.dtype, pin_memory=True).copy_(grad, non_blocking=True)
