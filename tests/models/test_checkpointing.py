"""Gradient checkpointing: the same gradients, what stays in memory, and what is refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import TRAINABLE, fused_logps, gradients, ragged_batch, tokens, weights_of
from tiny import tiny_model
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu

from fastalign.errors import ConfigError, DependencyError
from fastalign.models.config import LoraConfig, ModelConfig
from fastalign.models.load import prepare
from fastalign.models.trunk import trunk
from fastalign.objectives.dpo import DPOConfig
from fastalign.packing import collate
from fastalign.train.footprint import Ledger, footprint
from fastalign.types import PackedBatch, Sample

BATCH = ragged_batch(share=True)
SHAPE: dict[str, Any] = {"hidden_size": 64, "layers": 4}

new_enough = pytest.mark.skipif(
    "offload" not in inspect.signature(getattr(tiny_model(), "activation_checkpointing_enable", repr)).parameters,
    reason="this Transformers has neither every_n_layers nor offload: that they are right is unproven",
)


def long_batch() -> PackedBatch:
    generator = torch.Generator().manual_seed(0)
    return collate([Sample(k, tokens(8, generator), (tokens(n, generator),)) for k, n in enumerate((500, 300, 200))])


def load(family: str = "qwen3", lora: LoraConfig | None = None, shape: dict[str, Any] | None = None, **options: Any) -> Any:
    chosen = ModelConfig(gradient_checkpointing=bool(options), **options)
    return prepare(tiny_model(family, **(shape or {})), chosen, lora).train()


def held(model: Any) -> int:
    """Bytes that live between forward and backward, by what is allocated and released."""
    batch, ledger = long_batch(), Ledger()
    with ledger:
        hidden = trunk(model, batch).hidden
    assert hidden.requires_grad
    return ledger.total


OPTIONS = [
    pytest.param({"checkpoint_keep": "attention"}, id="attention"),
    pytest.param({"checkpoint_keep": "products"}, id="products"),
    pytest.param({"checkpoint_every": 2, "checkpoint_keep": "attention"}, id="every", marks=new_enough),
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("family", TRAINABLE)
def test_gradients_are_bitwise_those_without(family: str, options: dict[str, Any]) -> None:
    plain, recomputed = load(family), load(family, **options)
    want, found = (gradients(model, fused_logps(model, BATCH) @ weights_of(BATCH)) for model in (plain, recomputed))
    assert found.keys() == want.keys()
    for name, grad in want.items():
        assert torch.equal(found[name], grad), name
    assert sum(float(grad.abs().sum()) for grad in want.values()) > 0


def test_an_adapter_with_dropout_draws_the_same_numbers() -> None:
    def found(**options: Any) -> dict[str, Tensor]:
        torch.manual_seed(3)
        model = load(lora=LoraConfig(r=4, dropout=0.5), **options)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p, std=0.1)
        return gradients(model, fused_logps(model, BATCH) @ weights_of(BATCH))

    want = found()
    for keep in ("attention", "products"):
        assert all(torch.equal(grad, want[name]) for name, grad in found(checkpoint_keep=keep).items())


@new_enough
def test_what_is_held_is_in_the_order_of_the_options() -> None:
    """Nothing kept < attention < products < no checkpointing, each by what it says."""
    plain = held(load(shape=SHAPE))
    nothing, attention, products, every = (
        held(load(shape=SHAPE, **options))
        for options in (
            {"checkpoint_keep": "nothing"},
            {"checkpoint_keep": "attention"},
            {"checkpoint_keep": "products"},
            {"checkpoint_every": 2},
        )
    )
    count, layers, heads = 1024, 4, 4
    head_dim = tiny_model(**SHAPE).config.head_dim
    assert attention - nothing == pytest.approx(4 * layers * count * heads * (head_dim + 1), rel=0.01)  # results and lse, float32
    widths = head_dim * heads + 2 * head_dim * 2 + 64 + 2 * 128 + 64  # q, k and v, o, gate and up, down
    assert products - attention == pytest.approx(4 * layers * count * widths, rel=0.01)
    assert products < 0.6 * plain
    assert nothing < 0.15 * plain
    assert every - nothing == pytest.approx((plain - nothing) / 2, rel=0.1)


def test_products_of_an_adapter_are_not_kept() -> None:
    """Its second one costs next to nothing and is as large as that of the layer itself."""
    shape = {**SHAPE, "intermediate_size": 64}
    plain, adapted = (held(load(shape=shape, lora=lora, checkpoint_keep="products")) for lora in (None, LoraConfig(r=2)))
    first = 4 * 4 * 1024 * 7 * 2  # float32, of seven linear layers in four layers, rank 2
    second = 4 * 4 * 1024 * 64  # of one of them at the width of the model
    assert adapted - plain < first + second


@new_enough
def test_the_prediction_knows_the_options() -> None:
    def activations(**options: Any) -> int:
        config = DPOConfig(model=ModelConfig(gradient_checkpointing=True, **options))
        found = footprint(prepare(tiny_model(**SHAPE).to("meta"), config.model, None), config, tokens=1024, device="cpu").parts
        return found["activations"]

    plain = activations(device="meta")
    inputs = 4 * 1024 * 64 * 4  # of four layers
    assert plain - activations(device="meta", checkpoint_offload=True) == pytest.approx(inputs, rel=0.3)
    assert activations(device="meta", checkpoint_keep="attention") > plain + inputs


class Counted(save_on_cpu):
    """As save_on_cpu, without pinned memory, which needs a device; counts what it takes."""

    taken: list[torch.Size]

    def __init__(self, pin_memory: bool = False, **_: Any) -> None:
        super().__init__(pin_memory=False)
        pack: Callable[[Tensor], Any] = self.pack_hook
        self.pack_hook = lambda tensor: (self.taken.append(tensor.shape), pack(tensor))[1]  # type: ignore[func-returns-value]


@new_enough
def test_offload_takes_the_inputs_of_the_layers_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import modeling_utils

    monkeypatch.setattr(modeling_utils, "save_on_cpu", Counted)
    monkeypatch.setattr(Counted, "taken", [], raising=False)
    plain, model = load(), tiny_model()
    monkeypatch.setattr(type(model), "device", torch.device("meta"))  # not a CPU, by its word
    model = prepare(model, ModelConfig(device="cpu", gradient_checkpointing=True, checkpoint_offload=True), None).train()
    want, found = (gradients(m, fused_logps(m, BATCH) @ weights_of(BATCH)) for m in (plain, model))
    assert all(torch.equal(found[name], grad) for name, grad in want.items())
    assert Counted.taken.count(torch.Size([1, len(BATCH.input_ids), 32])) == 2  # one of each layer


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: that the inputs leave the device is unproven")
def test_offload_frees_the_device() -> None:
    def found(**options: Any) -> tuple[int, dict[str, Tensor]]:
        chosen = ModelConfig(device="cuda", gradient_checkpointing=True, **options)
        model = prepare(tiny_model(hidden_size=256, layers=8), chosen, None).train()
        batch = long_batch().to("cuda")
        before = torch.cuda.memory_allocated()
        hidden = trunk(model, batch).hidden
        bytes_held = torch.cuda.memory_allocated() - before
        return bytes_held, gradients(model, hidden.square().sum())

    (kept, want), (offloaded, moved) = found(), found(checkpoint_offload=True)
    assert kept - offloaded >= 7 * 1024 * 256 * 4
    assert all(torch.equal(moved[name], grad) for name, grad in want.items())


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("checkpoint_every", 2), ("checkpoint_keep", "attention"), ("checkpoint_offload", True)):
        with pytest.raises(ConfigError, match=rf"model\.{name} counts only with.*set --model\.gradient_checkpointing true"):
            DPOConfig(model=ModelConfig(path="m", **{name: value}), output="run").validate()
    with pytest.raises(ConfigError, match=r"model\.checkpoint_every must be at least 1, got 0"):
        load(checkpoint_every=0)
    with pytest.raises(ConfigError, match=r"model\.checkpoint_offload moves.*on the CPU, leave it out"):
        load(checkpoint_offload=True)
    model = tiny_model()
    monkeypatch.setattr(type(model), "activation_checkpointing_enable", lambda self, kwargs: None, raising=False)
    with pytest.raises(DependencyError, match=r"model\.checkpoint_every needs a Transformers whose .* has every_n_layers"):
        prepare(model, ModelConfig(gradient_checkpointing=True, checkpoint_every=3), None)
