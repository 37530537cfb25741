import json
import logging
from pathlib import Path

import peft
import pytest
import torch
from families import fused_logps, ragged_batch, stock_logps, stock_twin
from safetensors.torch import load_file, save_file
from tiny import save_tiny, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

from fastalign.errors import ConfigError, ModelError
from fastalign.models.config import LoraConfig, ModelConfig
from fastalign.models.load import load_model
from fastalign.models.save import save_final
from fastalign.models.trunk import stock_attention
from fastalign.objectives.dpo import DPOConfig
from fastalign.objectives.kto import KTOConfig

BATCH = ragged_batch()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model", "qwen3")


def test_from_a_folder_a_config_and_an_object(folder: Path) -> None:
    want = stock_logps(AutoModelForCausalLM.from_pretrained(folder), BATCH)
    for given in (folder, str(folder), ModelConfig(path=str(folder)), AutoModelForCausalLM.from_pretrained(folder)):
        torch.testing.assert_close(fused_logps(load_model(given), BATCH), want, rtol=1e-5, atol=1e-5)


def test_dtype(folder: Path) -> None:
    assert load_model(folder).dtype == torch.float32
    assert load_model(folder, dtype="bfloat16").dtype == torch.bfloat16
    assert load_model(ModelConfig(path=str(folder), dtype="bfloat16")).dtype == torch.bfloat16
    assert load_model(tiny_model("qwen3"), dtype="bfloat16").dtype == torch.bfloat16


def test_the_models_own_dropout_is_off_unless_kept() -> None:
    options = {"embd_pdrop": 0.5, "resid_pdrop": 0.5, "attn_pdrop": 0.5}
    off = load_model(tiny_model("gpt2", **options)).train()
    assert torch.equal(fused_logps(off, BATCH), fused_logps(off, BATCH))
    kept = load_model(tiny_model("gpt2", **options), dropout=True).train()
    assert not torch.equal(fused_logps(kept, BATCH), fused_logps(kept, BATCH))
    floats = load_model(tiny_model("qwen3", attention_dropout=0.5)).train()
    assert torch.equal(fused_logps(floats, BATCH), fused_logps(floats, BATCH))


def test_stock_attention_inside_and_ours_again_outside(folder: Path) -> None:
    model = load_model(folder)
    prompt = torch.tensor([[5, 6, 7]])
    want = AutoModelForCausalLM.from_pretrained(folder).generate(prompt, max_new_tokens=5, do_sample=False, pad_token_id=0)
    with stock_attention(model):
        assert torch.equal(model.generate(prompt, max_new_tokens=5, do_sample=False, pad_token_id=0), want)
    fused_logps(model, BATCH)


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"model.device 'abacus' cannot be used here"):
        load_model(tiny_model("qwen3"), device="abacus")


def test_no_such_folder() -> None:
    with pytest.raises(ModelError, match=r"model.path './nowhere': no such folder"):
        load_model("./nowhere")


def test_a_name_that_is_on_no_hub() -> None:
    with pytest.raises(ModelError, match="cannot read the model's config"):
        load_model("no-such-user/no-such-model")


def test_a_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_model(tmp_path)


def test_a_folder_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no weights \(\*.safetensors\)"):
        load_model(folder)


