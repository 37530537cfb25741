"""`fastalign dpo` and TRL 1.16's DPOTrainer give the same three optimizer steps: same model folder, same JSONL file, float32.

In step 1 the policy is the reference (loss log 2 for sigmoid). Steps 2 and 3 see weights that earlier steps moved, so they are
right only if loss, gradient, clipping, schedule and AdamW were.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trl_runs
from tiny import preference_rows
from trl_runs import BATCH, Run, run_ours, run_trl, starting_weights, with_adapter, write_inputs

from fastalign import DPOConfig
from fastalign.data.config import DataConfig

trl = pytest.importorskip("trl", reason="TRL is the oracle; without it the equality of a step with TRL's is unproven")

METRICS = (
    "loss",
    "grad_norm",
    "learning_rate",
    "logps/chosen",
    "logps/rejected",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logits/chosen",
    "logits/rejected",
    "entropy",
    "mean_token_accuracy",
    "num_tokens",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, an adapter whose update is not zero, and a file of exactly one step's pairs, some of them truncated."""
    files = {name: preference_rows(BATCH, conversational=name == "chat") for name in ("pairs", "chat")}
    return write_inputs(tmp_path_factory.mktemp("parity"), files)


@pytest.fixture(scope="module")
def oracle(folder: Path):
    """TRL's run for a loss, full or LoRA; each is made once."""
    made: dict[tuple, Run] = {}

    def get(loss_type: str, training: str, data: str = "pairs", **options) -> Run:
        key = (loss_type, training, data, *options.items())
        if key not in made:
            model: Any = with_adapter(folder) if training == "lora" else str(folder / "model")
            options |= {"loss_type": [loss_type], "beta": 0.1, "tokenizer": folder / "model"}
            made[key] = run_trl(folder, trl.DPOTrainer, trl.DPOConfig, model, folder / f"{data}.jsonl", **options)
        return made[key]

    return get


def our_run(
    folder: Path,
    output: Path,
    loss_type: str,
    *,
    training: str,
    reference: str,
    data: str = "pairs",
    smoothing: float = 0.0,
    **options: Any,
) -> Run:
    """The same run in ours. `options` are those of the data."""
    source = DataConfig(path=str(folder / f"{data}.jsonl"), **options)
    given = {"loss_type": loss_type, "reference": reference, "label_smoothing": smoothing, "beta": 0.1, "max_tokens": 300}
    return run_ours(DPOConfig, folder, output, source, lora=training == "lora", **given)


# rewards are beta times small differences of log-probs of hundreds of nats, which float32 rounds to 1e-5
assert_same_run = partial(trl_runs.assert_same_run, metrics=METRICS, absolute=lambda name: 1e-5 if name.startswith("rewards/") else 1e-6)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "hinge"])
@pytest.mark.parametrize(
    ("training", "reference"), [("full", "cache"), ("full", "copy"), ("lora", "adapter"), ("lora", "cache"), ("lora", "copy")]
)
def test_three_steps_equal_trl(folder, oracle, tmp_path, loss_type, training, reference):
    trl = oracle(loss_type, training)
    if loss_type == "sigmoid":
        assert trl.steps[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
        assert abs(trl.steps[1]["loss"] - math.log(2)) > 0.01
    ours = our_run(folder, tmp_path / "run", loss_type, training=training, reference=reference)
    assert_same_run(ours, trl, starting_weights(folder, training == "lora"))


@pytest.mark.parametrize("truncation", ["keep_start", "keep_end"])
def test_three_steps_equal_trl_with_truncation(folder, oracle, tmp_path, truncation):
    trl = oracle("sigmoid", "full", max_length=40, truncation_mode=truncation)
    assert trl.steps[0]["num_tokens"] < oracle("sigmoid", "full").steps[0]["num_tokens"], "nothing was truncated"
    ours = our_run(folder, tmp_path / "run", "sigmoid", training="full", reference="cache", max_length=40, truncation=truncation)
    assert_same_run(ours, trl, starting_weights(folder, lora=False))


def test_three_steps_equal_trl_on_conversations(folder, oracle, tmp_path):
    trl = oracle("sigmoid", "full", data="chat")
    ours = our_run(folder, tmp_path / "run", "sigmoid", training="full", reference="cache", data="chat")
    assert_same_run(ours, trl, starting_weights(folder, lora=False))


def test_trl_precomputed_reference_is_the_same_oracle(oracle):
    """TRL's third way to a reference gives what its first one gave, so comparing with one of them is comparing with all."""
    plain, precomputed = oracle("sigmoid", "full"), oracle("sigmoid", "full", precompute_ref_log_probs=True)
    for a, b in zip(plain.steps[:3], precomputed.steps[:3]):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def test_a_slightly_different_loss_is_noticed(folder, oracle, tmp_path):
    """The comparison has the power to fail: one label in a thousand taken for wrong is enough."""
    ours = our_run(folder, tmp_path / "run", "sigmoid", training="full", reference="cache", smoothing=0.001)
    with pytest.raises(AssertionError, match="step"):
        assert_same_run(ours, oracle("sigmoid", "full"), starting_weights(folder, lora=False))
