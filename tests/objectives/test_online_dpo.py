"""Online DPO: which answers become pairs, its loss against the formula on the model's own logits, and runs that stop and go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from online_runs import assert_learned, assert_resumes, metrics_of, online_config
from tiny import tiny_model, tiny_tokenizer
from torch.nn.functional import logsigmoid

from fastalign import train
from fastalign.errors import ConfigError, JudgeError, RewardError
from fastalign.models.config import LoraConfig
from fastalign.models.load import load_model
from fastalign.models.trunk import stock_attention
from fastalign.objectives.online_dpo import OnlineDPO, OnlineDPOConfig
from fastalign.rollout.judges import Verdict
from fastalign.rollout.judging import JudgeConfig, JudgeReward
from fastalign.train.step import micro_batches, run_step

NAN = float("nan")


def config_of(place: Path, **options: Any) -> OnlineDPOConfig:
    sizes = {"batch_size": 4, "num_generations": 3, "max_completion_length": 10, "max_tokens": 96, "seed": 10}
    return online_config(place, OnlineDPOConfig, **sizes | options)


def begun(place: Path, **options: Any) -> OnlineDPO:
    """An objective whose policy has moved since it answered, so that it differs from its reference."""
    config = config_of(place, **options)
    config.validate()
    data = config.load_data(tiny_tokenizer(), None)
    model = load_model(config.model, lora=config.lora)
    objective = config.objective(model, data, place)
    with torch.no_grad():
        objective.samples(0, data.samples[: config.draw_size])
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel())))
    return objective


def again(objective: OnlineDPO, rewards: list[list[float]] | None = None, step: int = 0) -> list[Any]:
    """The step's samples, with these rewards in place of those given."""
    if rewards is not None:
        objective.rollouts.rewards = torch.tensor(rewards)
        objective.rollouts.advantages = objective._choose(objective.rollouts)
    return list(objective.samples(step, objective.rollout.data.samples))


def rows_of(objective: OnlineDPO) -> list[tuple[int, ...]]:
    return [tuple(part.tolist()) for part in objective.rollouts.tokens.split(objective.rollouts.lengths.tolist())]


def test_best_against_worst_and_what_is_in_no_pair(place):
    objective = begun(place)
    answers, asked = rows_of(objective), objective.rollouts.prompts.tolist()
    rewards = [[0.5], [2.0], [-1.0]] + [[1.0]] * 3 + [[NAN], [NAN], [3.0]] + [[0.0], [NAN], [0.25]]
    samples = again(objective, rewards)
    assert [sample.completions for sample in samples] == [(answers[1], answers[2]), (answers[11], answers[9])]
    assert [sample.index for sample in samples] == [asked[0], asked[9]]
    assert [sample.weight for sample in samples] == [1.0 + asked[0] % 2, 1.0 + asked[9] % 2]
    sums, counts = run_step(objective, micro_batches(samples, 96), device=torch.device("cpu"))
    metrics = objective.metrics({name: float(value) for name, value in sums.items()}, counts)
    assert counts["samples"] == 2
    assert metrics["frac_ties"] == metrics["frac_unranked"] == 0.25
    assert metrics["objective/scores_margin"] == pytest.approx((3.0 + 0.25) / 2)
    assert metrics["objective/scores"] == pytest.approx((2.0 - 1.0 + 0.25) / 4)


def test_answers_without_an_end(place):
    """They may be worth less, or nothing; an opinion of nobody is not made up by the penalty."""
    objective = begun(place, missing_eos_penalty=0.75, reward="nothing")
    finished = objective.rollouts.finished
    assert torch.equal(objective.rollouts.rewards[:, 1], torch.where(finished, 0.0, -0.75))
    assert not finished.all(), "nothing would be proven"
    assert torch.isnan(objective.rollout.total(objective.rollouts.rewards)).all() and objective._pairs(objective.rollouts, range(4)) == []
    scored = torch.tensor([[1.0, 0.0], [1.0, -0.75]])
    assert objective.rollout.total(scored).tolist() == [1.0, 0.25]
    masked = begun(place, mask_truncated_completions=True)
    masked.rollouts.finished = torch.tensor([True, True, False] * 4)
    samples = again(masked, [[1.0], [2.0], [3.0]] * 4)
    answers = rows_of(masked)
    assert [sample.completions for sample in samples] == [(answers[3 * g + 1], answers[3 * g]) for g in range(4)]


