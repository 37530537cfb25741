"""`fastalign dpo` and TRL 1.16's DPOTrainer give the same three optimizer steps: same model folder, same JSONL file, float32.

In step 1 the policy is the reference (loss log 2 for sigmoid). Steps 2 and 3 see weights that earlier steps moved, so they are
right only if loss, gradient, clipping, schedule and AdamW were.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import preference_rows, save_tiny, tiny_model

from fastalign import DPOConfig, train
from fastalign.data.config import DataConfig
from fastalign.models.config import LoraConfig, ModelConfig

pytest.importorskip("trl", reason="TRL is the oracle; without it the equality of a step with TRL's is unproven")
import peft
from trl_dpo import BATCH, SETTINGS, Run, run_trl

RELATIVE = 1e-4
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
    folder = tmp_path_factory.mktemp("parity")
    save_tiny(folder / "model", "qwen3")
    torch.manual_seed(1)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    peft.get_peft_model(tiny_model("qwen3"), config).save_pretrained(folder / "adapter")
    for name, conversational in (("pairs", False), ("chat", True)):
        rows = preference_rows(BATCH, conversational=conversational)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def oracle(folder: Path):
    """TRL's run for a loss, full or LoRA; each is made once."""
    made: dict[tuple, Run] = {}

    def get(loss_type: str, training: str, data: str = "pairs", **options) -> Run:
        key = (loss_type, training, data, *options.items())
        if key not in made:
            adapter = folder / "adapter" if training == "lora" else None
            made[key] = run_trl(folder, folder / "model", folder / f"{data}.jsonl", loss_type=loss_type, adapter=adapter, **options)
        return made[key]

    return get


def run_ours(folder: Path, output: Path, *, loss_type: str, training: str, reference: str, data: str = "pairs", **options) -> Run:
    """The same run in ours, its steps cut into several micro-batches. `options` are those of the data."""
    steps: list[dict[str, float]] = []
    smoothing = options.pop("label_smoothing", 0.0)
    config = DPOConfig(
        model=ModelConfig(path=str(folder / "model")),
        data=DataConfig(path=str(folder / f"{data}.jsonl"), **options),
        lora=LoraConfig(adapter=str(folder / "adapter")) if training == "lora" else LoraConfig(),
        output=str(output),
        batch_size=BATCH,
        max_tokens=300,
        loss_type=loss_type,
        reference=reference,
        label_smoothing=smoothing,
        **SETTINGS,
    )
    result = train(config, callbacks=[lambda step, metrics: steps.append(dict(metrics))])
    name = "adapter_model.safetensors" if training == "lora" else "model.safetensors"
    return Run(steps, load_file(result.output / "final" / name))


def assert_same_run(ours: Run, trl: Run, start: dict[str, torch.Tensor], training: str) -> None:
    assert len(ours.steps) == 3
    assert len(trl.steps) >= 3
    for step, (mine, theirs) in enumerate(zip(ours.steps, trl.steps), 1):
        for name in METRICS:
            # rewards are beta times small differences of log-probs of hundreds of nats, which float32 rounds to 1e-5
            absolute = 1e-5 if name.startswith("rewards/") else 1e-6
            assert mine[name] == pytest.approx(theirs[name], rel=RELATIVE, abs=absolute), f"step {step}: {name}"
    assert all(step["grad_norm"] > 0 for step in trl.steps[:2]), "no gradient in step 2: the comparison would prove nothing"
    weights = {_saved_name(name, training): value for name, value in trl.weights.items()}
    assert weights.keys() <= ours.weights.keys()
    for name, theirs in weights.items():
        moved = (theirs - start[name]).norm()
        assert moved > 0, f"{name} never moved in TRL"
        difference = (ours.weights[name] - theirs).norm()
        assert difference <= RELATIVE * theirs.norm(), name
        assert difference <= 10 * RELATIVE * moved, f"{name}: the update itself differs"


def _saved_name(name: str, training: str) -> str:
    return name.replace(".default.", ".") if training == "lora" else name


def starting_weights(folder: Path, training: str) -> dict[str, torch.Tensor]:
    return load_file(folder / ("adapter/adapter_model.safetensors" if training == "lora" else "model/model.safetensors"))


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "hinge"])
@pytest.mark.parametrize(
    ("training", "reference"), [("full", "cache"), ("full", "copy"), ("lora", "adapter"), ("lora", "cache"), ("lora", "copy")]
)
def test_three_steps_equal_trl(folder, oracle, tmp_path, loss_type, training, reference):
    trl = oracle(loss_type, training)
    if loss_type == "sigmoid":
        assert trl.steps[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
        assert abs(trl.steps[1]["loss"] - math.log(2)) > 0.01
    ours = run_ours(folder, tmp_path / "run", loss_type=loss_type, training=training, reference=reference)
    assert_same_run(ours, trl, starting_weights(folder, training), training)


@pytest.mark.parametrize("truncation", ["keep_start", "keep_end"])
def test_three_steps_equal_trl_with_truncation(folder, oracle, tmp_path, truncation):
    trl = oracle("sigmoid", "full", max_length=40, truncation_mode=truncation)
    assert trl.steps[0]["num_tokens"] < oracle("sigmoid", "full").steps[0]["num_tokens"], "nothing was truncated"
    ours = run_ours(folder, tmp_path / "run", loss_type="sigmoid", training="full", reference="cache", max_length=40, truncation=truncation)
    assert_same_run(ours, trl, starting_weights(folder, "full"), "full")


def test_three_steps_equal_trl_on_conversations(folder, oracle, tmp_path):
    trl = oracle("sigmoid", "full", data="chat")
    ours = run_ours(folder, tmp_path / "run", loss_type="sigmoid", training="full", reference="cache", data="chat")
    assert_same_run(ours, trl, starting_weights(folder, "full"), "full")


def test_trl_precomputed_reference_is_the_same_oracle(oracle):
    """TRL's third way to a reference gives what its first one gave, so comparing with one of them is comparing with all."""
    plain, precomputed = oracle("sigmoid", "full"), oracle("sigmoid", "full", precompute_ref_log_probs=True)
    for a, b in zip(plain.steps[:3], precomputed.steps[:3]):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def test_a_slightly_different_loss_is_noticed(folder, oracle, tmp_path):
    """The comparison has the power to fail: one label in a thousand taken for wrong is enough."""
    ours = run_ours(folder, tmp_path / "run", loss_type="sigmoid", training="full", reference="cache", label_smoothing=0.001)
    with pytest.raises(AssertionError, match="step"):
        assert_same_run(ours, oracle("sigmoid", "full"), starting_weights(folder, "full"), "full")
