"""TRL's trainers under `patch`: the losses, metrics and weights of five steps are those without it, and no logits were formed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from datasets import Dataset
from largest import Largest
from tiny import preference_rows, save_tiny, tiny_tokenizer
from transformers import AutoModelForCausalLM

from fastalign.dropin import trl as door
from fastalign.errors import ConfigError, DependencyError

pytest.importorskip("trl", reason="without TRL its trainers are not compared")
import trl
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

if door.metadata.version("trl").rsplit(".", 1)[0] not in door.VERSIONS:
    pytest.skip("this TRL is refused by the patch", allow_module_level=True)

VOCABULARY = 2049  # of the model, and the size of no other dimension: what has it last and many rows is logits
SETTINGS = {"max_steps": 5, "learning_rate": 1e-3, "adam_epsilon": 1e-6, "per_device_train_batch_size": 4, "use_cpu": True, "bf16": False}
SETTINGS |= {"report_to": "none", "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True}
PAIRS = preference_rows(20, 0)


def data(kind: str) -> Dataset:
    if kind == "kto":
        rows = [
            {"prompt": r["prompt"], "completion": r[side], "label": side == "chosen"} for r in PAIRS[:10] for side in ("chosen", "rejected")
        ]
    elif kind == "sft":
        rows = [{"prompt": r["prompt"], "completion": r["chosen"]} for r in PAIRS]
    elif kind == "grpo":
        rows = [{"prompt": r["prompt"]} for r in PAIRS]
    else:
        rows = PAIRS
    return Dataset.from_list(rows)


def lengths(completions: list[Any], **_: Any) -> list[float]:
    return [float(len(str(c)) % 7) for c in completions]


# name: (trainer, config, kind of data, options)
TRAINERS: dict[str, tuple[Any, Any, str, dict[str, Any]]] = {
    "dpo": (trl.DPOTrainer, trl.DPOConfig, "pairs", {"beta": 0.3}),
    "dpo with weights": (trl.DPOTrainer, trl.DPOConfig, "pairs", {"use_weighting": True}),
    "kto": (trl.KTOTrainer, trl.KTOConfig, "kto", {"beta": 0.3}),
    "sft": (trl.SFTTrainer, trl.SFTConfig, "sft", {}),
    "grpo": (
        trl.GRPOTrainer,
        trl.GRPOConfig,
        "grpo",
        {"num_generations": 4, "max_completion_length": 6, "beta": 0.1, "entropy_coef": 0.01},
    ),
    "rloo": (trl.RLOOTrainer, trl.RLOOConfig, "grpo", {"num_generations": 4, "max_completion_length": 6, "beta": 0.1}),
    "orpo": (ORPOTrainer, ORPOConfig, "pairs", {"beta": 0.4, "max_length": 64}),
    "cpo": (CPOTrainer, CPOConfig, "pairs", {"cpo_alpha": 0.5, "max_length": 64}),
    "simpo": (CPOTrainer, CPOConfig, "pairs", {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "max_length": 64}),
}


def build(name: str, folder: Any, family: str = "qwen3", **more: Any) -> Any:
    trainer, config, kind, options = TRAINERS[name]
    torch.manual_seed(0)
    path = folder / f"model-{family}"  # a folder, from which DPO and KTO load their reference too
    if not path.exists():
        save_tiny(path, family, vocab_size=VOCABULARY)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    extra = {"reward_funcs": lengths} if kind == "grpo" else {}
    arguments = config(output_dir=str(folder / "out"), **{**SETTINGS, **options})
    tokenizer = tiny_tokenizer()
    return trainer(model=model, args=arguments, train_dataset=data(kind), processing_class=tokenizer, **extra, **more)


def train(trainer: Any) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    trainer.train()
    history = [row for row in trainer.state.log_history if "loss" in row]
    return history, {n: p.detach().clone() for n, p in trainer.model.named_parameters()}


IGNORED = ("runtime", "per_second", "step_time", "mem", "flos")


def assert_same(mine: Any, theirs: Any, start: dict[str, torch.Tensor]) -> None:
    assert len(mine[0]) == len(theirs[0]) == 5
    for step, (a, b) in enumerate(zip(mine[0], theirs[0])):
        assert a.keys() == b.keys()
        for name in a:
            if not any(word in name for word in IGNORED):
                assert a[name] == pytest.approx(b[name], rel=1e-4, abs=2e-4), f"step {step}: {name}"
    assert any(row.get("grad_norm", 0) > 0 for row in theirs[0][:3])
    moved = 0.0
    for name, weight in theirs[1].items():
        moved += float((weight - start[name]).norm())
        assert (mine[1][name] - weight).norm() <= 1e-4 * weight.norm() + 1e-6, name
    assert moved > 0.1


@pytest.mark.parametrize("name", TRAINERS)
def test_five_steps_are_those_of_trl(name: str, tmp_path: Any) -> None:
    theirs = build(name, tmp_path)
    start = {n: p.detach().clone() for n, p in theirs.model.named_parameters()}
    expected = train(theirs)
    mine = build(name, tmp_path)
    with door.patch() as found:
        got = train(mine)
    assert found.calls >= 5
    assert_same(got, expected, start)


@pytest.mark.parametrize("name", ["orpo", "cpo", "sft"])
def test_no_logits_exist(name: str, tmp_path: Any) -> None:
    """Under a small budget no tensor has the vocabulary for as many rows as the batch has; TRL's ORPO and CPO have one that does."""
    trainer = build(name, tmp_path, "llama")
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    seen = {}
    for patched in (False, True):
        with Largest(VOCABULARY) as largest:
            if patched:
                with door.patch(budget=64 * VOCABULARY * 4) as found:
                    trainer.compute_loss(trainer.model, copy.copy(batch)).backward()
            else:
                trainer.compute_loss(trainer.model, copy.copy(batch)).backward()
        seen[patched] = largest.rows
    assert found.calls == 1
    assert seen[True] <= 64
    assert seen[False] > 100


