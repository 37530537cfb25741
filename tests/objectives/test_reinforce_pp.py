"""REINFORCE++ and its variant with a baseline against their formulas, written out here on padded rows and whole logits; runs of it."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from online_runs import assert_learned, assert_resumes, metrics_of, move, online_config, shown_by, write_place
from support import relative_error
from tiny import tiny_tokenizer
from transformers import AutoModelForCausalLM

from fastalign import train
from fastalign.data.config import PromptDataConfig
from fastalign.data.prompts import load_prompts
from fastalign.errors import ConfigError
from fastalign.models.config import LoraConfig
from fastalign.models.load import load_model
from fastalign.objectives.reinforce_pp import ReinforcePP, ReinforcePPConfig
from fastalign.objectives.rollouts import Rollout
from fastalign.rollout.generate import Completion
from fastalign.train.step import micro_batches, run_step

PROMPTS = ("old river", "a green lamp holds the letter", "why?")
LENGTHS, LONGEST = (5, 1, 3, 7, 2, 7), 7  # of the answers, two to each prompt; those of seven tokens never end
TEMPERATURE, BETA = 0.9, 0.3
REWARD = """
def mine(completion_ids, **columns):
    return [0.3 * (sum(ids) % 7) - 0.5 for ids in completion_ids]

def not_all(completion_ids, **columns):
    return [None if i == 2 else 0.3 * (sum(ids) % 7) - 0.5 for i, ids in enumerate(completion_ids)]

def likes_o(completions, **columns):
    return [c.count("o") / max(1, len(c)) for c in completions]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_place(tmp_path_factory.mktemp("reinforce_pp"), prompts=PROMPTS, rewards=REWARD)


def config_of(place, reward="mine", **options):
    sizes = {"batch_size": 3, "num_generations": 2, "max_completion_length": LONGEST, "max_tokens": 40, "beta": BETA}
    return online_config(place, ReinforcePPConfig, reward=reward, **sizes | options)


class Case:
    """Answers that are given, a policy that moved away from its reference before it gave them, and once more since."""

    def __init__(self, place, monkeypatch, **options) -> None:
        tokenizer, rng = tiny_tokenizer(), torch.Generator().manual_seed(0)
        self.answers = [torch.randint(10, 300, (n,), generator=rng) for n in LENGTHS]
        self.finished = torch.tensor([n < LONGEST for n in LENGTHS])
        for answer in self.answers:
            answer[-1] = tokenizer.eos_token_id if len(answer) < LONGEST else answer[-1]
        said = [Completion(tuple(a.tolist()), (-1.0,) * len(a), bool(f)) for a, f in zip(self.answers, self.finished)]
        monkeypatch.setattr(Rollout, "_answers", lambda *_: said)
        self.config = config_of(place, num_iterations=2, temperature=TEMPERATURE, **options)
        self.config.validate()
        data = load_prompts(self.config.data, tokenizer)
        self.prompts = data.samples
        model = load_model(self.config.model)
        book = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32, attn_implementation="eager")
        self.objective = ReinforcePP(self.config, model, data)
        self.ref = self.snapshot(book, model)
        move(model, 1)
        self.old = self.snapshot(book, model)
        with torch.no_grad():
            self.objective.samples(0, self.prompts)
        move(model, 2)
        self.new = self.snapshot(book, model)

    @staticmethod
    def snapshot(book, model):
        found = copy.deepcopy(book)
        found.load_state_dict(model.state_dict())
        return found

    def ours(self, max_tokens=40):
        """(metrics, gradients) of the second step."""
        self.objective.model.zero_grad()
        with torch.no_grad():
            samples = list(self.objective.samples(1, self.prompts))
        bins = micro_batches(samples, max_tokens)
        sums, counts = run_step(self.objective, bins, device=torch.device("cpu"))
        metrics = self.objective.metrics({name: float(value) for name, value in sums.items()}, counts)
        return metrics, [w.grad.clone() for w in self.objective.model.parameters()]

    def logps(self, model):
        """(B, T) of the answers' tokens, from rows that are padded on the right."""
        rows = [torch.cat((torch.tensor(p.prompt), a)) for p, a in zip((p for p in self.prompts for _ in range(2)), self.answers)]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        attention = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
        logits = model(ids, attention_mask=attention.long()).logits[:, :-1] / TEMPERATURE
        everything = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[:, :, 0]
        parts = [
            row[n - 1 : n - 1 + len(a)]
            for row, n, a in zip(everything, (len(p.prompt) for p in self.prompts for _ in range(2)), self.answers)
        ]
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)

    @property
    def mask(self):
        return torch.arange(LONGEST) < torch.tensor(LENGTHS)[:, None]

    def advantages(self, scores, kl):
        """(B, T), before the prompts' weights; `scores` (B,) may be NaN."""
        judged = ~scores.isnan()
        counts = judged & self.finished if self.config.mask_truncated_completions else judged
        mask = self.mask & counts[:, None]
        if self.config.baseline:
            pairs = scores.view(3, 2)
            alone = pairs.isnan().any(1, keepdim=True)
            returns = torch.where(alone, 0.0, pairs - pairs.mean(1, keepdim=True)).view(6, 1).expand(6, LONGEST)
        else:
            rewards = -BETA * kl * self.mask
            for i, n in enumerate(LENGTHS):
                rewards[i, n - 1] += scores[i]
            returns, later = torch.zeros_like(rewards), torch.zeros(6)
            for t in reversed(range(LONGEST)):
                later = rewards[:, t] + later
                returns[:, t] = later
        counted = returns[mask]
        return torch.where(mask, (returns - counted.mean()) / (counted.var() + 1e-8).sqrt(), 0.0)


