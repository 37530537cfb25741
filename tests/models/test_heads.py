import peft
import pytest
import torch
from families import fused_logps, gradients, ragged_batch, stock_logps, stock_twin, weights_of
from tiny import tiny_model
from transformers import AutoModelForCausalLM
from transformers.models.falcon_h1 import FalconH1Config, FalconH1ForCausalLM

from fastalign.errors import HeadMismatchError, ModelError
from fastalign.models.config import LoraConfig
from fastalign.models.heads import head_spec
from fastalign.models.load import load_model
from fastalign.models.trunk import trunk

BATCH = ragged_batch()


@pytest.mark.parametrize(
    ("family", "options", "scale", "softcap"),
    [
        ("qwen3", {}, 1.0, None),
        ("gemma2", {}, 1.0, 3.0),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, 1.0, 30.0),
        ("granite", {"logits_scaling": 7.0}, 1 / 7.0, None),  # divides
        ("cohere2", {"logit_scale": 0.0625}, 0.0625, None),  # multiplies
        ("phi", {}, 1.0, None),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_the_forward_does_to_its_logits_is_read_exactly(family, options, scale, softcap, dtype) -> None:
    model = tiny_model(family, dtype=dtype, **options)
    spec = head_spec(model)
    assert (spec.logit_scale, spec.softcap) == (scale, softcap)
    assert spec.weight is model.get_output_embeddings().weight
    assert spec.bias is model.get_output_embeddings().bias
    assert (spec.bias is not None) == (family == "phi")


def test_a_scale_that_is_a_fixed_number_of_the_code_is_measured() -> None:
    model = tiny_model("llama")
    forward = model.forward
    model.forward = lambda **kwargs: _with_logits(forward(**kwargs), lambda z: 0.3711 * z)
    assert head_spec(model).logit_scale == pytest.approx(0.3711, rel=1e-6)


def test_a_scale_in_front_of_the_head() -> None:
    """MiniCPM divides the hidden states, by a ratio that its config does not hold as a number."""
    minicpm = pytest.importorskip("transformers.models.minicpm3", reason="no family of this Transformers scales in front of its head")
    sizes = {"vocab_size": 320, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    low_rank = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        config = minicpm.MiniCPM3Config(**sizes, **low_rank, num_key_value_heads=4, dim_model_base=14, initializer_range=0.3)
        models.append(AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval())
    model = load_model(models[1])
    assert head_spec(model).logit_scale == pytest.approx(14 / 48, rel=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(fused_logps(model, BATCH), stock_logps(models[0], BATCH), rtol=1e-5, atol=1e-5)


def test_falcon_h1_is_refused_but_its_head_can_be_read() -> None:
    config = FalconH1Config(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        lm_head_multiplier=0.13, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8,
    )  # fmt: skip
    model = FalconH1ForCausalLM(config)
    assert head_spec(model).logit_scale == 0.13
    with pytest.raises(ModelError, match="falcon_h1 models are not supported"):
        load_model(model)


def test_reading_leaves_no_trace() -> None:
    model = tiny_model("phi", embd_pdrop=0.5).train()
    before = torch.get_rng_state()
    head_spec(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert "forward" not in vars(model.model)
    assert not model.lm_head._forward_hooks
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "change",
    [lambda z: z + 0.5 * torch.sin(z), lambda z: z - z.logsumexp(-1, keepdim=True) * 1.1, lambda z: z.clamp(-3, 3), lambda z: z**3],
    ids=["sine", "shift per row", "clamp", "cube"],
)
def test_a_head_that_is_no_scale_and_cap_is_refused(change) -> None:
    model = tiny_model("llama")
    forward = model.forward
    model.forward = lambda **kwargs: _with_logits(forward(**kwargs), change)
    with pytest.raises(HeadMismatchError, match="does more to its logits than scale them"):
        head_spec(model)


def test_a_forward_that_does_not_call_its_head() -> None:
    model = tiny_model("llama")
    other = torch.nn.Linear(32, 320, bias=False)
    model.forward = lambda input_ids, **kwargs: _with_logits(model.model(input_ids), lambda z: z, other)
    with pytest.raises(HeadMismatchError, match="without calling its output embeddings"):
        head_spec(model)


def test_a_head_that_is_no_linear_layer_is_named() -> None:
    class Linear4bit(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x).round()

    model = tiny_model("llama")
    model.lm_head = Linear4bit(32, 320)
    with pytest.raises(ModelError, match="its head is a Linear4bit"):
        head_spec(model)


LORA = {
    "layers": LoraConfig(r=4),
    "layers and head": LoraConfig(r=4, alpha=16, targets=["all-linear", "lm_head"]),
    "head alone": LoraConfig(r=4, targets=["lm_head"]),
    "head in full": LoraConfig(r=4, targets=["q_proj"], modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("lora", LORA.values(), ids=LORA.keys())
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_adapted_models_equal_their_own_logits_and_gradients(lora: LoraConfig, tied: bool) -> None:
    torch.manual_seed(0)
    model = load_model(tiny_model("qwen3", tie_word_embeddings=tied), lora=lora)
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.requires_grad):  # a fresh adapter's B is 0: it would hide a missing update
            p.add_(0.2 * torch.randn_like(p))
    got = fused_logps(model, BATCH)
    fused_gradients = gradients(model, got @ weights_of(BATCH))
    causal = model.get_base_model()
    causal.set_attn_implementation("eager")
    want = stock_logps(causal, BATCH)
    own_gradients = gradients(model, want @ weights_of(BATCH))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert fused_gradients.keys() == own_gradients.keys() == {n for n, p in causal.named_parameters() if p.requires_grad}
    for name, gradient in own_gradients.items():
        scale = gradient.abs().max().clamp(min=1.0)
        torch.testing.assert_close(fused_gradients[name] / scale, gradient / scale, rtol=0, atol=1e-5)


def test_lora_on_the_head_in_bfloat16_trains_its_float32_adapter() -> None:
    model = load_model(tiny_model("qwen3", dtype=torch.bfloat16), lora=LORA["layers and head"])
    model.train()
    found = gradients(model, fused_logps(model, BATCH) @ weights_of(BATCH))
    head = {name: g for name, g in found.items() if "lm_head" in name}
    assert {g.dtype for g in head.values()} == {torch.float32}
    assert any(g.abs().max() > 0 for g in head.values())


def test_lora_dropout_acts_on_the_head_while_training() -> None:
    torch.manual_seed(0)
    model = load_model(tiny_model("qwen3"), lora=LoraConfig(r=4, dropout=0.5, targets=["lm_head"]))
    torch.nn.init.normal_(model.get_base_model().lm_head.lora_B["default"].weight)
    model.eval()
    assert torch.equal(fused_logps(model, BATCH), fused_logps(model, BATCH))
    model.train()
    assert not torch.equal(fused_logps(model, BATCH), fused_logps(model, BATCH))


def test_what_lora_on_the_head_cannot_be_is_named() -> None:
    model = load_model(tiny_model("qwen3"))
    dora = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["lm_head"], use_dora=True))
    with pytest.raises(ModelError, match="no plain LoRA"):
        head_spec(dora)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_loss_adds_to_an_existing_weight_gradient_in_place(tied: bool) -> None:
    """With `weight.grad` allocated the head adds to it; a tied weight gets the embedding's share from autograd too."""
    stock, model = stock_twin("qwen3", tie_word_embeddings=tied), load_model(tiny_model("qwen3", tie_word_embeddings=tied))
    want = gradients(stock, stock_logps(stock, BATCH).sum())
    head = head_spec(model)
    buffer = head.weight.grad = torch.ones_like(head.weight)
    hidden = trunk(model, BATCH).hidden.index_select(0, BATCH.live)
    head.loss(hidden, BATCH.live_target, lambda out, rows: out.logps.sum()).backward()
    assert head.weight.grad is buffer
    name = "model.embed_tokens.weight" if tied else "lm_head.weight"
    torch.testing.assert_close(buffer - 1, want[name], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        model.model.layers[0].mlp.up_proj.weight.grad, want["model.layers.0.mlp.up_proj.weight"], rtol=1e-4, atol=1e-4
    )


def _with_logits(out, change, head=None):
    out.logits = change(out.logits if head is None else head(out.last_hidden_state))
    return out