def test_a_pickle_is_not_read(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(ModelError, match=r"pickle \(pytorch_model.bin\).*Convert it.*writes safetensors"):
        load_model(folder)


def test_a_missing_shard(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="50KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    fused_logps(load_model(folder), BATCH)
    shards[1].unlink()
    with pytest.raises(ModelError, match=rf"weight file {shards[1].name} is missing \(1 of {len(shards)}\)"):
        load_model(folder)


def test_a_truncated_weight_file(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot load the weights"):
        load_model(folder)


def test_weights_that_would_start_from_random_numbers(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"], weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lack lm_head.weight, model.norm.weight, which would start from random numbers"):
        load_model(folder)


def test_remote_code_runs_only_on_request(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "homemade", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    marker = tmp_path / "ran"
    (folder / "code.py").write_text(f"open({str(marker)!r}, 'w').close()\nraise SystemExit\n")
    with pytest.raises(ModelError, match="trust_remote_code"):
        load_model(folder)
    assert not marker.exists()


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gpt2"])
@pytest.mark.parametrize("tied", [False, True])
def test_what_is_saved_loads_in_transformers(family: str, tied: bool, tmp_path: Path) -> None:
    model = load_model(tiny_model(family, tie_word_embeddings=tied))
    save_final(model, None, tmp_path)
    assert not any("fastalign" in file.read_text() for file in tmp_path.glob("*.json"))
    assert sorted(p.suffix for p in tmp_path.iterdir() if p.suffix != ".json") == [".safetensors"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation != "fastalign"
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")  # sdpa of 4.57 leaves Gemma's softcap out
    with torch.no_grad():
        torch.testing.assert_close(stock_logps(again, BATCH), stock_logps(stock_twin(family, tie_word_embeddings=tied), BATCH))
    assert again.generate(torch.tensor([[1, 2]]), max_new_tokens=2, pad_token_id=0).shape[1] > 2


def test_a_generation_config_that_contradicts_itself_is_saved(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = load_model(tiny_model("qwen3"))
    model.generation_config.temperature = 0.6  # without do_sample: Transformers refuses to write that
    model.generation_config.eos_token_id = [0, 3]
    with caplog.at_level(logging.WARNING):
        save_final(model, None, tmp_path)
    assert "do_sample" in caplog.text
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert (saved["temperature"], saved["do_sample"], saved["eos_token_id"]) == (0.6, True, [0, 3])


@pytest.fixture
def trained(folder: Path) -> nn.Module:
    """A model with an adapter on its layers and its head that has moved from 0."""
    torch.manual_seed(0)
    model = load_model(folder, lora=LoraConfig(r=4, targets=["all-linear", "lm_head"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def test_an_adapter_is_saved_as_one_and_loads_in_peft_and_here(trained: nn.Module, tmp_path: Path) -> None:
    want = fused_logps(trained, BATCH).detach()
    save_final(trained, None, tmp_path / "final")
    files = {p.name: p.stat().st_size for p in (tmp_path / "final").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= files.keys()
    assert not any(
        "embed_tokens" in key or key.endswith("lm_head.weight") for key in load_file(tmp_path / "final/adapter_model.safetensors")
    )
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "final")  # Transformers finds the base model by the adapter's config
    torch.testing.assert_close(stock_logps(stock, BATCH).detach(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fused_logps(load_model(tmp_path / "final"), BATCH).detach(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("head", [{"targets": ["all-linear", "lm_head"]}, {"modules_to_save": ["lm_head"]}], ids=["head", "head in full"])
def test_an_adapter_can_be_merged_into_the_weights(tied: bool, head: dict, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = load_model(save_tiny(tmp_path / "base", tie_word_embeddings=tied), lora=LoraConfig(r=4, **head))
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    want = fused_logps(model, BATCH).detach()
    save_final(model, None, tmp_path / "final", merged=True)
    assert not (tmp_path / "final/adapter_config.json").exists()
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    torch.testing.assert_close(stock_logps(stock, BATCH).detach(), want, rtol=1e-4, atol=1e-4)


def test_adapters_that_cannot_be_continued(folder: Path, trained: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no adapter_config.json there"):
        load_model(folder, lora=LoraConfig(adapter=str(folder)))
    adapter = tmp_path / "adapter"
    save_final(trained, None, adapter)
    with pytest.raises(ModelError, match=r"give its base model as model\.path"):
        load_model(adapter, lora=LoraConfig(r=4))
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"only a pickle \(adapter_model.bin\), which is not read"):
        load_model(folder, lora=LoraConfig(adapter=str(adapter)))


def test_an_adapter_that_trains_biases_cannot_be_switched_off(folder: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder)
    peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], bias="lora_only")).save_pretrained(tmp_path / "adapter")
    for reference in ("start", "base"):
        with pytest.raises(ModelError, match=r"trains biases of the model in place \(bias 'lora_only'\).*make one with bias 'none'"):
            load_model(folder, lora=LoraConfig(adapter=str(tmp_path / "adapter"), reference=reference))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"r": -1}, "lora.r must be a rank"),
        ({"alpha": 32.0}, r"lora.alpha counts only with an adapter.*set --lora.r 16"),
        ({"targets": ["q_proj"]}, "lora.targets counts only with an adapter"),
        ({"dora": True}, "lora.dora counts only with an adapter"),
        ({"r": 4, "adapter": "there"}, "lora.r: lora.adapter is an adapter with options of its own; leave lora.r out"),
        ({"dropout": 0.1, "adapter": "there"}, "lora.dropout: lora.adapter is an adapter"),
        ({"r": 4, "alpha": float("nan")}, "lora.alpha must be positive and finite"),
        ({"r": 4, "dropout": 1.0}, r"lora.dropout must be in \[0, 1\)"),
        ({"r": 4, "reference": "base"}, "counts only where an existing adapter is trained further"),
    ],
)
def test_options_of_an_adapter_that_would_change_nothing(options: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        LoraConfig(**options).validate()


def test_options_beside_a_model_path_that_is_an_adapter() -> None:
    LoraConfig(reference="base").validate(beside="model.path")
    with pytest.raises(ConfigError, match=r"lora.alpha: model.path is an adapter with options of its own"):
        LoraConfig(alpha=8.0).validate(beside="model.path")


def test_a_model_path_that_is_an_adapter_trains_an_adapter(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    for config_class in (DPOConfig, KTOConfig):
        run = {"reference": "adapter", "output": "run", "data": config_class().data}
        run["data"].path = "pairs.jsonl"
        config_class(model=ModelConfig(path=str(tmp_path)), **run).validate()
        with pytest.raises(ConfigError, match=r"all weights are trained \(lora.r 0\)"):
            config_class(model=ModelConfig(path="whole"), **run).validate()


def test_dora_and_rslora_are_those_of_peft(folder: Path) -> None:
    for options, ours in (({"use_dora": True}, {"dora": True}), ({"use_rslora": True}, {"rslora": True})):
        base = AutoModelForCausalLM.from_pretrained(folder)
        wanted = peft.get_peft_model(
            base, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **options)
        )
        model = load_model(folder, lora=LoraConfig(r=4, **ours))
        torch.manual_seed(0)
        with torch.no_grad():
            for (name, parameter), other in zip(model.named_parameters(), wanted.parameters(), strict=True):
                if "lora_" in name:
                    parameter.copy_(torch.rand_like(parameter))
                    other.copy_(parameter)
        plain = stock_logps(AutoModelForCausalLM.from_pretrained(folder), BATCH)
        found, stock = fused_logps(model, BATCH), stock_logps(wanted, BATCH)
        torch.testing.assert_close(found, stock, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(stock, plain, atol=0.1)
        gradients = [
            torch.autograd.grad(logps.sum(), [p for p in of.parameters() if p.requires_grad])
            for logps, of in ((found, model), (stock, wanted))
        ]
        for ours_of, theirs_of in zip(*gradients, strict=True):
            torch.testing.assert_close(ours_of, theirs_of, rtol=1e-3, atol=1e-3)


def test_targets_that_are_not_in_the_model(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"lora.targets=\['query'\] does not fit the model"):
        load_model(folder, lora=LoraConfig(r=4, targets=["query"]))


def test_all_linear_leaves_out_the_head_and_may_be_extended() -> None:
    def adapted(targets: str | list[str]) -> set[str]:
        names = (
            name
            for name, _ in load_model(tiny_model("qwen3"), lora=LoraConfig(r=2, targets=targets)).named_parameters()
            if "lora_A" in name
        )
        return {name.split(".lora_A")[0].rsplit(".", 1)[-1] for name in names}

    layers = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert adapted("all-linear") == layers
    assert adapted(["all-linear", "lm_head"]) == layers | {"lm_head"}


def test_a_fresh_adapter_is_the_model_and_alone_is_trained() -> None:
    model = load_model(tiny_model("qwen3"), lora=LoraConfig(r=4, targets=["all-linear", "lm_head"]))
    torch.testing.assert_close(fused_logps(model, BATCH), stock_logps(stock_twin("qwen3"), BATCH), rtol=1e-5, atol=1e-5)
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)
    assert model.peft_config["default"].lora_alpha == 8
