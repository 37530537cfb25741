"""What a training step holds in memory, known before it runs.

The step runs on tensors without storage (torch's fake tensors): the model's own forward and backward, with a stand-in for its head
that allocates what `head.plan` says. Every allocation and every release is counted, as the real step's allocator would see
them, so that gradient checkpointing, adapters and whatever a model's layers keep need no formula of their own.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastalign.errors import ModelError
from fastalign.head.function import PITCH
from fastalign.head.plan import ROW_SCRATCH, Plan, make_plan
from fastalign.models.embedding import accumulate_in_place
from fastalign.models.trunk import causal_lm, text_config, trunk
from fastalign.objectives.base import RunConfig
from fastalign.objectives.online import OnlineConfig
from fastalign.packing import collate, pack_samples
from fastalign.train.flops import head_weight
from fastalign.train.holdings import holdings, total
from fastalign.train.onednn import CAPACITY, Shapes, compiled_bytes, product_key
from fastalign.types import PackedBatch, Sample, SharedPrompts

BYTES_IN_NF4 = 4.127 / 8  # of a weight: 4 bits, and its share of doubly quantized scales
ELSEWHERE = 1 << 28  # bytes of logits scratch on a CUDA device that is not here: what `default_budget` gives one of 24 GB
MOST_PIECES = 4096  # of the batch times layers: beyond them a batch of a few sequences is run instead, which is faster
GRADIENT_PASSES = 5  # over a gradient: it is cleared, its norm is read, it is scaled (twice), and the update reads it
LOGIT_PASSES = 2  # over a slab of logits besides its products: it is read, and its gradient written
PIECES = 2  # sequences of the batch that is run: what they are cut into hardly changes what is kept

# What holds memory, in the order of the table.
WEIGHTS, REFERENCE, MASTERS, MOMENTS, GRADIENTS, ACTIVATIONS, HEAD, BACKWARD, UPDATE, COMPILED, GATHERED, TRAVELLING = PARTS = (
    "weights",
    "reference copy",
    "float32 copies of weights",
    "optimizer state",
    "gradients",
    "activations",
    "head",
    "temporaries of the backward",
    "temporaries of the update",
    "compiled products",
    "gathered layers",  # of several processes, as the last one
    "gradients that travel",
)


@dataclass(frozen=True)
class Work:
    """What a micro-batch and an update do, whatever they keep: what is computed twice counts twice."""

    products: float = 0.0  # FLOPs of the trunk's matrix products
    attention: int = 0  # calls of attention kernels, of the forward and of forwards that are repeated
    attention_backward: int = 0  # and of its backward
    head: float = 0.0  # FLOPs
    moved: float = 0.0  # bytes that everything else reads and writes
    update: float = 0.0  # bytes that clipping and the optimizer read and write


@dataclass(frozen=True)
class Footprint:
    """Bytes at the highest moment of a step, by part."""

    parts: dict[str, int]
    moment: str  # "micro-batch" or "optimizer"
    on_host: int = 0  # besides, in the host's memory
    work: Work = field(default_factory=Work)

    @property
    def peak(self) -> int:
        return sum(self.parts.values())

    def __str__(self) -> str:
        """The parts in GiB, largest first.

        >>> print(Footprint({"weights": 3 << 30, "gradients": 1 << 30, "head": 0}, "optimizer"))
        weights 3.00, gradients 1.00
        """
        largest = sorted(self.parts.items(), key=lambda part: -part[1])
        return ", ".join(f"{name} {size / 2**30:.2f}" for name, size in largest if size >= 2**30 / 200)

    @property
    def growth(self) -> int:
        """Above the weights, which are there before training."""
        return self.peak - self.parts[WEIGHTS]


@dataclass(frozen=True)
class Moments:
    """Bytes by part at the two moments that can be the highest, each of which grows with the number of layers on a line of its own."""

    step: dict[str, int]  # during a micro-batch
    update: dict[str, int]  # during the optimizer's
    on_host: int
    work: Work

    @property
    def footprint(self) -> Footprint:
        """The higher one of them."""
        highest = sum(self.step.values()) >= sum(self.update.values())
        return Footprint(self.step if highest else self.update, "micro-batch" if highest else "optimizer", self.on_host, self.work)

    def beyond(self, more: Moments, steps: int) -> Moments:
        """The line from these to `more`, continued for `steps` times the distance: steps 1 is `more`."""

        def parts(few: dict[str, int], many: dict[str, int]) -> dict[str, int]:
            return {name: few[name] + steps * (many[name] - few[name]) for name in PARTS}

        work = Work(*(x + steps * (y - x) for x, y in zip(astuple(self.work), astuple(more.work))))
        host = self.on_host + steps * (more.on_host - self.on_host)
        return Moments(parts(self.step, more.step), parts(self.update, more.update), host, work)


def footprint(model: nn.Module, config: RunConfig, **options: Any) -> Footprint:
    """The highest moment of a step, with the options of `moments`."""
    return moments(model, config, **options).footprint


def moments(
    model: nn.Module,
    config: RunConfig,
    *,
    tokens: int,
    rows: int | None = None,
    accumulates: bool = True,
    device: torch.device | str = "cpu",
    batch: PackedBatch | None = None,
    shapes: Shapes | None = None,
    known: dict[Any, tuple[dict[str, int], Work]] | None = None,
) -> Moments:
    """Both moments of steps of `model` (on any device, meta included) whose largest micro-batch has `tokens` tokens.

    rows         of them are scored; None: all
    accumulates  a step has several micro-batches, so that gradients of the first are there during the second
    device       that training runs on: it decides the head's slabs
    batch        the micro-batch itself; None: a few sequences of the same length
    shapes       of all micro-batches; None: they are many, as in a long run on data of many lengths
    known        what micro-batches without `batch` were found to hold before, for those who ask often

    From the second step on, that is: with the optimizer's state. The sampling of online training is not in it, nor the forward of a
    reference, which holds less than the step's own, nor what libraries and Python need. Raises ModelError for a model whose
    layers look into their tensors.
    """
    rows, device = tokens if rows is None else rows, torch.device(device)
    trained = {id(p): p for p in model.parameters() if p.requires_grad}
    each = {key: holdings(p, config, device) for key, p in trained.items()}
    optimizer = total(each.values())
    weights = sum(map(_bytes, _tensors(model)))
    if config.model.quantization:
        weights -= sum(p.numel() * p.element_size() - round(BYTES_IN_NF4 * p.numel()) for p in _quantized(model))
    held = dict.fromkeys(PARTS, 0)
    streamed = getattr(config, "reference", None) == "stream" and device.type != "cpu"  # from host memory
    held |= {WEIGHTS: weights, REFERENCE: weights if keeps_copy(config) and not streamed else 0}
    held |= {MASTERS: optimizer.master, MOMENTS: optimizer.moments}
    left = each  # whose gradients are there when the backward is over
    if config.update_in_backward:
        in_place = _added_to_in_place(model)
        left = {key: h for key, h in each.items() if key in in_place}
    update = {**held, GRADIENTS: total(left.values()).gradient, UPDATE: optimizer.update}

    try:
        known = {} if known is None or batch is not None else known
        layers = getattr(text_config(causal_lm(model)), "num_hidden_layers", 1)
        gradients = tuple(h.gradient for h in each.values())
        key = (str(replace(config.model, quantization=None)), str(config.lora), gradients, config.update_in_backward)
        key += (head_plan(model, config, rows, device), config.name, tokens, rows, accumulates, device, layers)  # type: ignore[assignment]
        if key not in known:
            known[key] = _run(model, config, batch or _batch(tokens), max(1, rows), accumulates, device, shapes)
        own, work = known[key]
    except Exception as error:  # whatever a model's own code makes of tensors without values
        name = type(causal_lm(model)).__name__
        raise ModelError(f"{name} cannot run on tensors without storage, so its memory is not predicted: {error}") from error
    step = {name: held[name] + own.get(name, 0) for name in PARTS}
    update[COMPILED] = step[COMPILED]
    trained_bytes = sum(map(_bytes, trained.values()))
    held_twice = trained_bytes + optimizer.master + optimizer.moments + optimizer.on_host  # is read and written
    work = replace(work, update=2.0 * held_twice + GRADIENT_PASSES * total(each.values()).gradient)
    return Moments(step, update, optimizer.on_host, work)


def footprint_of_steps(
    model: nn.Module,
    config: RunConfig,
    steps: Iterable[Sequence[Sample]],
    *,
    max_tokens: int,
    device: torch.device | None = None,
    dealt: Callable[[Sequence[Sample]], list[list[Sample]]] | None = None,
    predict: Callable[..., Footprint] = footprint,
) -> Footprint:
    """The highest moment of these steps, by their largest micro-batch, on `device` (None: where `model` is).

    Of several processes `dealt` says what this one has of a step, and `predict` is what takes the place of `footprint`.
    """
    share = config.share_prompts
    shapes, largest, size, accumulates = Shapes(), None, (0, 0), False
    for samples in steps:
        if dealt is not None:
            bins = dealt(samples)
        else:
            bins = [[samples[i] for i in members] for members in pack_samples(samples, max_tokens, share=share)]
        accumulates |= len(bins) > 1
        for members in bins:
            batch = collate(members, share=share)
            shapes.add(batch)
            if (held := (len(batch.input_ids), len(batch.live))) > size:
                largest, size = batch, held
    device = device or next(model.parameters()).device
    layers = getattr(text_config(causal_lm(model)), "num_hidden_layers", 1)
    if largest is not None and len(largest.bounds) * layers > MOST_PIECES:
        largest = None
    return predict(model, config, tokens=size[0], rows=size[1], accumulates=accumulates, device=device, batch=largest, shapes=shapes)


def keeps_copy(config: Any) -> bool:
    """Whether the run holds a second model as its reference."""
    kind = getattr(config, "reference", None)
    adapter = config.lora.enabled or (Path(config.model.path) / "adapter_config.json").is_file()
    if isinstance(config, OnlineConfig):
        return config.beta > 0 and (kind in ("copy", "stream") or (kind == "auto" and not adapter))
    if kind == "auto" and getattr(config, "kl_scope", None) == "microbatch":  # KTO, whose rows cannot be known before
        return not adapter
    return kind in ("copy", "stream") or bool(getattr(config, "sync_ref_model", False))


def head_plan(model: nn.Module, config: RunConfig, rows: int, device: torch.device, *, parts: int = 1) -> Plan | None:
    """How the head would be computed for the policy, or for one of `parts` equal runs of its rows; None of a model without one."""
    weight, budget = head_weight(model), config.logits_budget
    if weight is None:
        return None
    if budget is None and device.type == "cuda" and not torch.cuda.is_available():
        budget = ELSEWHERE
    return make_plan(
        rows,
        -(-weight.shape[0] // parts),
        weight.shape[1],
        dtype=weight.dtype,
        device=device,
        head_grad=weight.requires_grad,
        local_loss=True,
        impl="auto" if device.type == "cpu" or torch.cuda.is_available() else "torch",
        budget=budget,
    )


MATRICES = {torch.ops.aten.mm.default: 0, torch.ops.aten.addmm.default: 1, torch.ops.aten.bmm.default: 0}  # and their left operand


class Ledger(TorchDispatchMode):
    """Counts the bytes of the storages that live, by the label of their allocation, and keeps the count of the highest moment."""

    def __init__(self) -> None:
        super().__init__()
        self.label = ACTIVATIONS
        self.owners: dict[int, tuple[str, int]] = {}
        self.live: dict[str, int] = {}
        self.highest: dict[str, int] = {}
        self.total = self.peak = 0
        self.products: set[Any] = set()  # what products in 16 bits are compiled for
        self.flops = self.moved = 0.0
        self.attention = [0, 0]  # kernels of the forward and of the backward

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # what a tensor without storage is asked for most often, and no work
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args)
        if key := product_key(func, args):
            self.products.add(key)
        result = func(*args, **(kwargs or {}))
        self._count(func, args, result)
        pinned = bool(kwargs and kwargs.get("pin_memory"))  # an activation that waits in host memory (model.checkpoint_offload)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.add(leaf, on_host=pinned)
        return result

    def _count(self, func: Any, args: Any, result: Any) -> None:
        """What an operator does: FLOPs of a product, a call of attention, or the bytes that it reads and writes."""
        name = func.name()
        if func in MATRICES:
            self.flops += 2.0 * result.numel() * args[MATRICES[func]].shape[-1]
        elif "scaled_dot_product" in name:
            self.attention["backward" in name] += 1
        elif not func.is_view and "empty" not in name:
            tensors = [leaf for leaf in tree_leaves((args, result)) if isinstance(leaf, Tensor)]
            self.moved += sum(map(_bytes, tensors))

    def add(self, tensor: Tensor, label: str | None = None, *, on_host: bool = False) -> None:
        """Count the storage of `tensor` until it is released, if it is new; as nothing if it is `on_host` while the step is on a device."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.owners:
            weakref.finalize(storage, self._release, key)
            self.owners[key] = ("", 0)
            self._move(key, label or self.label, 0 if on_host else storage.nbytes())
        elif label is not None:
            size = self.owners[key][1]
            self._release(key)
            self._move(key, label, size)

    def ignore(self, tensor: Tensor) -> None:
        """Of what is counted elsewhere."""
        self.owners[tensor.untyped_storage()._cdata] = ("", 0)

    def _move(self, key: int, label: str, size: int) -> None:
        self.owners[key] = (label, size)
        self.live[label] = self.live.get(label, 0) + size
        self.total += size
        if self.total > self.peak:
            self.peak, self.highest = self.total, dict(self.live)

    def _release(self, key: int) -> None:
        label, size = self.owners.pop(key)
        if size:
            self.live[label] -= size
            self.total -= size


