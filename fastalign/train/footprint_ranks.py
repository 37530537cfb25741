"""What one of several processes holds in memory: the footprint of one process (`footprint`), divided as `distributed` divides it.

Every size is that of the largest process, the first one: rows of the first dimension are cut into equal runs, rounded up.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastalign.errors import ConfigError
from fastalign.objectives.base import RunConfig
from fastalign.train import footprint as one
from fastalign.train.distributed import buckets, layers_of, working_dtype
from fastalign.train.flops import head_weight
from fastalign.train.footprint import Footprint
from fastalign.train.holdings import Holdings, holdings, total

SMALLEST_SLAB = 1  # byte of logits: the head takes as few rows at a time as it can, so that the backward is the highest moment


@dataclass(frozen=True)
class Share:
    """Bytes of one process, by what `distributed.Divided` and `optim.Optimizer` make."""

    weights: int  # buffers of the model apart
    masters: int
    moments: int
    gradients: int  # where micro-batches add to them
    reduced: int  # sums of gradients over all processes, at the update
    exchange: int  # the most that travels at the update besides
    update: int  # temporaries of the optimizer
    head: int  # by how much the rows of a divided head are fewer
    layer: int  # the largest layer, gathered, where layers are divided
    trained: int  # and its gradient, as it is made
    reduction: int  # and that gradient, as it is reduced


@dataclass(frozen=True)
class MomentsOfRank:
    """What a step of one of several processes holds, as parts that grow with the number of layers on lines of their own."""

    share: Share  # of all layers
    layers: int  # all
    size: int  # processes of a group
    device: torch.device
    alone: one.Moments  # of a process alone
    backward: one.Moments | None  # and with hardly any logits, where layers are gathered: not while the head has its logits
    weights: int  # bytes of the whole model, buffers apart
    scratch: int  # of a divided head, more than of a whole one

    def beyond(self, more: MomentsOfRank, steps: int) -> MomentsOfRank:
        """The line from these to `more`, continued for `steps` times the distance (`footprint.Moments.beyond`)."""
        backward = None if self.backward is None or more.backward is None else self.backward.beyond(more.backward, steps)
        alone, weights = self.alone.beyond(more.alone, steps), self.weights + steps * (more.weights - self.weights)
        return replace(self, alone=alone, backward=backward, weights=weights)

    @property
    def footprint(self) -> Footprint:
        """The highest one."""
        share, found = self.share, self.alone
        held = dict.fromkeys(one.PARTS, 0)
        held[one.WEIGHTS] = found.step[one.WEIGHTS] - self.weights + share.weights if share.layer or share.head else found.step[one.WEIGHTS]
        held[one.REFERENCE] = max(0, found.step[one.REFERENCE] - share.head)  # a copy is whole (`is_divided_first`) but for its head
        held |= {one.MASTERS: share.masters, one.MOMENTS: share.moments, one.COMPILED: found.step[one.COMPILED]}
        update = {**held, one.GRADIENTS: share.gradients + share.reduced, one.UPDATE: max(share.update, share.exchange)}

        def micro_batch(measured: one.Moments) -> dict[str, int]:
            own = {name: measured.step[name] for name in (one.ACTIVATIONS, one.HEAD, one.BACKWARD)}
            gradients = share.gradients if share.layer or share.head else min(share.gradients, measured.step[one.GRADIENTS])
            return {**held, **own, one.GRADIENTS: gradients}

        scoring = micro_batch(found)
        scoring[one.HEAD] += self.scratch
        moments = [update, scoring]
        if self.backward is not None:
            backward = micro_batch(self.backward)
            moments.append(backward | _in_flight(share, backward, self.layers, self.size, self.device))
        highest = max(moments, key=lambda parts: sum(parts.values()))
        work = replace(found.work, update=found.work.update / self.size)  # every process updates its rows
        return Footprint(highest, "optimizer" if highest is update else "micro-batch", 0, work)


class Gap(NamedTuple):
    """What is not predicted, since it has not been compared with a measurement."""

    reason: str
    instead: str  # what may be planned

    def __str__(self) -> str:
        return f"{self.reason} has not been compared with a measurement"


def unpredicted(config: RunConfig, processes: int, device: torch.device) -> Gap | None:
    """Why the memory of one of `processes` is not predicted; None: it is."""
    if processes == 1:
        return None
    if device.type != "cpu":
        return Gap(
            f"what one of several processes on {device.type} holds",
            "--ranks 1 says what a process alone holds, --model.device cpu what processes hold that talk by gloo",
        )
    if config.parallel.head == "vocab":
        return Gap("the scratch of a head that is divided", "set --parallel.head whole")
    if config.parallel.replicas > 1:
        group = processes // config.parallel.replicas
        return Gap("what each of several groups holds", f"leave --parallel.replicas out, and plan one group: --ranks {group}")
    if config.copies_model:
        return Gap("a reference that is a copy, on several processes,", "set --reference cache")
    return None


def check_predicted(config: RunConfig, processes: int, device: torch.device) -> None:
    """Raise ConfigError where `unpredicted` has a reason."""
    if gap := unpredicted(config, processes, device):
        raise ConfigError(f"ranks {processes}: {gap}, so it is not predicted; {gap.instead}")


def footprint_of_rank(model: nn.Module, config: RunConfig, processes: int, **options: Any) -> Footprint:
    """The highest moment of a step of one of `processes`, divided as `config.parallel` says; `options` are those of `footprint`.

    The `model` is a whole one, on any device; where it is divided already, what `without_storage` made of it before. Of one process
    it is `footprint`. Raises what that raises, and ConfigError and ModelError for a model that cannot be divided so.
    """
    if processes == 1:
        return one.footprint(model, config, **options)
    return moments_of_rank(model, config, processes, **options).footprint


def moments_of_rank(
    model: nn.Module, config: RunConfig, processes: int, *, whole: nn.Module | None = None, **options: Any
) -> MomentsOfRank:
    """All moments of a step of one of several processes. `whole`: the model with all its layers, where `model` has a few of them."""
    whole, device = model if whole is None else whole, torch.device(options.get("device", "cpu"))
    share = share_of(whole, config, processes, device)
    if share.layer:  # gradients of layers are small here, so that the first micro-batch, which lacks them, need not be looked at
        options["accumulates"] = True
    rows = options.get("rows") or options["tokens"]
    return MomentsOfRank(
        share,
        len(layers_of(whole)) if share.layer else 1,
        processes // config.parallel.replicas,
        device,
        one.moments(model, config, **options),
        one.moments(model, replace(config, logits_budget=SMALLEST_SLAB), **options) if share.layer else None,
        sum(map(_bytes, model.parameters())),
        _of_divided_head(model, config, rows, device, processes) if share.head else 0,
    )


def _of_divided_head(model: nn.Module, config: RunConfig, rows: int, device: torch.device, processes: int) -> int:
    """By how much the scratch of a head that is divided differs from that of a whole one (`head.parallel_loss.Rounds`)."""
    size, weight = processes // config.parallel.replicas, head_weight(model)
    assert weight is not None
    alone, plan = (one.head_plan(model, config, n * rows, device, parts=n) for n in (1, size))
    assert alone is not None and plan is not None
    slab = plan.slab_rows // size * size  # rows of all processes
    tiles = 4 * (slab * plan.tile_cols - alone.slab_rows * alone.tile_cols)
    rows_here = 2 * weight.element_size() * slab  # as they are received, and in one piece (`Exchange.gather`)
    gradients = 2 * 4 * slab  # of the rows, and as they are sent (`Exchange.sums`)
    return tiles + weight.shape[1] * (rows_here + gradients - 4 * alone.slab_rows)


def _in_flight(share: Share, parts: dict[str, int], layers: int, size: int, device: torch.device) -> dict[str, int]:
    """Gathered layers and gradients on their way at the highest moment of a backward, besides `parts`.

    A layer is gathered when its backward begins, and the one before it at once (`set_modules_to_backward_prefetch`). When its backward
    is over it is freed and its gradient, which is there in full, is copied into one float32 buffer and freed (`foreach_reduce`). The
    buffer stays until the next layer is as far (FSDP2's `reduce_scatter_max_input_buffers`, 1); the sum is of its share. The layer's
    activations have gone by then.
    """
    layer, trained, reduction = share.layer, share.trained, share.reduction
    on_cpu = device.type == "cpu"
    of_a_layer = parts[one.ACTIVATIONS] // layers
    copied = max(0, layer - parts[one.BACKWARD]) * on_cpu  # gloo gathers into a copy of its own, before the backward of a layer has begun
    begins = 2 * layer + copied
    summed = reduction // size + reduction * on_cpu  # gloo reduces a copy of what it is given
    over = layer + reduction + max(trained, summed) - of_a_layer
    next_begins = 2 * layer + copied + reduction - of_a_layer
    next_ends = 2 * layer + trained + reduction - 2 * of_a_layer
    most = max(begins, over, next_begins, next_ends)
    gathered = min(most, begins)
    return {one.GATHERED: gathered, one.TRAVELLING: most - gathered}


def share_of(model: nn.Module, config: RunConfig, processes: int, device: torch.device) -> Share:
    """What a process holds of the weights of `model` (whole, on any device), and what of them travels."""
    parallel = config.parallel
    size = processes // parallel.replicas
    layers = layers_of(model) if parallel.shard == "full" and size > 1 else []
    working = {id(p): dtype for layer in layers for dtype in [working_dtype(layer, config)] for p in layer.parameters()}
    head = head_weight(model) if parallel.head == "vocab" else None
    weights = masters = gradients = less = 0
    moments: list[Holdings] = []
    travels: list[Tensor] = []  # gradients that are reduced at the update
    whole: list[Tensor] = []  # weights whose rows are gathered after it
    summed = 0  # of a divided head, over the groups
    for p in model.parameters():
        rows = _rows(p, size)
        if id(p) in working:  # rows of a layer; in float32 where that is the copy of a 16-bit weight (`_precision`)
            rows = rows.to(torch.float32 if working[id(p)] is not None else p.dtype)
            weights += _bytes(rows)
            if p.requires_grad:
                moments.append(holdings(rows, config, device))  # float32 or not, there is no further copy
                gradients += _bytes(rows)  # FSDP2 casts a sum to the dtype of the rows
            continue
        divided = head is not None and p is head
        weights += _bytes(rows if divided else p)
        less += (_bytes(p) - _bytes(rows)) * divided
        if not p.requires_grad:
            continue
        own = holdings(rows, config, device)  # copies and moments are of the rows that are updated here (`_Rows.rows`)
        wide = own.gradient > _bytes(rows)
        masters, moments = masters + own.master, [*moments, own]
        gradients += holdings(rows if divided else _meta(p), config, device).gradient
        if divided:
            summed += 4 * rows.numel() * (parallel.replicas > 1)  # `_of_replicas`
            continue
        travels.append(_meta(p).to(torch.float32 if wide else p.dtype))
        whole.append(_meta(p))
    reduced, exchange = _exchanged(travels, whole, size, device)
    largest = max(layers, key=lambda layer: sum(map(_bytes, layer.parameters())), default=None)
    own_layer = [] if largest is None else list(largest.parameters())
    padded = [(p, size * _rows(p, size).numel()) for p in own_layer]
    of_all = total(moments)
    return Share(
        weights,
        masters,
        of_all.moments,
        gradients,
        reduced + summed,
        exchange,
        of_all.update,
        less,
        sum(count * p.element_size() for p, count in padded),  # it is gathered in the dtype that it has in the model
        sum(_bytes(p) for p in own_layer if p.requires_grad),
        sum(4 * count for p, count in padded if p.requires_grad),  # `MixedPrecisionPolicy.reduce_dtype`
    )


def _exchanged(travels: list[Tensor], whole: list[Tensor], size: int, device: torch.device) -> tuple[int, int]:
    """Bytes of the sums that `_Rows.reduce` leaves, and the most that it and `_Rows.spread` hold besides."""
    reduced = sum(_rows(grad, size).numel() * grad.element_size() for grad in travels)
    received, most = 0, 0
    for bucket in buckets(travels):
        sent = 4 * size * sum(_rows(grad, size).numel() for grad in bucket)  # in float32, whatever the gradient is in
        received += sent // size
        most = max(most, sent * (2 if device.type == "cpu" else 1) + received - reduced)  # gloo reduces a copy of what it is given
    most = max(most, received if received > reduced else 0)  # sums of 16-bit gradients, while they are rounded
    for bucket in buckets(whole):
        row = sum(_rows(weight, size).numel() for weight in bucket) * bucket[0].element_size()
        most = max(most, (size * (2 if device.type == "cpu" else 1) + 1) * row)  # gloo gathers into a copy of its own
    return reduced, most


def travels(model: nn.Module, config: RunConfig, processes: int, *, forwards: int = 1) -> tuple[int, int]:
    """Bytes that pass through a process, as a ring moves them, in a micro-batch with so many `forwards`, and in an update."""
    size = processes // config.parallel.replicas
    layers = layers_of(model) if config.parallel.shard == "full" and size > 1 else []
    divided = {id(p) for layer in layers for p in layer.parameters()}
    gathered = sum(_bytes(p) for layer in layers for p in layer.parameters())
    reduced = sum(4 * p.numel() for layer in layers for p in layer.parameters() if p.requires_grad)
    whole = [p for p in model.parameters() if p.requires_grad and id(p) not in divided]
    update = sum(4 * p.numel() + _bytes(p) for p in whole)
    return (size - 1) * ((forwards + 1) * gathered + reduced) // size, (size - 1) * update // size


def without_storage(model: nn.Module) -> Any:
    """`model` on the meta device, for a prediction when its weights have been divided."""
    made = {id(t): t.to("meta") for t in model.buffers()}
    made |= {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, made)  # type: ignore[arg-type]


def _meta(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _rows(tensor: Tensor, size: int) -> Tensor:
    """What the first of `size` processes has of `tensor`, without storage (`distributed._part`)."""
    shape = tensor.shape or (1,)
    return torch.empty(-(-shape[0] // size), *shape[1:], dtype=tensor.dtype, device="meta")


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
