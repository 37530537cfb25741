"""`fastalign gkd` and `distill`, and TRL 1.16's GKDTrainer: the same three optimizer steps on the data's completions, and one on answers.

Ours cuts each step into several packed micro-batches, TRL pads it into one. Two things differ on purpose, and both numbers are
shown: TRL's temperature never reaches its divergence, and on answers it divides by the tokens of the data.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import preference_rows, save_tiny, tiny_tokenizer

from fastalign import train
from fastalign.data.config import SupervisedDataConfig
from fastalign.models.config import ModelConfig
from fastalign.models.load import load_model
from fastalign.objectives.distill import Distill, DistillConfig, TeacherConfig
from fastalign.objectives.gkd import GKDConfig
from fastalign.train.step import micro_batches, run_step
from fastalign.types import Sample

pytest.importorskip("trl", reason="TRL is the oracle; without it the equality of a step with TRL's is unproven")
from transformers import AutoModelForCausalLM
from trl.experimental import gkd
from trl_runs import BATCH, SETTINGS, Run, assert_same_run, run_trl

METRICS = ("loss", "grad_norm", "learning_rate")
CASES: dict[str, tuple[float, dict[str, Any]]] = {  # TRL's beta, our options
    "forward_kl": (0.0, {"divergence": "forward_kl"}),
    "jsd 0.1": (0.1, {"divergence": "jsd", "beta": 0.1}),
    "jsd 0.5": (0.5, {"divergence": "jsd"}),
    "jsd 0.9": (0.9, {"divergence": "jsd", "beta": 0.9}),
    "reverse_kl": (1.0, {"divergence": "reverse_kl"}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a wider teacher, and a step's conversations as each side reads them."""
    folder = tmp_path_factory.mktemp("gkd")
    save_tiny(folder / "model", "qwen3")
    save_tiny(folder / "teacher", "qwen3", seed=1, hidden_size=48)
    rows = preference_rows(BATCH, conversational=True)
    files = {
        "messages": [{"messages": row["prompt"] + row["chosen"]} for row in rows],
        "completions": [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows],
    }
    for name, content in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return folder


def trl_run(folder: Path, seen: list[dict[str, Any]] | None = None, **options: Any) -> Run:
    """`seen` collects what every step was trained on, and its loss."""

    class WithTeacher(gkd.GKDTrainer):  # type: ignore[misc]
        def __init__(self, *args: Any, **given: Any) -> None:
            teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=torch.float32)
            super().__init__(*args, teacher_model=teacher, **given)

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            if seen is not None:
                seen.append({**inputs, "loss": loss.item(), "items": int(num_items_in_batch)})
            return loss

    data = folder / "messages.jsonl"
    return run_trl(folder, WithTeacher, gkd.GKDConfig, str(folder / "model"), data, tokenizer=folder / "model", **options)


def our_run(folder: Path, output: Path, kind: type[DistillConfig], **options: Any) -> Run:
    steps: list[dict[str, float]] = []
    config = kind(
        model=ModelConfig(path=str(folder / "model")),
        teacher=TeacherConfig(path=str(folder / "teacher")),
        data=SupervisedDataConfig(path=str(folder / "completions.jsonl")),
        output=str(output),
        batch_size=BATCH,
        max_tokens=150,
        **SETTINGS,
        **options,
    )
    result = train(config, callbacks=[lambda step, metrics: steps.append(dict(metrics))])
    return Run(steps, load_file(result.output / "final" / "model.safetensors"))


def start(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


@pytest.mark.parametrize("kind", [DistillConfig, GKDConfig])
@pytest.mark.parametrize("case", CASES)
def test_three_steps_on_the_data_equal_trl(
    folder: Path, tmp_path: Path, case: str, kind: type[DistillConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastalign.train.loop.write_report", lambda run: run)
    beta, options = CASES[case]
    off = {"lmbda": 0.0} if kind is GKDConfig else {}
    oracle = trl_run(folder, lmbda=0.0, beta=beta)
    assert_same_run(our_run(folder, tmp_path / "run", kind, **off, **options), oracle, start(folder), METRICS)
    if case == "jsd 0.5":  # the comparison has the power to fail
        other = our_run(folder, tmp_path / "other", kind, **off, divergence="jsd", beta=0.52)
        with pytest.raises(AssertionError, match="step"):
            assert_same_run(other, oracle, start(folder), METRICS)


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_the_temperature_of_trl_never_reaches_its_divergence(
    folder: Path, tmp_path: Path, beta: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its three steps at temperature 2.5 are those at 1, and ours at 1. Ours at 2.5 are those of a TRL whose loss is told of it."""
    monkeypatch.setattr("fastalign.train.loop.write_report", lambda run: run)
    options = {"divergence": "jsd" if beta else "forward_kl"}
    trl_hot, trl_cold = (trl_run(folder, lmbda=0.0, beta=beta, temperature=t) for t in (2.5, 1.0))
    assert [step["loss"] for step in trl_hot.steps] == [step["loss"] for step in trl_cold.steps]
    assert_same_run(our_run(folder, tmp_path / "cold", DistillConfig, **options), trl_hot, start(folder), METRICS)
    hot = our_run(folder, tmp_path / "hot", DistillConfig, temperature=2.5, **options)
    assert hot.steps[0]["loss"] < 0.7 * trl_hot.steps[0]["loss"], "the flatter distributions are closer"
    loss = gkd.GKDTrainer.generalized_jsd_loss
    monkeypatch.setattr(gkd.GKDTrainer, "generalized_jsd_loss", staticmethod(lambda **given: loss(**given, temperature=2.5)))
    assert_same_run(hot, trl_run(folder, lmbda=0.0, beta=beta), start(folder), METRICS)


def test_on_answers_trl_divides_by_the_tokens_of_the_data(folder: Path) -> None:
    """The first step's loss on the answers that TRL drew: equal as a sum, ours a mean over them, TRL's over the data's tokens."""
    seen: list[dict[str, Any]] = []
    trl_run(folder, seen, lmbda=1.0, beta=0.5, max_new_tokens=7, max_steps=1)
    ids, kept, labels = (seen[0][name] for name in ("input_ids", "attention_mask", "labels"))
    step = []
    for i in range(BATCH):
        prompt = ids[i][(labels[i] == -100) & (kept[i] == 1)]
        step.append(Sample(i, tuple(prompt.tolist()), (tuple(labels[i][labels[i] != -100].tolist()),)))
    tokens, items, theirs = sum(sample.num_targets for sample in step), seen[0]["items"], seen[0]["loss"]
    config = DistillConfig(teacher=TeacherConfig(path=str(folder / "teacher")), divergence="jsd", beta=0.5)
    model, teacher = (load_model(ModelConfig(path=str(folder / name))) for name in ("model", "teacher"))
    sums, _ = run_step(Distill(config, model, teacher), micro_batches(step, 150), device=torch.device("cpu"))
    assert items == sum(len(tiny_tokenizer()(text)["input_ids"]) + 1 for text in completions(folder))
    assert tokens != items, "nothing would be proven"
    assert float(sums["loss"]) == pytest.approx(theirs * items / tokens, rel=1e-4)


def completions(folder: Path) -> list[str]:
    return [json.loads(line)["completion"][0]["content"] for line in (folder / "completions.jsonl").read_text().splitlines()]
