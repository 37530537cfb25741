from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from families import ragged_batch, tokens
from safetensors import safe_open
from tiny import save_tiny, tiny_model
from torch import Tensor, nn

from fastalign.errors import ConfigError, DataError
from fastalign.models import reference
from fastalign.models.adapters import add_adapter
from fastalign.models.config import LoraConfig
from fastalign.models.fingerprint import model_fingerprint
from fastalign.models.load import load_model
from fastalign.models.reference import AdapterReference, CachedReference, CopyReference, build_reference, sequence_logps
from fastalign.models.save import save_final
from fastalign.packing import collate
from fastalign.types import Sample

GENERATOR = torch.Generator().manual_seed(3)
SAMPLES = [Sample(i, tokens(3 + i, GENERATOR), (tokens(4, GENERATOR), tokens(2 + 3 * i, GENERATOR))) for i in range(5)]
LORA = LoraConfig(r=4, dropout=0.5, targets=["all-linear", "lm_head"])


@dataclass
class Options:
    reference: str = "auto"
    token_limit: int = 64
    share_prompts: bool = True
    logits_budget: int | None = None


@dataclass
class Data:
    samples: list[Sample] = field(default_factory=lambda: SAMPLES[:3])
    eval_samples: list[Sample] = field(default_factory=lambda: SAMPLES[3:])
    fingerprint: str = "data"


def policy(lora: bool = False, **options) -> nn.Module:
    torch.manual_seed(0)
    return load_model(tiny_model("qwen3", **options), lora=LORA if lora else None).train()


def train(model: nn.Module) -> None:
    """Move every trained weight."""
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.requires_grad):
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))


def batches() -> list:
    """The data set shuffled and cut as a run would, not as the cache was computed."""
    return [collate([SAMPLES[i] for i in rows]) for rows in ([4, 0], [2], [1, 3])]


def truth() -> list[Tensor]:
    return [sequence_logps(policy(), batch) for batch in batches()]


@pytest.mark.parametrize(("mode", "lora"), [("adapter", True), ("cache", True), ("cache", False), ("copy", True), ("copy", False)])
def test_the_reference_stays_while_the_policy_moves(mode: str, lora: bool, tmp_path: Path) -> None:
    model = policy(lora)
    ref = build_reference(model, Options(mode), Data(), tmp_path)
    before = [ref.logps(batch) for batch in batches()]
    train(model)
    wanted = truth()
    rng, flags = torch.get_rng_state(), [p.requires_grad for p in model.parameters()]
    for batch, first, want in zip(batches(), before, wanted):
        got = ref.logps(batch)
        assert torch.equal(got, first)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)
        assert (sequence_logps(model, batch) - got).abs().max() > 0.1
        assert got.dtype == torch.float32
        assert not got.requires_grad
    assert torch.equal(torch.get_rng_state(), rng)
    assert flags == [p.requires_grad for p in model.parameters()]
    assert model.training


