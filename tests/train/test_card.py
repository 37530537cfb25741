"""The model card: front matter that the hub can read, a command that repeats the run, and nothing private."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest
import yaml

from fastalign.data.config import PromptDataConfig
from fastalign.models.config import ModelConfig
from fastalign.objectives.grpo import GRPOConfig
from fastalign.train.card import command, write_card
from fastalign.train.config import flat, parse


@dataclass
class Model:
    path: str = ""


@dataclass
class Lora:
    r: int = 0


@dataclass
class Config:
    name: ClassVar[str] = "dpo"

    model: Model = field(default_factory=Model)
    data: Model = field(default_factory=Model)
    lora: Lora = field(default_factory=Lora)
    output: str = ""
    resume: bool = False
    master_weights: bool = True
    gradient_checkpointing: bool = False
    beta: float = 0.1
    learning_rate: float = 1e-6
    batch_size: int = 8
    seed: int = 0
    loss_type: str = "sigmoid"
    loggers: list[str] = field(default_factory=list)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "final").mkdir()
    rows = [
        {"step": 1, "loss": 0.7, "rewards/accuracies": 0.5},
        {"step": 2, "loss": 0.4, "rewards/accuracies": 0.9, "perf/step_seconds": 1.0},
    ]
    rows.append({"step": 2, "eval_loss": 0.45, "eval_rewards/accuracies": 0.8})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "data.json").write_text(json.dumps({"train": 1234, "held_out": 20, "rows": 1260, "dropped": {"empty prompt": 6}}))
    return tmp_path


def parts(card: Path) -> tuple[dict[str, object], str]:
    _, front, body = card.read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), body


def test_card_of_a_full_model(run: Path) -> None:
    config = Config(Model("Qwen/Qwen3-0.6B"), Model("trl-lib/ultrafeedback_binarized"), output="run", beta=0.2)
    front, body = parts(write_card(run, config))
    assert front == {
        "base_model": "Qwen/Qwen3-0.6B",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["fastalign", "dpo", "preference-optimization"],
        "datasets": ["trl-lib/ultrafeedback_binarized"],
        "model_name": "Qwen3-0.6B-dpo",
    }
    assert "# Qwen3-0.6B-dpo" in body
    assert "fastalign dpo --model.path Qwen/Qwen3-0.6B --data.path trl-lib/ultrafeedback_binarized --output run --beta 0.2\n" in body
    assert "| rewards/accuracies | 0.9 | 0.8 |" in body
    assert "| loss | 0.4 | 0.45 |" in body
    assert "perf/" not in body
    assert "- 1,234 pairs trained on\n- 20 held out\n- 6 rows dropped: empty prompt" in body
    assert "AutoModelForCausalLM.from_pretrained" in body
    assert "rafailov2023direct" in body
    assert "2 optimizer steps" in body


def test_card_of_an_adapter(run: Path) -> None:
    (run / "final" / "adapter_config.json").write_text("{}")
    front, body = parts(write_card(run, Config(Model("base"), Model("d.jsonl"), Lora(8))))
    assert (front["library_name"], front["tags"]) == ("peft", ["fastalign", "dpo", "preference-optimization", "lora"])
    assert "datasets" not in front  # a file of the author's is not a data set of the hub
    assert "AutoPeftModelForCausalLM.from_pretrained" in body
    assert "lora.r 8" in body


def test_no_private_folder_is_published(run: Path) -> None:
    config = Config(Model("/home/ann/models/qwen"), Model("/home/ann/secret project/pairs.jsonl"), output=str(run))
    text = write_card(run, config).read_text()
    assert "/home" not in text
    assert str(run.parent) not in text
    assert "--model.path qwen --data.path pairs.jsonl" in text


def test_card_of_an_online_run_names_its_rewards(run: Path) -> None:
    config = GRPOConfig(ModelConfig("base"), PromptDataConfig("/home/ann/prompts.jsonl"), rewards=["/home/ann/mine.py:good", "repetition"])
    config.reward_weights = [1.0, 0.5]
    rows = [{"step": 1, "loss": 0.0, "reward": 0.25, "frac_reward_zero_std": 0.5}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    front, body = parts(write_card(run, config))
    assert front["tags"] == ["fastalign", "grpo", "reinforcement-learning"]
    assert "trained on the prompts in `prompts.jsonl` by GRPO" in body
    assert "## Rewards\n\n- `mine.py:good`\n- `repetition`, weight 0.5\n" in body
    assert "| reward | 0.25 | – |" in body
    assert "shao2024deepseekmath" in body
    assert "/home" not in body


def test_command_repeats_the_run() -> None:
    config = Config(Model("my model's"), Model("d.jsonl"), Lora(4), "r", True, False, True, 1 / 3, 3e-5, 2, 7, "ipo", ["a", "b c"])
    words = shlex.split(command(config))
    assert words[:2] == ["fastalign", "dpo"]
    again = parse(words[2:], Config)
    assert flat(again) == {**flat(config), "resume": False}
    assert command(Config()) == "fastalign dpo"
