"""TRL's trainers under `patch`: the losses, metrics and weights of five steps are those without it, and no logits were formed."""

from __future__ import annotations

import copy
from dataclasses import fields, replace
from importlib import import_module
from typing import Any

import pytest
import torch
from datasets import Dataset
from largest import Largest
from tiny import preference_rows, save_tiny, tiny_tokenizer
from transformers import AutoModelForCausalLM

from fastalign.dropin import trl as door
from fastalign.dropin import trl_releases
from fastalign.dropin.unformed import FUNCTIONS
from fastalign.errors import ConfigError, DependencyError

pytest.importorskip("trl", reason="without TRL its trainers are not compared")
import trl

if ".".join(trl.__version__.split(".")[:2]) not in trl_releases.RELEASES:
    pytest.skip("this TRL is refused by the patch", allow_module_level=True)

RELEASE = trl_releases.installed_release()
PLACES = {name: module for module, name, *_ in (*RELEASE.paired, *RELEASE.scoring)}


def classes(name: str) -> tuple[Any, Any]:
    """The trainer and its config, where this release has them."""
    place = import_module(PLACES.get(f"{name}Trainer", f"trl.trainer.{name.lower()}_trainer"))
    return getattr(place, f"{name}Trainer"), getattr(place, f"{name}Config")


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


ANSWERS = {"num_generations": 4, "max_completion_length": 6, "beta": 0.1}
SHORT = {"max_length": 64, "max_prompt_length": 32}
# name: (trainer, kind of data, options)
TRAINERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "dpo": ("DPO", "pairs", {"beta": 0.3}),
    "dpo with weights": ("DPO", "pairs", {"use_weighting": True}),
    "dpo and sft": ("DPO", "pairs", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}),
    "kto": ("KTO", "kto", {"beta": 0.3}),
    "sft": ("SFT", "sft", {"loss_type": "chunked_nll" if RELEASE.fused else "nll"}),
    "grpo": ("GRPO", "grpo", {**ANSWERS, "temperature": 0.8, "num_iterations": 2, "entropy_coef": 0.01}),
    "rloo": ("RLOO", "grpo", {**ANSWERS, "temperature": 0.8}),
    "orpo": ("ORPO", "pairs", {"beta": 0.4, **SHORT}),
    "cpo": ("CPO", "pairs", {"cpo_alpha": 0.5, **SHORT}),
    "simpo": ("CPO", "pairs", {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, **SHORT}),
}
VARYING = {"entropy_coef", "max_prompt_length"}  # options that not every release has


def build(name: str, folder: Any, family: str = "qwen3", **more: Any) -> Any:
    called, kind, options = TRAINERS[name]
    trainer, config = classes(called)
    torch.manual_seed(0)
    path = folder / f"model-{family}"  # a folder, from which DPO and KTO load their reference too
    if not path.exists():
        save_tiny(path, family, vocab_size=VOCABULARY)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    extra = {"reward_funcs": lengths} if kind == "grpo" else {}
    known = {field.name for field in fields(config)}
    options = {name: value for name, value in {**SETTINGS, **options}.items() if name in known or name not in VARYING}
    arguments = config(output_dir=str(folder / "out"), **options)
    tokenizer = tiny_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
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


def logits_of(name: str, folder: Any, patched: bool) -> tuple[int, int]:
    """(rows of the largest logits in a step, calls of the operator)."""
    trainer = build(name, folder, "llama")
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    with Largest(VOCABULARY) as largest:
        if not patched:
            trainer.compute_loss(trainer.model, copy.copy(batch)).backward()
            return largest.rows, 0
        with door.patch(budget=64 * VOCABULARY * 4) as found:
            trainer.compute_loss(trainer.model, copy.copy(batch)).backward()
    return largest.rows, found.calls


@pytest.mark.parametrize("name", ["dpo", "dpo with weights", "dpo and sft", "kto", "sft", "grpo", "orpo", "cpo"])
def test_no_logits_exist(name: str, tmp_path: Any) -> None:
    """Under a small budget no tensor has the vocabulary for as many rows as the batch has; TRL without its fused head has one that does."""
    rows, calls = logits_of(name, tmp_path, True)
    assert calls >= 1
    assert rows <= 64
    if TRAINERS[name][0] in ("ORPO", "CPO") or RELEASE.fused is None:
        assert logits_of(name, tmp_path, False)[0] > (20 if name == "grpo" else 64)


