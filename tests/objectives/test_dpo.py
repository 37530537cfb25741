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


def test_a_uniform_reference_is_cpo() -> None:
    """reference_free: log-ratios are log-probs."""
    settings = config(reference_free=True)
    objective = DPO(settings, load_model(tiny_model("qwen3")), None)
    sums, denominators = run_step(objective, [SAMPLES], device=torch.device("cpu"))
    found = objective.metrics({name: value.item() for name, value in sums.items()}, denominators)
    logps = Dense(tiny_model("qwen3"), SAMPLES).logps
    assert found["loss"] == pytest.approx(sum(s.weight * sigmoid_loss(BETA * (logps[s.index][0] - logps[s.index][1])) for s in SAMPLES) / 4)
    assert found["rewards/chosen"] == pytest.approx(BETA * found["logps/chosen"])


def test_the_likelihood_term_is_over_the_chosen_tokens_of_the_step() -> None:
    """TRL's is a mean over the micro-batch, so that a cut weighs the tokens of short micro-batches more."""
    policy = Dense(tiny_model("qwen3"), SAMPLES)
    tokens = sum(s.scored[0] for s in SAMPLES)
    expected = -sum(s.weight * policy.logps[s.index][0] for s in SAMPLES) / tokens
    objective = DPO(config(loss_type="sft"), load_model(tiny_model("qwen3")), FixedReference())
    whole, cut = (run_step(objective, bins, device=torch.device("cpu"))[0]["loss"].item() for bins in ([SAMPLES], [[s] for s in SAMPLES]))
    assert whole == pytest.approx(expected, rel=2e-5)
    assert cut == pytest.approx(expected, rel=2e-5)
    mean_of_means = -sum(s.weight * policy.logps[s.index][0] / s.scored[0] for s in SAMPLES) / 4
    assert abs(mean_of_means - expected) > 0.01


def test_several_losses_add_up() -> None:
    one, two = run(SAMPLES, loss_type="sigmoid")["loss"], run(SAMPLES, loss_type="nca_pair")["loss"]
    anchor = run(SAMPLES, loss_type="sft")["loss"]
    both = run(SAMPLES, loss_type=["sigmoid", "nca_pair"], loss_weights=[0.7, 0.2], rpo_alpha=0.3)["loss"]
    assert both == pytest.approx(0.7 * one + 0.2 * two + 0.3 * anchor, rel=1e-5)


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
        ({"loss_type": []}, "loss_type must be one or more of"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "loss_weights must be 2 numbers, as loss_type"),
        ({"loss_type": "exo_pair"}, "label_smoothing must be more than 0 with exo_pair.*--label_smoothing 0.001"),
        ({"loss_type": ["nca_pair", "sft"], "f_divergence_type": "forward_kl"}, "f_divergence_type must be reverse_kl with nca_pair"),
        ({"f_divergence_type": "hellinger"}, "f_divergence_type must be one of reverse_kl, forward_kl"),
        ({"ld_alpha": 1.5}, r"ld_alpha must be in \[0, 1\], or null"),
        ({"rpo_alpha": -1.0}, "rpo_alpha must be 0 or more, or null"),
        ({"loss_type": "aot", "use_weighting": True}, "use_weighting must be false with aot"),
        ({"discopop_tau": 0.0}, "discopop_tau must be positive"),
        ({"sync_ref_model": True, "reference": "cache"}, "reference must be auto, copy or stream with sync_ref_model"),
        ({"sync_ref_model": True, "reference_free": True}, "sync_ref_model must be false with reference_free"),
        ({"sync_ref_model": True, "ref_model_sync_steps": 0}, "ref_model_sync_steps must be at least 1"),
        ({"sync_ref_model": True, "ref_model_mixup_alpha": 0.0}, r"ref_model_mixup_alpha must be in \(0, 1\]"),
        ({"f_alpha_divergence_coef": 0.7}, "f_alpha_divergence_coef must be left at 0.5, .* f_divergence_type=alpha_divergence"),
        ({"discopop_tau": 0.1}, "discopop_tau must be left at 0.05"),
        ({"ref_model_sync_steps": 7}, "ref_model_sync_steps must be left at 512"),
        ({"reference_free": True, "reference": "copy"}, "reference must be left at 'auto'"),
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
