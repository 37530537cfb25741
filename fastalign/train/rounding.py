"""Stochastic rounding to bfloat16, which keeps on average what rounding to the nearest would lose."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_LOW = 0xFFFF  # bits of a float32 that a bfloat16 does not have
_INFINITE = 0x7F800000  # exponent of infinity and NaN


def random_bits(count: int, generator: torch.Generator) -> Tensor:
    """(count,) int32, each of 16 random bits."""
    return torch.randint(0, _LOW + 1, (count,), dtype=torch.int32, device=generator.device, generator=generator)


def round_stochastically(values: Tensor, generator: torch.Generator | None = None, *, random: Tensor | None = None) -> Tensor:
    """`values` (...) in float32, each rounded to one of the two bfloat16 numbers beside it: up with the probability of its remainder.

    The mean over the random numbers is the value itself, so that updates far smaller than a bfloat16 can hold add up (Gupta 2015,
    arXiv:1502.02551 eq. 4). A bfloat16 is a float32 without its low 16 bits, so adding 16 random bits and cutting them off does it, for
    both signs. What bfloat16 holds exactly, infinity and NaN stay as they are. The random bits are drawn, or given as `random` (...).

    >>> value, generator = torch.tensor([1.0, 1 + 2.0**-9]).repeat_interleave(10_000), torch.Generator().manual_seed(0)
    >>> rounded = round_stochastically(value, generator).float().view(2, -1)
    >>> rounded[0].unique().tolist(), rounded[1].unique().tolist(), round(float(rounded[1].mean()), 3)
    ([1.0], [1.0, 1.0078125], 1.002)
    """
    bits = values.view(torch.int32)
    if random is None:
        assert generator is not None
        random = random_bits(bits.numel(), generator).view(bits.shape)
    finite = (bits & _INFINITE) != _INFINITE
    bits = torch.where(finite, (bits + random) & ~_LOW, bits)
    return bits.view(torch.float32).to(torch.bfloat16)


def generator_for(device: torch.device, *key: object) -> torch.Generator:
    """Random numbers that depend on `key` alone, such as (seed, step, name of a weight)."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)
