"""Every family: packed log-probs and gradients equal the stock model's own, one sequence at a time."""

from typing import Any

import pytest
import torch
import transformers
from families import TRAINABLE, fused_logps, gradients, ragged_batch, stock_logps, stock_twin, weights_of
from tiny import tiny_config, tiny_model
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, BloomConfig, BloomForCausalLM

from fastalign import packing
from fastalign.errors import ModelError
from fastalign.models.heads import head_spec
from fastalign.models.load import load_model
from fastalign.models.trunk import trunk
from fastalign.packing import collate
from fastalign.types import Sample

# Families beyond tiny.FAMILIES, each for a reason.
MORE: dict[str, dict[str, Any]] = {
    "gemma": {"head_dim": 16},  # embeddings scaled by sqrt(D)
    "cohere": {"logit_scale": 0.25},
    "gpt_neox": {"num_key_value_heads": None},  # partial rotary, parallel residual
    "gpt_oss": {"head_dim": 16, "sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2},  # attention sinks
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 64, "do_layer_norm_before": True},  # learned positions with an offset
    "starcoder2": {"sliding_window": 8},
    "glm4": {"head_dim": 8},
    "hyperclovax": {"logits_scaling": 3.0, "head_dim": 8},  # multiplies by what Granite divides by
    "nanochat": {},  # another softcap
    "deepseek_v3": {  # latent attention: values are narrower than keys
        "num_key_value_heads": 4,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 6,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
    },
    "olmo3": {"sliding_window": 8},
}


@pytest.fixture(scope="module", params=[False, True], ids=["separate", "shared prompts"])
def batch(request: pytest.FixtureRequest) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "SHARE_FROM", 5)
        found = ragged_batch(share=request.param)
    assert (found.shared is not None) == request.param
    return found


@pytest.mark.parametrize("family", TRAINABLE)
def test_log_probs_equal_the_models_own_logits(family: str, batch: Any) -> None:
    with torch.no_grad():
        want = stock_logps(stock_twin(family), batch)
        got = fused_logps(load_model(tiny_model(family)), batch)
    assert want.std() > 0.1  # random models that are confident enough to be wrong
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", MORE)
def test_log_probs_of_further_families(family: str, batch: Any) -> None:
    if family not in CONFIG_MAPPING:
        pytest.skip(f"Transformers {transformers.__version__} has no {family}: that it packs is unproven here")
    options = dict.fromkeys(("bos_token_id", "pad_token_id"), None)
    config = tiny_config("llama").to_dict() | options | MORE[family]
    for key in ("model_type", "architectures", "transformers_version", "head_dim", "rope_parameters", "rope_scaling", "rope_theta"):
        if key not in MORE[family]:
            config.pop(key, None)
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **config), attn_implementation="eager").eval())
    with torch.no_grad():
        want = stock_logps(models[0], batch)
        if family == "opt" and transformers.__version__ < "5":  # there OPT builds a mask whatever the attention
            with pytest.raises(ModelError, match="OPTAttention passes its own attention mask"):
                fused_logps(load_model(models[1]), batch)
            return
        got = fused_logps(load_model(models[1]), batch)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


# One of each mechanism: grouped heads and tied head; window; caps, window and tied head; bias; scales; experts; learned positions.
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen3", {"tie_word_embeddings": True}),
        ("mistral", {}),
        ("gemma2", {}),
        ("phi", {}),
        ("granite", {}),
        ("qwen3_moe", {}),
        ("gpt2", {}),
    ],
)
def test_gradients_equal_the_sum_of_one_by_one(family: str, options: dict, batch: Any) -> None:
    stock, model = stock_twin(family, **options), load_model(tiny_model(family, **options))
    want = gradients(stock, stock_logps(stock, batch) @ weights_of(batch))
    got = gradients(model, fused_logps(model, batch) @ weights_of(batch))
    assert got.keys() == want.keys()
    for name in want:
        scale = want[name].abs().max().clamp(min=1.0)
        torch.testing.assert_close(got[name] / scale, want[name] / scale, rtol=0, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "qwen3_moe"])
