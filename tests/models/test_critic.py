"""The critic beside a model: what it adds, what it leaves alone, and what an export holds. Its training: tests/objectives/test_ppo.py."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from tiny import save_tiny
from transformers import AutoModelForCausalLM

from fastalign.errors import ConfigError
from fastalign.models.adapters import critic_adapter, reference_adapter
from fastalign.models.config import LoraConfig
from fastalign.models.critic import ValueHead, add_critic, critic_weights, save_critic, value_head, without_critic
from fastalign.models.load import load_model
from fastalign.models.save import save_final
from fastalign.models.trunk import causal_lm, stock_attention


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("critic") / "model")


def logits(model):
    with stock_attention(model), torch.no_grad():
        return causal_lm(model)(torch.tensor([[5, 6, 7]])).logits


def trained(model):
    return {name for name, weight in model.named_parameters() if weight.requires_grad}


def fill(model):
    """Every trained weight, so that no adapter is without effect."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name))))


def test_a_value_head_is_linear_begins_at_0_and_computes_in_float32():
    head = ValueHead(4)
    hidden = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(head(hidden), torch.zeros(3))
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0, -2.0, 0.5, 3.0]]))
        head.bias.fill_(0.25)
    assert torch.allclose(head(hidden), hidden @ torch.tensor([1.0, -2.0, 0.5, 3.0]) + 0.25)
    rounded = hidden.bfloat16()
    assert head(rounded).dtype == torch.float32 and torch.equal(head(rounded), head(rounded.float()))
    assert torch.autograd.gradcheck(lambda x: head.double()(x), hidden.double().requires_grad_())


def test_a_shared_critic_is_two_weights_more(folder):
    model = load_model(folder, dtype="bfloat16")
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    assert add_critic(model, adapter=False, rate_factor=3.0) is model
    own = critic_weights(model)
    assert {name: tuple(weight.shape) for name, weight in own.items()} == {"value_head.weight": (1, 32), "value_head.bias": (1,)}
    assert all(weight.dtype == torch.float32 and weight.requires_grad and weight.rate_factor == 3.0 for weight in own.values())
    assert dict(model.named_parameters()).keys() == before.keys() | own.keys()
    assert not any(hasattr(weight, "rate_factor") for name, weight in model.named_parameters() if name in before)
    with pytest.raises(ConfigError, match="has a value_head already"):
        add_critic(model, adapter=False)


@pytest.mark.parametrize("existing", [False, True])
def test_an_adapter_of_its_own_leaves_the_policys_alone(folder, tmp_path, existing):
    lora = LoraConfig(r=4, targets=["all-linear", "lm_head"], modules_to_save=["embed_tokens"])
    if existing:  # an adapter that is trained further comes with a frozen copy of itself, the reference
        first = load_model(folder, lora=lora)
        fill(first)
        save_final(first, None, tmp_path / "adapter")
        lora = LoraConfig(adapter=str(tmp_path / "adapter"))
    model = load_model(folder, lora=lora)
    policys = trained(model)
    with reference_adapter(model):
        reference = logits(model)
    add_critic(model, adapter=True)
    own = critic_weights(model)
    assert trained(model) == policys | own.keys() and not policys & own.keys()
    assert len(own) == 2 + 2 * 14 and not any("lm_head" in name or "embed" in name for name in own)
    assert all(weight.rate_factor == 1.0 for weight in own.values())
    fill(model)
    policy = logits(model)
    with critic_adapter(model):
        critic = logits(model)
        assert own.keys() - {name for name in own if "value_head" in name} <= trained(model)
    assert trained(model) == policys | own.keys()
    assert torch.equal(logits(model), policy) and not torch.equal(critic, policy)
    with reference_adapter(model):
        assert torch.equal(logits(model), reference)
    with torch.no_grad():
        for name, weight in own.items():
            if "lora_B" in name:
                weight.zero_()
    assert torch.equal(logits(model), policy)
    plain = load_model(folder)
    with critic_adapter(model):
        assert torch.allclose(logits(model), logits(plain), atol=1e-5), "nothing that the policy trains is under the critic"


def test_a_critic_under_an_adapter_needs_one(folder):
    with pytest.raises(ConfigError, match=r"critic=adapter needs an adapter: set lora\.r, or use critic=shared"):
        add_critic(load_model(folder), adapter=True)


@pytest.mark.parametrize("lora", [None, LoraConfig(r=4)])
def test_an_export_is_without_the_critic_which_has_a_file_of_its_own(folder, tmp_path, lora):
    model = load_model(folder, lora=lora)
    assert save_critic(model, tmp_path) is None and not list(tmp_path.iterdir())
    add_critic(model, adapter=lora is not None)
    fill(model)
    head = value_head(model)
    with without_critic(model):
        assert not any("value_head" in name for name in model.state_dict())
    assert value_head(model) is head
    save_final(model, None, tmp_path / "final")
    names = load_file(tmp_path / "final" / ("model.safetensors" if lora is None else "adapter_model.safetensors"))
    assert names and not any("value_head" in name or "critic" in name for name in names)
    assert not (tmp_path / "final" / "critic").exists()
    stored = load_file(save_critic(model, tmp_path))
    assert stored.keys() == critic_weights(model).keys()
    assert all(torch.equal(value, weight) for value, weight in zip(stored.values(), (critic_weights(model)[name] for name in stored)))
    if lora is None:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
        assert torch.equal(logits(loaded), logits(model))
