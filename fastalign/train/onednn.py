"""What oneDNN keeps of the products that it has compiled, on a CPU in 16 bits.

There every product is compiled for its shape, and the last CAPACITY of them are kept, 0.6 MiB each. A packed trunk has many shapes: the
tokens of a micro-batch are those of its linear layers, and the backward of attention has products for each pair of lengths of queries
and keys. (In float32 products go to MKL, which keeps nothing.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastalign.types import PackedBatch

CAPACITY = 1024  # ONEDNN_PRIMITIVE_CACHE_CAPACITY
# Two code buffers of 256 KiB, and what describes them. Measured: 513 MiB after the forwards and backwards of a trunk with 862 of them.
COMPILED = int(0.6 * 2**20)
PRODUCTS = {torch.ops.aten.mm.default: (0, 1), torch.ops.aten.addmm.default: (1, 2), torch.ops.aten.bmm.default: (0, 1)}
KEY_BLOCK = 512  # keys that torch's attention for CPUs takes at a time
IN_BLOCK = 3  # products of its backward for each shape of a block: d_value, d_key and d_query


def product_key(func: object, args: tuple[object, ...]) -> tuple[object, ...] | None:
    """What a product in 16 bits is compiled for: its operands' shapes and which of them are transposed; None of anything else."""
    places = PRODUCTS.get(func)  # type: ignore[call-overload]
    if places is None:
        return None
    operands = [args[place] for place in places]
    if not all(isinstance(x, Tensor) and x.dtype in (torch.bfloat16, torch.float16) for x in operands):
        return None
    return tuple((tuple(x.shape), x.stride(-1) == 1) for x in operands)  # type: ignore[attr-defined]


def attention_blocks(batch: PackedBatch) -> set[tuple[int, int]]:
    """(queries, keys) of the blocks that the backward of a batch's attention cuts its pieces into."""
    found: set[tuple[int, int]] = set()
    lengths = [stop - start for start, stop in zip(batch.bounds, batch.bounds[1:])]
    before = [-1] * len(lengths) if batch.shared is None else batch.shared.prefix
    for length, prefix in zip(lengths, before):
        keys = length + (lengths[prefix] if prefix >= 0 else 0)
        rows = 256 if length >= 768 else 64 if length >= 192 else 32
        for r in _parts(length, rows):
            found |= {(r, k) for k in _parts(keys, KEY_BLOCK)}
    return found


def compiled_bytes(products: int, token_counts: int, blocks: int) -> int:
    """Bytes that are kept for `products` of a micro-batch's linear layers, `token_counts` different sizes of it, and attention's blocks."""
    return COMPILED * min(CAPACITY, products * token_counts + IN_BLOCK * blocks)


def _parts(size: int, block: int) -> set[int]:
    whole, rest = divmod(size, block)
    return ({block} if whole else set()) | ({rest} if rest else set())


class Shapes:
    """The shapes of the micro-batches of a run in turn, which count where products are compiled for them."""

    def __init__(self) -> None:
        self.tokens: set[int] = set()
        self.blocks: set[tuple[int, int]] = set()
        self.seen: list[tuple[int, int, int]] = []  # of each micro-batch: its tokens, and how many sizes and blocks there were before

    def add(self, batch: PackedBatch) -> None:
        tokens = len(batch.input_ids)
        self.tokens.add(tokens)
        self.seen.append((tokens, len(self.tokens), len(self.blocks)))
        self.blocks |= attention_blocks(batch)

    def compiled(self, products: int, activations: float, tokens: int) -> int:
        """Bytes of compiled products at the highest moment, before the backward of a micro-batch: a later one has more, but may be smaller.

        `activations` are those of `tokens` tokens, the most that there are.
        """
        found = [compiled_bytes(products, sizes, blocks) - activations * (1 - own / tokens) for own, sizes, blocks in self.seen]
        return max(0, int(max(found)))
