"""Losses of the user's own: equal to ours where they are written alike, tried before a run, and run only where the user names them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from online_runs import write_place
from test_dpo import SAMPLES, FixedReference
from test_grpo import config_of, dense_logps, rolled
from tiny import preference_rows, save_tiny, tiny_model
from torch import Tensor

from fastalign import cli
from fastalign.errors import ConfigError, LossError
from fastalign.losses import PREFERENCE_LOSSES
from fastalign.models.config import ModelConfig
from fastalign.models.load import load_model
from fastalign.objectives.dpo import DPO, DPOConfig
from fastalign.train.config import RESUME_MAY_CHANGE
from fastalign.train.step import micro_batches, run_step

LOSSES = """
import torch
from torch.nn.functional import logsigmoid

from fastalign.losses import aot, own_loss
from fastalign.types import PreferenceLoss


def logistic(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, *, beta, label_smoothing=0.0):
    z = beta * ((chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps))
    return -(1 - label_smoothing) * logsigmoid(z) - label_smoothing * logsigmoid(-z)


def squared(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, *, chosen_lengths, rejected_lengths, target, beta=0.1):
    gap = (chosen_logps - ref_chosen_logps) / chosen_lengths - (rejected_logps - ref_rejected_logps) / rejected_lengths
    return PreferenceLoss((gap - target) ** 2, gap, gap)


@own_loss(couples="step")
def sorted_gaps(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, *, beta):
    gaps = (chosen_logps - rejected_logps).sort()
    ranks = gaps.indices.argsort()
    d = gaps.values - (ref_chosen_logps - ref_rejected_logps).sort().values
    return -logsigmoid(beta * d)[ranks]


def centred(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, *, beta):
    gap = chosen_logps - rejected_logps
    return -logsigmoid(beta * (gap - gap.mean()))


def three(chosen_logps, rejected_logps, ref_chosen_logps):
    return chosen_logps


def needs_more(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, *, tau):
    return tau * (rejected_logps - chosen_logps)


def one_length(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, *, chosen_lengths):
    return chosen_logps / chosen_lengths


def scalar(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps):
    return (rejected_logps - chosen_logps).mean()


def text(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps):
    return "loss"


def detached(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps):
    return (rejected_logps - chosen_logps).detach()


def infinite(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps):
    return chosen_logps / 0


def broken(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps):
    return chosen_logps @ torch.ones(99)


def fails_later(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps):
    if chosen_logps.dtype == torch.float32:
        raise ValueError("no float32")
    return rejected_logps - chosen_logps


@own_loss(level="sequence")
def levelled(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps):
    return rejected_logps - chosen_logps


def surrogate(logps, old_logps, advantages, *, log_ratio, clip_low=0.2, clip_high=0.2):
    ratio = log_ratio.exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)


@own_loss(aggregate="sequence_mean", level="sequence")
def of_answers(logps, old_logps, advantages, *, log_ratio, clip_low=0.2, clip_high=0.2):
    return surrogate(logps, old_logps, advantages, log_ratio=log_ratio, clip_low=clip_low, clip_high=clip_high)


@own_loss(aggregate="fixed_length")
def plain(logps, old_logps, advantages, *, scale=1.0):
    return -scale * advantages * logps


def whitened(logps, old_logps, advantages):
    return -(advantages - advantages.mean()) * logps


@own_loss(couples="step")
def coupled(logps, old_logps, advantages):
    return -advantages * logps


@own_loss(level="sequence")
def no_ratio(logps, old_logps, advantages):
    return -advantages * logps
