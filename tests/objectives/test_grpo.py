"""The GRPO objective against its formula on the model's own logits, and runs that generate, learn, stop and go on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from online_runs import PROMPTS, assert_learned, assert_resumes, metrics_of, online_config, same, shown_by
from tiny import tiny_tokenizer

from fastalign import packing, train
from fastalign.data.config import PromptDataConfig
from fastalign.data.prompts import load_prompts
from fastalign.errors import ConfigError, DataError
from fastalign.models.config import LoraConfig
from fastalign.models.load import load_model
from fastalign.models.trunk import stock_attention
from fastalign.objectives.grpo import GRPO, GRPOConfig
from fastalign.objectives.rloo import RLOO, RLOOConfig
from fastalign.rollout.generate import Completion
from fastalign.train.step import micro_batches, run_step


def config_of(place: Path, kind=GRPOConfig, **options):
    sizes = {"batch_size": 2, "num_generations": 4, "max_completion_length": 10, "max_tokens": 64}
    return online_config(place, kind, **sizes | {"seed": 10} | options)  # with it no two answers to a prompt are rewarded alike


def rolled(place, kind=GRPO, config_kind=GRPOConfig, **options):
    """An objective in the middle of a generation: the policy has moved since it answered."""
    config = config_of(place, config_kind, **options)
    config.validate()
    tokenizer = tiny_tokenizer()
    model = load_model(config.model, lora=config.lora)
    objective = kind(config, model, load_prompts(config.data, tokenizer))
    prompts = objective.rollout.data.samples[: config.draw_size]
    with torch.no_grad():
        objective.samples(0, prompts)
        for weight in model.parameters():
            weight.add_(0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel())))
    return objective, prompts


def dense_logps(model, sample, temperature):
    ids = torch.tensor([(*sample.prompt, *sample.completions[0])])
    with stock_attention(model):
        scores = (model(ids).logits[0, :-1] / temperature).log_softmax(-1)
    return scores.gather(1, ids[0, 1:, None])[len(sample.prompt) - 1 :, 0]


def by_the_book(objective, samples, loss_type, beta):
    rollouts, config, model = objective.rollouts, objective.config, objective.model
    parts = []
    for i, sample in zip(objective.answers, samples):
        logps, at = dense_logps(model, sample, config.temperature), slice(*rollouts.bounds[i : i + 2])
        ratio, advantage = (logps - rollouts.logps[at]).exp(), rollouts.advantages[i]
        if loss_type == "gspo":
            ratio = (logps - rollouts.logps[at]).mean().exp().expand_as(logps)
        values = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        if beta:
            d = rollouts.ref_logps[at] - logps
            values = values + beta * ratio * (d.exp() - d - 1)
        parts.append(values)
    if loss_type == "dapo":
        return torch.cat(parts).mean()
    if loss_type == "dr_grpo":
        return torch.cat(parts).sum() / (len(parts) * config.max_completion_length)
    return torch.stack([values.mean() for values in parts]).mean()


@pytest.mark.parametrize(("loss_type", "beta"), [("dapo", 0.0), ("grpo", 0.3), ("dr_grpo", 0.0), ("gspo", 0.1)])
def test_loss_and_gradient_by_the_book(place, loss_type, beta):
    objective, prompts = rolled(place, loss_type=loss_type, beta=beta, num_iterations=2, temperature=0.8)
    samples = list(objective.samples(1, prompts))
    assert len(samples) == 8 and float(objective.rollouts.advantages.abs().min()) > 0
    sums, _ = run_step(objective, micro_batches(samples, 64), device=torch.device("cpu"))
    grads = [w.grad.clone() for w in objective.model.parameters()]
    objective.model.zero_grad()
    want = by_the_book(objective, samples, loss_type, beta)
    want.backward()
    assert float(sums["loss"]) == pytest.approx(want.item(), rel=1e-5)
    for got, weight in zip(grads, objective.model.parameters()):
        assert same(got, weight.grad)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss_type": "grpo", "beta": 0.2},
        {"loss_type": "vespo"},
        {"mask_truncated_completions": True},
        {"top_entropy_quantile": 0.3, "entropy_coef": 0.1},
    ],
)
def test_the_cut_into_micro_batches_does_not_matter(place, options):
    results = []
    for max_tokens in (40, 64, 500):
        objective, prompts = rolled(place, num_iterations=2, **options)
        bins = micro_batches(list(objective.samples(1, prompts)), max_tokens)
        sums, counts = run_step(objective, bins, device=torch.device("cpu"))
        metrics = objective.metrics({name: float(value) for name, value in sums.items()}, counts)
        results.append((metrics, [w.grad for w in objective.model.parameters()]))
    for metrics, grads in results[1:]:
        assert metrics == pytest.approx(results[0][0], rel=1e-4, abs=1e-7)
        assert all(same(a, b) for a, b in zip(grads, results[0][1]))


@pytest.mark.parametrize("options", [{}, {"loss_type": "vespo", "beta": 0.2}, {"top_entropy_quantile": 0.3}])
def test_a_group_that_shares_its_prompt_takes_the_same_step(place, options, monkeypatch):
    monkeypatch.setattr(packing, "SHARE_FROM", 2)
    results = []
    for share, max_tokens in ((False, 500), (True, 500), (True, 48)):
        objective, prompts = rolled(place, num_iterations=2, share_prompts=share, **options)
        bins = micro_batches(list(objective.samples(1, prompts)), max_tokens, share=share)
        assert any(packing.collate(members, share=share).shared is not None for members in bins) == share
        sums, counts = run_step(objective, bins, device=torch.device("cpu"), share=share)
        metrics = objective.metrics({name: float(value) for name, value in sums.items()}, counts)
        results.append((metrics, [w.grad for w in objective.model.parameters()]))
    for metrics, grads in results[1:]:
        assert metrics == pytest.approx(results[0][0], rel=1e-4, abs=1e-6)
        assert all(same(a, b) for a, b in zip(grads, results[0][1]))


def test_the_quantile_of_entropy_is_that_of_all_answers_that_count(place):
    """Those without an advantage, which are not computed with a gradient, and not those that are masked."""
    objective, prompts = rolled(place, num_iterations=2, top_entropy_quantile=0.25, mask_truncated_completions=True, temperature=0.8)
    rollouts = objective.rollouts
    rollouts.finished[:] = torch.arange(8) < 6
    rollouts.advantages[:3] = 0.0
    samples = list(objective.samples(1, prompts))
    assert [sample.index for sample in samples] == [3, 4, 5]
    run_step(objective, micro_batches(samples, 64), device=torch.device("cpu"))
    entropies = []
    for sample in objective.rollout.samples(rollouts)[:6]:
        ids = torch.tensor([(*sample.prompt, *sample.completions[0])])
        with stock_attention(objective.model), torch.no_grad():
            p = (objective.model(ids).logits[0, len(sample.prompt) - 1 : -1] / 0.8).softmax(-1)
        entropies.append(-(p * p.log()).sum(-1))
    entropy = torch.cat(entropies)
    want = entropy >= entropy.quantile(0.75)
    assert torch.equal(objective.high_entropy[: len(want)], want) and 0 < int(want.sum()) < len(want)
    assert not objective.high_entropy[len(want) :].any()
    rollouts.finished[:] = False
    sums, _ = run_step(objective, micro_batches(list(objective.samples(1, prompts)), 500), device=torch.device("cpu"))
    assert float(sums["loss"]) == 0 and not objective.high_entropy.any()


@pytest.mark.parametrize("num_iterations", [1, 2])
def test_truncated_sampling_is_corrected_by_default_whatever_the_cut(place, num_iterations):
    """The weight of a token is the probability that truncation left; with exact sampling nothing is stored, nor weighed."""
    results = []
    for max_tokens in (40, 500):
        objective, prompts = rolled(place, num_iterations=num_iterations, top_p=0.8, top_k=60, max_tokens=max_tokens)
        if num_iterations == 1:  # the policy is still the one that answered
            objective.model.load_state_dict(load_model(objective.config.model).state_dict())
        samples, rollouts = list(objective.samples(num_iterations - 1, prompts)), objective.rollouts
        sums, counts = run_step(objective, micro_batches(samples, max_tokens), device=torch.device("cpu"))
        metrics = objective.metrics({name: float(value) for name, value in sums.items()}, counts)
        results.append((metrics, [w.grad.clone() for w in objective.model.parameters()]))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-4, abs=1e-7)
    assert all(same(a, b) for a, b in zip(results[1][1], results[0][1]))
    with torch.no_grad():
        trained = torch.cat([dense_logps(load_model(objective.config.model), sample, 1.0) for sample in samples])
    left = (trained - rollouts.sampling_logps).exp()
    assert 0.1 < float(left.min()) < float(left.max()) < 1.0001  # 0.8 of the 60 most probable
    names = ("min", "mean", "max")
    assert [metrics[f"sampling/importance_sampling_ratio/{name}"] for name in names] == pytest.approx(
        [float(left.min()), float(left.mean()), float(left.max())], rel=1e-4
    )
    objective.model.zero_grad()
    parts = []
    for i, sample in enumerate(samples):
        at = slice(*rollouts.bounds[i : i + 2])
        logps = dense_logps(objective.model, sample, 1.0)
        ratio, advantage = (logps - trained[at]).exp(), rollouts.advantages[i]
        parts.append(-left[at] * torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage))
    torch.cat(parts).mean().backward()
    assert all(same(got, weight.grad) for got, weight in zip(results[1][1], objective.model.parameters()))
    exact, _ = rolled(place, num_iterations=num_iterations)
    assert exact.rollouts.sampling_logps.numel() == 0 and not exact.corrected


def test_answers_without_an_advantage_are_left_out_and_change_nothing(place):
    objective, prompts = rolled(place, num_iterations=2)
    objective.rollouts.advantages[:4] = 0.0
    trained = objective.samples(1, prompts)
    assert [sample.index for sample in trained] == [4, 5, 6, 7]
    everything = objective.rollout.samples(objective.rollouts)
    grads = []
    for samples in (trained, everything):
        objective.model.zero_grad()
        _, counts = run_step(objective, micro_batches(list(samples), 500), device=torch.device("cpu"))
        grads.append([w.grad.clone() for w in objective.model.parameters()])
        assert counts["count"] == float(objective.rollouts.lengths.sum())
    assert all(same(a, b) for a, b in zip(*grads))
    objective.rollouts.advantages[:] = 0.0
    assert len(objective.samples(1, prompts)) == 1  # a step needs something to be made of: its gradient is 0


def test_truncated_answers_do_not_count_if_asked(place):
    objective, prompts = rolled(place, num_iterations=2, mask_truncated_completions=True, loss_type="grpo")
    done = objective.rollouts.finished
    assert not done.all()
    done[:2] = True
    trained = objective.samples(1, prompts)
    assert [sample.index for sample in trained] == done.nonzero()[:, 0].tolist()
    assert objective.denominators(trained)["count"] == float(done.sum())
    done[:] = False
    sums, _ = run_step(objective, micro_batches(list(objective.samples(1, prompts)), 500), device=torch.device("cpu"))
    assert float(sums["loss"]) == 0 and float(sums["tokens"]) == 0


def test_a_function_that_abstains_gives_no_advantage(place):
    objective, _ = rolled(place, reward="nothing", num_iterations=2)
    assert torch.equal(objective.rollouts.advantages, torch.zeros(8))
    assert torch.isnan(objective.rollout.total(objective.rollouts.rewards)).all()


def test_prompts_whose_answers_are_rewarded_alike_are_answered_anew(place):
    options = {"num_generations": 2, "max_completion_length": 3, "batch_size": 4, "num_iterations": 2}
    first, _ = rolled(place, **options)
    alike = [len(set(group)) == 1 for group in first.rollouts.rewards[:, 0].view(-1, 2).tolist()]
    assert any(alike) and not all(alike)
    objective, _ = rolled(place, refill=5, **options)
    again, _ = rolled(place, refill=5, **options)
    rollouts = objective.rollouts
    for name, value in again.state().items():
        assert torch.equal(value, objective.state()[name]), name
    assert [draws > 1 for draws in rollouts.draws.tolist()] == alike
    for g, drawn in enumerate(rollouts.draws.tolist()):
        before, after = ([x.tolist() for x in r.tokens.split(r.lengths.tolist())[2 * g : 2 * g + 2]] for r in (first.rollouts, rollouts))
        assert (before == after) == (drawn == 1)
    metrics, before = objective.rollout.metrics(rollouts), first.rollout.metrics(first.rollouts)
    assert metrics["refill/frac_reward_zero_std"] == before["frac_reward_zero_std"] == sum(alike) / 4
    assert metrics["frac_reward_zero_std"] < before["frac_reward_zero_std"]
    assert torch.equal(rollouts.advantages != 0, (objective.rollout._deviation(rollouts.rewards) > 0).repeat_interleave(2))
    assert rollouts.logps.numel() == len(rollouts.tokens), "log-probs are those of the answers that are kept"


def test_answers_of_nothing_but_the_end_are_trained_on(place, monkeypatch):
    """Every answer is EOS at once: one token, an empty text, equal rewards; half of them are made to differ."""
    end = tiny_tokenizer().eos_token_id
    said = Completion((end,), (-1.0,), True)
    monkeypatch.setattr("fastalign.rollout.engine.generate", lambda model, prompts, **_: [said] * len(prompts))
    objective, prompts = rolled(place, rewards=["repetition"], num_iterations=2)
    assert objective.rollout.shown(objective.rollouts, [0])[0]["completion"] == ""
    assert objective.rollout.metrics(objective.rollouts)["completions/mean_terminated_length"] == 1
    objective.rollouts.advantages[:] = torch.tensor([1.0, -1.0]).repeat(4)
    sums, counts = run_step(objective, micro_batches(list(objective.samples(1, prompts)), 64), device=torch.device("cpu"))
    assert counts["count"] == 8 and float(sums["loss"]) == float(sums["loss"])
    assert all(bool(w.grad.isfinite().all()) for w in objective.model.parameters())


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_leave_one_out_and_the_penalty_in_the_reward(place, top_p):
    objective, prompts = rolled(place, RLOO, RLOOConfig, beta=0.2, num_iterations=2, top_p=top_p)
    rollouts = objective.rollouts
    kl = torch.stack([part.sum() for part in (rollouts.logps - rollouts.ref_logps).split(rollouts.lengths.tolist())])
    reward = (rollouts.rewards[:, 0] - 0.2 * kl).view(2, 4)
    want = (reward - (reward.sum(1, keepdim=True) - reward) / 3) * torch.tensor([[1.0], [2.0]])
    assert torch.allclose(rollouts.advantages, want.view(-1), atol=1e-6)
    samples = list(objective.samples(1, prompts))
    sums, _ = run_step(objective, micro_batches(samples, 64), device=torch.device("cpu"))
    losses = []
    for i, sample in enumerate(samples):
        at = slice(*rollouts.bounds[i : i + 2])
        ratio = (dense_logps(objective.model, sample, 1.0) - rollouts.logps[at]).sum().exp()
        weight = 1.0 if top_p == 1 else (rollouts.logps - rollouts.sampling_logps)[at].exp().mean()  # of the answer's tokens
        losses.append(-weight * torch.minimum(ratio * rollouts.advantages[i], ratio.clamp(0.8, 1.2) * rollouts.advantages[i]))
    assert float(sums["loss"]) == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)
    rollouts.ref_logps -= 0.5
    metrics = objective.metrics({name: float(value) for name, value in sums.items()}, {})
    assert metrics["kl"] == pytest.approx(0.5, abs=1e-4), "of the generation's tokens: the loss has no penalty"


@pytest.mark.parametrize("lora", [0, 4])
def test_a_run_learns_and_a_resumed_run_is_the_same_run(place, tmp_path, lora):
    options = {"lora": LoraConfig(r=lora), "steps_per_generation": 2, "num_iterations": 2, "batch_size": 1, "beta": 0.01}
    options |= {"max_steps": 24, "save_every": 1, "keep_checkpoints": 99, "learning_rate": 2e-2, "num_generations": 8}
    options |= {"completions_every": 3, "refill": 1, "seed": 0, "top_p": 0.95 if lora else 1.0}
    whole = train(config_of(place, output=str(tmp_path / "whole"), **options)).output
    rows, shown = metrics_of(whole), shown_by(whole)
    assert_learned(rows, 2)
    assert [row["step"] for row in shown[::2]] == [1, 3, 6, 9, 12, 15, 18, 21, 24]
    prompt, text = shown[0]["prompt"], shown[0]["completion"]
    assert prompt in PROMPTS and shown[0]["rewards"]["likes_o"] == pytest.approx(text.count("o") / len(text))
    assert {"kl", "entropy", "clip_ratio/low_mean", "completions/mean_length", "rewards/likes_o/mean"} <= set(rows[0])
    # inside a generation, at its end, in its second pass
    assert_resumes(whole, (2, 4, 7), lambda run: train(config_of(place, output=str(run), resume=True, **options)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "sapo", "epsilon": 0.1}, "epsilon must be left at 0.2, which counts only with a loss type that clips"),
        ({"loss_type": "vespo", "epsilon_high": 0.3}, "epsilon_high must be left at None"),
        ({"kl_estimator": "k1"}, "kl_estimator must be left at 'k3', which counts only with a KL penalty in the loss"),
        ({"rewards": []}, "rewards must be at least one reward function"),
        ({"num_generations": 1}, "num_generations must be at least 2"),
        ({"loss_options": {"tau": 1.0}}, "loss_options must be options of dapo"),
        ({"reference": "adapter"}, "reference must be copy or auto"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"importance_sampling_clip_max": 2.0}, "importance_sampling_clip_max must be left at 3.0, which counts only with"),
        ({"top_k": 5, "importance_sampling_clip_min": 3.0}, "importance_sampling_clip_min must be 0 or more and less than the maximum"),
        ({"importance_sampling_correction": "token"}, "importance_sampling_correction must be one of auto, none, token_truncate"),
        ({"loss_type": "vespo", "importance_sampling_correction": "sequence_mask"}, "one of tokens for vespo"),
        ({"top_entropy_quantile": 0.0}, r"top_entropy_quantile must be in \(0, 1\]"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"top_k": -1}, "top_k must be 0 or more"),
        ({"min_p": 1.5}, r"min_p must be in \[0, 1\]"),
        ({"reward_weights": [1.0, 2.0]}, "2 weights for 1 reward functions"),
        ({"max_tokens": 12}, "max_tokens 12 is less than the longest prompt"),
        ({"max_tokens": 9999, "max_completion_length": 512}, "window of 512 tokens is less than the longest prompt .* smaller --max_comp"),
        ({"data": {"max_length": 2}}, "no prompt is left"),
        ({"off_policy_mask_threshold": 0.1}, "off_policy_mask_threshold must be left at None"),
        ({"refill": -1}, "refill must be 0 or more"),
        ({"rewards": ["numbers"]}, "no built-in reward is called 'numbers'"),
    ],
)
def test_bad_options_are_named(place, tmp_path, options, message):
    data = PromptDataConfig(path=str(place / "prompts.jsonl"), **options.pop("data", {}))
    with pytest.raises((ConfigError, DataError), match=message):
        train(config_of(place, output=str(tmp_path / "run"), data=data, **options))
    assert not (tmp_path / "run").exists(), "nothing was written"
