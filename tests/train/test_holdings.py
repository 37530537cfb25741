"""What the planner says of an optimizer against the bytes of a real one, and of oneDNN's products against their definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import tiny_model
from torch import nn

from fastalign.models.config import LoraConfig
from fastalign.models.load import load_model
from fastalign.objectives.base import RunConfig
from fastalign.objectives.dpo import DPOConfig
from fastalign.packing import collate
from fastalign.train.footprint import footprint
from fastalign.train.holdings import holdings, total
from fastalign.train.onednn import CAPACITY, COMPILED, Shapes, attention_blocks, compiled_bytes, product_key
from fastalign.train.optim import Optimizer
from fastalign.types import Sample

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BACKWARD = {"update_in_backward": True, "max_grad_norm": None}
STOCHASTIC = {"master_weights": False, "stochastic_rounding": True}


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        (options, dtype)
        for options in ({}, {"master_weights": False}, {"optimizer": "adamw_8bit"}, {"optimizer": "adamw_offload"}, STOCHASTIC, BACKWARD)
        for dtype in (torch.float32, torch.bfloat16)
        if dtype == torch.bfloat16 or "stochastic_rounding" not in options  # float32 has nothing to round: refused
    ],
    ids=str,
)
def test_holdings_are_those_of_the_optimizer(options: dict[str, Any], dtype: torch.dtype) -> None:
    weights = [nn.Parameter(torch.ones(70, 100, dtype=dtype)), nn.Parameter(torch.ones(9, dtype=dtype))]
    config = RunConfig(**options)
    optimizer = Optimizer(nn.ParameterList(weights), config)
    optimizer.zero_grad()
    sum(w.float().sum() for w in weights).backward()  # type: ignore[union-attr]
    found = total(holdings(w, config, CPU) for w in weights)
    assert found.gradient == sum(h.grad.nbytes for h in optimizer.holders.values())
    optimizer.step(1e-3, optimizer.grad_norm())
    state = {key: value.nbytes for key, value in optimizer.state().items() if not key.endswith(("/step", "/master"))}
    assert found.moments == sum(state.values())
    assert found.master == sum(m.nbytes for m in optimizer.masters.values())
    assert found.on_host == 0
    away = total(holdings(w, config, CUDA) for w in weights)
    if config.optimizer == "adamw_offload":
        assert (away.master, away.moments, away.on_host) == (0, 0, found.master + found.moments)
    else:
        assert (away.master, away.moments, away.on_host) == (found.master, found.moments, 0)


def test_updating_in_the_backward_saves_gradients_of_a_single_micro_batch() -> None:
    """A deep model, so that the gradients of its layers weigh more than those of its vocabulary; one micro-batch, and several."""
    deep = load_model(tiny_model("qwen3", hidden_size=64, layers=12, dtype=torch.bfloat16))
    size = 4 * sum(p.numel() for name, p in deep.named_parameters() if ".layers." in name)
    plain, early = (
        {alone: footprint(deep, DPOConfig(**options), tokens=64, accumulates=not alone) for alone in (True, False)}
        for options in ({"max_grad_norm": None}, BACKWARD)
    )
    assert plain[True].peak - early[True].peak > 0.8 * size
    assert plain[False].peak == early[False].peak
    adapted = load_model(tiny_model("qwen3", hidden_size=64, layers=3), lora=LoraConfig(r=4))
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    found = footprint(adapted, DPOConfig(optimizer="adamw_offload"), tokens=64, device="cuda")
    assert found.on_host == 12 * trained
    assert found.parts["optimizer state"] == 0


def test_blocks_of_attention_and_what_is_compiled_for_them() -> None:
    apart = [Sample(0, (5,) * 20, ((6,) * 30, (7,) * 50))]
    assert attention_blocks(collate(apart, share=False)) == {(32, 50), (18, 50), (32, 70), (6, 70)}
    assert attention_blocks(collate(apart, share=True)) == {(19, 19), (31, 50), (32, 70), (19, 70)}  # a prompt's last token is each one's
    long = [Sample(0, (5,) * 600, ((6,) * 200,))]
    assert attention_blocks(collate(long)) == {(256, 512), (256, 288), (32, 512), (32, 288)}
    assert compiled_bytes(12, 4, 269) == 855 * COMPILED
    assert compiled_bytes(12, 4, 2690) == CAPACITY * COMPILED

    half, wide = torch.ones(4, 6, dtype=torch.bfloat16), torch.ones(4, 6)
    mm = torch.ops.aten.mm.default
    assert product_key(mm, (half, half.T)) != product_key(mm, (half, half.view(6, 4))) is not None
    assert product_key(mm, (wide, wide.T)) is None
    assert product_key(torch.ops.aten.add.Tensor, (half, half)) is None


def test_compiled_products_count_up_to_the_largest_micro_batch() -> None:
    shapes = Shapes()
    for length in (50, 60, 20):
        shapes.add(collate([Sample(0, (5,) * 10, ((6,) * (length - 10),))]))
    assert shapes.seen == [(50, 1, 0), (60, 2, 2), (20, 3, 4)]
    assert shapes.compiled(10, 0.0, 60) == (30 + 12) * COMPILED  # activations that weigh nothing: the last counts
    heavy = 1e9
    assert shapes.compiled(10, heavy, 60) == (20 + 6) * COMPILED

    half = load_model(tiny_model("qwen3", hidden_size=64, layers=3, dtype=torch.bfloat16))
    many = footprint(half, DPOConfig(), tokens=64)
    assert many.parts["compiled products"] == CAPACITY * COMPILED
    assert footprint(half, DPOConfig(), tokens=64, device="cuda").parts["compiled products"] == 0
    assert footprint(half.float(), DPOConfig(), tokens=64).parts["compiled products"] == 0
