"""The PPO objective: its critics, runs that learn, stop and go on, refusals. Its formulas: tests/parity/test_ppo_reference.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from online_runs import PROMPTS, assert_learned, assert_resumes, metrics_of, move, online_config, same
from safetensors.torch import load_file
from tiny import tiny_tokenizer
from transformers import AutoModelForCausalLM

from fastalign import train
from fastalign.data.prompts import load_prompts
from fastalign.errors import ConfigError
from fastalign.models.adapters import critic_adapter
from fastalign.models.config import LoraConfig, ModelConfig
from fastalign.models.critic import critic_weights
from fastalign.models.trunk import causal_lm, stock_attention
from fastalign.models.value_head import load_reward_model
from fastalign.objectives.ppo import PPO, PPOConfig
from fastalign.objectives.rollouts import Rollout
from fastalign.rollout.generate import Completion
from fastalign.train.optim import Optimizer
from fastalign.train.step import micro_batches, run_step

OF_THE_FIRST = """
def of_the_first(prompts, completions, **columns):
    return [len(c) if p == "old river" else None for p, c in zip(prompts, completions)]
"""
CRITICS = {"shared": {}, "shared_lora": {"lora": LoraConfig(r=4)}, "adapter": {"lora": LoraConfig(r=4), "critic": "adapter"}}


def config_of(place: Path, **options) -> PPOConfig:
    sizes = {"batch_size": 2, "num_generations": 2, "max_completion_length": 10, "max_tokens": 64}
    return online_config(place, PPOConfig, **sizes | options)


def end_early(rollout, asked, seed, answers=Rollout._answers):
    """The model's own answers, but two of three end, after few tokens; left to itself a random model hardly ever ends."""
    done, end = answers(rollout, asked, seed), rollout.data.tokenizer.eos_token_id
    return [c if i % 3 == 0 else Completion((*c.tokens[: 2 + i % 4], end), (0.0,) * (3 + i % 4), True) for i, c in enumerate(done)]


def rolled(place, *, ends=True, **options):
    """An objective in the middle of a generation: the policy and the critic have moved since."""
    config = config_of(place, **options)
    config.validate()
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    model = config.load_model(tokenizer)
    move(model, 1)
    objective = PPO(config, model, load_prompts(config.data, tokenizer))
    prompts = objective.rollout.data.samples[: config.draw_size]
    with torch.no_grad(), pytest.MonkeyPatch.context() as patched:
        if ends:
            patched.setattr(Rollout, "_answers", end_early)
        objective.samples(0, prompts)
    move(model, 2)
    return objective, prompts


def step(objective, samples, max_tokens=64):
    """(metrics, gradients by name)"""
    objective.model.zero_grad()
    sums, counts = run_step(objective, micro_batches(list(samples), max_tokens), device=torch.device("cpu"))
    metrics = objective.metrics({name: float(value) for name, value in sums.items()}, counts)
    return metrics, {n: w.grad.clone() for n, w in objective.model.named_parameters() if w.grad is not None}


@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize("options", [{}, {"mask_truncated_completions": True, "whiten_rewards": True}])
def test_the_cut_into_micro_batches_does_not_matter(place, critic, options):
    results = []
    for max_tokens in (40, 64, 500):
        objective, prompts = rolled(place, batch_size=4, **options, **CRITICS[critic])
        results.append(step(objective, objective.samples(1, prompts), max_tokens))
    trained = {name for name, weight in objective.model.named_parameters() if weight.requires_grad}
    for metrics, grads in results:
        assert metrics == pytest.approx(results[0][0], rel=1e-4, abs=1e-7)
        assert grads.keys() == trained
        assert all(float(grads[name].abs().max()) > 0 and same(grads[name], results[0][1][name]) for name in grads)


