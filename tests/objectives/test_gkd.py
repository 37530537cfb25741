"""On-policy distillation: whose answers a step takes, the same loss on them as distillation's, and runs that stop and go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from online_runs import assert_resumes, metrics_of, shown_by
from tiny import preference_rows, save_tiny, tiny_tokenizer

from fastalign import train
from fastalign.data.config import SupervisedDataConfig
from fastalign.errors import ConfigError, DataError
from fastalign.models.config import LoraConfig, ModelConfig
from fastalign.models.load import load_model
from fastalign.objectives.distill import Distill, TeacherConfig
from fastalign.objectives.gkd import GKD, GKDConfig, _before
from fastalign.rollout.generate import Completion, generate
from fastalign.train.step import micro_batches, run_step


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a teacher of another width, and rows with completions, prompts alone, and texts."""
    folder = tmp_path_factory.mktemp("gkd")
    save_tiny(folder / "model", "qwen3")
    save_tiny(folder / "teacher", "qwen3", seed=1, hidden_size=48)
    rows = preference_rows(12)
    files = {
        "completions": [{"prompt": row["prompt"], "completion": row["chosen"], "weight": 1 + i % 2} for i, row in enumerate(rows)],
        "prompts": [{"prompt": row["prompt"]} for row in rows],
        "texts": [{"text": row["prompt"] + row["chosen"]} for row in rows],
    }
    for name, content in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return folder


def config_of(place: Path, data: str = "completions", **options: Any) -> GKDConfig:
    given: dict[str, Any] = {
        "model": ModelConfig(path=str(place / "model"), dtype="float32"),
        "teacher": TeacherConfig(path=str(place / "teacher")),
        "data": SupervisedDataConfig(path=str(place / f"{data}.jsonl"), eval_fraction=0.2),
        "output": str(place / "run"),
        "batch_size": 4,
        "max_completion_length": 8,
        "max_tokens": 128,
        "learning_rate": 3e-3,
    }
    return GKDConfig(**given | options)


def made(place: Path, data: str = "completions", **options: Any) -> tuple[GKD, list[Any]]:
    config = config_of(place, data, **options)
    config.validate()
    loaded = config.load_data(tiny_tokenizer(), None)
    return config.objective(load_model(config.model), loaded, place), loaded.samples[:4]


def test_a_share_of_the_steps_is_on_policy_by_seed_and_step_alone(place):
    objective, prompts = made(place, lmbda=0.25, max_completion_length=1)
    taken = []
    for step in range(200):
        samples = objective.samples(step, prompts)
        taken.append(objective.on_policy)
        assert (samples is prompts) != objective.on_policy
    assert 30 <= sum(taken) <= 70
    backwards, _ = made(place, lmbda=0.25, max_completion_length=1)
    again = []
    for step in reversed(range(200)):
        backwards.samples(step, prompts)
        again.append(backwards.on_policy)
    assert again[::-1] == taken
    other, _ = made(place, lmbda=0.25, max_completion_length=1, seed=1)
    different = []
    for step in range(200):
        other.samples(step, prompts)
        different.append(other.on_policy)
    assert different != taken


@pytest.mark.parametrize("by", ["model", "teacher"])
def test_answers_are_those_that_their_writer_gives(place, by):
    options = {"lmbda": 1.0} if by == "model" else {"lmbda": 0.0, "seq_kd": True}
    objective, prompts = made(place, "prompts", sampling_temperature=0.7, **options)
    samples = objective.samples(3, prompts)
    writer, other = (
        load_model(ModelConfig(path=str(place / by))),
        load_model(ModelConfig(path=str(place / ("model", "teacher")[by == "model"]))),
    )
    end = tiny_tokenizer().eos_token_id
    wanted, unwanted = (
        generate(m, [s.prompt for s in prompts], max_new_tokens=8, eos_token_id=end, temperature=0.7, seed=(0, 4)) for m in (writer, other)
    )
    assert [sample.completions[0] for sample in samples] == [answer.tokens for answer in wanted] != [answer.tokens for answer in unwanted]
    assert [(sample.index, sample.prompt) for sample in samples] == [(sample.index, sample.prompt) for sample in prompts]
    assert [row["by"] for row in objective.shown(1)] == [by] * 2
    with torch.no_grad():
        held_out = objective.evaluate(prompts)
    assert held_out["on_policy/divergence"] > 0 and "divergence" not in held_out, "the data has no completions"
    assert objective.shown(1)[0]["completion"] == tiny_tokenizer().decode(list(wanted[0].tokens), skip_special_tokens=True)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_the_loss_on_answers_is_distillations_however_they_are_cut(place, divergence):
    """And so is the gradient: none of it goes through the sampling."""
    objective, prompts = made(place, lmbda=1.0, data="prompts", divergence=divergence, temperature=1.3)
    samples = list(objective.samples(0, prompts))
    teacher, model = (load_model(ModelConfig(path=str(place / name), dtype="float32")) for name in ("teacher", "model"))
    oracle, results = Distill(objective.config, model, teacher), []
    for judge, max_tokens in ((oracle, 500), (objective, 500), (objective, 128), (objective, 30)):
        judge.model.zero_grad()
        sums, counts = run_step(judge, micro_batches(samples, max_tokens), device=torch.device("cpu"))
        results.append((float(sums["loss"]), [w.grad.clone() for w in judge.model.parameters()]))
        assert counts["tokens"] == sum(len(sample.completions[0]) for sample in samples)
    assert len(micro_batches(samples, 30)) > 1
    assert results[0][0] > 0.01
    for loss, grads in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-5)
        for got, want in zip(grads, results[0][1]):
            assert float((got - want).abs().max()) <= 1e-5 * float(want.abs().max())


