"""MLPs on slices of rows: the same results and gradients, less memory, no second computation under checkpointing, and refusals."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from families import DENSE, fused_logps, gradients, ragged_batch, tokens, weights_of
from support import relative_error
from tiny import save_tiny, tiny_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastalign.errors import ConfigError, ModelError
from fastalign.models.config import LoraConfig, ModelConfig
from fastalign.models.load import load_model, prepare
from fastalign.models.trunk import trunk
from fastalign.objectives.dpo import DPOConfig
from fastalign.packing import collate
from fastalign.train.footprint import Ledger, footprint
from fastalign.types import Sample

BATCH = ragged_batch(share=True)
WIDE: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 512}


def load(family: str = "qwen3", rows: int = 0, lora: LoraConfig | None = None, shape: dict[str, Any] | None = None, **options: Any) -> Any:
    return prepare(tiny_model(family, **(shape or {})), ModelConfig(mlp_chunk=rows, **options), lora).train()


def moved_adapter(rows: int, **lora: Any) -> Any:
    torch.manual_seed(0)
    model = load(rows=rows, lora=LoraConfig(r=4, **lora))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    return model


def found(model: Any) -> dict[str, Tensor]:
    torch.manual_seed(1)
    logps = fused_logps(model, BATCH)
    return gradients(model, logps @ weights_of(BATCH)) | {"logps": logps.detach()}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert relative_error(got[name], value) < tolerance, name
    assert sum(float(value.abs().sum()) for value in want.values()) > 0


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True, "checkpoint_keep": "attention"}], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("family", DENSE)
def test_results_and_gradients_are_those_of_all_rows_at_once(family: str, options: dict[str, Any]) -> None:
    """Slices of 7 leave a last one that is shorter."""
    assert len(BATCH.input_ids) % 7
    assert_same(found(load(family, 7, **options)), found(load(family, **options)))


def test_names_classes_and_copies_stay(tmp_path: Path) -> None:
    plain, sliced = load(), load(rows=7)
    assert sliced.state_dict().keys() == plain.state_dict().keys()
    assert isinstance(sliced.model.layers[0].mlp, type(plain.model.layers[0].mlp))
    twin = copy.deepcopy(sliced)
    with torch.no_grad():
        for p in sliced.parameters():
            p.zero_()
    assert_same(found(twin), found(plain))


def test_adapters_and_their_dropout() -> None:
    plain, sliced = moved_adapter(0), moved_adapter(7)
    assert_same(found(sliced), found(plain))
    random = moved_adapter(7, dropout=0.5)
    first, again = found(random), found(random)
    assert all(torch.equal(again[name], value) for name, value in first.items())
    checkpointed = moved_adapter(7, dropout=0.5)
    checkpointed.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(found(checkpointed), first, 1e-6)  # the masks of the backward are those of the forward
    weight = next(p for name, p in random.named_parameters() if "down_proj.lora_B" in name)
    direction = torch.randn_like(weight)
    slope = float((first[next(n for n in first if "down_proj.lora_B" in n)] * direction).sum())
    values = []
    for step in (1e-3, -1e-3):
        with torch.no_grad():
            weight.add_(step * direction)
        values.append(float(found(random)["logps"] @ weights_of(BATCH)))
        with torch.no_grad():
            weight.sub_(step * direction)
    assert (values[0] - values[1]) / 2e-3 == pytest.approx(slope, rel=0.05)


def test_weights_in_four_bits(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="without bitsandbytes slices of 4-bit layers are unproven")
    folder = save_tiny(tmp_path / "model", "qwen3", hidden_size=64)

    def of(rows: int) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = load_model(ModelConfig(str(folder), quantization="nf4", mlp_chunk=rows), lora=LoraConfig(r=4)).train()
        for name, p in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p, std=0.1)
        return found(model)

    assert_same(of(7), of(0))


def test_gradients_of_16_bit_weights_are_rounded_once() -> None:
    """As near to those in float32 as without slices, though 25 slices are added up."""

    def of(rows: int, dtype: str) -> Tensor:
        mlp = load(rows=rows, dtype="auto").to(getattr(torch, dtype)).model.layers[0].mlp
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, 100, 32, generator=generator).to(torch.bfloat16).to(getattr(torch, dtype))
        with torch.no_grad():
            for p in mlp.parameters():
                p.copy_(p.to(torch.bfloat16))
        mlp(x).sum().backward()
        return mlp.down_proj.weight.grad.double()

    gold, whole, sliced = of(0, "float32"), of(0, "bfloat16"), of(4, "bfloat16")
    error = [float((found - gold).square().mean().sqrt()) for found in (whole, sliced)]
    assert 0 < error[1] < 1.2 * error[0]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_wide_activations_are_held_of_one_slice(checkpointing: bool) -> None:
    """The highest moment of a step falls by what all rows but one slice take at the width of the MLP."""
    generator = torch.Generator().manual_seed(0)
    batch = collate([Sample(0, (1, 2), (tokens(2046, generator),))])

    def peak(rows: int) -> int:
        model, ledger = load(rows=rows, shape=WIDE, gradient_checkpointing=checkpointing), Ledger()
        with ledger:
            trunk(model, batch).hidden.sum().backward()
        return ledger.peak

    at_least = 4 * (2048 - 128) * 512 * 3 * (1 if checkpointing else 2)  # gate, up and their product; of every layer that is kept
    assert peak(0) - peak(128) > at_least


def test_the_prediction_knows_of_it() -> None:
    def at(rows: int) -> int:
        config = DPOConfig(model=ModelConfig(device="meta", mlp_chunk=rows))
        return footprint(prepare(tiny_model(**WIDE).to("meta"), config.model, None), config, tokens=2048, device="cpu").peak

    assert at(0) - at(128) > 4 * (2048 - 128) * 512 * 3 * 2


def test_under_checkpointing_only_the_last_product_is_computed_again() -> None:
    """A layer's forward is not repeated beyond the input of its MLP, which the MLP's own backward repeats."""

    def flops(rows: int) -> float:
        model = load("llama", rows, gradient_checkpointing=True)
        with FlopCounterMode(display=False) as counted:
            trunk(model, BATCH).hidden.sum().backward()
        return counted.get_total_flops()

    down_projections = 2 * 2 * len(BATCH.input_ids) * 32 * 64  # of two layers
    assert flops(7) - flops(0) == down_projections


def test_what_is_refused() -> None:
    for family, kind in (("qwen3_moe", "Qwen3MoeSparseMoeBlock"), ("mixtral", "MixtralSparseMoeBlock")):
        with pytest.raises(ModelError, match=rf"model\.mlp_chunk: layer 0 of \w+ForCausalLM has .*({kind}|no layer named mlp)"):
            load(family, 7)
    model = tiny_model()
    own = type(model.model.layers[0].mlp)
    model.model.layers[0].mlp.__class__ = type("Mixing", (own,), {"forward": lambda self, x: own.forward(self, x).cumsum(-2)})
    with pytest.raises(ModelError, match=r"model\.mlp_chunk: Mixing of Qwen3ForCausalLM does not act on each token alone"):
        prepare(model, ModelConfig(mlp_chunk=4), None)
    with pytest.raises(ConfigError, match=r"model\.mlp_chunk must be a number of tokens, or 0 .*got -1"):
        load(rows=-1)
    with pytest.raises(ConfigError, match=r"model\.mlp_chunk drops what model\.checkpoint_keep products keeps"):
        load(rows=7, gradient_checkpointing=True, checkpoint_keep="products")
