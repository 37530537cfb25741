"""The reference whose layers come to the device one by one: the same bits, and how much of it is there at a time."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from families import TRAINABLE, ragged_batch
from tiny import preference_rows, save_tiny, tiny_model
from torch import Tensor, nn

from fastalign import DPOConfig, train
from fastalign.data.config import DataConfig
from fastalign.errors import ConfigError, ModelError
from fastalign.models import stream
from fastalign.models.config import LoraConfig, ModelConfig
from fastalign.models.load import load_model, prepare
from fastalign.models.reference import CopyReference, StreamReference, build_reference
from fastalign.models.trunk import causal_lm, decoder_layers
from fastalign.train.footprint import footprint

BATCH = ragged_batch(share=True)


class Arrivals:
    """In place of `stream.to_device`: counts the bytes that have come and not gone."""

    def __init__(self) -> None:
        self.live = self.peak = self.total = 0

    def __call__(self, host: Tensor, device: torch.device) -> Tensor:
        made = host.to(device, copy=True)
        size = made.untyped_storage().nbytes()
        self.live += size
        self.total += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(made.untyped_storage(), self.leave, size)
        return made

    def leave(self, size: int) -> None:
        self.live -= size


def bytes_of(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


@pytest.mark.parametrize("family", TRAINABLE)
def test_the_same_bits_as_a_copy(family: str) -> None:
    model = load_model(tiny_model(family, tie_word_embeddings=family == "llama"))
    copied, streamed = CopyReference(model, ld_alpha=0.5), StreamReference(model, ld_alpha=0.5)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()  # neither is the model itself
    for _ in range(2):
        assert torch.equal(streamed.logps(BATCH), copied.logps(BATCH))
        assert torch.equal(streamed.token_logps(BATCH, temperature=0.7), copied.token_logps(BATCH, temperature=0.7))
    assert copied.logps(BATCH).abs().max() > 1


def test_two_layers_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(tiny_model("qwen3", layers=6))
    arrivals = Arrivals()
    monkeypatch.setattr(stream, "to_device", arrivals)
    ref = StreamReference(model)
    assert arrivals.total == 0
    layers = decoder_layers(causal_lm(ref.model))
    at_most: list[int] = []
    layers[3].mlp.register_forward_hook(lambda *_: at_most.append(arrivals.live))
    ref.logps(BATCH)
    layer, head = bytes_of(layers[0]), bytes_of(ref.model.lm_head)
    assert at_most == [2 * layer]
    assert arrivals.peak == max(2 * layer, head)
    assert arrivals.total == 6 * layer + head
    assert arrivals.live == 0
    held = {t.untyped_storage()._cdata for t in ref.model.parameters()}
    assert held.isdisjoint(t.untyped_storage()._cdata for t in model.parameters())


def test_a_forward_that_fails_leaves_nothing_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    arrivals = Arrivals()
    monkeypatch.setattr(stream, "to_device", arrivals)
    ref = StreamReference(load_model(tiny_model("qwen3", layers=3)))
    want = ref.logps(BATCH)

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("full")

    hook = decoder_layers(ref.model)[1].mlp.register_forward_hook(fail)
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        ref.logps(BATCH)
    hook.remove()
    assert torch.equal(ref.logps(BATCH), want)
    assert arrivals.live == 0


def test_it_follows_the_policy_as_a_copy_does() -> None:
    model = load_model(tiny_model("qwen3"))
    copied, streamed = CopyReference(model), StreamReference(model)
    before = copied.logps(BATCH)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    for ref in (copied, streamed):
        ref.mix(model, 0.3)
    assert torch.equal(streamed.logps(BATCH), copied.logps(BATCH))
    assert not torch.equal(copied.logps(BATCH), before)


def test_of_a_model_with_an_adapter() -> None:
    torch.manual_seed(0)
    model = load_model(tiny_model("qwen3"), lora=LoraConfig(r=4, targets=["all-linear", "lm_head"], dropout=0.3)).train()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    assert torch.equal(StreamReference(model).logps(BATCH), CopyReference(model).logps(BATCH))
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())


def test_a_run_is_that_with_a_copy(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model")
    rows = preference_rows(8)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(reference: str) -> list[dict[str, Any]]:
        config = DPOConfig(
            model=ModelConfig(str(tmp_path / "model")),
            data=DataConfig(str(tmp_path / "pairs.jsonl")),
            output=str(tmp_path / reference),
            batch_size=4,
            learning_rate=1e-3,
            epochs=2,
            reference=reference,  # type: ignore[arg-type]
            sync_ref_model=True,
            ref_model_sync_steps=2,
        )
        train(config)
        lines = [json.loads(line) for line in (tmp_path / reference / "metrics.jsonl").read_text().splitlines()]
        return [{name: line[name] for name in ("loss", "grad_norm", "rewards/margins")} for line in lines]

    assert run("stream") == run("copy")


def test_the_prediction_knows_where_it_is() -> None:
    model = load_model(tiny_model("qwen3"))
    config = DPOConfig(reference="stream")
    on_cpu = footprint(model, config, tokens=64).parts
    assert on_cpu["reference copy"] == on_cpu["weights"]
    elsewhere = prepare(tiny_model("qwen3").to("meta"), ModelConfig(device="meta"), None)
    assert footprint(elsewhere, config, tokens=64, device="meta").parts["reference copy"] == 0
    assert footprint(elsewhere, DPOConfig(reference="copy"), tokens=64, device="meta").parts["reference copy"] == on_cpu["weights"]


def test_what_is_refused(tmp_path: Path) -> None:
    from test_reference import Data, Options

    model = load_model(tiny_model("qwen3"))
    model.quantization_method = "bitsandbytes"
    with pytest.raises(ConfigError, match=r"reference=stream cannot move 4-bit weights; use reference=adapter"):
        build_reference(model, Options("stream"), Data(), tmp_path)
    other = load_model(tiny_model("qwen3"))
    other.model.layers = nn.Sequential(*other.model.layers)
    with pytest.raises(ModelError, match=r"Qwen3ForCausalLM: its decoder has no list of 2 layers"):
        StreamReference(other)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: that copies and kernels keep their order is unproven")
def test_on_a_device_the_bits_are_those_of_a_copy_there() -> None:
    model = load_model(tiny_model("qwen3", layers=8, hidden_size=256), device="cuda")
    batch = BATCH.to("cuda")
    want = CopyReference(model).logps(batch)
    before = torch.cuda.memory_allocated()
    ref = StreamReference(model)
    assert torch.cuda.memory_allocated() - before < bytes_of(decoder_layers(model)[0])
    for _ in range(5):
        assert torch.equal(ref.logps(batch), want)