class _Head(torch.autograd.Function):
    """Allocates what `LinearLoss` does: a tile, statistics, the gradient of the hidden states, and of the weight without a buffer."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, plan: Plan, buffered: bool) -> Tensor:
        work = torch.promote_types(hidden.dtype, torch.float32)
        grads = [torch.empty_like(hidden) if hidden.requires_grad else None, None]
        d_weight = torch.empty_like(weight, dtype=work) if weight.requires_grad and not buffered else None
        tile = hidden.new_empty(plan.slab_rows, -(-plan.tile_cols // PITCH) * PITCH, dtype=work)
        scratch = [tile, hidden.new_empty(ROW_SCRATCH, dtype=torch.uint8), hidden.new_empty(plan.slab_rows, hidden.shape[1], dtype=work)]
        del tile, scratch
        if d_weight is not None:
            grads[1] = d_weight.to(weight.dtype)
        ctx.save_for_backward(*grads)
        return hidden.new_zeros((), dtype=work)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return (*ctx.saved_tensors, None, None)


def _run(
    model: nn.Module,
    config: RunConfig,
    example: PackedBatch,
    rows: int,
    accumulates: bool,
    device: torch.device,
    shapes: Shapes | None,
) -> tuple[dict[str, int], Work]:
    """The parts of the highest moment of one micro-batch, on fake tensors, and what it does."""
    plan = head_plan(model, config, rows, device)
    before = torch.get_rng_state()
    try:
        with FakeTensorMode() as mode:
            fakes = {id(v): _fake(v) for v in _tensors(model)}
            fake = copy.deepcopy(model, dict(fakes))
            weight = head_weight(fake)
            in_place = _added_to_in_place(fake)
            ledger = Ledger()
            for value in fakes.values():
                ledger.ignore(value)
            parameters = [p for p in fake.parameters() if p.requires_grad]
            for p in parameters:
                size = holdings(p, config, device).gradient
                wide = size > _bytes(p)
                if id(p) in in_place or accumulates or (wide and not config.update_in_backward):
                    buffer = torch.empty(p.shape, dtype=torch.float32 if wide else p.dtype)
                    ledger.add(buffer, GRADIENTS)
                    if wide:
                        p.main_grad = buffer  # type: ignore[attr-defined]
                    else:
                        p.grad = buffer
                freed = config.update_in_backward and id(p) not in in_place
                p.register_post_accumulate_grad_hook(partial(_accumulated, ledger, wide, freed))
            batch = _moved(example, mode)
            fake.train()
            with ledger:
                hidden = trunk(fake, batch).hidden
                ledger.label = HEAD
                if weight is None or plan is None:
                    loss = hidden[:rows].float().sum()
                else:
                    live = hidden.index_select(0, torch.arange(rows)).to(weight.dtype)
                    buffered = weight.grad is not None or hasattr(weight, "main_grad")
                    loss = _Head.apply(live, weight, plan, buffered)
                    del live
                del hidden
                ledger.label = BACKWARD
                loss.backward()
            found = ledger.highest
            if device.type == "cpu" and ledger.products:
                products, tokens = len(ledger.products), len(example.input_ids)
                if shapes is None:
                    found[COMPILED] = compiled_bytes(products, CAPACITY, CAPACITY)
                else:
                    found[COMPILED] = shapes.compiled(products, found.get(ACTIVATIONS, 0), tokens)
            logits = 0.0 if weight is None or plan is None else float(rows) * weight.shape[0]
            head = logits * weight.shape[1] * plan.nvd if weight is not None and plan is not None else 0.0
            forwards, backwards = ledger.attention
            return found, Work(ledger.flops, forwards, backwards, head, ledger.moved + LOGIT_PASSES * 4.0 * logits)
    finally:
        torch.set_rng_state(before)


def _accumulated(ledger: Ledger, wide: bool, freed: bool, p: Any) -> None:
    """What the optimizer's own hook does with a gradient."""
    if p.grad is not None and not wide:
        ledger.add(p.grad, GRADIENTS)
    elif p.grad is not None and not hasattr(p, "main_grad"):
        p.main_grad = torch.empty(p.shape, dtype=torch.float32)
        ledger.add(p.main_grad, GRADIENTS)
    if wide or freed:
        p.grad = None
    if freed and hasattr(p, "main_grad"):
        del p.main_grad