"""
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_place(tmp_path_factory.mktemp("own"))
    (folder / "losses.py").write_text(LOSSES)
    return folder


def pairs(bins: list[list[Any]] | None = None, **options: Any) -> tuple[dict[str, float], list[Tensor]]:
    """Metrics and gradients of a step of DPO, its micro-batches being `bins`."""
    config = DPOConfig(**({"output": "run", "beta": 0.3, "model": ModelConfig(path="model")} | options))
    config.data.path = "pairs.jsonl"
    config.validate()
    objective = DPO(config, load_model(tiny_model("qwen3")), FixedReference())  # type: ignore[arg-type]
    sums, denominators = run_step(objective, bins or [SAMPLES], device=CPU)
    metrics = objective.metrics({name: value.item() for name, value in sums.items()}, denominators)
    return metrics, [w.grad.clone() for w in objective.model.parameters() if w.grad is not None]


def assert_same(found: tuple[dict[str, float], list[Tensor]], other: tuple[dict[str, float], list[Tensor]]) -> None:
    assert found[0] == pytest.approx(other[0], rel=1e-5, abs=1e-6)
    largest = max(float(gradient.abs().max()) for gradient in other[1])
    assert largest > 1e-3
    for ours, theirs in zip(found[1], other[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.parametrize(
    ("own", "ours"),
    [
        ({"loss_type": "logistic"}, {"loss_type": "sigmoid"}),
        ({"loss_type": "logistic", "label_smoothing": 0.2}, {"loss_type": "sigmoid", "label_smoothing": 0.2}),
        ({"loss_type": "squared", "loss_options": {"target": 1 / 0.6}}, {"loss_type": "ipo"}),
        ({"loss_type": "sorted_gaps"}, {"loss_type": "aot"}),
        ({"loss_type": ["logistic", "hinge"], "loss_weights": [0.5, 2.0]}, {"loss_type": ["sigmoid", "hinge"], "loss_weights": [0.5, 2.0]}),
        ({"loss_type": ["aot", "sorted_gaps"], "loss_weights": [0.5, 1.5]}, {"loss_type": "aot", "loss_weights": [2.0]}),
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)  # fmt: skip
def test_a_preference_loss_written_like_ours_is_ours_however_the_step_is_cut(place: Path, own: Any, ours: Any) -> None:
    names = own["loss_type"] if isinstance(own["loss_type"], list) else [own["loss_type"]]
    named = [name if name in PREFERENCE_LOSSES else f"{place}/losses.py:{name}" for name in names]
    expected = pairs(**ours)
    for bins in ([SAMPLES], [SAMPLES[:1], SAMPLES[1:3], SAMPLES[3:]], [[sample] for sample in SAMPLES]):
        assert_same(pairs(bins, **(own | {"loss_type": named})), expected)


@pytest.mark.parametrize(
    ("own", "ours"),
    [("surrogate", "dapo"), ("of_answers", "gspo")],
)
def test_a_policy_loss_written_like_ours_is_ours(place: Path, own: str, ours: str) -> None:
    found = {}
    for name in (f"{place}/losses.py:{own}", ours):
        for limit in (64, 1024):
            objective, prompts = rolled(place, loss_type=name, num_iterations=2, epsilon=0.1, epsilon_high=0.15)
            sums, denominators = run_step(objective, micro_batches(objective.samples(1, prompts), limit), device=CPU)
            metrics = objective.metrics({key: value.item() for key, value in sums.items()}, denominators)
            found[name, limit] = metrics, [w.grad.clone() for w in objective.model.parameters() if w.grad is not None]
    expected = found.pop((ours, 64))
    assert expected[0]["clip_ratio/region_mean"] > 0
    for step in found.values():
        assert_same(step, expected)


def test_options_of_its_own_and_the_longest_answer_reach_a_policy_loss(place: Path) -> None:
    losses = []
    for options in ({}, {"loss_options": {"scale": 2.5}}):
        objective, prompts = rolled(place, loss_type=f"{place}/losses.py:plain", num_iterations=2, **options)
        samples = list(objective.samples(1, prompts))
        sums, _ = run_step(objective, micro_batches(samples, 64), device=CPU)
        losses.append(float(sums["loss"]))
        logps = [float(dense_logps(objective.model, sample, 1.0).sum().detach()) for sample in samples]
        advantages = objective.rollouts.advantages[objective.answers]
    by_the_book = -sum(float(a) * total for a, total in zip(advantages, logps)) / (len(samples) * 10)
    assert losses == pytest.approx([by_the_book, 2.5 * by_the_book], rel=1e-4) and abs(by_the_book) > 1e-3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss_type": "none.py:f"}, "loss_type: none.py cannot be loaded"),
        ({"loss_type": "no_such_module:f"}, "loss_type: no_such_module cannot be loaded: No module named"),
        ({"loss_type": "absent"}, r"losses.py has no function 'absent' \(functions: .*logistic"),
        ({"loss_type": "three"}, r"it is called as three\(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, \*\*opt"),
        ({"loss_type": "needs_more"}, r"'tau' of its signature .* is none of them: give it a default, or set --loss_options '\{tau"),
        ({"loss_type": "one_length"}, "chosen_lengths and rejected_lengths go together, its signature has chosen_lengths alone"),
        ({"loss_type": "scalar"}, r"must return a loss for each pair, a tensor \(P,\) = \(5,\), got a tensor \(\)"),
        ({"loss_type": "text"}, r"must return a loss for each pair, a tensor \(P,\) = \(5,\), got str"),
        ({"loss_type": "detached"}, "its loss has no gradient; do not detach the log-probs"),
        ({"loss_type": "infinite"}, "its loss is not finite for log-probs between -3 and 0"),
        ({"loss_type": "broken"}, "losses.py:broken raised RuntimeError"),
        ({"loss_type": "centred"}, r"the loss of a pair depends on other pairs \(alone .*\); declare it with @fastalign.losses.own_loss"),
        ({"loss_type": "levelled"}, r"own_loss\(level=...\) is of policy losses"),
        ({"loss_type": "logistic", "loss_options": {"gamma": 1.0}}, "loss_options: .*losses.py:logistic takes no 'gamma'; it takes beta"),
        ({"loss_type": "logistic", "loss_options": {"beta": 1.0}}, "loss_options: 'beta' is given to .* by the run itself"),
        ({"loss_type": "sigmoid", "loss_options": {"gamma": 1.0}}, "loss_options must be left out"),
        ({"loss_type": "centred_not:", "beta": 0.1}, "loss_type must be MODULE:FUNCTION or FILE.py:FUNCTION"),
        ({"loss_type": "squared", "loss_options": {"target": 1.0}, "label_smoothing": 0.1}, "label_smoothing must be 0 with loss_type"),
        ({"loss_type": "logistic", "f_divergence_type": "forward_kl"}, "f_divergence_type must be reverse_kl with"),
        ({"loss_type": "sorted_gaps", "use_weighting": True}, "use_weighting must be false with .*sorted_gaps, which compares a pair"),
    ],
    ids=lambda value: str(value.get("loss_type")) if isinstance(value, dict) else "",
)  # fmt: skip
def test_a_preference_loss_that_cannot_be_used_is_refused_before_the_run(place: Path, options: Any, words: str) -> None:
    name = options["loss_type"]
    if ":" not in name and name != "sigmoid":
        options = options | {"loss_type": f"{place}/losses.py:{name}"}
    with pytest.raises((ConfigError, LossError), match=words):
        pairs(**options)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("whitened", {}, r"the loss of a token depends on other tokens .* own_loss\(level='sequence'\) gives it its sequence's ratio"),
        ("coupled", {}, r"own_loss\(couples=...\) is of preference losses"),
        ("no_ratio", {}, r"own_loss\(level='sequence'\) says whose ratio log_ratio is, which its signature lacks"),
        ("plain", {"epsilon": 0.1}, "epsilon must be left at 0.2, which counts only with a loss type that clips ratios"),
        ("plain", {"importance_sampling_level": "sequence"}, "which counts only with a loss that takes log_ratio"),
        ("plain", {"loss_options": {"gamma": 1.0}}, "takes no 'gamma'; it takes scale"),
    ],
)
def test_a_policy_loss_that_cannot_be_used_is_refused_before_the_run(place: Path, name: str, options: Any, words: str) -> None:
    config = config_of(place, loss_type=f"{place}/losses.py:{name}", **options)
    with pytest.raises((ConfigError, LossError), match=words):
        config.validate()


def test_a_loss_that_fails_in_the_run_is_named(place: Path) -> None:
    with pytest.raises(LossError, match=r"loss_type .*losses.py:fails_later raised ValueError: no float32"):
        pairs(loss_type=f"{place}/losses.py:fails_later")


def test_a_misspelt_loss_is_not_taken_for_code(place: Path) -> None:
    with pytest.raises(ConfigError, match=r"loss_type must be one or more of sigmoid, .* or FILE.py:FUNCTION, got 'sigmod'"):
        pairs(loss_type="sigmod")
    with pytest.raises(ConfigError, match=r"loss_type must be one of grpo, bnpo, .*, got 'dapi'"):
        config_of(place, loss_type="dapi").validate()


def test_a_run_resumes_only_with_the_loss_named_again_and_unchanged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny(tmp_path / "model")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in preference_rows(8)))
    file, ran = tmp_path / "mine.py", tmp_path / "ran"
    source = LOSSES + f"\nwith open({str(ran)!r}, 'a') as log:\n    log.write('x')\n"
    file.write_text(source)
    name = f"{file}:logistic"
    base = ["dpo", "--model.path", str(tmp_path / "model"), "--data.path", str(tmp_path / "pairs.jsonl"), "--batch_size", "4"]
    base += ["--loss_type", name, "--metrics", "basic", "--save_every", "1"]
    assert cli.main([*base, "--max_steps", "2", "--output", str(tmp_path / "run")]) == 0
    assert ran.read_text() == "x"  # run once, however often it is asked for
    metrics = (tmp_path / "run/metrics.jsonl").read_text()
    assert "mine.py:logistic" in (tmp_path / "run/final/README.md").read_text()
    assert str(tmp_path) not in (tmp_path / "run/final/README.md").read_text().split("```")[0]
    capsys.readouterr()

    file.write_text(source + "\n# another file: whether it ran shows\n")
    assert cli.main(["dpo", "--resume", "--output", str(tmp_path / "run")]) == 2
    assert f"loss_type names code of yours ({name}), which runs only where you name it yourself" in capsys.readouterr().err
    assert ran.read_text() == "x"

    assert cli.main(["dpo", "--resume", "--output", str(tmp_path / "run"), "--loss_type", name]) == 2
    error = capsys.readouterr().err
    assert f"of a run with other options (source of loss_type {name} was '{name} " in error
    assert ran.read_text() == "xx"

    file.write_text(source)
    assert cli.main(["dpo", "--resume", "--output", str(tmp_path / "run"), "--loss_type", name]) == 0
    assert (tmp_path / "run/metrics.jsonl").read_text() == metrics
    assert "loss_type" not in RESUME_MAY_CHANGE