@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_critics_gradient_is_that_of_its_own_trunk(place, critic, checkpointing):
    """Values, loss and gradient by way of Transformers' attention, one answer at a time."""
    model = ModelConfig(path=str(place / "model"), dtype="float32", gradient_checkpointing=checkpointing)
    objective, prompts = rolled(place, model=model, vf_coef=0.7, cliprange_value=0.4, **CRITICS[critic])
    rollouts, policy = objective.rollouts, objective.model
    objective.model.train()
    samples = list(objective.samples(1, prompts))
    assert len(samples) == 4
    rollouts.advantages.zero_()  # no gradient comes from the policy's loss
    metrics, grads = step(objective, samples)
    policy.zero_grad()
    losses = []
    with stock_attention(policy):
        for i, sample in enumerate(samples):
            ids, at = torch.tensor([(*sample.prompt, *sample.completions[0])]), slice(*rollouts.bounds[i : i + 2])
            if critic == "adapter":
                with critic_adapter(policy):
                    hidden = causal_lm(policy).model(ids).last_hidden_state[0, len(sample.prompt) - 1 : -1]
            else:
                hidden = causal_lm(policy).model(ids).last_hidden_state[0, len(sample.prompt) - 1 : -1]
            head = objective.value
            values, old, returns = (hidden @ head.weight.T)[:, 0] + head.bias, rollouts.values[at], rollouts.returns[at]
            kept = values.clamp(old - 0.4, old + 0.4)
            losses.append(0.5 * sample.weight * torch.maximum((values - returns) ** 2, (kept - returns) ** 2))
        loss = torch.cat(losses).sum() / len(rollouts.tokens)
        if not (checkpointing and critic == "adapter"):
            (0.7 * loss).backward()
    assert metrics["loss/value_avg"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["loss"] == pytest.approx(0.7 * loss.item(), rel=1e-5)
    assert 0 < metrics["val/clipfrac_avg"] < 1
    own = critic_weights(policy)
    assert sum("lora" in name for name in own) == (28 if critic == "adapter" else 0)
    if checkpointing and critic == "adapter":  # compared with that of a run that keeps its activations
        plain, prompts = rolled(place, vf_coef=0.7, cliprange_value=0.4, **CRITICS[critic])
        plain.rollouts.advantages.zero_()
        want = {name: gradient for name, gradient in step(plain, plain.samples(1, prompts))[1].items() if ".default." not in name}
    else:
        want = {name: weight.grad for name, weight in policy.named_parameters() if weight.grad is not None}
    assert want.keys() >= own.keys()
    for name, gradient in want.items():
        assert float(gradient.abs().max()) > 0 and same(grads[name], gradient), name
    if critic == "adapter":
        policys = [gradient for name, gradient in grads.items() if ".default." in name]
        assert policys and all(not gradient.any() for gradient in policys), "the critic's loss is none of the policy's business"


@pytest.mark.parametrize("lora", [{"targets": ["all-linear", "lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_the_critics_adapter_leaves_the_head_to_the_policy(place, lora):
    """lm_head adapted, or trained in full: the critic has no use for either, and every weight has a gradient."""
    objective, prompts = rolled(place, lora=LoraConfig(r=4, **lora), critic="adapter")
    heads = [name for name, weight in objective.model.named_parameters() if "lm_head" in name and weight.requires_grad]
    assert heads and not any(".critic." in name for name in heads)
    _, grads = step(objective, objective.samples(1, prompts))
    trained = {name for name, weight in objective.model.named_parameters() if weight.requires_grad}
    assert grads.keys() == trained and all(float(gradient.abs().max()) > 0 for gradient in grads.values())


def test_the_critics_rate_is_its_own(place):
    config = config_of(place, value_learning_rate=5e-2)
    model = config.load_model(tiny_tokenizer())
    optimizer = Optimizer(model, config)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    optimizer.step(1e-3, optimizer.grad_norm())
    for name, weight in model.named_parameters():  # Adam's first step is the rate itself
        rate = 5e-3 if "value_head" in name else 1e-3
        assert torch.allclose(before[name] - weight, torch.tensor(rate), rtol=1e-2), name


def test_an_answer_that_no_function_judged_or_that_was_cut_off_does_not_count(place, tmp_path):
    (tmp_path / "mine.py").write_text(OF_THE_FIRST)
    options = {"rewards": [f"{tmp_path}/mine.py:of_the_first"], "batch_size": 4, "whiten_rewards": True, "num_generations": 4}
    objective, prompts = rolled(place, **options)
    first = [prompt.index for prompt in prompts if PROMPTS[prompt.index] == "old river"]
    judged = torch.isin(objective.rollouts.prompts, torch.tensor(first))
    assert int(judged.sum()) == 4 and torch.equal(objective.earned.counts, judged)
    samples = list(objective.samples(1, prompts))
    assert [sample.index for sample in samples] == judged.nonzero()[:, 0].tolist()
    counted = objective.rollouts.token_mask(objective.earned.counts)
    assert float(objective.rollouts.advantages[counted].mean()) == pytest.approx(0, abs=1e-5)
    assert float(objective.rollouts.advantages[counted].std()) == pytest.approx(1, rel=1e-3)
    assert not objective.rollouts.advantages[~counted].any()
    assert objective.denominators(samples)["tokens"] == float(counted.sum())
    metrics, grads = step(objective, samples)
    everything = objective.rollout.samples(objective.rollouts)
    others, theirs = step(objective, everything, 500)
    assert metrics == pytest.approx(others, rel=1e-4, abs=1e-7) and all(same(grads[name], theirs[name]) for name in theirs)

    objective, prompts = rolled(place, ends=False, mask_truncated_completions=True, max_completion_length=2, temperature=1e-3)
    assert not objective.rollouts.finished.any()
    samples = list(objective.samples(1, prompts))
    metrics, grads = step(objective, samples)
    assert len(samples) == 1 and metrics["loss"] == 0 and not any(gradient.any() for gradient in grads.values())


def test_the_penalty_for_a_missing_end_is_taken_from_the_score(place):
    with_penalty, without = (rolled(place, batch_size=4, **options)[0] for options in ({"missing_eos_penalty": 2.0}, {}))
    cut_off = ~with_penalty.rollouts.finished
    assert cut_off.any() and not cut_off.all()
    assert torch.allclose(without.earned.scores - with_penalty.earned.scores, 2.0 * cut_off)
    last = with_penalty.rollouts.lengths.cumsum(0) - 1
    difference = without.earned.rewards - with_penalty.earned.rewards
    assert torch.allclose(difference[last], 2.0 * cut_off) and float(difference.sum()) == pytest.approx(2.0 * int(cut_off.sum()))


def test_the_weight_of_a_prompt_multiplies_both_losses(place):
    objective, prompts = rolled(place)
    first, *others = objective.samples(1, prompts)
    lighter, heavier, alone = (
        step(objective, some)[0]
        for some in ([replace(first, weight=1.0), *others], [replace(first, weight=2.5), *others], [replace(first, weight=1.0)])
    )
    for name in ("loss/policy_avg", "loss/value_avg"):
        assert alone[name] != 0 and heavier[name] - lighter[name] == pytest.approx(1.5 * alone[name], rel=1e-4)


@pytest.mark.parametrize("critic", CRITICS)
def test_a_run_learns_and_a_resumed_run_is_the_same_run(place, tmp_path, monkeypatch, critic):
    monkeypatch.setattr("fastalign.train.loop.write_report", lambda run: run)  # takes longer than the steps
    options = {"steps_per_generation": 2, "num_iterations": 2, "batch_size": 2, "beta": 0.01, "num_generations": 8, "max_steps": 40}
    options |= {"save_every": 1, "keep_checkpoints": 99, "completions_every": 3, "value_learning_rate": 3e-2, "learning_rate": 2e-2}
    options |= CRITICS[critic]
    whole = train(config_of(place, output=str(tmp_path / "whole"), **options)).output
    rows = metrics_of(whole)
    assert_learned(rows, 2)
    assert {"objective/kl", "objective/rlhf_reward", "val/explained_variance", "policy/entropy_avg", "reward_std"} <= set(rows[0])
    assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-4) and rows[0]["val/ratio"] == pytest.approx(1, abs=1e-5)
    critics = load_file(whole / "critic.safetensors")
    saved = load_file(whole / "checkpoints" / "step-000040" / "weights.safetensors")
    assert len(critics) == (30 if critic == "adapter" else 2)
    assert all(torch.equal(value, saved[name]) and value.any() for name, value in critics.items())
    steps = (1, 4, 6) if critic == "shared" else (6,)  # inside a generation, at its end, in its second pass
    assert_resumes(whole, steps, lambda run: train(config_of(place, output=str(run), resume=True, **options)), ["critic.safetensors"])
    kept = [(whole / "checkpoints" / f"step-{step:06d}" / "objective.safetensors").is_file() for step in (1, 4, 6)]
    assert kept == [True, False, True]
    exported = load_file(whole / "final" / ("adapter_model.safetensors" if "lora" in options else "model.safetensors"))
    assert not any("value_head" in name or "critic" in name for name in exported)


@pytest.mark.parametrize(("size", "places"), [(1, [0, 1, 2, 3]), (3, [0, 1, 3, 4])])
def test_what_is_shown_of_a_step(place, size, places):
    """Four answers, two to a prompt at most, with the mean advantage of their tokens."""
    objective, _ = rolled(place, batch_size=4, num_generations=size, completions_every=5)
    rollouts, shown = objective.rollouts, objective.shown(1)
    assert [row["row"] for row in shown] == rollouts.prompts[places].tolist()
    advantages = rollouts.advantages.split(rollouts.lengths.tolist())
    assert [row["advantage"] for row in shown] == pytest.approx([float(advantages[i].mean()) for i in places], rel=1e-5)
    assert objective.shown(5) == shown and objective.shown(6) == []


def test_evaluation_answers_held_out_prompts_and_leaves_the_generation_alone(place):
    objective, prompts = rolled(place, num_generations=1)
    before = {name: value.clone() for name, value in objective.state().items()}
    metrics = objective.evaluate(prompts)
    assert {"reward", "completions/mean_length"} <= metrics.keys() and "frac_reward_zero_std" not in metrics
    assert before.keys() == objective.state().keys() and all(torch.equal(x, before[n]) for n, x in objective.state().items())


def test_a_reward_model_and_bfloat16(place, tmp_path):
    """What is written loads in Transformers without a word about a critic, and the value head is float32."""
    torch.manual_seed(0)
    load_reward_model(place / "model", pad_token_id=1).save_pretrained(tmp_path / "judge")
    tiny_tokenizer().save_pretrained(tmp_path / "judge")
    model = ModelConfig(path=str(place / "model"), dtype="bfloat16")
    config = config_of(place, model=model, rewards=[str(tmp_path / "judge")], output=str(tmp_path / "run"), max_steps=5, num_generations=1)
    result = train(config)
    assert {"objective/scores", "rewards/judge/mean"} <= result.metrics.keys() and "reward_std" not in result.metrics
    assert result.metrics["objective/scores"] == pytest.approx(result.metrics["rewards/judge/mean"], rel=1e-5)
    assert {value.dtype for value in load_file(result.output / "critic.safetensors").values()} == {torch.float32}
    loaded, info = AutoModelForCausalLM.from_pretrained(result.output / "final", output_loading_info=True)
    assert loaded.dtype == torch.bfloat16 and not info["unexpected_keys"] and not info["missing_keys"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"critic": "adapter"}, "critic must be shared when all weights are trained"),
        ({"critic": "model"}, "critic must be one of shared, adapter"),
        ({"beta": -0.1}, "beta must be 0 or more"),
        ({"beta": 0.0, "kl_estimator": "k3"}, "kl_estimator must be left at 'k1', which counts only with a KL penalty"),
        ({"kl_estimator": "k4"}, "kl_estimator must be one of k1, k2, k3"),
        ({"vf_coef": 0.0}, "vf_coef must be positive"),
        ({"cliprange": 0.0}, r"cliprange must be in \(0, 1\]"),
        ({"cliprange_value": -1.0}, "cliprange_value must be positive and finite, or null"),
        ({"lam": 1.5}, r"lam must be in \[0, 1\]"),
        ({"gamma": -0.1}, r"gamma must be in \[0, 1\]"),
        ({"missing_eos_penalty": 0.0}, "missing_eos_penalty must be positive"),
        ({"missing_eos_penalty": 1.0, "mask_truncated_completions": True}, "counts only with truncated answers that are trained on"),
        ({"refill": 2}, "refill must be left at 0, which counts only with grpo and rloo"),
        ({"value_learning_rate": 0.0}, "value_learning_rate must be positive"),
        ({"value_learning_rate": 1e-3, "learning_rate": 0.0}, "value_learning_rate must be left at None"),
        ({"rewards": []}, "rewards must be at least one reward function"),
    ],
)
def test_bad_options_are_named(place, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        train(config_of(place, output=str(tmp_path / "run"), **options))
    assert not (tmp_path / "run").exists(), "nothing was written"
