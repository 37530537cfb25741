"""The reward objective against definitions from Transformers' own classifier in float64, and however a step is cut."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import preference_rows, save_tiny
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification

from fastalign.data.tokenizer import load_tokenizer
from fastalign.errors import ConfigError
from fastalign.models.config import LoraConfig
from fastalign.models.save import save_final
from fastalign.models.value_head import load_reward_model
from fastalign.objectives.reward import Reward, RewardConfig
from fastalign.train.step import micro_batches, run_step
from fastalign.types import Sample

PAD = 1


def samples(listwise: bool, n: int = 8) -> list[Sample]:
    rng = random.Random(0)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        return tuple(rng.randrange(2, 300) for _ in range(rng.randint(low, high)))

    found = []
    for i in range(n):
        count = rng.randint(2, 5) if listwise else 2
        labels = tuple(float(k) for k in reversed(range(count)))
        completions = tuple(tokens(1, 14) for _ in labels)
        found.append(Sample(i, tokens(1, 9), completions, weight=rng.choice((0.5, 1.0, 2.0)), labels=labels, margin=rng.random()))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward")
    save_tiny(folder / "causal", "qwen3")
    torch.manual_seed(0)
    save_final(load_reward_model(folder / "causal", pad_token_id=PAD), None, folder / "model")
    return folder


OPTIONS: dict[str, dict[str, Any]] = {
    "bradley_terry": {},
    "centred": {"center_coef": 0.2},
    "plackett_luce": {"loss_type": "plackett_luce"},
}


def dense(model: Any, step: list[Sample], *, loss_type: str = "bradley_terry", center_coef: float = 0.0) -> dict[str, Tensor]:
    loss, rewards, margins = torch.zeros((), dtype=torch.float64), [], []
    for sample in step:
        scores = [model(input_ids=torch.tensor([[*sample.prompt, *ids]])).logits[0, 0] for ids in sample.completions]
        if loss_type == "plackett_luce":  # the best of all, the best of the rest, ...
            value = -sum(torch.stack(scores[k:]).log_softmax(0)[0] for k in range(len(scores)))
        else:
            value = -logsigmoid(scores[0] - scores[1] - sample.margin) + center_coef * (scores[0] + scores[1]) ** 2
        loss = loss + sample.weight * value / len(step)
        rewards += scores
        margins += [a - b for k, a in enumerate(scores) for b in scores[k + 1 :]]
    every, margin = torch.stack(rewards), torch.stack(margins)
    return {
        "loss": loss,
        "min_reward": every.min(),
        "mean_reward": every.mean(),
        "max_reward": every.max(),
        "accuracy": (margin > 0).double().mean(),
        "margin": margin.mean(),
    }


def ours(folder: Path, bins: list[list[Sample]], case: str, **load: Any) -> tuple[dict[str, float], dict[str, Tensor]]:
    torch.manual_seed(0)
    model = load_reward_model(folder / "model", pad_token_id=PAD, **load)
    objective = Reward(RewardConfig(output="run", **OPTIONS[case]), model)
    sums, denominators = run_step(objective, bins, device=torch.device("cpu"))
    found = objective.metrics({name: value.item() for name, value in sums.items()}, denominators)
    return found, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("case", OPTIONS)
def test_loss_metrics_and_gradient_equal_their_definitions(folder: Path, case: str) -> None:
    step = samples(case == "plackett_luce")
    found, gradient = ours(folder, [step], case)
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model", dtype=torch.float64)
    expected = dense(model, step, **OPTIONS[case])
    assert found == pytest.approx({name: value.item() for name, value in expected.items()}, rel=2e-5, abs=1e-6)
    assert 0 < found["accuracy"] < 1  # both outcomes occur
    expected["loss"].backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(gradient[name].double(), p.grad, rtol=1e-4, atol=1e-5 * p.grad.abs().max().item(), msg=name)


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("lora", [False, True])
def test_the_cut_of_a_step_does_not_matter(folder: Path, case: str, lora: bool) -> None:
    step = samples(case == "plackett_luce")
    load: dict[str, Any] = {"lora": LoraConfig(r=4)} if lora else {}
    whole, gradient = ours(folder, [step], case, **load)
    plans = {
        "8x1": [[sample] for sample in step],
        "4x2": [step[i : i + 2] for i in range(0, 8, 2)],
        "2x4": [step[:4], step[4:]],
        "reversed": [step[::-1]],
        "by 120 tokens": micro_batches(step, 120),
    }
    for name, plan in plans.items():
        found, other = ours(folder, plan, case, **load)
        assert found == pytest.approx(whole, rel=1e-4, abs=1e-6), name
        assert gradient.keys() == other.keys()
        for weight, grad in gradient.items():
            torch.testing.assert_close(other[weight], grad, rtol=1e-4, atol=2e-5 * grad.abs().max().item(), msg=f"{name}: {weight}")
    again, same = ours(folder, [step], case, **load)
    assert again == whole
    assert all(torch.equal(same[weight], grad) for weight, grad in gradient.items())


def test_equal_completions_and_huge_scores_have_finite_gradients(folder: Path) -> None:
    twins = Sample(0, (5,), ((6, 7), (6, 7)), labels=(1.0, 0.0))
    found, gradient = ours(folder, [[twins]], "bradley_terry")
    assert found["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert all(grad.isfinite().all() for grad in gradient.values())
    rewards = torch.tensor([-1e4, 1e4], requires_grad=True)
    from fastalign.losses.reward import bradley_terry, plackett_luce

    for loss in (bradley_terry(rewards[:1], rewards[1:]), plackett_luce(rewards, torch.tensor([1.0, 0.0]), torch.tensor([0, 2]))):
        assert loss.item() == pytest.approx(2e4)
        (grad,) = torch.autograd.grad(loss.sum(), rewards)
        torch.testing.assert_close(grad, torch.tensor([-1.0, 1.0]))


def test_a_pair_is_the_ranking_of_two(folder: Path) -> None:
    step = [Sample(s.index, s.prompt, s.completions, labels=s.labels) for s in samples(False)]
    pairs, rankings = (ours(folder, [step], case) for case in ("bradley_terry", "plackett_luce"))
    assert rankings[0] == pytest.approx(pairs[0], rel=1e-5)


def test_rankings_need_their_loss(folder: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = preference_rows(3)
    rows.append({"prompt": "old lamp", "completions": [" keeps", " opens", " follows"], "ranks": [2, 1, 3]})
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = RewardConfig(output="run")
    config.data.path = str(tmp_path / "data.jsonl")
    tokenizer = load_tokenizer(folder / "causal")
    with pytest.raises(ConfigError, match=r"row 3 ranks 3 completions; set --loss_type plackett_luce"):
        config.load_data(tokenizer, None)
    config.loss_type = "plackett_luce"
    data = config.load_data(tokenizer, None)
    assert [len(sample.completions) for sample in data.samples] == [2, 2, 2, 3]
    assert tokenizer.decode(data.samples[3].completions[0]).startswith(" opens")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "btl"}, "loss_type must be one of bradley_terry, plackett_luce, got 'btl'"),
        ({"center_coef": -0.1}, "center_coef must be 0 or more and finite"),
        ({"center_coef": 0.1, "loss_type": "plackett_luce"}, "center_coef must be 0 with loss_type=plackett_luce"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    config = RewardConfig(output="run", **options)
    config.model.path, config.data.path = "model", "pairs.jsonl"
    with pytest.raises(ConfigError, match=message):
        config.validate()
