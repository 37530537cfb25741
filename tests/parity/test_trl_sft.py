"""`fastalign sft` and TRL 1.16's SFTTrainer give the same three optimizer steps: same model folder, same JSONL file, float32.

Ours cuts each step into several packed micro-batches, TRL pads it into one. Steps 2 and 3 see weights that earlier steps moved,
so they are right only if loss, gradient, clipping, schedule and AdamW were.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import preference_rows

from fastalign.data.config import SupervisedDataConfig
from fastalign.objectives.sft import SFTConfig

pytest.importorskip("trl", reason="TRL is the oracle; without it the equality of a step with TRL's is unproven")
import trl
from trl_runs import BATCH, Run, assert_same_run, run_ours, run_trl, starting_weights, with_adapter, write_inputs

METRICS = ("loss", "grad_norm", "learning_rate", "entropy", "mean_token_accuracy", "num_tokens")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, an adapter whose update is not zero, and files of exactly one step's samples."""
    plain, chat = preference_rows(BATCH), preference_rows(BATCH, conversational=True)
    files: dict[str, list[dict[str, Any]]] = {
        "completion": [{"prompt": row["prompt"], "completion": row["chosen"]} for row in plain],
        "text": [{"text": row["prompt"] + row["chosen"]} for row in plain],
        "messages": [{"messages": row["prompt"] + row["chosen"]} for row in chat],
    }
    return write_inputs(tmp_path_factory.mktemp("parity"), files)


def trl_run(folder: Path, data: str, lora: bool, **options: Any) -> Run:
    model, file = with_adapter(folder) if lora else str(folder / "model"), folder / f"{data}.jsonl"
    return run_trl(folder, trl.SFTTrainer, trl.SFTConfig, model, file, tokenizer=folder / "model", **options)


def our_run(folder: Path, output: Path, data: str, lora: bool, max_length: int | None = 1024, **options: Any) -> Run:
    source = SupervisedDataConfig(path=str(folder / f"{data}.jsonl"), max_length=max_length)
    return run_ours(SFTConfig, folder, output, source, lora=lora, **options)


CASES: dict[str, tuple[str, bool, dict[str, Any], dict[str, Any]]] = {  # data, adapter, options of TRL, ours
    "nll of completions": ("completion", False, {}, {}),
    "dft of completions": ("completion", False, {"loss_type": "dft"}, {"loss_type": "dft"}),
    "nll of texts": ("text", False, {}, {}),
    "nll of conversations": ("messages", False, {}, {}),
    "label smoothing": ("completion", False, {"label_smoothing_factor": 0.2}, {"label_smoothing": 0.2}),
    "dft with an adapter": ("completion", True, {"loss_type": "dft"}, {"loss_type": "dft"}),
    "truncated": ("text", False, {"max_length": 30}, {"max_length": 30}),
}


@pytest.mark.parametrize("case", CASES)
def test_three_steps_equal_trl(folder: Path, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastalign.train.loop.write_report", lambda run: run)
    data, lora, theirs, mine = CASES[case]
    oracle = trl_run(folder, data, lora, **theirs)
    ours = our_run(folder, tmp_path / "run", data, lora, **mine)
    assert_same_run(ours, oracle, starting_weights(folder, lora), METRICS)
    if case == "nll of completions":  # the comparison has the power to fail
        other = our_run(folder, tmp_path / "other", data, lora, z_loss=1e-4)
        with pytest.raises(AssertionError, match="step"):
            assert_same_run(other, oracle, starting_weights(folder, lora), METRICS)
