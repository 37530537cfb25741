"""The DPO objective against definitions computed from the model's own logits in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import tiny_model
from torch import Tensor

from fastalign.errors import ConfigError
from fastalign.models.load import load_model
from fastalign.objectives.dpo import DPO, DPOConfig
from fastalign.train.step import run_step
from fastalign.types import PackedBatch, Sample

SAMPLES = [
    Sample(0, (5, 9, 2), ((7, 8, 3, 1), (4, 1))),
    Sample(1, (11,), ((6, 1), (13, 12, 2, 9, 1)), weight=0.25),
    Sample(2, (), ((3, 3, 4, 1), (9, 1))),  # no prompt: the first token is not scored
    Sample(3, tuple(range(20, 40)), ((2,), (17, 1)), weight=2.0),
]
BETA = 0.3


class FixedReference:
    """Reference log-probs taken from another model's logits."""

    def __init__(self, seed: int = 1) -> None:
        self.dense = Dense(tiny_model("qwen3", seed=seed), SAMPLES)

    def logps(self, batch: PackedBatch) -> Tensor:
        return torch.tensor([logps for i in batch.index for logps in self.dense.logps[i]], dtype=torch.float32)


class Dense:
    """Per-sequence statistics by the book: one sequence at a time, whole logits, float64."""

    def __init__(self, model: Any, samples: list[Sample]) -> None:
        model = model.double().eval()
        self.logps, self.entropy, self.mean_logits, self.top1 = {}, {}, {}, {}
        for sample in samples:
            rows = []
            for completion in sample.completions:
                ids = torch.tensor([(*sample.prompt, *completion)])
                with torch.no_grad():
                    logits = model(ids).logits[0, :-1][max(0, len(sample.prompt) - 1) :]
                target = ids[0, 1:][max(0, len(sample.prompt) - 1) :]
                log_probs = logits.log_softmax(-1)
                picked = log_probs.gather(1, target[:, None])[:, 0]
                entropy = -(log_probs.exp() * log_probs).sum(-1)
                rows.append(
                    (picked.sum().item(), entropy.sum().item(), logits.mean(-1).sum().item(), (logits.argmax(-1) == target).sum().item())
                )
            self.logps[sample.index], self.entropy[sample.index], self.mean_logits[sample.index], self.top1[sample.index] = zip(*rows)


def sigmoid_loss(z: float, *_: float, smoothing: float = 0.0) -> float:
    return (1 - smoothing) * math.log1p(math.exp(-z)) + smoothing * math.log1p(math.exp(z))


LOSSES: dict[str, tuple[dict[str, Any], Callable[..., float]]] = {
    "sigmoid": ({}, lambda c, r, n, m: sigmoid_loss(BETA * (c - r))),
    "cdpo": ({"label_smoothing": 0.2}, lambda c, r, n, m: sigmoid_loss(BETA * (c - r), smoothing=0.2)),
    "hinge": ({"loss_type": "hinge"}, lambda c, r, n, m: max(0.0, 1 - BETA * (c - r))),
    "ipo": ({"loss_type": "ipo"}, lambda c, r, n, m: (c / n - r / m - 1 / (2 * BETA)) ** 2),
}


def config(**options: Any) -> DPOConfig:
    return DPOConfig(**({"output": "run", "beta": BETA} | options))


def run(samples: list[Sample], **options: Any) -> dict[str, float]:
    objective = DPO(config(**options), load_model(tiny_model("qwen3")), FixedReference())  # type: ignore[arg-type]
    sums, denominators = run_step(objective, [samples], device=torch.device("cpu"))
    return objective.metrics({name: value.item() for name, value in sums.items()}, denominators)


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_metrics_equal_their_definitions(name: str) -> None:
    options, loss = LOSSES[name]
    found = run(SAMPLES, **options)
    policy, ref = Dense(tiny_model("qwen3"), SAMPLES), FixedReference().dense
    ratio = {s.index: [p - q for p, q in zip(policy.logps[s.index], ref.logps[s.index])] for s in SAMPLES}
    chosen_tokens, rejected_tokens = (sum(s.scored[k] for s in SAMPLES) for k in (0, 1))
    pairs = len(SAMPLES)

    def total(of: dict[int, tuple[float, ...]], k: int) -> float:
        return sum(values[k] for values in of.values())

    rewards = [BETA * sum(r[k] for r in ratio.values()) / pairs for k in (0, 1)]
    expected = {
        "loss": sum(s.weight * loss(*ratio[s.index], *s.scored) for s in SAMPLES) / pairs,
        "rewards/chosen": rewards[0],
        "rewards/rejected": rewards[1],
        "rewards/margins": rewards[0] - rewards[1],
        "rewards/accuracies": sum(r[0] > r[1] for r in ratio.values()) / pairs,
        "logps/chosen": total(policy.logps, 0) / pairs,
        "logps/rejected": total(policy.logps, 1) / pairs,
        "logits/chosen": total(policy.mean_logits, 0) / chosen_tokens,
        "logits/rejected": total(policy.mean_logits, 1) / rejected_tokens,
        "entropy": (total(policy.entropy, 0) + total(policy.entropy, 1)) / (chosen_tokens + rejected_tokens),
        "mean_token_accuracy": total(policy.top1, 0) / chosen_tokens,
    }
    assert found == pytest.approx(expected, rel=2e-5, abs=1e-6)
    assert 0 < expected["rewards/accuracies"] < 1  # both outcomes occur


