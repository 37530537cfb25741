"""The MLP of every decoder layer on a few rows at a time, so that its wide activations never exist for a whole batch.

An MLP acts on each token alone. Its forward runs on slices of rows and keeps its input; the backward runs it again slice by slice
and adds the weights' gradients up in float32, to be rounded once. For N tokens and slices of n the activations as wide as
`intermediate_size` take n rows in place of N, in the forward, in the backward and between them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from fastalign.errors import ModelError
from fastalign.models.trunk import decoder_layers, evaluation, text_config

PROBE_ROWS = 5
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}  # others: 0.05


def slice_mlps(causal: Any, rows: int) -> None:
    """Let every MLP of `causal` take at most `rows` tokens at a time. Its weights and their names stay as they are.

    Raises ModelError, and changes nothing, when a layer has no MLP that acts on each token alone: mixtures of experts, whose
    routers look at all tokens, and MLPs that keep weights outside of linear layers, or whose results change with the slices.
    """
    name = type(causal).__name__
    mlps: list[Any] = []
    for index, layer in enumerate(decoder_layers(causal)):
        mlp = getattr(layer, "mlp", None)
        if not isinstance(mlp, nn.Module) or not _is_dense(mlp):
            kind = "no layer named mlp" if mlp is None else f"a {type(mlp).__name__}"
            raise ModelError(f"model.mlp_chunk: layer {index} of {name} has {kind}, not an MLP of linear layers; leave the option out")
        mlps.append(mlp)
    _check_rows(mlps[0], causal)
    for mlp in mlps:
        if "forward" in vars(mlp):  # that of Liger's kernels
            mlp.own_forward = vars(mlp).pop("forward")
        own: Any = type(mlp)
        mlp.__class__ = _sliced_class(own)
        mlp.rows_at_once = rows


def _is_dense(mlp: nn.Module) -> bool:
    """Whether all weights of `mlp` are those of linear layers, and none of these belongs to an expert."""
    from transformers.pytorch_utils import Conv1D

    for name, module in mlp.named_modules():
        if isinstance(module, nn.ModuleList) or "experts" in name.split("."):
            return False
        if not isinstance(module, (nn.Linear, Conv1D)) and next(module.parameters(recurse=False), None) is not None:
            return False
    return True


def _check_rows(mlp: Any, causal: Any) -> None:
    """Raise ModelError unless slices of random rows give what all of them give together."""
    weight = next(mlp.parameters())
    if weight.device.type == "meta":
        return
    generator = torch.Generator().manual_seed(0)
    dtype = causal.dtype
    x = torch.randn(1, PROBE_ROWS, text_config(causal).hidden_size, generator=generator).to(weight.device, dtype)
    with evaluation(mlp):
        whole = mlp(x)
        parts = [mlp(part) for part in x.split(2, dim=1)] if isinstance(whole, Tensor) else []
    if parts and whole.shape[:-1] == x.shape[:-1]:
        error = float((torch.cat(parts, dim=1) - whole).abs().max() / whole.abs().max().clamp(min=1e-30))
        if error <= _TOLERANCE.get(dtype, 0.05):
            return
    raise ModelError(f"model.mlp_chunk: {type(mlp).__name__} of {type(causal).__name__} does not act on each token alone; leave it out")


@cache
def _sliced_class(cls: Any) -> Any:
    """`cls` with a forward on slices. A class, not a method of the instance, so that copies of a model stay copies."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        whole = vars(self).get("own_forward") or partial(cls.forward, self)
        if hidden_states.shape[-2] <= self.rows_at_once:
            return whole(hidden_states)
        kept: list[Any] = []
        weights = [p for p in self.parameters() if p.requires_grad]
        return _Slices.apply(_Keep.apply(hidden_states, kept), kept, whole, self.rows_at_once, *weights)

    return type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__, "__qualname__": cls.__qualname__})


class _Keep(torch.autograd.Function):
    """The identity. It keeps its input for the backward of the slices that follow.

    Where the whole layer is checkpointed, its forward is repeated until everything that was kept is there again. As the input is kept
    here, and not by the slices, that is before their forward: the MLP is then computed twice in all, as without slices.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: list[Any]) -> Tensor:
        ctx.save_for_backward(x)
        kept.append(ctx)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        return upstream[0], None


class _Slices(torch.autograd.Function):
    """`whole` on slices of `rows` rows of x (..., N, D), with gradients to x and to `weights`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: list[Any], whole: Callable[[Tensor], Tensor], rows: int, *weights: Tensor) -> Tensor:
        if not ctx.needs_input_grad[0]:  # then nothing was kept before
            ctx.save_for_backward(x)
        ctx.kept, ctx.whole, ctx.rows, ctx.weights = kept, whole, rows, weights
        ctx.random = torch.get_rng_state(), *get_device_states(x)
        out: Tensor | None = None
        for k, part in enumerate(x.detach().split(rows, dim=-2)):
            found = whole(part)
            if out is None:
                out = found.new_empty(*x.shape[:-1], found.shape[-1])
            out[..., k * rows : k * rows + part.shape[-2], :] = found
        assert out is not None
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        needs_x, needs, rows = ctx.needs_input_grad[0], ctx.needs_input_grad[4:], ctx.rows
        (x,) = (ctx.kept[0] if needs_x else ctx).saved_tensors
        wanted = [weight for weight, need in zip(ctx.weights, needs) if need]
        sums: list[Tensor | None] = [None] * len(wanted)
        d_x = torch.empty_like(x) if needs_x else None
        with _random_numbers(x, *ctx.random):
            for k, (part, grad) in enumerate(zip(x.split(rows, dim=-2), upstream.split(rows, dim=-2))):
                with torch.enable_grad():
                    part = part.detach().requires_grad_(needs_x)
                    part = part.view_as(part)  # no leaf: hooks on modules (FlopCounterMode's) cannot deal with leaves here
                    out = ctx.whole(part)
                found = list(torch.autograd.grad(out, [part, *wanted] if needs_x else wanted, grad, allow_unused=True))
                del out
                if d_x is not None:
                    d_x[..., k * rows : k * rows + part.shape[-2], :] = found.pop(0)
                sums = [_sum(total, more) for total, more in zip(sums, found)]
        of_weights = iter(sums)
        d_weights: list[Tensor | None] = []
        for weight, need in zip(ctx.weights, needs):
            total = next(of_weights) if need else None
            d_weights.append(None if total is None else total.to(weight.dtype))
        return d_x, None, None, None, *d_weights


def _sum(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    """`total + more`, in place, in float32 at least."""
    if total is None or more is None:
        return total if more is None else more.to(torch.promote_types(more.dtype, torch.float32))
    return total.add_(more)


@contextmanager
def _random_numbers(x: Tensor, cpu: Tensor, devices: list[int], states: list[Tensor]) -> Iterator[None]:
    """Inside, random numbers go on from where they were in the forward: dropout of an adapter falls where it fell."""
    kind = x.device.type
    with torch.random.fork_rng(devices, device_type=kind) if devices else torch.random.fork_rng([]):
        torch.set_rng_state(cpu)
        if devices:
            set_device_states(devices, states, device_type=kind)
        yield
