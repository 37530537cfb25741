"""Several processes on one step: how the weights of a model are divided among them, and how they come together again.

The layers of the decoder are FSDP2's (`fully_shard`, one group of parameters each): gathered when they run, their gradient reduced as
it is made. All else, above all the embedding and the head, whose operator wants the whole weight, is whole on every process: its
gradient is reduced once a step, in float32 where the weights have float32 copies, every process updates its rows, and the rows are
gathered once a step. With shard optimizer that goes for the layers, too. With head vocab every process has its rows of the head alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from fastalign.errors import ConfigError, ModelError
from fastalign.models.divided_head import DividedHead, divide_head, divided_head, whole_shape
from fastalign.models.trunk import causal_lm, decoder
from fastalign.objectives.base import Copying, Objective, RunConfig
from fastalign.ranks import Ranks
from fastalign.train.optim import Division
from fastalign.types import Sample

Bin = list[Sample]

BUCKET = 1 << 25  # elements that travel together


class Alone:
    """The weights of a process that is alone: all of them are here."""

    division = Division()
    in_step = False  # whether processes wait for each other inside of micro-batches

    @contextmanager
    def whole(self) -> Iterator[None]:
        """All weights are here inside, so that processes may run the model as often as each of them likes."""
        yield

    def divide_copies(self, objective: Objective) -> None:
        """Divide what further models of the objective have in common with the one that is trained."""

    def idle(self, bins: Sequence[Sequence[Bin]], index: int) -> list[Bin]:
        """What rank `index`, with its share of `bins`, runs for nothing while others have more of them to run."""
        return []

    def make_whole(self) -> None:
        """Leave the model of the first process with whole weights, to be written; it is not trained after that."""


class Divided(Alone):
    """The weights of a model of several processes, divided by `config.parallel`: what is on the host goes to `device`, layer by layer."""

    def __init__(self, model: nn.Module, config: RunConfig, ranks: Ranks, device: torch.device) -> None:
        self.model, self.ranks = model, ranks
        replicas = config.parallel.replicas
        mesh = init_device_mesh(device.type, (replicas, ranks.size // replicas), mesh_dim_names=("replicate", "shard"))
        self.in_step = config.parallel.shard == "full" and ranks.size > replicas
        self.layers: list[Any] = []
        if self.in_step:
            self.layers = _divide_layers(model, mesh if replicas > 1 else mesh["shard"], config)
        self.heads: list[DividedHead] = []
        if config.parallel.head == "vocab":
            self.in_step = True
            divide_head(model, mesh["shard"].get_group(), self.heads)
        _bring(model, device)
        self.division = _Rows(ranks, mesh, device)

    @contextmanager
    def whole(self) -> Iterator[None]:
        for layer in self.layers:
            layer.unshard()
            layer.set_reshard_after_forward(False)
        try:
            with ExitStack() as stack:
                if self.heads:
                    stack.enter_context(self.ranks.serving(self.heads[0].serve))
                yield
        finally:
            for layer in self.layers:
                layer.set_reshard_after_forward(True)
                layer.reshard()

    def divide_copies(self, objective: Objective) -> None:
        if self.heads and isinstance(objective, Copying):
            for copy in objective.copies:
                divide_head(copy, self.heads[0].exchange.group, self.heads)

    def idle(self, bins: Sequence[Sequence[Bin]], index: int) -> list[Bin]:
        if not self.in_step:
            return []
        shortest = min((members for own in bins for members in own), key=lambda members: sum(sample.num_tokens for sample in members))
        return [shortest] * (max(map(len, bins)) - len(bins[index]))

    def make_whole(self) -> None:
        if self.heads:
            self.heads[0].make_whole()
        for module in self.model.modules():
            for name, parameter in list(module._parameters.items()):
                if isinstance(parameter, DTensor):
                    full = parameter.full_tensor().detach()
                    if self.ranks.is_first:
                        dtype = getattr(parameter, "working_dtype", full.dtype)
                        module._parameters[name] = nn.Parameter(full.to("cpu", dtype), requires_grad=parameter.requires_grad)


class _Rows(Division):
    """Equal runs of rows (of the first dimension) of every weight, one for each process of a group that holds one copy."""

    is_whole = False

    def __init__(self, ranks: Ranks, mesh: Any, device: torch.device) -> None:
        self.ranks, self.device = ranks, device
        self.shard, self.replicas = mesh["shard"].get_group(), mesh["replicate"].get_group()
        self.index, self.size = mesh["shard"].get_local_rank(), mesh["shard"].size()

    def rows(self, tensor: Tensor, of: Tensor | None = None) -> Tensor:
        if isinstance(tensor, DTensor):
            return tensor.to_local()
        return tensor if of is not None and divided_head(of) is not None else _part(tensor, self.index, self.size)

    def place(self, weight: nn.Parameter) -> tuple[int, int]:
        shape = whole_shape(weight)
        if not shape:
            return 0, 1
        rows = min(self.index * -(-shape[0] // self.size), shape[0])
        return rows * math.prod(shape[1:]), math.prod(shape)

    def parameter(self, weight: nn.Parameter) -> nn.Parameter:
        return nn.Parameter(self.rows(weight.detach(), weight))

    def masters(self, weights: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        return {name: self.parameter(weight) for name, weight in weights.items() if hasattr(weight, "working_dtype")}

    def copy(self, weight: Tensor, value: Tensor) -> None:
        if isinstance(weight, DTensor):
            weight.to_local().copy_(_part(value, self.index, self.size))
        elif divided_head(weight) is not None:
            weight.copy_(_part(value, self.index, self.size))
        else:
            weight.copy_(value)

    def kept(self, weight: nn.Parameter) -> Tensor:
        part = self.rows(weight.detach(), weight)
        return part.to(weight.working_dtype) if hasattr(weight, "working_dtype") else part

    def reduce(self, weights: Mapping[str, nn.Parameter], updated: Mapping[str, nn.Parameter]) -> None:
        whole: dict[str, Tensor] = {}
        for name, weight in weights.items():
            if isinstance(weight, DTensor):
                updated[name].grad = None if weight.grad is None else weight.grad.to_local()  # type: ignore[attr-defined]
            elif divided_head(weight) is not None:
                grad = getattr(weight, "main_grad", weight.grad)
                updated[name].grad = None if grad is None else self._of_replicas(grad).to(updated[name].dtype)
            elif (grad := getattr(weight, "main_grad", weight.grad)) is not None:
                whole[name] = grad
        names = [name for name, weight in weights.items() if not _is_divided(weight)]
        here = self.ranks.gather([name in whole for name in names])
        wanted = [name for name, *flags in zip(names, *here) if any(flags)]
        for name in set(names) - set(wanted):
            updated[name].grad = None  # of a weight that no micro-batch used
        grads = [whole[name] if name in whole else torch.zeros_like(weights[name]) for name in wanted]
        for name, part in zip(wanted, self._reduced(grads)):
            updated[name].grad = part.to(updated[name].dtype)

    def norm(self, grads: Iterable[Tensor]) -> Tensor:
        grads = list(grads)
        local = nn.utils.get_total_norm(grads).double().square().to(self.device)  # 0 of none
        dist.all_reduce(local, group=self.shard)
        return local.sqrt().float()

    def spread(self, weights: Mapping[str, nn.Parameter]) -> None:
        whole = [weight.detach() for weight in weights.values() if not _is_divided(weight)]
        for bucket in buckets(whole):
            self._spread(bucket)  # which frees what it sends and receives before the next

    def _spread(self, bucket: Sequence[Tensor]) -> None:
        widths = [_width(weight, self.size) for weight in bucket]
        sent = bucket[0].new_zeros(sum(widths))
        _lay(sent, [_part(weight, self.index, self.size) for weight in bucket], widths)
        received = sent.new_empty(self.size, len(sent))
        dist.all_gather_into_tensor(received.view(-1), sent, group=self.shard)
        for rank, row in enumerate(received):
            if rank != self.index:
                for weight, taken in zip(bucket, row.split(widths)):
                    part = _part(weight, rank, self.size)
                    part.copy_(taken[: part.numel()].view_as(part))

    def names(self, names: list[str]) -> list[str]:
        return sorted(set().union(*map(set, self.ranks.gather(names))))

    def _of_replicas(self, grad: Tensor) -> Tensor:
        """The sum of the gradients that the groups have, in float32 at least."""
        if self.replicas.size() == 1:
            return grad
        total = grad.to(torch.promote_types(grad.dtype, torch.float32), copy=True)
        dist.all_reduce(total, group=self.replicas)
        return total

    def _reduced(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """This process's rows of the sums of `grads` over all processes, in float32 at least, in the same order."""
        found: dict[int, Tensor] = {}
        place = {id(grad): i for i, grad in enumerate(grads)}
        for bucket in buckets(grads):
            widths = [_width(grad, self.size) for grad in bucket]
            wide = torch.promote_types(bucket[0].dtype, torch.float32)
            sent = torch.zeros(self.size, sum(widths), dtype=wide, device=bucket[0].device)
            for rank, row in enumerate(sent):
                _lay(row, [_part(grad, rank, self.size) for grad in bucket], widths)
            received = sent.new_empty(sent.shape[1])
            dist.reduce_scatter_tensor(received, sent.view(-1), group=self.shard)
            del sent, row  # before the next ones are made
            if self.replicas.size() > 1:
                dist.all_reduce(received, group=self.replicas)
            for grad, taken in zip(bucket, received.split(widths)):
                part = _part(grad, self.index, self.size)
                found[place[id(grad)]] = taken[: part.numel()].view_as(part)
        return [found[i] for i in range(len(grads))]