def test_the_answer_of_a_wider_teacher_ends_where_the_model_has_no_token():
    answer = Completion((3, 9, 4, 9), (-1.0, -2.0, -3.0, -4.0), True)
    assert _before(answer, 9) == Completion((3,), (-1.0,), False)
    assert _before(answer, 10) is answer


@pytest.mark.parametrize("case", ["mixed", "on policy, adapter", "teacher"])
def test_a_run_learns_repeats_and_resumes(place, tmp_path, case, monkeypatch):
    monkeypatch.setattr("fastalign.train.loop.write_report", lambda run: run)
    options: dict[str, Any] = {
        "mixed": {"lmbda": 0.5},
        "on policy, adapter": {"lmbda": 1.0, "data": "prompts"},
        "teacher": {"lmbda": 0.3, "seq_kd": True, "data": "prompts"},
    }[case]
    options |= {"lora": LoraConfig(r=4, dropout=0.1), "learning_rate": 2e-2} if "adapter" in case else {}
    options |= {"epochs": 8, "save_every": 1, "keep_checkpoints": 99, "completions_every": 1}
    result = train(config_of(place, output=str(tmp_path / "whole"), **options))
    whole, held_out = result.output, {"eval_on_policy/divergence", "eval_completions/mean_length"}
    steps = [row for row in metrics_of(whole) if "loss" in row]
    assert sum(row["divergence"] for row in steps[-5:]) < 0.9 * sum(row["divergence"] for row in steps[:5])
    own = [row["on_policy"] for row in steps]
    assert {"mixed": 0 < sum(own) < len(own), "teacher": 0 < sum(own) < len(own)}.get(case, all(own))
    assert held_out | ({"eval_divergence"} if case == "mixed" else set()) <= result.eval_metrics.keys()
    assert {row["by"] for row in shown_by(whole)} == ({"model", "teacher"} if case == "teacher" else {"model"})
    assert_resumes(whole, (3, 8), lambda run: train(config_of(place, output=str(run), resume=True, **options)))


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ("completions", {"lmbda": 1.5}, r"lmbda must be in \[0, 1\]"),
        ("completions", {"lmbda": 1.0, "seq_kd": True}, "seq_kd must be left at False, which counts only with lmbda below 1"),
        ("completions", {"nll_weight": 0.2}, "nll_weight must be 0: the model's own answers are no texts"),
        ("completions", {"lmbda": 0.0}, "max_completion_length must be left at 256, which counts only with answers"),
        ("completions", {"sampling_temperature": 0.0}, "sampling_temperature must be positive"),
        ("completions", {"max_completion_length": 0}, "max_completion_length must be at least 1"),
        ("completions", {"max_tokens": 64, "max_completion_length": 60}, "max_tokens 64 is less than the longest prompt"),
        ("completions", {"max_tokens": 9999, "max_completion_length": 510}, "the model's window of 512 tokens is less than"),
        ("texts", {}, "data: row 0 has no prompt to answer"),
        ("prompts", {"lmbda": 0.5}, "completion"),
        ("prompts", {"teacher": TeacherConfig()}, "teacher.path: no teacher given"),
    ],
)
def test_bad_options_are_named(place, tmp_path, data, options, message):
    with pytest.raises((ConfigError, DataError), match=message):
        train(config_of(place, data, output=str(tmp_path / "run"), **options))
    assert not (tmp_path / "run").exists(), "nothing was written"


def test_options_of_completions_are_refused_where_there_are_none(place):
    config = config_of(place, "prompts", lmbda=1.0)
    config.data.completion_only = True
    with pytest.raises(ConfigError, match=r"data\.completion_only is of completions"):
        config.validate()
