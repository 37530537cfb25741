"""What the makers' data sheets say of devices."""

from __future__ import annotations

import re
from typing import NamedTuple


class Card(NamedTuple):
    """A device. TFLOP/s are of dense bfloat16 products with float32 sums."""

    pattern: str  # a regular expression in the name that torch gives it, which others with other numbers do not match
    gigabytes: int  # 10^9 bytes
    teraflops: float
    terabytes: float  # per second
    listed: bool = True  # in the tables of `fastalign plan`


CARDS: dict[str, Card] = {
    "L4": Card(r"\bL4$", 24, 121.0, 0.3),
    "RTX 4090": Card(r"\bRTX 4090$", 24, 165.0, 1.008),
    "L40S": Card(r"\bL40S\b", 48, 362.0, 0.864),
    "A100 80 GB": Card(r"\bA100\b", 80, 312.0, 2.039),  # that of 40 GB has the same arithmetic
    "H100 SXM": Card(r"\bH100\b(?! PCIe| NVL)", 80, 989.0, 3.35),
    "H200": Card(r"\bG?H200\b(?! NVL)", 141, 989.0, 4.8),
    "H100 PCIe": Card(r"\bH100 PCIe\b", 80, 756.0, 2.0, False),
    "B200": Card(r"\bB200\b", 180, 2250.0, 8.0, False),
    "A10G": Card(r"\bA10G\b", 24, 70.0, 0.6, False),
    "MI300X": Card(r"\bMI300X\b", 192, 1307.0, 5.3, False),
}


def card_of(device: str) -> Card | None:
    """The card that torch calls `device`; None: it is not in the table.

    >>> [card_of(name).teraflops for name in ("NVIDIA L4", "NVIDIA L40S", "NVIDIA H100 PCIe", "NVIDIA H100 80GB HBM3")]
    [121.0, 362.0, 756.0, 989.0]
    >>> [card_of(name) for name in ("NVIDIA L40", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H200 NVL")]
    [None, None, None]
    """
    return next((card for card in CARDS.values() if re.search(card.pattern, device)), None)