def of(model: nn.Module, config: RunConfig, ranks: Ranks, device: torch.device) -> Alone:
    """The weights of `model` as this run has them."""
    return Divided(model, config, ranks, device) if ranks.size > 1 else Alone()


def is_divided_first(config: RunConfig, ranks: Ranks) -> bool:
    """Whether a model is divided as soon as it has been read, so that a process never holds more than its share and a layer.

    The weights are then read to the host, where they are pages of their files, and go to the device layer by layer. An objective
    that makes a copy of the model, and kernels that are chosen by the device, need a whole one.
    """
    return ranks.size > 1 and config.parallel.shard == "full" and not config.copies_model and not config.model.liger_kernels


def device_of(config: RunConfig) -> torch.device:
    """Where the model is trained."""
    name = config.model.device
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def on_host(config: RunConfig) -> RunConfig:
    """`config` with the model read to the host."""
    return replace(config, model=replace(config.model, device="cpu"))


def _bring(model: nn.Module, device: torch.device) -> None:
    """Move to `device` what FSDP2 has left where it was; parameters keep their identity."""
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and not isinstance(parameter, DTensor) and parameter.device.type != device.type:
                parameter.data = parameter.data.to(device)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type != device.type:
                module._buffers[name] = buffer.to(device)


def _is_divided(weight: Tensor) -> bool:
    """Whether this process holds its rows of `weight` alone."""
    return isinstance(weight, DTensor) or divided_head(weight) is not None