@pytest.mark.parametrize("family", ["gemma2", "granite", "cohere2"])
def test_orpo_of_models_that_scale_or_cap_their_logits(family: str, tmp_path: Any) -> None:
    theirs = build("orpo", tmp_path, family)
    start = {n: p.detach().clone() for n, p in theirs.model.named_parameters()}
    expected = train(theirs)
    mine = build("orpo", tmp_path, family)
    with door.patch():
        got = train(mine)
    assert_same(got, expected, start)


@pytest.mark.parametrize("name", ["orpo", "dpo"])
def test_a_lora_on_the_head_is_trained_and_the_reference_is_without(name: str, tmp_path: Any) -> None:
    """TRL itself refuses one on the head where it has a fused head."""
    from peft import LoraConfig

    modules = ["q_proj", "lm_head"] if name == "orpo" or RELEASE.fused is None else ["q_proj"]

    def run(patched: bool) -> Any:
        lora = LoraConfig(r=8, target_modules=modules, init_lora_weights=False, task_type="CAUSAL_LM")
        trainer = build(name, tmp_path, peft_config=lora)
        start = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        if not patched:
            return train(trainer), start
        with door.patch():
            return train(trainer), start

    (expected, start), (got, _) = run(False), run(True)
    assert_same(got, expected, start)
    assert any((got[1][n] - start[n]).norm() > 0 for n in start if modules[-1] in n and "lora" in n)


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


def replaced() -> dict[tuple[Any, str], Any]:
    """What this release's patch replaces, by (owner, name), and what stands there now."""
    owners = [(import_module(RELEASE.fused[0]), RELEASE.fused[1])] if RELEASE.fused else []
    owners += [(getattr(import_module(module), name), "concatenated_forward") for module, name in RELEASE.paired]
    for module, name, methods in RELEASE.scoring:
        place = import_module(module)
        owners += [(getattr(place, name), method) for method in methods]
        owners += [(place, function.__name__) for function in FUNCTIONS if hasattr(place, function.__name__)]
    return {(owner, name): vars(owner)[name] for owner, name in owners}


def test_undo_puts_back_what_was_there() -> None:
    before = replaced()
    found = door.patch()
    assert all(vars(owner)[name] is not old for (owner, name), old in before.items())
    with pytest.raises(ConfigError, match="patched already"):
        door.patch()
    found.undo()
    found.undo()
    assert replaced() == before
    with pytest.raises(ZeroDivisionError), door.patch():
        _ = 1 / 0
    assert replaced() == before


def test_a_patch_that_fails_half_way_leaves_nothing(monkeypatch: Any) -> None:
    before = replaced()
    wrong = replace(RELEASE, scoring=(("trl.trainer.sft_trainer", "SFTTrainer", ("none",)),))
    monkeypatch.setattr(door, "installed_release", lambda: wrong)
    with pytest.raises(KeyError):
        door.patch()
    assert replaced() == before


@pytest.mark.skipif(RELEASE.fused is not None, reason="this release scores by its own fused head, whose results are no logits")
def test_what_needs_logits_is_refused(tmp_path: Any) -> None:
    trainer = build("sft", tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    with door.patch():
        _, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    logits = outputs.logits
    assert logits.shape == (4, batch["input_ids"].shape[1], VOCABULARY)
    for ask in (lambda: logits[..., 3], lambda: logits.softmax(-1), lambda: torch.topk(logits, 5), lambda: logits.view(-1, 7)):
        with pytest.raises(ConfigError, match="the patch forms no logits"):
            ask()
    trainer.args.use_liger_kernel = True
    with door.patch(), pytest.raises(ConfigError, match="form no logits: train this without the patch"):
        trainer.compute_loss(trainer.model, batch)
    assert "forward" not in vars(trainer.model) or not hasattr(trainer.model.forward, "unformed")


@pytest.mark.parametrize("version", ["0.23.1", "1.17.0", "2.0.0"])
def test_other_releases_are_refused(version: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(trl_releases.metadata, "version", lambda name: version)
    with pytest.raises(DependencyError, match=rf"TRL {version} is installed, and the patch is tested with 0.24 to 1.16: pip install"):
        door.patch()


def test_without_trl(monkeypatch: Any) -> None:
    def absent(name: str) -> str:
        raise trl_releases.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(trl_releases.metadata, "version", absent)
    with pytest.raises(DependencyError, match=r"TRL is not installed.*pip install"):
        door.patch()
