"""What the trunk costs, counted by torch: with a shared prompt P + 2R tokens, without 2 (P + R)."""

from __future__ import annotations

import torch
from tiny import tiny_model
from torch.utils.flop_counter import FlopCounterMode

from fastalign.models.load import load_model
from fastalign.models.trunk import trunk
from fastalign.packing import collate
from fastalign.types import PackedBatch, Sample

P, R = 40, 20
PAIR = Sample(0, tuple(range(1, P + 1)), ((7,) * R, (9,) * R))


def flops(batch: PackedBatch) -> int:
    """Of the linear layers in a forward and backward pass."""
    model = load_model(tiny_model("qwen3")).train()
    with FlopCounterMode(display=False) as counter:
        trunk(model, batch).hidden.sum().backward()
    found = counter.get_flop_counts()["Global"]
    return sum(count for op, count in found.items() if "mm" in str(op))


def test_linear_layers_see_a_shared_prompt_once() -> None:
    apart, shared = collate([PAIR]), collate([PAIR], share=True)
    assert (len(apart.input_ids), len(shared.input_ids)) == (2 * (P + R), P - 1 + 2 * (R + 1))
    assert flops(apart) > 0
    assert flops(shared) * len(apart.input_ids) == flops(apart) * len(shared.input_ids)


def test_hidden_states_of_a_shared_prompt_are_those_of_each_sequence() -> None:
    model = load_model(tiny_model("qwen3"))
    apart, shared = collate([PAIR]), collate([PAIR], share=True)
    with torch.no_grad():
        a, b = trunk(model, apart).hidden, trunk(model, shared).hidden
    for own, rows in zip(apart.sequences(), shared.sequences(), strict=True):
        torch.testing.assert_close(b[rows], a[own], rtol=1e-5, atol=1e-5)