def test_a_step_without_a_pair_has_no_gradient(place):
    objective = begun(place)
    sums, counts = run_step(objective, micro_batches(again(objective, [[1.0]] * 12), 96), device=torch.device("cpu"))
    metrics = objective.metrics({name: float(value) for name, value in sums.items()}, counts)
    assert metrics["loss"] == 0 and metrics["frac_ties"] == 1 and "rewards/margins" not in metrics
    assert all(float(w.grad.abs().max()) == 0 for w in objective.dpo.model.parameters())


def dense_logps(model: Any, prompt: tuple[int, ...], answer: tuple[int, ...]) -> torch.Tensor:
    ids = torch.tensor([(*prompt, *answer)])
    with stock_attention(model):
        scores = model(ids).logits[0, :-1].log_softmax(-1)
    return scores.gather(1, ids[0, 1:, None])[len(prompt) - 1 :, 0].sum()


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
@pytest.mark.parametrize("lora", [0, 4])
def test_loss_and_gradient_by_the_book(place, loss_type, lora):
    """The formulas of TRL's OnlineDPOTrainer, with its sums of log-probs at temperature 1 whatever that of sampling."""
    objective = begun(place, loss_type=loss_type, beta=0.3, temperature=0.7, lora=LoraConfig(r=lora))
    samples, model = again(objective, [[1.0], [3.0], [2.0]] * 4), objective.dpo.model
    assert len(samples) == 4
    reference = tiny_model("qwen3")  # the weights that the run began with
    sums, counts = run_step(objective, micro_batches(samples, 96), device=torch.device("cpu"))
    trained = [w for w in model.parameters() if w.requires_grad]
    grads = [w.grad.clone() for w in trained]
    model.zero_grad()
    total, kl = torch.zeros(()), []
    for sample in samples:
        chosen, rejected = (dense_logps(model, sample.prompt, a) for a in sample.completions)
        with torch.no_grad():
            ref = [dense_logps(reference, sample.prompt, a) for a in sample.completions]
        gap = (chosen - ref[0]) - (rejected - ref[1])
        kl += [chosen - ref[0], rejected - ref[1]]
        loss = -logsigmoid(0.3 * gap) if loss_type == "sigmoid" else (gap - 1 / 0.6) ** 2
        total = total + sample.weight * loss / len(samples)
    total.backward()
    metrics = objective.metrics({name: float(value) for name, value in sums.items()}, counts)
    assert metrics["loss"] == pytest.approx(total.item(), rel=1e-4)
    assert metrics["objective/kl"] == pytest.approx(torch.stack(kl).mean().item(), rel=1e-3)
    for got, weight in zip(grads, trained):
        assert float((got - weight.grad).abs().max()) <= 1e-4 * float(weight.grad.abs().max())
    assert any(float(grad.abs().max()) > 0 for grad in grads)


@pytest.mark.parametrize("loss_type", ["sigmoid", "sigmoid_norm", "robust"])
def test_the_cut_into_micro_batches_does_not_matter(place, loss_type):
    options = {"loss_type": loss_type, "label_smoothing": 0.1 if loss_type == "robust" else 0.0}
    objective = begun(place, **options)
    samples, results = again(objective), []
    for max_tokens in (64, 96, 500):
        objective.dpo.model.zero_grad()
        sums, _ = run_step(objective, micro_batches(samples, max_tokens), device=torch.device("cpu"))
        results.append((float(sums["loss"]), [w.grad.clone() for w in objective.dpo.model.parameters()]))
    assert len(micro_batches(samples, 64)) > len(micro_batches(samples, 500)) == 1
    for loss, grads in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-6)
        for got, want in zip(grads, results[0][1]):
            assert float((got - want).abs().max()) <= 1e-5 * float(want.abs().max())


class Judge:
    """Scores by place; has no verdict on prompts that end in "?"."""

    fingerprint = "by place"

    def __call__(self, prompt, completions, columns):
        if prompt.endswith("?"):
            raise JudgeError("silence")
        assert columns == {"answer": prompt.upper()}
        return Verdict(tuple(float(i) for i in range(len(completions))))


