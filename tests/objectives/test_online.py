"""What all online runs have in common: judges and reward models as rewards, bad input, answers that teach nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from online_runs import online_config, write_place
from safetensors.torch import load_file
from tiny import tiny_config, tiny_tokenizer
from transformers import AutoModelForSequenceClassification

from fastalign import train
from fastalign.errors import ConfigError, RewardError
from fastalign.objectives.grpo import GRPOConfig
from fastalign.objectives.online import OnlineConfig
from fastalign.objectives.online_dpo import OnlineDPOConfig
from fastalign.objectives.ppo import PPOConfig
from fastalign.objectives.reinforce_pp import ReinforcePPConfig
from fastalign.objectives.rloo import RLOOConfig
from fastalign.rollout.generate import Completion
from fastalign.rollout.judging import JudgeConfig

KINDS = (GRPOConfig, RLOOConfig, ReinforcePPConfig, PPOConfig, OnlineDPOConfig)
PROMPTS = ("old river", "why?")
CODE = """
def longer(prompts, completions, **columns):
    assert len(set(prompts)) == 1, "a judge is asked of one prompt at a time"
    return [len(c) for c in completions]

def likes_o(completions, **columns):
    return [c.count("o") / max(1, len(c)) for c in completions]

def nothing(completions, **columns):
    return [None] * len(completions)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_place(tmp_path_factory.mktemp("online"), prompts=PROMPTS, rewards=CODE)


def config_of(place: Path, kind: type[OnlineConfig] = GRPOConfig, **options: Any) -> OnlineConfig:
    sizes = {"batch_size": 2, "num_generations": 2, "max_completion_length": 6, "max_steps": 1, "completions_every": 1}
    return online_config(place, kind, **{"rewards": []} | sizes | options)


@pytest.mark.parametrize("kind", [GRPOConfig, PPOConfig, ReinforcePPConfig])
def test_a_judge_is_a_reward_among_others_and_alone(place, tmp_path, kind):
    judge = JudgeConfig(function=f"{place}/rewards.py:longer")
    both = {"rewards": ["judge", "soft_overlong:6:5"], "reward_weights": [1.0, 0.5]}
    for name, options in {"both": both, "alone": {}}.items():
        result = train(config_of(place, kind, output=str(tmp_path / name), judge=judge, **options))
        shown = [json.loads(line) for line in (result.output / "completions.jsonl").read_text().splitlines()]
        assert len(shown) == 4 and len({row["rewards"]["judge"] for row in shown}) > 1
        for row in shown:
            late = -min(1.0, max(0.0, (row["tokens"] - 1) / 5))
            assert row["rewards"] == {"judge": len(row["completion"])} | ({"soft_overlong:6:5": late} if name == "both" else {})
        row = json.loads((result.output / "metrics.jsonl").read_text().splitlines()[0])
        parts = [("judge", 1.0), ("soft_overlong:6:5", 0.5)] if name == "both" else [("judge", 1.0)]
        assert row["reward"] == pytest.approx(sum(weight * row[f"rewards/{reward}/mean"] for reward, weight in parts))
        card = (result.output / "final" / "README.md").read_text()
        assert "- a judge, `rewards.py:longer`\n" in card and ("- `soft_overlong:6:5`, weight 0.5" in card) == (name == "both")


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (GRPOConfig, {"rewards": ["judge"]}, "judge: name one judge"),
        (
            GRPOConfig,
            {"rewards": ["repetition"], "judge": JudgeConfig(function="json:dumps")},
            "rewards must be left out, or contain judge",
        ),
        (GRPOConfig, {"rewards": ["repetition"], "judge": JudgeConfig(retries=9)}, "options of a judge, but none is named"),
        (GRPOConfig, {"judge": JudgeConfig(function="json:nowhere")}, "json has no function 'nowhere'"),
        (GRPOConfig, {}, "rewards must be at least one reward function, .* or a judge"),
        (
            PPOConfig,
            {"judge": JudgeConfig(url="http://localhost:1/v1", model="m"), "num_generations": 1},
            "at least 2 for a judge that comp",
        ),
    ],
)
def test_a_judge_that_is_not_told_is_named(place, tmp_path, kind, options, message):
    with pytest.raises(ConfigError, match=message):
        train(config_of(place, kind, output=str(tmp_path / "run"), **options))
    assert not (tmp_path / "run").exists(), "nothing was written"