def _added_to_in_place(model: nn.Module) -> set[int]:
    """Weights of the head and the embedding, whose gradients have buffers all the time."""
    embedding = causal_lm(model).get_input_embeddings()
    head = head_weight(model)
    found = {id(head)} if head is not None and head.requires_grad else set()
    return found | ({id(embedding.weight)} if accumulate_in_place(embedding) else set())


def _batch(tokens: int) -> PackedBatch:
    pieces = max(1, min(PIECES, tokens // 2))
    lengths = [max(2, tokens // pieces + (k < tokens % pieces)) for k in range(pieces)]
    return collate([Sample(k, (0,), ((0,) * (length - 1),)) for k, length in enumerate(lengths)])


def _moved(value: Any, mode: FakeTensorMode) -> Any:
    """A batch, or what prompts it shares, without storage."""
    if isinstance(value, Tensor):
        return mode.from_tensor(value)
    if isinstance(value, (PackedBatch, SharedPrompts)):
        return replace(value, **{name: _moved(item, mode) for name, item in vars(value).items()})
    return value


def _fake(value: Tensor) -> Tensor:
    made = torch.empty(value.shape, dtype=value.dtype)
    return nn.Parameter(made, value.requires_grad) if isinstance(value, nn.Parameter) else made


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    seen: set[int] = set()
    for value in (*model.parameters(), *model.buffers()):
        if id(value) not in seen:
            seen.add(id(value))
            yield value


def _quantized(model: nn.Module) -> Iterator[Tensor]:
    """The weights that 4-bit loading would pack and has not: those of the frozen linear layers but the head."""
    head = causal_lm(model).get_output_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head and not module.weight.requires_grad and module.weight.is_floating_point():
            yield module.weight


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