def test_gradient_checkpointing_changes_nothing(family: str, batch: Any) -> None:
    kept, recomputed = load_model(tiny_model(family)), load_model(tiny_model(family), gradient_checkpointing=True)
    found = []
    for model in (kept, recomputed):
        model.train()
        out = trunk(model, batch)
        logps = head_spec(model).logps(out.hidden[batch.live], batch.live_target).logps
        found.append(gradients(model, logps @ weights_of(batch) + (0.0 if out.aux_loss is None else 100 * out.aux_loss)))
    assert recomputed.is_gradient_checkpointing
    assert found[0].keys() == found[1].keys()
    for name in found[0]:
        torch.testing.assert_close(found[1][name], found[0][name], rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_auxiliary_loss_is_the_models_own(family: str, batch: Any) -> None:
    stock, model = stock_twin(family), load_model(tiny_model(family))
    single = copies(batch, 3, 1)  # one sequence: there the model's own unpadded batch is the packed batch
    own, packed = stock.router_aux_loss_coef * stock(input_ids=single.input_ids[None]).aux_loss, trunk(model, single).aux_loss
    torch.testing.assert_close(packed, own, rtol=1e-5, atol=0)
    want = torch.autograd.grad(own, list(stock.parameters()), allow_unused=True)
    got = torch.autograd.grad(packed, list(model.parameters()), allow_unused=True)
    for a, b in zip(got, want):
        assert (a is None) == (b is None)
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_auxiliary_loss_of_a_pack_is_taken_over_all_its_tokens(batch: Any) -> None:
    """Equal sequences side by side route as one of them does, so packing two of them keeps the loss."""
    model = load_model(tiny_model("mixtral"))
    once, twice = (copies(batch, 0, n) for n in (1, 2))
    torch.testing.assert_close(trunk(model, twice).aux_loss, trunk(model, once).aux_loss)


def test_no_auxiliary_loss_unless_the_config_asks(batch: Any) -> None:
    assert trunk(load_model(tiny_model("mixtral", output_router_logits=False)), batch).aux_loss is None
    assert trunk(load_model(tiny_model("qwen3")), batch).aux_loss is None


def test_bfloat16_is_within_its_rounding(batch: Any) -> None:
    gold = fused_logps(load_model(tiny_model("granite")), batch)
    stock = stock_logps(stock_twin("granite", dtype=torch.bfloat16), batch).float()
    model = load_model(tiny_model("granite", dtype=torch.bfloat16))
    assert head_spec(model).logit_scale == 0.25  # read exactly, though measured in bfloat16
    got = fused_logps(model, batch)
    assert (got - gold).abs().max() <= 2 * (stock - gold).abs().max()


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        ("falcon_h1", {}, "recurrent layers"),
        ("mamba", {}, "recurrent layers"),
        ("rwkv", {}, "recurrent layers"),
        ("jamba", {}, "recurrent layers"),
        ("qwen3_next", {}, "recurrent layers (linear_attention)"),
        ("lfm2", {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2}, "recurrent layers (conv)"),
        ("llama4_text", {}, "chunked_attention layers"),
        ("t5", {}, "encoder-decoder"),
        ("vit", {}, "no causal language model"),
    ],
)
def test_refused_by_name_before_any_weight_is_read(family: str, options: dict, reason: str, tmp_path: Any) -> None:
    AutoConfig.for_model(family, **options).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"never read")
    with pytest.raises(ModelError, match=f"{family} models are not supported") as error:
        load_model(tmp_path)
    assert reason in str(error.value)


def test_attention_outside_of_the_interface_is_refused() -> None:
    model = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=2))
    with pytest.raises(ModelError, match=r"bloom models are not supported: its attention does not go through"):
        load_model(model)


def test_a_layer_that_mixes_tokens_by_itself_is_caught_whatever_it_is_called(batch: Any) -> None:
    model = load_model(tiny_model("qwen3"))

    class Mixer(torch.nn.Module):
        def forward(self, hidden_states: Any, **kwargs: Any) -> Any:
            return hidden_states.cumsum(1), None

    model.model.layers[1].self_attn = Mixer()
    with pytest.raises(ModelError, match=r"only 1 of 2 layers called fastalign's attention"):
        trunk(model, batch)


def test_a_model_that_drops_the_boundaries_is_caught(batch: Any) -> None:
    model = load_model(tiny_model("qwen3"))
    attention = model.model.layers[0].self_attn
    forward = attention.forward
    attention.forward = lambda hidden_states, position_embeddings, attention_mask, **kwargs: forward(
        hidden_states=hidden_states, position_embeddings=position_embeddings, attention_mask=attention_mask
    )
    with pytest.raises(ModelError, match="without sequence boundaries"):
        trunk(model, batch)


def copies(batch: Any, sequence: int, n: int) -> Any:
    ids = tuple(batch.input_ids[batch.sequences()[sequence]].tolist())
    return collate([Sample(0, ids[:1], (ids[1:],) * n)])