@pytest.mark.parametrize("other", [True, False])
def test_a_reward_model_with_another_tokenizer_is_mentioned(place, tmp_path, caplog, other):
    tokenizer = tiny_tokenizer(vocab_size=280 if other else tiny_tokenizer().vocab_size)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(tiny_config("qwen3", num_labels=1, pad_token_id=1))
    model.save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    with caplog.at_level("INFO", "fastalign"):
        result = train(config_of(place, output=str(tmp_path / "run"), rewards=[str(tmp_path / "rm")]))
    lines = [record.getMessage() for record in caplog.records if "tokenizer" in record.getMessage()]
    wanted = "reward rm has another tokenizer than the policy: it reads the text of the answers, tokenized anew"
    assert lines == ([wanted] if other else [])
    for row in [json.loads(line) for line in (result.output / "completions.jsonl").read_text().splitlines()]:
        end = tokenizer.eos_token
        ids = tokenizer(row["prompt"] + row["completion"] + end, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            assert row["rewards"]["rm"] == pytest.approx(model.eval()(input_ids=ids).logits.item(), rel=1e-4, abs=1e-5)


# Bad input, and answers that nothing can be learned from.


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_whose_answers_never_end(place, tmp_path, kind):
    options = {"max_completion_length": 2, "mask_truncated_completions": True, "max_steps": 2, "beta": 0.1, "temperature": 1e-3}
    result = train(config_of(place, kind, output=str(tmp_path / "run"), rewards=[f"{place}/rewards.py:likes_o"], **options))
    assert result.metrics["completions/clipped_ratio"] == 1 and result.metrics["completions/mean_terminated_length"] == 0
    assert result.metrics["loss"] == 0 and result.metrics["grad_norm"] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_whose_answers_are_nothing_but_the_end(place, tmp_path, kind, monkeypatch):
    """One token, an empty text, equal rewards."""
    said = Completion((tiny_tokenizer().eos_token_id,), (-1.0,), True)
    monkeypatch.setattr("fastalign.rollout.engine.generate", lambda model, prompts, **_: [said] * len(prompts))
    result = train(config_of(place, kind, output=str(tmp_path / "run"), rewards=[f"{place}/rewards.py:likes_o"], max_steps=2))
    rows = [json.loads(line) for line in (result.output / "metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]) for row in rows if "loss" in row)
    assert result.step == 2 and result.metrics["completions/mean_terminated_length"] == 1 and result.metrics["reward"] == 0
    assert {json.loads(line)["completion"] for line in (result.output / "completions.jsonl").read_text().splitlines()} == {""}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_whose_reward_has_nothing_to_say(place, tmp_path, kind):
    before = load_file(place / "model" / "model.safetensors")
    options = {"rewards": [f"{place}/rewards.py:nothing"], "max_steps": 2, "beta": 0.1, "learning_rate": 1e-2}
    result = train(config_of(place, kind, output=str(tmp_path / "run"), **options))
    assert result.step == 2 and result.metrics["loss"] == pytest.approx(0, abs=1e-6)
    after = load_file(result.output / "final" / "model.safetensors")
    assert all(torch.allclose(after[name], value, atol=1e-3) for name, value in before.items()), "there is nothing to learn"


@pytest.mark.parametrize("kind", [GRPOConfig, RLOOConfig, OnlineDPOConfig])
def test_one_answer_is_not_enough_where_answers_are_compared(place, tmp_path, kind):
    with pytest.raises(ConfigError, match="num_generations must be at least 2: answers are compared with each other, got 1"):
        train(config_of(place, kind, output=str(tmp_path / "run"), rewards=["repetition"], num_generations=1))


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_and_its_answer_must_fit_the_window(place, tmp_path, kind):
    options = {"rewards": ["repetition"], "max_completion_length": 512, "max_tokens": 9999}
    with pytest.raises(ConfigError, match=r"window of 512 tokens is less than the longest prompt \(row 0, 5 tokens\)"):
        train(config_of(place, kind, output=str(tmp_path / "run"), **options))
    assert not (tmp_path / "run").exists(), "nothing was written"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[float('nan')] * n", r"reward good: completion 0 .* got nan; return a finite number, or None"),
        ("[1.0] * (n - 1) + [float('inf')]", r"reward good: completion 7 .* got inf"),
        ("[1.0] * (n + 1)", r"reward good: expected a list of 8 numbers, one per completion, got 9 values"),
        ("1 / 0", r"reward good raised ZeroDivisionError"),
    ],
)
def test_a_bad_reward_is_named_and_its_run_can_go_on(place, tmp_path, value, message):
    """It goes wrong at the third step: two checkpoints are there, and the mended run ends as one that was never wrong."""
    code = "calls = 0\ndef good(completions, **columns):\n    global calls\n    calls, n = calls + 1, len(completions)\n"
    right = "    return [c.count('o') + 0.1 * len(c) for c in completions]\n"
    options = {"rewards": [f"{tmp_path}/mine.py:good"], "max_steps": 4, "save_every": 1, "num_generations": 4}
    (tmp_path / "mine.py").write_text(f"{code}    if calls == 3:\n        return {value}\n{right}")
    with pytest.raises(RewardError, match=message):
        train(config_of(place, output=str(tmp_path / "run"), **options))
    (tmp_path / "mine.py").write_text(code + right)
    train(config_of(place, output=str(tmp_path / "run"), resume=True, **options))
    train(config_of(place, output=str(tmp_path / "whole"), **options))
    ours, theirs = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