ESTIMATES = {"k1": lambda d: d, "k2": lambda d: d**2 / 2, "k3": lambda d: (-d).exp() - 1 + d}


@pytest.mark.parametrize(
    ("estimate", "options"),
    [
        ("k1", {}),
        ("k2", {"kl_estimator": "k2"}),
        ("k3", {"kl_estimator": "k3"}),
        ("k1", {"mask_truncated_completions": True}),
        ("k1", {"reward": "not_all"}),
        ("k2", {"baseline": True}),
        ("k3", {"baseline": True, "kl_estimator": "k3"}),
        ("k2", {"baseline": True, "reward": "not_all", "mask_truncated_completions": True}),
    ],
    ids=str,
)
def test_advantages_loss_and_gradient_by_the_book(place, monkeypatch, estimate, options):
    case = Case(place, monkeypatch, **options)
    rollouts, mask = case.objective.rollouts, case.mask
    with torch.no_grad():
        old, ref = case.logps(case.old), case.logps(case.ref)
    assert relative_error(rollouts.logps, old[mask]) < 1e-4 and relative_error(rollouts.ref_logps, ref[mask]) < 1e-4
    scores = torch.tensor([0.3 * (int(a.sum()) % 7) - 0.5 for a in case.answers])
    if options.get("reward") == "not_all":
        scores[2] = torch.nan
    advantages = case.advantages(scores, ESTIMATES[estimate](old - ref))
    weight = torch.tensor([sample.weight for sample in case.prompts]).repeat_interleave(2)[:, None]
    assert relative_error(rollouts.advantages, (advantages * weight)[mask]) < 1e-4
    spread = [float(row[:n].max() - row[:n].min()) > 1e-3 for row, n in zip(advantages, LENGTHS)]
    assert any(spread) != bool(options.get("baseline")), "tokens have advantages of their own, or those of their answers"

    metrics, grads = case.ours()
    logps = case.logps(case.new)
    ratio = (logps - old).exp()
    values = -torch.minimum(ratio * advantages * weight, ratio.clamp(0.8, 1.2) * advantages * weight)
    if options.get("baseline"):
        values = values + BETA * ESTIMATES[estimate](logps - ref)
    counted = mask & case.finished[:, None] if options.get("mask_truncated_completions") else mask
    loss = values[counted].mean()
    loss.backward()
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-4)
    kl = ESTIMATES[estimate](logps.detach() - ref) if options.get("baseline") else ESTIMATES[estimate](old - ref)
    assert metrics["kl"] == pytest.approx(kl[counted].mean().item(), rel=1e-3)
    for got, (name, weight) in zip(grads, case.new.named_parameters()):
        assert float(weight.grad.abs().max()) > 0 and relative_error(got, weight.grad) < 1e-4, name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"baseline": True},
        {"mask_truncated_completions": True, "loss_type": "cispo"},
        {"top_entropy_quantile": 0.3, "entropy_coef": 0.1, "off_policy_mask_threshold": 0.01},
    ],
    ids=str,
)
def test_the_cut_into_micro_batches_does_not_matter(place, monkeypatch, options):
    case = Case(place, monkeypatch, **options)
    results = [case.ours(max_tokens) for max_tokens in (24, 40, 500)]
    for metrics, grads in results[1:]:
        assert metrics == pytest.approx(results[0][0], rel=1e-4, abs=1e-6)
        assert all(float(b.abs().max()) > 0 and relative_error(a, b) < 1e-4 for a, b in zip(grads, results[0][1]))


