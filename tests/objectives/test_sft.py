"""The SFT objective against definitions computed from the model's own logits in float64, and however a step is cut."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from tiny import tiny_model
from torch import Tensor

from fastalign.errors import ConfigError
from fastalign.models.config import LoraConfig
from fastalign.models.load import load_model
from fastalign.objectives.sft import SFT, SFTConfig
from fastalign.train.step import micro_batches, run_step
from fastalign.types import Sample


def tokens(rng: random.Random, low: int, high: int) -> tuple[int, ...]:
    return tuple(rng.randrange(1, 300) for _ in range(rng.randint(low, high)))


def samples(n: int = 8) -> list[Sample]:
    """With weights; some without a prompt, some with turns that are not scored."""
    rng = random.Random(0)
    found = []
    for i in range(n):
        completion = tokens(rng, 1, 14)
        masks = (tuple(rng.random() < 0.6 for _ in completion),) if i % 3 == 1 else ()
        found.append(Sample(i, tokens(rng, 0, 9), (completion,), weight=rng.choice((0.5, 1.0, 2.0)), masks=masks))
    return found


OPTIONS: dict[str, dict[str, Any]] = {
    "nll": {},
    "dft": {"loss_type": "dft"},
    "smoothed": {"label_smoothing": 0.3},
    "z": {"z_loss": 0.05},
    "smoothed and z": {"label_smoothing": 0.1, "z_loss": 0.05},
    "dft and z": {"loss_type": "dft", "z_loss": 0.05},
}


def dense(
    model: Any, step: list[Sample], *, loss_type: str = "nll", label_smoothing: float = 0.0, z_loss: float = 0.0
) -> dict[str, Tensor]:
    """By the book: one sequence at a time, whole logits; loss and metrics of the step."""
    sums = dict.fromkeys(("loss", "nll", "entropy", "mean_token_accuracy"), torch.zeros((), dtype=torch.float64))
    count = 0
    for sample in step:
        ids = torch.tensor([(*sample.prompt, *sample.completions[0])])
        logits = model(ids).logits[0, :-1]
        keep = [False] * len(sample.prompt) + list(sample.masks[0] if sample.masks else [True] * len(sample.completions[0]))
        rows = torch.tensor(keep)[1:]
        logits, target = logits[rows], ids[0, 1:][rows]
        log_probs = logits.log_softmax(-1)
        logps = log_probs.gather(1, target[:, None])[:, 0]
        loss = -logps * logps.detach().exp() if loss_type == "dft" else -logps
        loss = (1 - label_smoothing) * loss - label_smoothing * log_probs.mean(-1) + z_loss * logits.logsumexp(-1) ** 2
        found = {"loss": sample.weight * loss, "nll": -logps, "entropy": -(log_probs.exp() * log_probs).sum(-1)}
        found["mean_token_accuracy"] = (logits.argmax(-1) == target).double()
        sums = {name: total + found[name].sum() for name, total in sums.items()}
        count += len(target)
    return {name: total / count for name, total in sums.items()}


def config(**options: Any) -> SFTConfig:
    return SFTConfig(**({"output": "run"} | options))


def ours(bins: list[list[Sample]], case: dict[str, Any], model: Any = None) -> tuple[dict[str, float], dict[str, Tensor]]:
    model = load_model(tiny_model("qwen3")) if model is None else model
    objective = SFT(config(**case), model)
    sums, denominators = run_step(objective, bins, device=torch.device("cpu"))
    found = objective.metrics({name: value.item() for name, value in sums.items()}, denominators)
    return found, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("case", OPTIONS)
def test_loss_metrics_and_gradient_equal_their_definitions(case: str) -> None:
    found, gradient = ours([samples()], OPTIONS[case])
    model = tiny_model("qwen3").double()
    expected = dense(model, samples(), **OPTIONS[case])
    assert found == pytest.approx({name: value.item() for name, value in expected.items()}, rel=2e-5)
    expected["loss"].backward()
    for name, p in model.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(gradient[name].double(), p.grad, rtol=1e-4, atol=1e-5 * p.grad.abs().max().item(), msg=name)


PLANS = {
    "8x1": [[sample] for sample in samples()],
    "4x2": [samples()[i : i + 2] for i in range(0, 8, 2)],
    "2x4": [samples()[:4], samples()[4:]],
    "reversed": [samples()[::-1]],
    "by 30 tokens": micro_batches(samples(), 30),
}


@pytest.mark.parametrize("case", ["nll", "dft", "smoothed and z"])
@pytest.mark.parametrize("lora", [False, True])
def test_the_cut_of_a_step_does_not_matter(case: str, lora: bool) -> None:
    def model() -> Any:
        torch.manual_seed(0)
        targets = ["q_proj", "down_proj", "lm_head"]
        return load_model(tiny_model("qwen3"), lora=LoraConfig(r=4, targets=targets) if lora else None)

    whole, gradient = ours([samples()], OPTIONS[case], model())
    for name, plan in PLANS.items():
        found, other = ours(plan, OPTIONS[case] | {"logits_budget": 20 * 320 * 4}, model())
        assert found == pytest.approx(whole, rel=1e-5), name
        assert gradient.keys() == other.keys()
        for weight, grad in gradient.items():
            torch.testing.assert_close(other[weight], grad, rtol=1e-4, atol=1e-5 * grad.abs().max().item(), msg=f"{name}: {weight}")
    again, same = ours([samples()], OPTIONS[case], model())
    assert again == whole
    assert all(torch.equal(same[weight], grad) for weight, grad in gradient.items())


def test_a_step_with_nothing_to_score_is_zero_and_finite() -> None:
    nothing = Sample(0, (5, 6), ((7, 8),), masks=((False, False),))
    found, gradient = ours([[nothing]], {"z_loss": 0.1})
    assert set(found.values()) == {0.0}
    assert all(grad.abs().max() == 0 for grad in gradient.values())


def test_dft_weighs_a_token_by_its_probability() -> None:
    """One token: loss p nll, gradient p times that of nll."""
    step = [[Sample(0, (5, 9), ((7,),))]]
    plain, weighted = (ours(step, case) for case in ({}, {"loss_type": "dft"}))
    p = math.exp(-plain[0]["nll"])
    assert weighted[0]["loss"] == pytest.approx(p * plain[0]["loss"], rel=1e-5)
    for name, grad in plain[1].items():
        torch.testing.assert_close(weighted[1][name], p * grad, rtol=1e-4, atol=1e-7)


def test_basic_metrics_leave_out_the_costly_ones_and_change_nothing_else() -> None:
    full, basic = (ours([samples()], {"metrics": kind})[0] for kind in ("full", "basic"))
    assert full.keys() - basic.keys() == {"entropy", "mean_token_accuracy"}
    assert basic == pytest.approx({name: full[name] for name in basic}, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "ntp"}, "loss_type must be one of nll, dft, got 'ntp'"),
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\), got 1.0"),
        ({"label_smoothing": 0.1, "loss_type": "dft"}, "label_smoothing must be 0 with loss_type=dft"),
        ({"z_loss": -1.0}, "z_loss must be 0 or more and finite"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    good = config(**options)
    good.model.path, good.data.path = "model", "texts.jsonl"
    with pytest.raises(ConfigError, match=message):
        good.validate()