@pytest.mark.parametrize("extra", [{"targets": ["all-linear", "lm_head"]}, {"modules_to_save": ["lm_head"]}], ids=["head", "head in full"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_fresh_adapter_equals_its_reference_bit_for_bit(extra: dict, tied: bool) -> None:
    model = add_adapter(policy(tie_word_embeddings=tied), LoraConfig(r=4, dropout=0.5, **extra)).train()
    for batch in batches():
        assert torch.equal(AdapterReference(model).logps(batch), sequence_logps(model, batch))


@pytest.mark.parametrize("head_in_full", [False, True], ids=["lora", "modules_to_save"])
def test_an_adapter_trained_further_is_compared_with_where_it_started(head_in_full: bool, tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    extra = {"targets": ["q_proj"], "modules_to_save": ["lm_head"]} if head_in_full else {}
    first = load_model(base, lora=LoraConfig(r=4, **extra))
    train(first)
    save_final(first, None, tmp_path / "adapter")
    started = [sequence_logps(first, batch) for batch in batches()]

    model = load_model(base, lora=LoraConfig(adapter=str(tmp_path / "adapter"))).train()
    ref = AdapterReference(model)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all(".default." in name for name in trained)
    for batch, want in zip(batches(), started):
        torch.testing.assert_close(sequence_logps(model, batch), want, rtol=1e-5, atol=1e-4)
    train(model)
    moved = [sequence_logps(model, batch) for batch in batches()]
    for batch, want, now in zip(batches(), started, moved):
        torch.testing.assert_close(ref.logps(batch), want, rtol=1e-5, atol=1e-4)
        assert torch.equal(sequence_logps(model, batch), now)  # the policy is active again
        assert (now - want).abs().max() > 0.1
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained
    save_final(model, None, tmp_path / "final")
    assert not (tmp_path / "final/reference").exists()
    again = load_model(tmp_path / "final")
    torch.testing.assert_close(sequence_logps(again, batches()[0]), moved[0], rtol=1e-5, atol=1e-4)


def test_an_adapter_trained_further_may_be_compared_with_the_base_model(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    first = load_model(base, lora=LoraConfig(r=4))
    train(first)
    save_final(first, None, tmp_path / "adapter")
    wanted = [sequence_logps(load_model(base), batch) for batch in batches()]
    for model in (
        load_model(base, lora=LoraConfig(adapter=str(tmp_path / "adapter"), reference="base")),
        load_model(tmp_path / "adapter", lora=LoraConfig(reference="base")),
    ):
        ref = AdapterReference(model)
        for batch, want in zip(batches(), wanted):
            assert torch.equal(ref.logps(batch), want)
            assert (sequence_logps(model, batch) - want).abs().max() > 0.1


def test_auto(tmp_path: Path) -> None:
    assert isinstance(build_reference(policy(lora=True), Options(), Data(), tmp_path), AdapterReference)
    assert isinstance(build_reference(policy(), Options(), Data(), tmp_path), CachedReference)


def test_modes_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="reference=adapter needs an adapter"):
        build_reference(policy(), Options("adapter"), Data(), ".")
    with pytest.raises(ConfigError, match="reference must be auto, adapter, cache, copy or stream, got 'disk'"):
        build_reference(policy(), Options("disk"), Data(), ".")


def test_the_cache_is_reused_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build_reference(policy(), Options("cache"), Data(), tmp_path)
    monkeypatch.setattr(reference, "_compute", lambda *args: pytest.fail("computed again"))
    again = build_reference(policy(), Options("cache", token_limit=32), Data(), tmp_path)
    for batch in batches():
        assert torch.equal(first.logps(batch), again.logps(batch))
    files = sorted(file.suffix for file in (tmp_path / "reference").iterdir())
    assert files == [".json", ".safetensors"]


CHANGES = {
    "a weight in its last bit": lambda model, data: model.lm_head.weight.data.view(torch.int32)[7, 3].add_(1),
    "the config": lambda model, data: setattr(model.config, "rms_norm_eps", 1e-4),
    "the data's fingerprint": lambda model, data: setattr(data, "fingerprint", "other"),
    "one token": lambda model, data: data.samples.__setitem__(0, Sample(0, (1, 2), ((3,), (4,)))),
    "the order": lambda model, data: data.samples.reverse(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_whatever_changes_the_numbers_changes_the_cache(change, tmp_path: Path) -> None:
    build_reference(policy(), Options("cache"), Data(samples=list(SAMPLES[:3])), tmp_path)
    model, data = policy(), Data(samples=list(SAMPLES[:3]))
    change(model, data)
    ref = build_reference(model, Options("cache"), data, tmp_path)
    assert len(list((tmp_path / "reference").glob("*.safetensors"))) == 2
    batch = collate(data.samples)
    torch.testing.assert_close(ref.logps(batch), sequence_logps(model, batch), rtol=1e-5, atol=1e-4)


def test_the_fresh_adapter_does_not_count_for_the_cache(tmp_path: Path) -> None:
    build_reference(policy(), Options("cache"), Data(), tmp_path)
    build_reference(policy(lora=True), Options("cache"), Data(), tmp_path)
    build_reference(
        add_adapter(policy(), LoraConfig(r=8, targets=["v_proj"], modules_to_save=["lm_head"])), Options("cache"), Data(), tmp_path
    )
    assert len(list((tmp_path / "reference").glob("*.safetensors"))) == 1


@pytest.mark.parametrize(
    "harm", [lambda file: file.write_bytes(file.read_bytes()[:-9]), lambda file: file.write_bytes(b"")], ids=["cut", "empty"]
)
def test_a_damaged_cache_is_computed_anew(harm, tmp_path: Path) -> None:
    first = build_reference(policy(), Options("cache"), Data(), tmp_path)
    [file] = (tmp_path / "reference").glob("*.safetensors")
    harm(file)
    again = build_reference(policy(), Options("cache"), Data(), tmp_path)
    assert torch.equal(first.logps(batches()[0]), again.logps(batches()[0]))
    with safe_open(file, framework="pt") as stored:
        assert stored.get_tensor("logps").shape == (10,)


def test_samples_outside_of_the_cache_are_named(tmp_path: Path) -> None:
    ref = build_reference(policy(), Options("cache"), Data(eval_samples=[]), tmp_path)
    with pytest.raises(DataError, match="sample 4 has no cached reference"):
        ref.logps(collate([SAMPLES[4]]))
    with pytest.raises(DataError, match="same index"):
        build_reference(policy(), Options("cache"), Data(eval_samples=[SAMPLES[0]]), tmp_path)


def test_the_fingerprint_is_of_the_weights_not_of_where_they_lie(tmp_path: Path) -> None:
    prints = {model_fingerprint(load_model(save_tiny(tmp_path / name))) for name in ("a", "b")}
    assert len(prints) == 1
    assert model_fingerprint(load_model(tmp_path / "a", dtype="bfloat16")) not in prints


def test_a_copy_on_another_device_answers_on_the_batches() -> None:
    model = policy()
    ref = CopyReference(model, device="cpu")
    assert ref.model is not model
    assert not any(p.requires_grad for p in ref.model.parameters())
    assert ref.logps(ragged_batch()).device.type == "cpu"


def test_sums_are_those_of_the_completions_alone() -> None:
    model = policy()
    sample = Sample(0, (5, 6, 7), ((8, 9), (10,)))
    logits = model.eval()
    logits.set_attn_implementation("eager")
    with torch.no_grad():
        rows = logits(input_ids=torch.tensor([[5, 6, 7, 8, 9]])).logits[0].log_softmax(-1)
        other = logits(input_ids=torch.tensor([[5, 6, 7, 10]])).logits[0].log_softmax(-1)
    want = torch.stack([rows[2, 8] + rows[3, 9], other[2, 10]])
    model.set_attn_implementation("fastalign")
    torch.testing.assert_close(sequence_logps(model, collate([sample])), want)


@pytest.mark.parametrize("kind", ["adapter", "cache", "copy"])
def test_desensitised_log_probs_are_the_same_from_every_reference(tmp_path: Path, kind: str) -> None:
    """LD-DPO changes the reference's sums too, and a cache of them is not taken for one of plain sums."""
    model = policy(lora=kind == "adapter")
    plain = build_reference(model, Options(kind), Data(), tmp_path)
    found = build_reference(model, Options(kind), Data(), tmp_path, ld_alpha=0.3)
    expected = [sequence_logps(policy(), batch, ld_alpha=0.3) for batch in batches()]
    for batch, want in zip(batches(), expected):
        torch.testing.assert_close(found.logps(batch), want, rtol=1e-5, atol=1e-5)
        assert (found.logps(batch) - plain.logps(batch)).abs().max() > 0.1


def test_a_copy_moves_towards_the_model() -> None:
    model = policy()
    copy = CopyReference(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model)
    copy.mix(model, 0.25)
    for (name, now), then in zip(copy.model.named_parameters(), before.values(), strict=True):
        torch.testing.assert_close(now, 0.75 * then + 0.25 * model.get_parameter(name), msg=name)
