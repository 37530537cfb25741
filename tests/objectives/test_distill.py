"""Distillation against its definition from both models' logits in float64, against TRL's GKD loss, and however a step is cut."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import preference_rows, save_tiny, tiny_model, tiny_tokenizer
from torch import Tensor

from fastalign import train
from fastalign.errors import ConfigError, ModelError
from fastalign.models.config import LoraConfig, ModelConfig
from fastalign.models.load import load_model
from fastalign.objectives.distill import Distill, DistillConfig, TeacherConfig
from fastalign.train.step import micro_batches, run_step
from fastalign.types import Sample

CASES: dict[str, dict[str, Any]] = {
    "forward_kl": {},
    "reverse_kl": {"divergence": "reverse_kl"},
    "jsd": {"divergence": "jsd", "beta": 0.3},
    "with nll": {"nll_weight": 0.4},
    "tempered": {"divergence": "jsd", "temperature": 2.5},
    "tempered with nll": {"temperature": 0.7, "nll_weight": 0.4},
}


def samples(n: int = 8) -> list[Sample]:
    rng = random.Random(0)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        return tuple(rng.randrange(1, 300) for _ in range(rng.randint(low, high)))

    return [Sample(i, tokens(0, 9), (tokens(1, 14),), weight=rng.choice((0.5, 1.0, 2.0))) for i in range(n)]


def student() -> Any:
    return tiny_model("qwen3")


def teacher(**options: Any) -> Any:
    """Another architecture, wider, with a softcap and a head that has some rows more, as padding leaves it."""
    return tiny_model("gemma2", seed=1, hidden_size=48, vocab_size=328, **options)


def divergence(p: Tensor, q: Tensor, kind: str, beta: float) -> Tensor:
    """From log-probs (T, V), by the definitions."""
    if kind == "forward_kl":
        return (q.exp() * (q - p)).sum(-1)
    if kind == "reverse_kl":
        return (p.exp() * (p - q)).sum(-1)
    m = ((1 - beta) * p.exp() + beta * q.exp()).log()
    return beta * (q.exp() * (q - m)).sum(-1) + (1 - beta) * (p.exp() * (p - m)).sum(-1)


def dense(model: Any, guide: Any, options: dict[str, Any]) -> dict[str, Tensor]:
    kind, beta = options.get("divergence", "forward_kl"), options.get("beta", 0.5)
    temperature, share = options.get("temperature", 1.0), options.get("nll_weight", 0.0)
    sums = dict.fromkeys(("loss", "divergence", "nll"), torch.zeros((), dtype=torch.float64))
    count = 0
    for sample in samples():
        ids = torch.tensor([(*sample.prompt, *sample.completions[0])])
        first = max(0, len(sample.prompt) - 1)
        logits, target = model(ids).logits[0, first:-1], ids[0, first + 1 :]
        with torch.no_grad():
            taught = guide(ids).logits[0, first:-1, : logits.shape[1]]
        d = divergence((logits / temperature).log_softmax(-1), (taught / temperature).log_softmax(-1), kind, beta)
        nll = -logits.log_softmax(-1).gather(1, target[:, None])[:, 0]
        found = {"loss": sample.weight * ((1 - share) * d + share * nll), "divergence": d, "nll": nll}
        sums = {name: total + found[name].sum() for name, total in sums.items()}
        count += len(target)
    return {name: total / count for name, total in sums.items()}


def ours(bins: list[list[Sample]], case: str, lora: bool = False, **options: Any) -> tuple[dict[str, float], dict[str, Tensor]]:
    torch.manual_seed(0)
    model = load_model(student(), lora=LoraConfig(r=4, targets=["q_proj", "lm_head"]) if lora else None)
    objective = Distill(DistillConfig(output="run", **CASES[case], **options), model, load_model(teacher()))
    sums, denominators = run_step(objective, bins, device=torch.device("cpu"))
    found = objective.metrics({name: value.item() for name, value in sums.items()}, denominators)
    return found, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("case", CASES)
def test_loss_metrics_and_gradient_equal_their_definitions(case: str) -> None:
    found, gradient = ours([samples()], case)
    model = student().double()
    expected = dense(model, teacher().double(), CASES[case])
    for name, value in expected.items():
        if name in found:
            assert found[name] == pytest.approx(value.item(), rel=2e-5), name
    assert {"loss", "divergence"} <= found.keys()
    assert ({"entropy", "mean_token_accuracy"} <= found.keys()) == ("tempered" not in case)
    assert ("nll" in found) == (case != "tempered")
    expected["loss"].backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(gradient[name].double(), p.grad, rtol=1e-4, atol=1e-5 * p.grad.abs().max().item(), msg=name)


@pytest.mark.parametrize("case", ["forward_kl", "reverse_kl", "jsd", "tempered"])
def test_the_loss_is_that_of_trl(case: str) -> None:
    gkd = pytest.importorskip("trl.experimental.gkd", reason="TRL is the oracle; without it the equality with its GKD loss is unproven")
    step = [Sample(s.index, s.prompt, s.completions) for s in samples()]
    found, _ = ours([step], case)
    options, total, count = CASES[case], 0.0, 0
    kind = options.get("divergence", "forward_kl")
    beta = {"forward_kl": 0.0, "reverse_kl": 1.0}.get(kind, options.get("beta", 0.5))
    for sample in step:
        ids = torch.tensor([(*sample.prompt, *sample.completions[0])])
        labels = ids.clone()
        labels[:, : max(1, len(sample.prompt))] = -100
        with torch.no_grad():
            logits, taught = student()(ids).logits, teacher()(ids).logits[..., :320]
        shifted = (logits[:, :-1], taught[:, :-1], labels[:, 1:])
        one = torch.ones(())
        total += gkd.GKDTrainer.generalized_jsd_loss(
            *shifted, beta=beta, temperature=options.get("temperature", 1.0), num_items_in_batch=one
        ).item()
        count += int((labels[:, 1:] != -100).sum())
    assert found["loss"] == pytest.approx(total / count, rel=1e-4)


@pytest.mark.parametrize("case", ["forward_kl", "tempered with nll"])
@pytest.mark.parametrize("lora", [False, True])
def test_the_cut_of_a_step_does_not_matter(case: str, lora: bool) -> None:
    step = samples()
    whole, gradient = ours([step], case, lora)
    plans = [[[s] for s in step], [step[i : i + 2] for i in range(0, 8, 2)], [step[:4], step[4:]], micro_batches(step[::-1], 40)]
    for plan in plans:
        found, other = ours(plan, case, lora, logits_budget=40 * 320 * 4)
        assert found == pytest.approx(whole, rel=1e-5)
        assert gradient.keys() == other.keys()
        for weight, grad in gradient.items():
            torch.testing.assert_close(other[weight], grad, rtol=1e-4, atol=2e-5 * grad.abs().max().item(), msg=weight)
    again, same = ours([step], case, lora)
    assert again == whole
    assert all(torch.equal(same[weight], grad) for weight, grad in gradient.items())


def test_a_model_that_equals_its_teacher_has_nothing_to_learn() -> None:
    model = load_model(student())
    objective = Distill(DistillConfig(output="run"), model, load_model(student()))
    sums, _ = run_step(objective, [samples()], device=torch.device("cpu"))
    assert sums["loss"].item() == pytest.approx(0.0, abs=1e-6)
    assert max(p.grad.abs().max().item() for p in model.parameters() if p.grad is not None) < 1e-5


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    save_tiny(tmp_path / "model", "qwen3")
    save_tiny(tmp_path / "teacher", "llama", seed=1, hidden_size=48)
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in preference_rows(16)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def config(inputs: Path, teacher: str = "teacher", **options: Any) -> DistillConfig:
    made = DistillConfig(model=ModelConfig(path=str(inputs / "model")), teacher=TeacherConfig(path=str(inputs / teacher)), **options)
    made.data.path, made.output = str(inputs / "texts.jsonl"), str(inputs / "run")
    return made


def test_a_run_comes_closer_to_its_teacher(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastalign.train.loop.write_report", lambda run: run)
    steps: list[dict[str, float]] = []
    train(config(inputs, learning_rate=1e-2, epochs=10), callbacks=[lambda step, metrics: steps.append(dict(metrics))])
    assert steps[-1]["divergence"] < 0.7 * steps[0]["divergence"]


def test_teachers_that_cannot_teach_are_named(inputs: Path) -> None:
    silent = config(inputs)
    silent.teacher.path = ""
    with pytest.raises(ConfigError, match=r"teacher\.path: no teacher given; set --teacher\.path DIR"):
        train(silent)
    with pytest.raises(ModelError, match=r"teacher\.path: .*gone: no usable tokenizer"):
        train(config(inputs, "gone"))
    save_tiny(inputs / "other words", "llama", tokenizer=tiny_tokenizer("word"))
    with pytest.raises(ConfigError, match=r"different vocabularies \(id \d+ is .* there and '.*' here\)"):
        train(config(inputs, "other words"))
    strange = save_tiny(inputs / "strange", "llama") / "tokenizer.json"
    strange.write_text(strange.read_text().replace("<|user|>", "<|human|>"))  # the same ids, one of which is another token
    with pytest.raises(ConfigError, match=r"\(id \d+ is '<\|human\|>' there and '<\|user\|>' here\)"):
        train(config(inputs, "strange"))
    small = load_model(tiny_model("llama", vocab_size=300))
    with pytest.raises(ModelError, match="the teacher's head has 300 rows, the model's 320"):
        Distill(DistillConfig(output="run"), load_model(student()), small)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"divergence": "kl"}, "divergence must be one of forward_kl, reverse_kl, jsd, got 'kl'"),
        ({"beta": 1.5}, r"beta must be in \[0, 1\], got 1.5"),
        ({"temperature": 0.0}, "temperature must be positive and finite"),
        ({"nll_weight": 1.0}, r"nll_weight must be in \[0, 1\); nll alone is `fastalign sft`, got 1.0"),
    ],
)
def test_options_out_of_range_are_named(inputs: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(inputs, **options).validate()