def _part(tensor: Tensor, index: int, size: int) -> Tensor:
    """Rows of `tensor` that process `index` of `size` has: as many as every other, but for the last ones. As FSDP2 cuts."""
    tensor = tensor if tensor.ndim else tensor.view(1)
    rows = -(-len(tensor) // size)
    return tensor[min(index * rows, len(tensor)) : (index + 1) * rows]


def _width(tensor: Tensor, size: int) -> int:
    """Elements of the largest part."""
    return -(-len(tensor) // size) * math.prod(tensor.shape[1:]) if tensor.ndim else 1


def _lay(row: Tensor, parts: Iterable[Tensor], widths: Sequence[int]) -> None:
    for place, part in zip(row.split(list(widths)), parts):
        place[: part.numel()] = part.reshape(-1)


def buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one dtype and, but for a single larger one, at most BUCKET elements."""
    bucket: list[Tensor] = []
    for tensor in sorted(tensors, key=lambda t: str(t.dtype)):
        if bucket and (bucket[0].dtype != tensor.dtype or sum(t.numel() for t in bucket) + tensor.numel() > BUCKET):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def layers_of(model: nn.Module) -> list[Any]:
    """The layers of the decoder, which shard full divides. Raises ModelError where there is no list of them."""
    trunk = decoder(causal_lm(model))
    stacks = [module for module in trunk.children() if isinstance(module, nn.ModuleList)]
    if not stacks:
        raise ModelError(f"{type(trunk).__name__} has no list of layers that could be divided; set --parallel.shard optimizer")
    return max((list(stack) for stack in stacks), key=len)


def _divide_layers(model: nn.Module, mesh: Any, config: RunConfig) -> list[Any]:
    """FSDP2 for the layers of the decoder, each a group; the other weights stay as they are."""
    trunk = decoder(causal_lm(model))
    if config.model.quantization:
        raise ConfigError("parallel.shard full cannot divide 4-bit weights; set --parallel.shard optimizer")
    layers = layers_of(model)
    inside = {id(p) for layer in layers for p in layer.parameters()}
    outside = {p for p in trunk.parameters() if id(p) not in inside}
    if any(id(p) in inside for module in model.modules() if module not in set(trunk.modules()) for p in module._parameters.values()):
        raise ModelError(f"{type(trunk).__name__} shares weights of its layers; set --parallel.shard optimizer")
    if any(isinstance(part, nn.ModuleList) and "expert" in name for name, part in trunk.named_modules()):
        raise ModelError(
            f"{type(trunk).__name__} has its experts one by one, and which of them get a gradient differs between processes, which "
            "parallel.shard full cannot bear; set it to optimizer"
        )
    for layer in layers:
        notes = {name: getattr(p, "rate_factor", None) for name, p in layer.named_parameters()}
        policy = _precision(layer, config)
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
        for name, p in layer.named_parameters():
            if notes[name] is not None:
                p.rate_factor = notes[name]  # type: ignore[attr-defined]
            if policy.param_dtype is not None:
                p.working_dtype = policy.param_dtype  # type: ignore[attr-defined]
    fully_shard(trunk, mesh=mesh, reshard_after_forward=False, ignored_params=outside)
    for before, layer in zip([layers[0], *layers], layers):
        # FSDP2 by itself fetches what ran before a layer, which may be a rollout, and some processes have none: they would wait for ever.
        layer.set_modules_to_backward_prefetch([before])  # type: ignore[operator]  # the first one names itself, which is there
    for module in (*layers, trunk):
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)  # denominators are the step's: gradients add up
        module.set_force_sum_reduction_for_comms(True)
        module.unshard()  # makes the gathered weights, with the flags that weights have now, before adapters are switched
        module.reshard()
    return layers


def _precision(layer: nn.Module, config: RunConfig) -> MixedPrecisionPolicy:
    """How `layer` is gathered. Trainable 16-bit weights become float32, which is what is divided, and are gathered as they were."""
    working = working_dtype(layer, config)
    if working is not None:
        for p in layer.parameters():
            p.data = p.data.float()
    return MixedPrecisionPolicy(param_dtype=working, reduce_dtype=torch.float32, cast_forward_inputs=False)


def working_dtype(layer: nn.Module, config: RunConfig) -> torch.dtype | None:
    """The 16-bit dtype that `layer` is gathered in, of which float32 weights are divided; None: it is divided as it is."""
    trained = {p.dtype for p in layer.parameters() if p.requires_grad}
    found = {p.dtype for p in layer.parameters()}
    if config.master_weights and trained - {torch.float32}:
        if len(found) > 1:
            names = ", ".join(sorted(str(dtype) for dtype in found))
            raise ConfigError(f"parallel.shard full needs layers of one dtype to train them, these have {names}; set it to optimizer")
        return found.pop()
    if len(trained) > 1:
        raise ConfigError("parallel.shard full needs trainable weights of one dtype in a layer; set it to optimizer")
    return None
