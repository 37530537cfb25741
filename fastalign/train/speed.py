"""How long a step takes: what it computes and moves, by the rates of the device at hand, which are measured, or those of a data sheet."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from fastalign.models.trunk import causal_lm, text_config
from fastalign.train.cards import CARDS
from fastalign.train.flops import head_weight, main_dtype
from fastalign.train.footprint import Work

SECONDS = 1.0  # that a measurement takes, about
REPEATS = 3  # of each, at least; the median counts
ROWS = {"cpu": 2048, "cuda": 8192}  # of a product that is measured, at most
CALL = 0.02  # seconds of one on a CPU
COPY = {"cpu": 64 << 20, "cuda": 512 << 20}  # bytes that are copied
ATTAINED = 0.55  # share of a card's peak that products reach in training
ATTAINED_MEMORY = 0.8  # and of its bandwidth


@dataclass(frozen=True)
class Rates:
    """What a device does in a second, and where the numbers are from."""

    products: float  # FLOP/s of the trunk's linear layers
    head: float  # and of the head's
    attention: float
    memory: float  # bytes/s
    source: str


@dataclass(frozen=True)
class Step:
    """Seconds of a micro-batch, by part, and of the update that comes once in a step."""

    products: float
    attention: float
    head: float
    rest: float
    update: float

    @property
    def micro_batch(self) -> float:
        return self.products + self.attention + self.head + self.rest


def seconds(work: Work, attention: float, rates: Rates, *, reference: float = 0.0) -> Step:
    """Of `work`, whose attention has `attention` FLOPs forward and backward without repetition; `reference` is the FLOPs of one's forward.

    >>> seconds(Work(3e12, 2, 1, 4e12, 1e9, 2e9), 3e12, Rates(1e12, 2e12, 1e12, 1e9, ""))
    Step(products=3.0, attention=4.0, head=2.0, rest=1.0, update=2.0)
    """
    forwards = work.attention / work.attention_backward if work.attention_backward else 0.0
    repeated = attention * (forwards + 2) / 3 if work.attention_backward else 0.0  # a backward is two forwards
    products = (work.products + reference) / rates.products
    return Step(products, repeated / rates.attention, work.head / rates.head, work.moved / rates.memory, work.update / rates.memory)


def of_card(name: str) -> Rates:
    """An estimate for a card that need not be here."""
    tera, bandwidth = CARDS[name].teraflops, CARDS[name].terabytes
    rate = ATTAINED * tera * 1e12
    source = f"estimate: {ATTAINED:.0%} of {tera:.0f} TFLOP/s, {ATTAINED_MEMORY:.0%} of {bandwidth:.2g} TB/s"
    return Rates(rate, rate, rate, ATTAINED_MEMORY * bandwidth * 1e12, source)


def measure(model: Any, device: torch.device, *, tokens: int, length: int) -> Rates:
    """Rates of `device` for the products of `model` (which may be on the meta device) in micro-batches of `tokens` tokens.

    Measured are the shapes that make up most of the trunk's arithmetic, the head's, attention of a sequence of `length` tokens, and a copy.
    """
    dtype = main_dtype(model)
    shapes = _shapes(model)
    head = head_weight(model)
    share = SECONDS / (len(shapes) + 3)

    def product(shape: Sequence[int]) -> float:
        """FLOP/s."""
        rows = min(tokens, ROWS.get(device.type, 2048))
        columns, inner = shape
        weight = torch.ones(columns, inner, dtype=dtype, device=device)
        if device.type == "cpu":  # not longer than it must be
            few = torch.ones(min(rows, 32), inner, dtype=dtype)
            rows = max(len(few), min(rows, int(len(few) * CALL / _median(lambda: few @ weight.T, device, CALL))))
        x = torch.ones(rows, inner, dtype=dtype, device=device)
        return 2.0 * rows * columns * inner / _median(lambda: x @ weight.T, device, share)

    spent = sum(columns * inner * count / product((columns, inner)) for (columns, inner), count in shapes.items())
    trunk = sum(columns * inner * count for (columns, inner), count in shapes.items()) / spent
    if head is None:
        rate = trunk
    else:
        rate = product((min(len(head), 32768), head.shape[1]))  # a tile of it
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"
    return Rates(
        trunk, rate, _attention(model, device, dtype, length, share), _copy(device, share), f"measured on {name}, {str(dtype)[6:]}"
    )


def _shapes(model: Any) -> dict[tuple[int, int], int]:
    """The shapes of the trunk's linear layers that have nineteen parts in twenty of their numbers, and how many have them."""
    causal = causal_lm(model)
    left_out = {id(p) for p in causal.get_input_embeddings().parameters()} | {id(head_weight(model))}
    found: Counter[tuple[int, int]] = Counter()
    for weight in model.parameters():
        if weight.ndim >= 2 and id(weight) not in left_out:
            found[(weight.shape[-2], weight.shape[-1])] += weight.shape[:-2].numel()
    sizes = {shape: shape[0] * shape[1] * count for shape, count in found.items()}
    kept: dict[tuple[int, int], int] = {}
    for shape in sorted(sizes, key=lambda shape: -sizes[shape]):
        if sum(sizes[other] for other in kept) < 0.95 * sum(sizes.values()):
            kept[shape] = found[shape]
    return kept


def _attention(model: Any, device: torch.device, dtype: torch.dtype, length: int, share: float) -> float:
    """FLOP/s of a forward and its backward, the causal half of the scores counted."""
    config = text_config(causal_lm(model))
    heads = int(config.num_attention_heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    length = min(length, 2048)
    x = torch.ones(1, heads, length, head_dim, dtype=dtype, device=device, requires_grad=True)

    def run() -> None:
        F.scaled_dot_product_attention(x, x, x, is_causal=True).sum().backward()  # type: ignore[no-untyped-call]
        x.grad = None

    return 6.0 * heads * head_dim * length * length / _median(run, device, share)


def _copy(device: torch.device, share: float) -> float:
    size = COPY.get(device.type, 64 << 20)
    a, b = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2.0 * size / _median(lambda: a.copy_(b), device, share)


def _median(run: Callable[[], object], device: torch.device, share: float) -> float:
    """Seconds of `run`: the median of a few, and of as many as go into `share` seconds; the first one does not count."""
    times: list[float] = []
    began = time.perf_counter()
    while len(times) <= REPEATS or (time.perf_counter() - began < share and len(times) < 100):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return max(statistics.median(times[1:]), 1e-9)
