"""Whole runs of every algorithm but DPO (whose runs are in the other files): same bits again, exact resume, and what they leave behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import no_report, rows, weights
from tiny import save_tiny, write_every_format
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fastalign import train
from fastalign.data.config import DataConfig, RankedDataConfig, SupervisedDataConfig, UnpairedDataConfig
from fastalign.models.config import LoraConfig, ModelConfig
from fastalign.objectives.base import RunConfig
from fastalign.objectives.cpo import SimPOConfig
from fastalign.objectives.distill import DistillConfig, TeacherConfig
from fastalign.objectives.dpo import DPOConfig
from fastalign.objectives.kto import KTOConfig
from fastalign.objectives.orpo import ORPOConfig
from fastalign.objectives.reward import RewardConfig
from fastalign.objectives.sft import SFTConfig


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny(folder / "model", "qwen3")
    save_tiny(folder / "teacher", "llama", seed=1, hidden_size=48)
    write_every_format(folder)
    return folder


ALGORITHMS: dict[str, Callable[[Path], tuple[type[RunConfig], dict[str, Any]]]] = {
    "sft": lambda f: (SFTConfig, {"data": SupervisedDataConfig(path=str(f / "completions.jsonl"), eval_fraction=0.2)}),
    "distill": lambda f: (
        DistillConfig,
        {
            "data": SupervisedDataConfig(path=str(f / "completions.jsonl"), eval_fraction=0.2),
            "teacher": TeacherConfig(path=str(f / "teacher")),
            "lora": LoraConfig(r=4, dropout=0.1),
            "learning_rate": 2e-2,
        },
    ),
    "reward": lambda f: (RewardConfig, {"data": RankedDataConfig(path=str(f / "pairs.jsonl"), eval_fraction=0.2)}),
    "reward, rankings, adapter": lambda f: (
        RewardConfig,
        {
            "data": RankedDataConfig(path=str(f / "rankings.jsonl"), eval_fraction=0.2),
            "loss_type": "plackett_luce",
            "lora": LoraConfig(r=4, dropout=0.1),
        },
    ),
    "dpo, ranks and a reference that follows": lambda f: (
        DPOConfig,
        {
            "data": DataConfig(path=str(f / "pairs.jsonl"), eval_fraction=0.2),
            "loss_type": ["sigmoid", "aot"],
            "rpo_alpha": 0.1,
            "sync_ref_model": True,
            "ref_model_sync_steps": 5,
        },
    ),
    "kto, adapter": lambda f: (
        KTOConfig,
        {
            "data": UnpairedDataConfig(path=str(f / "singles.jsonl"), eval_fraction=0.2),
            "lora": LoraConfig(r=4, dropout=0.1),
            "learning_rate": 2e-2,
        },
    ),
    "kto, cached": lambda f: (KTOConfig, {"data": UnpairedDataConfig(path=str(f / "singles.jsonl"), eval_fraction=0.2)}),
    "orpo": lambda f: (ORPOConfig, {"data": DataConfig(path=str(f / "pairs.jsonl"), eval_fraction=0.2)}),
    "simpo": lambda f: (SimPOConfig, {"data": DataConfig(path=str(f / "pairs.jsonl"), eval_fraction=0.2)}),
}


def config(inputs: Path, output: Path, name: str, **options: Any) -> RunConfig:
    make, own = ALGORITHMS[name](inputs)
    shared = {"batch_size": 4, "max_tokens": 256, "learning_rate": 3e-3, "epochs": 2, "save_every": 3, "eval_every": 4}
    return make(model=ModelConfig(path=str(inputs / "model")), output=str(output), **(shared | own | options))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_run_learns_repeats_and_resumes_bit_for_bit(inputs: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastalign.train.loop.write_report", no_report)
    train(config(inputs, tmp_path / "whole", name, epochs=8))
    losses = [row["loss"] for row in rows(tmp_path / "whole") if "loss" in row]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])

    train(config(inputs, tmp_path / "again", name, epochs=8))
    assert rows(tmp_path / "again") == rows(tmp_path / "whole")
    assert weights(tmp_path / "again") == weights(tmp_path / "whole")

    class Killed(Exception):
        pass

    def stop(step: int, _: dict[str, float]) -> None:
        if step == 8:
            raise Killed

    with pytest.raises(Killed):
        train(config(inputs, tmp_path / "cut", name, epochs=8), callbacks=[stop])
    train(config(inputs, tmp_path / "cut", name, epochs=8, resume=True))
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


def test_what_sft_leaves_behind(inputs: Path, tmp_path: Path) -> None:
    result = train(config(inputs, tmp_path / "run", "sft"))
    assert AutoModelForCausalLM.from_pretrained(result.output / "final") is not None
    assert result.metrics["nll"] == pytest.approx(result.metrics["loss"])
    assert {"eval_loss", "eval_nll", "eval_mean_token_accuracy", "eval_entropy"} <= result.eval_metrics.keys()
    drawn = {file.stem for file in (result.output / "report").iterdir()}
    assert {"loss", "nll", "token_accuracy", "entropy"} <= drawn
    assert "<span>held-out perplexity</span>" in (result.output / "report.html").read_text()
    card = (result.output / "final" / "README.md").read_text()
    assert "trained on the examples in `completions.jsonl` by SFT" in card
    assert "AutoModelForCausalLM.from_pretrained" in card
    assert "implicit" not in card


def test_what_a_reward_run_leaves_behind(inputs: Path, tmp_path: Path) -> None:
    result = train(config(inputs, tmp_path / "run", "reward"))
    folder = result.output / "final"
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert (model.config.num_labels, model.config.pad_token_id) == (1, tokenizer.pad_token_id)
    assert {"eval_accuracy", "eval_margin", "eval_mean_reward", "eval_min_reward", "eval_max_reward"} <= result.eval_metrics.keys()
    assert {"loss", "accuracy", "scores"} <= {file.stem for file in (result.output / "report").iterdir()}
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card
    assert "AutoModelForSequenceClassification.from_pretrained(folder)" in card
    assert "comparisons trained on" in card


def test_the_card_of_a_reward_adapter_says_how_to_load_it(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastalign.train.loop.write_report", no_report)
    result = train(config(inputs, tmp_path / "run", "reward, rankings, adapter"))
    folder = result.output / "final"
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {"text": "old lamp keeps small river"}
    exec(code.replace('"final"', repr(str(folder))), names)
    from fastalign.models.value_head import load_reward_model, scores
    from fastalign.packing import collate
    from fastalign.types import Sample

    ids = tuple(names["tokenizer"](names["text"])["input_ids"])
    ours = load_reward_model(folder, pad_token_id=names["tokenizer"].pad_token_id)
    torch.testing.assert_close(names["score"][:, 0], scores(ours, collate([Sample(0, ids[:1], (ids[1:],))])), rtol=1e-4, atol=1e-5)