def test_a_judge_ranks_the_answers_to_a_prompt_and_makes_nothing_up():
    reward = JudgeReward(Judge(), 2, workers=3)
    prompts = ["one", "one", "two?", "two?", "three", "three"]
    columns = {"answer": [prompt.upper() for prompt in prompts], "completion_ids": [[1]] * 6}
    assert reward(prompts=prompts, completions=["x"] * 6, **columns) == [0.0, 1.0, None, None, 0.0, 1.0]
    with pytest.raises(JudgeError, match="silence"):
        reward(prompts=["a?"] * 2, completions=["x"] * 2)


def test_a_run_with_a_judge(place, tmp_path):
    judge = JudgeConfig(function=f"{place}/rewards.py:longer")
    options = {"rewards": [], "judge": judge, "max_steps": 1, "completions_every": 1}
    result = train(config_of(place, output=str(tmp_path / "run"), **options))
    shown = [json.loads(line) for line in (result.output / "completions.jsonl").read_text().splitlines()]
    assert len(shown) == 4
    for chosen, rejected in zip(shown[::2], shown[1::2]):
        assert (chosen["advantage"], rejected["advantage"]) == (1.0, -1.0)
        assert chosen["rewards"]["judge"] == len(chosen["completion"]) > len(rejected["completion"])
    assert "a judge, `rewards.py:longer`" in (result.output / "final" / "README.md").read_text()


def test_a_judge_that_fails_on_everything_stops_the_run(place, tmp_path):
    (tmp_path / "bad.py").write_text("def judge(prompts, completions, **columns):\n    return [None]\n")
    judge = JudgeConfig(function=f"{tmp_path}/bad.py:judge")
    with pytest.raises(RewardError, match=r"reward judge raised JudgeError: the judge .*bad.py:judge must return 3 finite numbers"):
        train(config_of(place, rewards=[], judge=judge, output=str(tmp_path / "run"), max_steps=1))


@pytest.mark.parametrize("lora", [0, 4])
def test_a_run_learns_and_a_resumed_run_is_the_same_run(place, tmp_path, lora):
    options = {"lora": LoraConfig(r=lora), "steps_per_generation": 2, "num_iterations": 2, "batch_size": 2, "num_generations": 4}
    options |= {"max_steps": 16, "save_every": 1, "keep_checkpoints": 99, "learning_rate": 1e-2, "completions_every": 3, "refill": 1}
    whole = train(config_of(place, output=str(tmp_path / "whole"), **options)).output
    rows = metrics_of(whole)
    assert_learned(rows, 1.5)
    assert {"rewards/accuracies", "objective/kl", "objective/rlhf_reward", "val/contain_eos_token", "frac_ties"} <= set(rows[0])
    # inside a generation, at its end, in its second pass
    assert_resumes(whole, (2, 4, 7), lambda run: train(config_of(place, output=str(run), resume=True, **options)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rewards": []}, "rewards must be at least one reward function"),
        ({"judge": JudgeConfig(function="json:dumps")}, "rewards must be left out, or contain judge"),
        ({"judge": JudgeConfig(workers=2)}, "options of a judge, but none is named"),
        ({"judge": JudgeConfig(function="json:nowhere"), "rewards": []}, "json has no function 'nowhere'"),
        ({"judge": JudgeConfig(function="json:dumps"), "rewards": [], "reward_weights": [2.0, 1.0]}, "2 weights for 1 reward functions"),
        ({"rewards": ["judge"]}, "judge: name one judge"),
        ({"num_generations": 1}, "num_generations must be at least 2"),
        ({"beta": 0.0}, "beta must be positive"),
        ({"loss_type": "aot"}, "loss_type must be one of sigmoid, ipo"),
        ({"loss_type": "exo_pair"}, "label_smoothing must be more than 0 with exo_pair"),
        ({"label_smoothing": 0.1, "loss_type": "hinge"}, "label_smoothing must be 0 with loss_type=hinge"),
        ({"missing_eos_penalty": -1.0}, "missing_eos_penalty must be positive"),
        ({"max_tokens": 32}, "max_tokens 32 is less than a pair of the longest answers"),
        ({"reference": "adapter"}, "reference must be copy or auto"),
    ],
)
def test_bad_options_are_named(place, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        train(config_of(place, output=str(tmp_path / "run"), **options))
    assert not (tmp_path / "run").exists(), "nothing was written"
