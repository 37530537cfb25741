"""How long a step takes: what is computed and moved against counts of a real step, and the rates of a device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import tiny_model
from torch.utils.flop_counter import FlopCounterMode

from fastalign.models.config import LoraConfig, ModelConfig
from fastalign.models.load import load_model, prepare
from fastalign.models.trunk import trunk
from fastalign.objectives.dpo import DPOConfig
from fastalign.train import speed
from fastalign.train.flops import head_weight
from fastalign.train.footprint import GRADIENT_PASSES, Ledger, Work, _batch, footprint
from fastalign.train.speed import Rates, measure, of_card, seconds

CPU = torch.device("cpu")


@pytest.mark.parametrize(("r", "options"), [(0, {}), (4, {}), (0, {"gradient_checkpointing": True}), (0, {"mlp_chunk": 64})], ids=str)
def test_products_are_those_of_a_real_step(r: int, options: dict[str, Any]) -> None:
    real = prepare(tiny_model("qwen3", hidden_size=64, layers=3), ModelConfig(**options), LoraConfig(r=r)).train()
    config = DPOConfig(logits_budget=1 << 20)
    work = footprint(real, config, tokens=512).work
    with FlopCounterMode(display=False) as counter:
        trunk(real, _batch(512)).hidden.sum().backward()
    assert work.products == sum(counter.get_flop_counts()["Global"].values())
    head = head_weight(real)
    assert head is not None
    assert work.head == 512 * head.numel() * (6 if head.requires_grad else 4)
    assert work.attention / work.attention_backward == (2 if options.get("gradient_checkpointing") else 1)


def test_an_update_reads_and_writes_what_the_optimizer_holds() -> None:
    half = load_model(tiny_model("qwen3", dtype=torch.bfloat16))
    count = sum(p.numel() for p in half.parameters())
    assert footprint(half, DPOConfig(), tokens=64).work.update == count * (2 * (2 + 4 + 8) + GRADIENT_PASSES * 4)
    adapted = load_model(tiny_model("qwen3"), lora=LoraConfig(r=4))
    few = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert footprint(adapted, DPOConfig(), tokens=64).work.update == few * (2 * (4 + 8) + GRADIENT_PASSES * 4)


def test_what_operators_move_is_their_operands_and_results() -> None:
    x, y = torch.ones(10, 20), torch.ones(20, 10)
    with Ledger() as ledger:
        z = x * 2  # 800 bytes in and out
        x.view(20, 10).transpose(0, 1)  # nothing
        x.add_(z)  # two operands, and the result
    assert (ledger.moved, ledger.flops, ledger.attention) == (2 * 800 + 3 * 800, 0, [0, 0])
    with Ledger() as ledger:
        x @ y
    assert (ledger.moved, ledger.flops) == (0, 2 * 10 * 20 * 10)


def test_seconds_by_part() -> None:
    rates = Rates(products=2.0, head=3.0, attention=5.0, memory=7.0, source="")
    step = seconds(Work(products=20.0, attention=4, attention_backward=2, head=30.0, moved=70.0, update=14.0), 150.0, rates)
    assert (step.products, step.head, step.rest, step.update) == (10, 10, 10, 2)
    assert step.attention == 150 / 5 * (2 + 2) / 3  # a forward more: four thirds
    assert step.micro_batch == 30 + 40
    assert seconds(Work(products=20.0), 150.0, rates, reference=10.0) == speed.Step(15.0, 0.0, 0.0, 0.0, 0.0)


def test_cards_reach_a_share_of_their_data_sheets() -> None:
    card = of_card("A100 80 GB")
    assert card.products == card.head == pytest.approx(0.55 * 312e12) and card.memory == pytest.approx(0.8 * 2.039e12)
    assert card.source == "estimate: 55% of 312 TFLOP/s, 80% of 2 TB/s"


def test_the_shapes_of_the_model_are_measured_in_proportion(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products with as many columns as the MLP is wide take twice as long for their arithmetic as the others."""
    real = tiny_model("qwen3", hidden_size=64, layers=3)
    shapes = speed._shapes(real)
    wide = {shape for shape in shapes if max(shape) == real.config.intermediate_size}
    assert wide and len(wide) < len(shapes) and sum(shapes.values()) <= 3 * 7
    size = {shape: shape[0] * shape[1] * count for shape, count in shapes.items()}

    def median(run: Any, device: Any, share: float) -> float:
        with FlopCounterMode(display=False) as counter:
            result = run()
        flops = counter.get_total_flops()
        if not isinstance(result, torch.Tensor) or not flops:
            return 1.0
        inner = flops // (2 * result.numel())
        return flops * (2.0 if (result.shape[1], inner) in wide else 1.0) / 1e9

    monkeypatch.setattr(speed, "_median", median)
    found = measure(real, CPU, tokens=128, length=64)
    assert found.products == pytest.approx(1e9 * sum(size.values()) / sum(size[s] * (1 + (s in wide)) for s in size))
    assert found.head == pytest.approx(1e9)
    assert found.memory == 2 * speed.COPY["cpu"]
    assert found.source == "measured on this CPU, float32"


def test_a_measurement_is_of_this_machine() -> None:
    found = measure(load_model(tiny_model("qwen3")), CPU, tokens=256, length=64)
    assert all(1e5 < rate < 1e14 for rate in (found.products, found.head, found.attention, found.memory))