def test_an_answer_that_nobody_judged_changes_nothing_but_the_count(place, monkeypatch):
    case = Case(place, monkeypatch, reward="not_all")
    rollouts = case.objective.rollouts
    assert rollouts.have_advantage == [True, True, False, True, True, True]
    assert [sample.index for sample in case.objective.samples(1, case.prompts)] == [0, 1, 3, 4, 5]
    assert case.objective.denominators([])["count"] == sum(LENGTHS)
    assert not rollouts.of_tokens(rollouts.advantages, [2]).any()
    shown = case.objective.rollout.shown(rollouts, [0, 2])
    assert shown[0]["advantage"] == pytest.approx(float(rollouts.advantages[:5].mean()), rel=1e-5) and shown[1]["advantage"] == 0


@pytest.mark.parametrize(
    "variant", [{"num_generations": 1, "batch_size": 16}, {"baseline": True, "num_generations": 8, "lora": LoraConfig(r=4)}]
)
def test_a_run_learns_and_a_resumed_run_is_the_same_run(place, tmp_path, monkeypatch, variant):
    monkeypatch.setattr("fastalign.train.loop.write_report", lambda run: run)  # takes longer than the steps
    prompts = tmp_path / "many.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{p} {i}"}) + "\n" for i in range(12) for p in PROMPTS))
    options = {
        "data": PromptDataConfig(path=str(prompts)),
        "reward": "likes_o",
        "batch_size": 2,
        "steps_per_generation": 2,
        "num_iterations": 2,
    }
    options |= {"max_completion_length": 10, "max_tokens": 64, "beta": 0.01, "max_steps": 32, "save_every": 1, "keep_checkpoints": 99}
    options |= {"learning_rate": 2e-2, "completions_every": 3} | variant
    whole = train(config_of(place, output=str(tmp_path / "whole"), **options)).output
    rows = metrics_of(whole)
    assert_learned(rows, 2)
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-5) and any(row["kl"] > 1e-3 for row in rows)
    assert ("frac_reward_zero_std" in rows[0]) == ("baseline" in variant), "an answer that is alone is not compared"
    assert len([row for row in shown_by(whole) if row["step"] == 1]) == 4
    # inside a generation, at its end, in its second pass
    assert_resumes(whole, (1, 4, 6), lambda run: train(config_of(place, output=str(run), resume=True, **options)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"baseline": True, "num_generations": 1}, "num_generations must be at least 2: answers are compared"),
        ({"kl_estimator": "k4"}, "kl_estimator must be one of auto, k1, k2, k3"),
        ({"beta": 0.0, "kl_estimator": "k2"}, r"kl_estimator must be left at 'auto', which counts only with a KL penalty \(beta above 0\)"),
        ({"use_bias_correction_kl": True}, r"use_bias_correction_kl must be left at False, which counts only with .* \(baseline with beta"),
        ({"scale_rewards": "batch"}, "scale_rewards must be left at 'group', which counts only with grpo"),
        ({"refill": 1}, "refill must be left at 0, which counts only with baseline"),
        ({"beta": -1.0}, "beta must be 0 or more"),
        ({"num_generations": 0}, "num_generations must be at least 1"),
    ],
)
def test_bad_options_are_named(place, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        train(config_of(place, output=str(tmp_path / "run"), **options))
    assert not (tmp_path / "run").exists(), "nothing was written"
