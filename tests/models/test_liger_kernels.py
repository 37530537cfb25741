"""Liger's kernels: what is asked of Liger, what is put back, what is compared, and what is refused. Parity itself needs a GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import DENSE, fused_logps, gradients, ragged_batch, weights_of
from support import relative_error
from tiny import tiny_model
from transformers.models.qwen3 import modeling_qwen3

from fastalign.errors import ConfigError, DependencyError, ModelError
from fastalign.models import liger_kernels
from fastalign.models.config import LoraConfig, ModelConfig
from fastalign.models.liger_kernels import install_liger_kernels
from fastalign.models.load import load_model, prepare
from fastalign.models.sliced_mlp import slice_mlps

pytest.importorskip("liger_kernel", reason="without liger-kernel its installation is unproven")
BATCH = ragged_batch(share=True)
KNOWN = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "granite", "olmo2", "smollm3"]


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Any]:
    """Loads a tiny model that says it is on CUDA."""

    def made(family: str, **options: Any) -> Any:
        model = load_model(tiny_model(family, **options))
        monkeypatch.setattr(type(model), "device", torch.device("cuda"))
        return model

    return made


@pytest.fixture
def patched(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Liger's patching, which notes how it is called, and runs with what a CPU can run: the classes and the rotary embedding."""
    import liger_kernel.transformers as package

    calls: list[dict[str, Any]] = []
    for name in ("apply_rotary_pos_emb", "Qwen3RMSNorm", "Qwen3MLP"):
        monkeypatch.setattr(modeling_qwen3, name, getattr(modeling_qwen3, name))  # put back after the test

    def apply(model: Any, **kwargs: Any) -> None:
        calls.append(kwargs)
        from liger_kernel.transformers.monkey_patch import apply_liger_kernel_to_qwen3

        apply_liger_kernel_to_qwen3(**kwargs)  # of the module alone

    monkeypatch.setattr(package, "_apply_liger_kernel_to_instance", apply)
    return calls


def test_the_head_stays_ours_and_the_module_is_put_back(on_cuda: Any, patched: list[dict[str, Any]]) -> None:
    own = {name: getattr(modeling_qwen3, name) for name in ("apply_rotary_pos_emb", "Qwen3RMSNorm", "Qwen3MLP")}
    model = on_cuda("qwen3")
    want = fused_logps(model, BATCH)
    for _ in range(2):  # a second model of the same architecture
        install_liger_kernels(model)
    assert patched == [{"fused_linear_cross_entropy": False, "cross_entropy": False}] * 2
    assert modeling_qwen3.Qwen3RMSNorm is own["Qwen3RMSNorm"]
    assert modeling_qwen3.Qwen3MLP is own["Qwen3MLP"]
    rope = modeling_qwen3.apply_rotary_pos_emb
    assert rope is not own["apply_rotary_pos_emb"]
    assert rope.own is own["apply_rotary_pos_emb"]
    assert torch.equal(fused_logps(model, BATCH), want)  # a CPU's tensors are rotated as ever


def test_the_rotation_goes_by_the_tensors_device() -> None:
    class Elsewhere:
        device = torch.device("cuda")

    rope = liger_kernels._by_device(lambda q, k: ("liger", k), lambda q, k: ("own", k))
    assert rope(Elsewhere(), 1) == ("liger", 1)
    assert rope(torch.zeros(1), k=2) == ("own", 2)


def test_other_results_are_refused(on_cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import liger_kernel.transformers as package

    def wrong(model: Any, **_: Any) -> None:
        for layer in model.model.layers:
            layer.mlp.act_fn = torch.nn.GELU()

    monkeypatch.setattr(package, "_apply_liger_kernel_to_instance", wrong)
    with pytest.raises(ModelError, match=r"hidden states of Qwen3ForCausalLM differ by 0\.\d+ of their size.*another activation"):
        install_liger_kernels(on_cuda("qwen3"))


def test_what_is_refused(on_cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"model\.liger_kernels are Triton kernels for CUDA, the model is on cpu"):
        prepare(tiny_model("qwen3"), ModelConfig(device="cpu", liger_kernels=True), None)
    with pytest.raises(ModelError, match=r"Liger has no kernels for gpt2 models \(GPT2LMHeadModel\)"):
        install_liger_kernels(on_cuda("gpt2"))
    model = on_cuda("qwen3")
    monkeypatch.setattr(liger_kernels, "find_spec", lambda name: None if name == "liger_kernel" else object())
    with pytest.raises(DependencyError, match=r"model\.liger_kernels needs liger_kernel: pip install 'fastalign\[liger\]'"):
        install_liger_kernels(model)


def test_an_mlp_on_slices_runs_the_forward_that_was_installed() -> None:
    """As Liger binds it, to the instance; a copy of the model has one of its own."""
    model, plain = (load_model(tiny_model("qwen3")) for _ in range(2))
    for k, layer in enumerate(model.model.layers):
        own = type(layer.mlp).forward
        layer.mlp.__dict__["forward"] = (lambda self, x, own=own, k=k: (k + 2.0) * own(self, x)).__get__(layer.mlp)
    want = fused_logps(model, BATCH).detach()
    assert relative_error(fused_logps(plain, BATCH), want) > 0.01
    slice_mlps(model, 7)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(fused_logps(model, BATCH), want, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    torch.testing.assert_close(fused_logps(twin, BATCH), want, rtol=1e-5, atol=1e-5)


def test_a_plan_is_made_without_them() -> None:
    model = prepare(tiny_model("qwen3").to("meta"), ModelConfig(device="meta", liger_kernels=True), None)
    assert "forward" not in vars(model.model.norm)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: that Liger's kernels compute the same is unproven")
@pytest.mark.parametrize("lora", [None, LoraConfig(r=4)], ids=["full", "lora"])
@pytest.mark.parametrize("family", KNOWN)
def test_log_probs_and_gradients_are_those_without(family: str, lora: LoraConfig | None) -> None:
    assert family in DENSE
    found = []
    for options in ({}, {"liger_kernels": True}, {"liger_kernels": True, "mlp_chunk": 7, "gradient_checkpointing": True}):
        torch.manual_seed(0)
        model = prepare(tiny_model(family), ModelConfig(device="cuda", **options), lora).train()
        batch = BATCH.to("cuda")
        logps = fused_logps(model, batch)
        found.append(gradients(model, logps @ weights_of(BATCH).cuda()) | {"logps": logps.detach()})
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, value in found[0].items():
            assert relative_error(other[name], value) < 1e-3 or not value.any(), name
