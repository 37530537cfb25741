"""`fastalign reward` and TRL 1.16's RewardTrainer give the same three optimizer steps: same reward model, same JSONL file, float32.

Ours cuts each step into several packed micro-batches, TRL pads it into one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import PAD, preference_rows, save_tiny, tiny_tokenizer

from fastalign.data.config import RankedDataConfig
from fastalign.models.save import save_final
from fastalign.models.value_head import load_reward_model
from fastalign.objectives.reward import RewardConfig

pytest.importorskip("trl", reason="TRL is the oracle; without it the equality of a step with TRL's is unproven")
import peft
import trl
from transformers import AutoModelForSequenceClassification
from trl_runs import BATCH, Run, assert_same_run, run_ours, run_trl, starting_weights, write_rows

METRICS = ("loss", "grad_norm", "learning_rate", "accuracy", "margin", "min_reward", "mean_reward", "max_reward", "num_tokens")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model, one whose pad token is its EOS token, an adapter on the first, and files of exactly one step's pairs."""
    folder = tmp_path_factory.mktemp("parity")
    for name, pad in (("model", PAD), ("pad is eos", None)):
        tokenizer = tiny_tokenizer(pad=pad)
        save_tiny(folder / "causal" / name, "qwen3", tokenizer=tokenizer)
        torch.manual_seed(0)
        pad_id = tokenizer.eos_token_id if pad is None else tokenizer.pad_token_id
        save_final(load_reward_model(folder / "causal" / name, pad_token_id=pad_id), tokenizer, folder / name)
    torch.manual_seed(1)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    peft.get_peft_model(base(folder), config).save_pretrained(folder / "adapter")
    files = {"pairs": preference_rows(BATCH), "chat": preference_rows(BATCH, conversational=True)}
    files["margins"] = [row | {"margin": 0.3 * k} for k, row in enumerate(files["pairs"])]
    long = {"prompt": "river", "chosen": " old lamp", "rejected": " bright stone holds quiet garden" * 20}
    files["long"] = [*files["pairs"][:3], long, *files["pairs"][3:]]
    write_rows(folder, files)
    return folder


def base(folder: Path) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(folder / "model", dtype=torch.float32)


def trl_run(folder: Path, model: str, data: str, lora: bool, **options: Any) -> Run:
    policy: Any = peft.PeftModel.from_pretrained(base(folder), folder / "adapter", is_trainable=True) if lora else str(folder / model)
    options = {"gradient_checkpointing": False, **options}
    file = folder / f"{data}.jsonl"
    return run_trl(folder, trl.RewardTrainer, trl.RewardConfig, policy, file, tokenizer=folder / model, **options)


def our_run(folder: Path, output: Path, model: str, data: str, lora: bool, max_length: int | None = 1024, **options: Any) -> Run:
    source = RankedDataConfig(path=str(folder / f"{data}.jsonl"), max_length=max_length)
    return run_ours(RewardConfig, folder, output, source, lora=lora, model=model, **{"max_tokens": 300, **options})


CASES: dict[str, tuple[str, str, bool, dict[str, Any], dict[str, Any]]] = {  # model, data, adapter, options of TRL, ours
    "pairs": ("model", "pairs", False, {}, {}),
    "margins and centering": ("model", "margins", False, {"center_rewards_coefficient": 0.1}, {"center_coef": 0.1}),
    "conversations": ("model", "chat", False, {}, {}),
    "over-long pairs": ("model", "long", False, {"max_length": 200}, {"max_length": 200}),
    "the pad token is EOS": ("pad is eos", "pairs", False, {}, {}),
    "adapter": ("model", "pairs", True, {}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_three_steps_equal_trl(folder: Path, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastalign.train.loop.write_report", lambda run: run)
    model, data, lora, theirs, mine = CASES[case]
    oracle = trl_run(folder, model, data, lora, **theirs)
    ours = our_run(folder, tmp_path / "run", model, data, lora, **mine)
    start = starting_weights(folder, lora, model)
    assert_same_run(ours, oracle, start, METRICS)
    if case == "pairs":  # the comparison has the power to fail
        other = our_run(folder, tmp_path / "other", model, data, lora, center_coef=1e-3)
        with pytest.raises(AssertionError, match="step"):
            assert_same_run(other, oracle, start, METRICS)