def test_the_gradient_is_that_of_the_dense_loss() -> None:
    model = load_model(tiny_model("qwen3"))
    objective = DPO(config(), model, FixedReference())  # type: ignore[arg-type]
    run_step(objective, [SAMPLES], device=torch.device("cpu"))

    dense = tiny_model("qwen3").double()
    loss = torch.zeros((), dtype=torch.float64)
    for sample in SAMPLES:
        logps = []
        for completion in sample.completions:
            ids = torch.tensor([(*sample.prompt, *completion)])
            first = max(0, len(sample.prompt) - 1)
            log_probs = dense(ids).logits[0, :-1].log_softmax(-1)
            logps.append(log_probs.gather(1, ids[0, 1:, None])[first:].sum())
        ref = FixedReference().dense.logps[sample.index]
        z = BETA * ((logps[0] - ref[0]) - (logps[1] - ref[1]))
        loss = loss - sample.weight * torch.nn.functional.logsigmoid(z) / len(SAMPLES)
    loss.backward()
    for (name, ours), (_, theirs) in zip(model.named_parameters(), dense.named_parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-6 * theirs.grad.abs().max().item(), msg=name)


def test_basic_metrics_leave_out_the_costly_ones_and_change_nothing_else() -> None:
    full, basic = run(SAMPLES), run(SAMPLES, metrics="basic")
    assert full.keys() - basic.keys() == {"entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy"}
    assert basic == pytest.approx({name: full[name] for name in basic}, rel=1e-6)


def test_pairs_with_nothing_scored_do_no_harm() -> None:
    """A one-token completion after no prompt has no log-prob; its pair is a constant, and the gradient stays finite."""
    empty = Sample(1, (), ((3,), (4,)))
    model = load_model(tiny_model("qwen3"))
    reference = FixedReference()
    reference.dense.logps[1] = (0.0, 0.0)
    objective = DPO(config(loss_type="ipo"), model, reference)  # type: ignore[arg-type]
    sums, _ = run_step(objective, [[SAMPLES[0], empty, SAMPLES[3], empty]], device=torch.device("cpu"))
    assert all(value.isfinite() for value in sums.values())
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    alone, _ = run_step(objective, [[SAMPLES[0], SAMPLES[3]]], device=torch.device("cpu"))
    assert sums["logps/chosen"].item() == pytest.approx(alone["logps/chosen"].item(), rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "beta must be positive, got 0.0"),
        ({"beta": -1.0}, "beta must be positive, got -1.0"),
        ({"beta": math.nan}, "beta must be positive, got nan"),
        ({"label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\), got 0.5"),
        ({"label_smoothing": 0.1, "loss_type": "ipo"}, "label_smoothing must be 0 with loss_type=ipo"),
        ({"loss_type": "kto"}, r"loss_type must be one or more of sigmoid, hinge, ipo, .*, got 'kto'"),
        ({"reference": "none"}, "reference must be one of auto, adapter, cache, copy"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"learning_rate": -1e-6}, "learning_rate must be 0 or more and finite"),
        ({"warmup_ratio": 1.0}, r"warmup_ratio must be in \[0, 1\)"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be positive, or null"),
        ({"resume": True, "overwrite": True}, "resume and overwrite exclude each other"),
        ({"output": ""}, "set --output RUN"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    good = config()
    good.model.path, good.data.path = "model", "pairs.jsonl"
    good.validate()
    for name, value in options.items():
        setattr(good, name, value)
    with pytest.raises(ConfigError, match=message):
        good.validate()


def test_model_and_data_must_be_named() -> None:
    with pytest.raises(ConfigError, match=r"--model.path"):
        DPOConfig(output="run").validate()
    named = DPOConfig(output="run")
    named.model.path = "model"
    with pytest.raises(ConfigError, match=r"data.path"):
        named.validate()