@pytest.mark.parametrize("family", ["gemma2", "granite", "cohere2"])
def test_orpo_of_models_that_scale_or_cap_their_logits(family: str, tmp_path: Any) -> None:
    theirs = build("orpo", tmp_path, family)
    start = {n: p.detach().clone() for n, p in theirs.model.named_parameters()}
    expected = train(theirs)
    mine = build("orpo", tmp_path, family)
    with door.patch():
        got = train(mine)
    assert_same(got, expected, start)


def test_orpo_trains_a_lora_on_the_head(tmp_path: Any) -> None:
    from peft import LoraConfig

    def run(patched: bool) -> Any:
        lora = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False, task_type="CAUSAL_LM")
        trainer = build("orpo", tmp_path, peft_config=lora)
        start = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        if not patched:
            return train(trainer), start
        with door.patch():
            return train(trainer), start

    (expected, start), (got, _) = run(False), run(True)
    assert_same(got, expected, start)
    assert any((got[1][n] - start[n]).norm() > 0 for n in start if "lm_head" in n and "lora" in n)


def test_one_trainer_alone(tmp_path: Any) -> None:
    trainer, other = build("orpo", tmp_path), build("orpo", tmp_path)
    start = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    found = door.patch(trainer)
    expected = train(other)
    assert found.calls == 0
    got = train(trainer)
    assert found.calls >= 5
    assert_same(got, expected, start)
    before = found.calls
    found.undo()
    trainer.training_step(trainer.model, next(iter(trainer.get_train_dataloader())))
    assert found.calls == before
    assert "training_step" not in vars(trainer)


def test_undo_puts_back_what_was_there() -> None:
    import trl.trainer.utils as utils

    owners = ((utils, "_ChunkedLogProbFunction"), (ORPOTrainer, "concatenated_forward"), (CPOTrainer, "concatenated_forward"))
    before = [vars(owner)[name] for owner, name in owners]
    found = door.patch()
    assert all(vars(owner)[name] is not old for (owner, name), old in zip(owners, before))
    with pytest.raises(ConfigError, match="patched already"):
        door.patch()
    found.undo()
    found.undo()
    assert all(vars(owner)[name] is old for (owner, name), old in zip(owners, before))
    with pytest.raises(ZeroDivisionError), door.patch():
        _ = 1 / 0
    assert all(vars(owner)[name] is old for (owner, name), old in zip(owners, before))


@pytest.mark.parametrize("version", ["0.24.0", "1.15.0", "2.0.0"])
def test_other_releases_are_refused(version: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(door.metadata, "version", lambda name: version)
    with pytest.raises(DependencyError, match=rf"TRL {version} is installed, and the patch is tested with 1.16.\*: pip install"):
        door.patch()


def test_without_trl(monkeypatch: Any) -> None:
    def absent(name: str) -> str:
        raise door.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(door.metadata, "version", absent)
    with pytest.raises(DependencyError, match=r"TRL is not installed.*pip install"):
        door.patch()
