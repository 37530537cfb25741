"""Adapters on 4-bit models: the same guarantees as on any other, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import fused_logps, gradients, ragged_batch, stock_logps, weights_of
from tiny import preference_rows, save_tiny

pytest.importorskip("bitsandbytes", reason="without bitsandbytes training on 4-bit models is unproven")
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fastalign import DPOConfig, train
from fastalign.data.config import DataConfig
from fastalign.errors import ConfigError, DependencyError, ModelError
from fastalign.models import quantization
from fastalign.models.config import LoraConfig, ModelConfig
from fastalign.models.load import load_model
from fastalign.models.reference import AdapterReference
from fastalign.models.save import save_final
from fastalign.models.trunk import evaluation
from fastalign.packing import collate
from fastalign.types import Sample

BATCH = ragged_batch()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized")
    save_tiny(folder / "model", "qwen3", hidden_size=64)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in preference_rows(16)))
    return folder


def load(folder: Path, **options: object) -> torch.nn.Module:
    return load_model(ModelConfig(str(folder / "model"), quantization="nf4"), lora=LoraConfig(r=4), **options)  # type: ignore[arg-type]


def test_linear_layers_are_held_in_four_bits_and_the_head_is_not(folder: Path) -> None:
    model = load(folder).get_base_model()
    base = model.model.layers[0].mlp.up_proj.base_layer
    assert (base.weight.dtype, base.weight.numel()) == (torch.uint8, 64 * 128 // 2)
    assert model.lm_head.weight.dtype == model.model.norm.weight.dtype == torch.float32
    exact = load_model(str(folder / "model"))
    bytes_held = sum(p.numel() * p.element_size() for name, p in model.named_parameters() if "base_layer" in name)
    bytes_exact = sum(p.numel() * 4 for name, p in exact.named_parameters() if "proj" in name)
    assert bytes_held * 8 == bytes_exact


def test_log_probs_and_gradients_are_those_of_the_models_own_forward(folder: Path) -> None:
    torch.manual_seed(0)
    model = load(folder)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.05)
    want = fused_logps(model, BATCH)
    with evaluation(model):  # where bitsandbytes would pack the weights for inference
        torch.testing.assert_close(fused_logps(model, BATCH), want)
    found = gradients(model, fused_logps(model, BATCH) @ weights_of(BATCH))
    exact = fused_logps(load_model(str(folder / "model")), BATCH)
    assert (want - exact).abs().max() > 1e-2  # 4 bits are not the weights themselves
    model.get_base_model().set_attn_implementation("eager")
    own = stock_logps(model.get_base_model(), BATCH)
    torch.testing.assert_close(want, own, rtol=1e-4, atol=1e-4)
    for name, grad in gradients(model, own @ weights_of(BATCH)).items():
        assert grad.abs().max() > 0
        torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-4)


def test_the_reference_is_the_quantized_model_without_its_adapter(folder: Path) -> None:
    batch = collate([Sample(0, (5, 9), ((7, 8), (3,)))])
    model = load(folder)
    before = AdapterReference(model).logps(batch)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_()
    assert torch.equal(AdapterReference(model).logps(batch), before)


def test_a_run_learns_repeats_resumes_and_leaves_an_adapter_for_any_base(folder: Path, tmp_path: Path) -> None:
    def run(name: str, **options: object) -> dict[str, torch.Tensor]:
        config = DPOConfig(
            model=ModelConfig(str(folder / "model"), quantization="nf4"),
            data=DataConfig(str(folder / "pairs.jsonl")),
            lora=LoraConfig(r=4),
            output=str(tmp_path / name),
            batch_size=4,
            learning_rate=1e-2,
            epochs=6,
            save_every=2,
            **options,  # type: ignore[arg-type]
        )
        config.validate()
        result = train(config, callbacks=[stop] if name == "cut" and not options.get("resume") else [])
        return load_file(result.output / "final" / "adapter_model.safetensors")

    class Killed(Exception):
        pass

    def stop(step: int, _: dict[str, float]) -> None:
        if step == 3:
            raise Killed

    whole = run("whole")
    losses = [json.loads(line)["loss"] for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])
    with pytest.raises(Killed):
        run("cut")
    resumed = run("cut", resume=True)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    from peft import PeftModel

    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "model"), tmp_path / "whole" / "final")
    assert merged.merge_and_unload() is not None


def test_what_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DPOConfig(model=ModelConfig(str(folder / "model"), quantization="nf4"), output=str(tmp_path / "run"))
    config.data.path = "pairs.jsonl"
    with pytest.raises(ConfigError, match=r"4-bit weights cannot be trained themselves; set --lora\.r 16"):
        config.validate()
    with pytest.raises(ModelError, match="cannot be merged into 4-bit weights"):
        save_final(load(folder), None, tmp_path / "merged", merged=True)
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    with pytest.raises(DependencyError, match=r"pip install 'fastalign\[qlora\]'"):
        load(folder)
