"""ORPO, CPO and SimPO against definitions computed from the model's own logits in float64, and what they refuse."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny import tiny_model
from torch import Tensor

from fastalign.errors import ConfigError
from fastalign.models.load import load_model
from fastalign.objectives.cpo import CPO, CPOConfig, SimPOConfig
from fastalign.objectives.orpo import ORPO, ORPOConfig
from fastalign.train.step import run_step
from fastalign.types import Sample

SAMPLES = [
    Sample(0, (5, 9, 2), ((7, 8, 3, 1), (4, 1))),
    Sample(1, (11,), ((6, 1), (13, 12, 2, 9, 1)), weight=0.25),
    Sample(2, (), ((3, 3, 4, 1), (9, 1))),  # no prompt: the first token is not scored
    Sample(3, tuple(range(20, 40)), ((2,), (17, 1)), weight=2.0),
]
EMPTY = Sample(4, (), ((3,), (4,)))  # nothing is scored


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def odds(a: float) -> float:
    return a - math.log(1 - math.exp(a))


# config, loss of a pair from (sum, length) of the chosen and the rejected, factor of the likelihood
CASES: dict[str, tuple[Any, Any, float]] = {
    "orpo": (ORPOConfig(beta=0.4), lambda c, n, r, m: 0.4 * softplus(odds(r / m) - odds(c / n)), 1.0),
    "orpo, prompts too": (ORPOConfig(beta=0.4, nll_scope="all"), lambda c, n, r, m: 0.4 * softplus(odds(r / m) - odds(c / n)), 1.0),
    "cpo": (CPOConfig(beta=0.2, cpo_alpha=0.5), lambda c, n, r, m: softplus(-0.2 * (c - r)), 0.5),
    "cpo, hinge": (CPOConfig(loss_type="hinge"), lambda c, n, r, m: max(0.0, 1 - 0.1 * (c - r)), 1.0),
    "cpo, ipo": (CPOConfig(loss_type="ipo", beta=0.5), lambda c, n, r, m: (c / n - r / m - 1) ** 2, 1.0),
    "simpo": (SimPOConfig(), lambda c, n, r, m: softplus(-2 * (c / n - r / m) + 1), 0.0),
    "alphapo": (
        SimPOConfig(loss_type="alphapo", alpha=0.5),
        lambda c, n, r, m: softplus(-2 * (math.exp(-0.5 * r / m) - math.exp(-0.5 * c / n)) / 0.5 + 1),
        0.0,
    ),
}


def dense(all_tokens: bool) -> tuple[list[tuple[float, int, float, int]], float, float]:
    """(sum, length) of both completions of each pair; the weighted likelihood term and its tokens."""
    model, found, nll, tokens = tiny_model("qwen3").double(), [], 0.0, 0
    for sample in SAMPLES:
        row: list[Any] = []
        for k, completion in enumerate(sample.completions):
            ids = torch.tensor([(*sample.prompt, *completion)])
            with torch.no_grad():
                logps = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            scored = logps[max(0, len(sample.prompt) - 1) :]
            row += [scored.sum().item(), len(scored)]
            if k == 0:
                counted = logps if all_tokens else scored
                nll, tokens = nll - sample.weight * counted.sum().item(), tokens + len(counted)
        found.append(tuple(row))
    return found, nll / tokens, tokens


def make(settings: Any) -> Any:
    model = load_model(tiny_model("qwen3"))
    return (ORPO if isinstance(settings, ORPOConfig) else CPO)(settings, model)


@pytest.mark.parametrize("case", CASES)
def test_loss_equals_its_definition(case: str) -> None:
    settings, loss, factor = CASES[case]
    objective = make(settings)
    sums, denominators = run_step(objective, [SAMPLES[:1], SAMPLES[1:]], device=torch.device("cpu"))
    found = objective.metrics({name: value.item() for name, value in sums.items()}, denominators)
    pairs, nll, _ = dense("prompts" in case)
    expected = sum(s.weight * loss(*pair) for s, pair in zip(SAMPLES, pairs)) / len(SAMPLES) + factor * nll
    assert found["loss"] == pytest.approx(expected, rel=2e-5)
    assert ("nll_loss" in found) == (factor > 0)
    if case == "orpo":
        log_odds = [odds(c / n) - odds(r / m) for c, n, r, m in pairs]
        assert found["log_odds_chosen"] == pytest.approx(sum(log_odds) / 4, rel=2e-5)
        assert found["log_odds_ratio"] == pytest.approx(-sum(map(softplus, (-x for x in log_odds))) / 4, rel=2e-5)
    averaged = case.split(",")[0] != "cpo" or case == "cpo, ipo"
    means = [(c / n, r / m) if averaged else (c, r) for c, n, r, m in pairs]
    assert found["logps/chosen"] == pytest.approx(sum(c for c, _ in means) / 4, rel=2e-5)
    assert found["logps/rejected"] == pytest.approx(sum(r for _, r in means) / 4, rel=2e-5)


@pytest.mark.parametrize("case", CASES)
def test_pairs_with_nothing_scored_do_no_harm(case: str) -> None:
    """A completion without a scored token has log-prob 0, the odds of certainty: a constant, and every gradient stays finite."""

    def gradient(samples: list[Sample]) -> Tensor:
        objective = make(CASES[case][0])
        sums, _ = run_step(objective, [samples], device=torch.device("cpu"))
        assert all(value.isfinite() for value in sums.values())
        return torch.cat([p.grad.flatten() for p in objective.model.parameters()])

    two, alone = gradient([SAMPLES[0], EMPTY, SAMPLES[3], EMPTY]), gradient([SAMPLES[0], SAMPLES[3]])
    assert two.isfinite().all()
    assert two.abs().max() > 1e-3
    if CASES[case][2] == 0:
        torch.testing.assert_close(2 * two, alone, rtol=1e-4, atol=1e-5)  # twice the pairs to divide by


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (ORPOConfig(beta=0.0), "beta must be positive, got 0.0"),
        (ORPOConfig(nll_scope="prompt"), "nll_scope must be one of completion, all, got 'prompt'"),  # type: ignore[arg-type]
        (CPOConfig(loss_type="kto_pair"), "loss_type must be one of sigmoid, hinge, ipo, simpo, alphapo"),  # type: ignore[arg-type]
        (CPOConfig(label_smoothing=0.1, loss_type="hinge"), "label_smoothing must be 0 with loss_type=hinge"),
        (CPOConfig(label_smoothing=0.5), r"label_smoothing must be in \[0, 0.5\)"),
        (CPOConfig(simpo_gamma=0.7), "simpo_gamma must be left at 0.5, which counts only with loss_type=simpo or alphapo, got 0.7"),
        (CPOConfig(cpo_alpha=-1.0), "cpo_alpha must be 0 or more and finite"),
        (CPOConfig(loss_type="alphapo"), "alpha must be other than 0 with loss_type=alphapo, .* 0.25"),
        (SimPOConfig(alpha=0.25), "alpha must be 0 with loss_type=simpo"),
    ],
)
def test_options_out_of_range_are_named(settings: Any, message: str) -> None:
    settings.output, settings.model.path, settings.data.path = "run", "model", "pairs.jsonl"
    with pytest.raises(ConfigError, match=message):
        settings.validate()


@pytest.mark.parametrize("name", ["entropy", "logits/chosen", "mean_token_accuracy"])
def test_basic_metrics_leave_out_the_costly_ones(name: str) -> None:
    for full in (ORPOConfig(), CPOConfig()):
        basic = type(full)(metrics="basic")
        names = [run_step(make(settings), [SAMPLES], device=torch.device("cpu"))[0].keys() for settings in (full, basic)]
        assert name in names[0]
        assert name not in names[1]
