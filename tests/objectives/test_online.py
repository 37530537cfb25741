"""What rewards the answers of an online run: judges, and reward models with tokenizers of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_tiny, tiny_config, tiny_tokenizer
from transformers import AutoModelForSequenceClassification

from fastalign import train
from fastalign.data.config import PromptDataConfig
from fastalign.errors import ConfigError
from fastalign.models.config import ModelConfig
from fastalign.objectives.grpo import GRPOConfig
from fastalign.objectives.online import OnlineConfig
from fastalign.objectives.ppo import PPOConfig
from fastalign.objectives.reinforce_pp import ReinforcePPConfig
from fastalign.rollout.judging import JudgeConfig

PROMPTS = ("old river", "why?")
CODE = """
def longer(prompts, completions, **columns):
    assert len(set(prompts)) == 1, "a judge is asked of one prompt at a time"
    return [len(c) for c in completions]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("online")
    save_tiny(folder / "model")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    (folder / "mine.py").write_text(CODE)
    return folder


def config_of(place: Path, kind: type[OnlineConfig] = GRPOConfig, **options: Any) -> OnlineConfig:
    given: dict[str, Any] = {
        "model": ModelConfig(path=str(place / "model"), dtype="float32"),
        "data": PromptDataConfig(path=str(place / "prompts.jsonl")),
        "output": str(place / "run"),
        "batch_size": 2,
        "num_generations": 2,
        "max_completion_length": 6,
        "max_steps": 1,
        "completions_every": 1,
    }
    return kind(**given | options)


@pytest.mark.parametrize("kind", [GRPOConfig, PPOConfig, ReinforcePPConfig])
def test_a_judge_is_a_reward_among_others_and_alone(place, tmp_path, kind):
    judge = JudgeConfig(function=f"{place}/mine.py:longer")
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
        assert "- a judge, `mine.py:longer`\n" in card and ("- `soft_overlong:6:5`, weight 0.5" in card) == (name == "both")


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
