import pytest
import torch
from families import TRAINABLE, ragged_batch
from tiny import tiny_model

from fastalign.errors import HeadMismatchError, ModelError
from fastalign.models import selfcheck
from fastalign.models.config import LoraConfig
from fastalign.models.load import load_model
from fastalign.models.selfcheck import self_check
from fastalign.packing import collate
from fastalign.types import Sample

BATCH = ragged_batch()


@pytest.mark.parametrize("family", TRAINABLE)
def test_every_family_passes(family: str) -> None:
    assert self_check(load_model(tiny_model(family)), BATCH) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_passes_with_room(dtype: torch.dtype) -> None:
    model = load_model(tiny_model("granite", dtype=dtype), lora=LoraConfig(r=4, targets=["all-linear", "lm_head"]))
    assert self_check(model, BATCH) < 0.5 * selfcheck._TOLERANCE[dtype]


def test_it_leaves_no_trace() -> None:
    model = load_model(tiny_model("gpt2", embd_pdrop=0.5, resid_pdrop=0.5), dropout=True).train()
    rng = torch.get_rng_state()
    self_check(model, BATCH)
    assert torch.equal(torch.get_rng_state(), rng)
    assert model.training
    assert model.config._attn_implementation == "fastalign"
    assert all(p.grad is None for p in model.parameters())


def _scaled(model: torch.nn.Module) -> None:
    """Logits scaled behind our back only when there is more than a probe to score."""
    forward = model.forward

    def altered(input_ids, **kwargs):
        out = forward(input_ids=input_ids, **kwargs)
        if input_ids.any():
            out.logits = 1.1 * out.logits
        return out

    model.forward = altered


def _head_forgotten(model: torch.nn.Module) -> None:
    """An adapter on the head that the fused path does not know of."""
    model.get_output_embeddings().register_forward_hook(lambda module, args, out: out + 0.3 * args[0].sum(-1, keepdim=True) * out.cos())


def _positions_not_restarted(model: torch.nn.Module) -> None:
    """A decoder that counts positions over the whole pack. Rotary attention sees only differences, learned positions do not."""
    inner = model.transformer.forward
    model.transformer.forward = lambda *ids, position_ids=None, **kwargs: inner(*ids, **kwargs)


@pytest.mark.parametrize(("family", "alter"), [("llama", _scaled), ("llama", _head_forgotten), ("gpt2", _positions_not_restarted)])
def test_a_model_that_is_not_what_was_read_from_it_is_refused(family: str, alter) -> None:
    model = load_model(tiny_model(family))
    alter(model)
    with pytest.raises(HeadMismatchError, match="differ from the model's own logits"):
        self_check(model, BATCH)


def test_sequences_without_a_scored_token_are_passed_over() -> None:
    assert self_check(load_model(tiny_model("llama")), collate([Sample(0, (), ((3,),))])) == 0.0


def test_long_sequences_are_cut() -> None:
    model = load_model(tiny_model("llama"))
    seen = []
    model.model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    self_check(model, collate([Sample(0, (1,) * 300, ((2,) * 100, (3,) * 50))]), tokens=64)
    assert sorted(seen)[-3:] == [64, 64, 128]


def test_attention_that_cannot_branch_is_refused_by_name_for_sharing_only() -> None:
    model = load_model(tiny_model("gpt2"))
    inner = model.transformer.forward

    def own_positions(*ids, position_ids=None, segments=None, **kwargs):  # counted per piece, whatever it continues
        if segments is None:
            return inner(*ids, position_ids=position_ids, **kwargs)
        positions = torch.cat([torch.arange(n) for n in segments.lengths])[None]
        return inner(*ids, position_ids=positions, segments=segments, **kwargs)

    model.transformer.forward = own_positions
    assert self_check(model, BATCH) < 1e-5
    short = collate([Sample(0, (5, 9, 7), ((3,), (4, 8)))])  # whose prompt is too short to be shared itself
    for batch in (BATCH, short):
        with pytest.raises(ModelError, match=r"GPT2LMHeadModel: .* its attention cannot branch; set --share_prompts false"):
            self_check(model, batch, share=True)


@pytest.mark.parametrize("family", TRAINABLE)
def test_every_family_can_branch(family: str) -> None:
    assert self_check(load_model(tiny_model(family)), ragged_batch(share=True), share=True) < 1e-5
