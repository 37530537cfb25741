"""Reward models: scores of packed sequences are those of Transformers' own classifiers, before and after saving."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tiny import save_tiny, tiny_config
from transformers import AutoModelForSequenceClassification

from fastalign import packing
from fastalign.errors import HeadMismatchError, ModelError
from fastalign.models.config import LoraConfig
from fastalign.models.save import save_final
from fastalign.models.value_head import check_scores, is_reward_model, load_reward_model, scores
from fastalign.packing import collate
from fastalign.types import Sample

PAD = 1
SAMPLES = [
    Sample(0, (5, 9, 2), ((7, 8, 3, 0), (4, 0))),
    Sample(1, (11,), ((6, 13, PAD, PAD), (PAD,))),  # ends in padding: the score is read before it
    Sample(2, (PAD,), ((PAD,), (21, 22, 23))),  # nothing but padding: the score is read at the first token
]
FAMILIES = ("qwen3", "llama", "gemma2", "gpt2", "qwen3_moe")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for family in (*FAMILIES, "granite"):
        save_tiny(folder / family, family)
    return folder


def fresh(path: Path, **options: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return load_reward_model(path, pad_token_id=PAD, **options)  # type: ignore[arg-type]


def stock_scores(path: Path) -> torch.Tensor:
    """As a user of plain Transformers gets them: one unpadded sequence at a time. SDPA leaves softcaps out in some of its versions."""
    model = AutoModelForSequenceClassification.from_pretrained(path, attn_implementation="eager")
    batch = collate(SAMPLES)
    with torch.no_grad():
        return torch.cat([model(input_ids=batch.input_ids[None, a:b]).logits[:, 0] for a, b in pairwise(batch.bounds)])


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_loads_in_transformers_and_scores_the_same(folders: Path, tmp_path: Path, family: str) -> None:
    model = fresh(folders / family)
    batch = collate(SAMPLES)
    ours = scores(model, batch)
    assert len(set(ours.tolist())) == len(ours)  # the sequences are told apart
    assert check_scores(model, batch, sequences=6) < 1e-5
    save_final(model, None, tmp_path / "final")
    torch.testing.assert_close(stock_scores(tmp_path / "final"), ours, rtol=1e-5, atol=1e-6)
    config = AutoModelForSequenceClassification.from_pretrained(tmp_path / "final").config
    assert (config.num_labels, config.pad_token_id) == (1, PAD)
    assert is_reward_model(tmp_path / "final")
    assert not is_reward_model(folders / family)
    torch.testing.assert_close(scores(load_reward_model(tmp_path / "final", pad_token_id=PAD), batch), ours)


def test_a_padded_batch_in_transformers_scores_the_same(folders: Path, tmp_path: Path) -> None:
    """Why the score is not simply read at the last token: Transformers cannot tell a sequence's own padding from its batch's."""
    model = fresh(folders / "qwen3")
    save_final(model, None, tmp_path / "final")
    batch = collate(SAMPLES)
    rows = [batch.input_ids[a:b] for a, b in pairwise(batch.bounds)]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    with torch.no_grad():
        own = AutoModelForSequenceClassification.from_pretrained(tmp_path / "final")(input_ids=padded, attention_mask=mask).logits[:, 0]
    torch.testing.assert_close(own, scores(model, batch), rtol=1e-4, atol=1e-5)


def test_gradient_reaches_trunk_and_head(folders: Path) -> None:
    model = fresh(folders / "qwen3")
    scores(model, collate(SAMPLES)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_lora_trains_the_score_head_in_full_and_keeps_it(folders: Path, tmp_path: Path) -> None:
    model = fresh(folders / "qwen3", lora=LoraConfig(r=4, targets=["all-linear"]))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert [name for name in trained if "lora" not in name] == ["base_model.model.score.modules_to_save.default.weight"]
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    batch = collate(SAMPLES)
    ours = scores(model, batch)
    assert check_scores(model, batch) < 1e-5
    save_final(model, None, tmp_path / "adapter")
    assert is_reward_model(tmp_path / "adapter")
    torch.testing.assert_close(scores(load_reward_model(tmp_path / "adapter", pad_token_id=PAD), batch), ours)
    save_final(model, None, tmp_path / "merged", merged=True)
    torch.testing.assert_close(stock_scores(tmp_path / "merged"), ours, rtol=1e-4, atol=1e-5)


def test_a_score_read_elsewhere_is_noticed(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = fresh(folders / "qwen3"), collate(SAMPLES)
    monkeypatch.setattr("fastalign.models.value_head._last_tokens", lambda batch, pad: batch.cu_seqlens[1:].long() - 1)
    with pytest.raises(HeadMismatchError, match=r"packed scores differ from the model's own by up to .* so it does not start"):
        check_scores(model, batch)


@pytest.mark.parametrize("shrunk", [1.0, 0.01])
def test_half_precision_passes_the_check_whatever_the_size_of_its_scores(folders: Path, shrunk: float) -> None:
    model, batch = fresh(folders / "qwen3").bfloat16(), collate(SAMPLES)
    with torch.no_grad():
        model.score.weight.mul_(shrunk)
    assert 0 < check_scores(model, batch, sequences=6) < 0.05


def test_models_that_cannot_be_reward_models_are_named(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="granite: Transformers has no sequence classification model of type granite"):
        fresh(folders / "granite")
    AutoModelForSequenceClassification.from_config(tiny_config("qwen3", num_labels=3)).save_pretrained(tmp_path / "three")
    with pytest.raises(ModelError, match="a classifier of 3 labels; a reward model has one score"):
        fresh(tmp_path / "three")


def test_a_torn_config_is_named(tmp_path: Path) -> None:
    assert not is_reward_model(tmp_path)
    for name in ("config.json", "adapter_config.json"):
        (tmp_path / name).write_text("{")
        with pytest.raises(ModelError, match=rf"/{name}: no JSON \(.*\); the folder is damaged"):
            is_reward_model(tmp_path)


def test_scores_do_not_depend_on_whether_prompts_are_shared(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "SHARE_FROM", 2)
    samples = [*SAMPLES, Sample(3, (PAD, PAD), ((PAD,), (4, PAD))), Sample(4, (PAD, 8, PAD), ((PAD,), (5,))), SAMPLES[0]]
    apart, shared = collate(samples), collate(samples, share=True)
    assert shared.shared is not None and shared.shared.prefix.count(-1) == len(shared.shared.prefix) - 8
    model = fresh(folders / "qwen3")
    torch.testing.assert_close(scores(model, shared), scores(model, apart), rtol=1e-5, atol=1e-6)
    assert check_scores(model, shared, sequences=12) < 1e-5
    found = []
    for batch in (shared, apart):
        model.zero_grad()
        (scores(model, batch) * torch.linspace(-1, 2, 12)).sum().backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
