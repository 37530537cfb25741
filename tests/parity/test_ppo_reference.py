"""A PPO step against the formulas of TRL 1.12's PPOTrainer, the last that TRL had, written out here: padded rows, whole logits, float32.

`Book` follows `experimental/ppo/ppo_trainer.py` line by line where `pays="trl"`. TRL pays the score one position after the last token
where the row has room for it, and lets the critic judge that position too; we pay it for the last token (`pays="last"`). Where
every answer fills its row, both are the same.
"""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from tiny import save_tiny, tiny_tokenizer
from transformers import AutoModelForCausalLM

from fastalign.data.config import PromptDataConfig
from fastalign.data.prompts import load_prompts
from fastalign.models.config import ModelConfig
from fastalign.objectives.ppo import PPO, PPOConfig
from fastalign.objectives.rollouts import Rollout
from fastalign.rollout.generate import Completion
from fastalign.train.step import micro_batches, run_step

PROMPTS = ("old river", "a green lamp holds the letter", "why?")
LENGTHS, LONGEST = (5, 1, 3, 7, 2, 7), 7  # of the answers, two to each prompt; those of seven tokens never end
TEMPERATURE = 0.9
REWARD = "def mine(completion_ids, **columns):\n    return [0.3 * (sum(ids) % 7) - 0.5 for ids in completion_ids]\n"


class Case:
    """Answers that are given, a policy that moved away from its reference before it gave them, and once more since."""

    def __init__(self, folder, monkeypatch, lengths=LENGTHS, **options) -> None:
        tokenizer = tiny_tokenizer()
        end, rng = tokenizer.eos_token_id, torch.Generator().manual_seed(0)
        self.answers = [torch.randint(10, 300, (n,), generator=rng) for n in lengths]
        self.finished = torch.tensor([n < LONGEST for n in lengths])
        for answer, finished in zip(self.answers, self.finished):
            if finished:
                answer[-1] = end
        said = [Completion(tuple(a.tolist()), (0.0,) * len(a), bool(f)) for a, f in zip(self.answers, self.finished)]
        monkeypatch.setattr(Rollout, "_answers", lambda *_: said)
        given = {"rewards": [f"{folder}/reward.py:mine"], "output": "unused", "batch_size": 3, "num_generations": 2, "num_iterations": 2}
        given |= {"max_completion_length": LONGEST, "temperature": TEMPERATURE, "max_tokens": 40, "cliprange": 0.2}
        model = ModelConfig(path=str(folder / "model"), dtype="float32")
        self.config = PPOConfig(model=model, data=PromptDataConfig(path=str(folder / "prompts.jsonl")), **given | options)
        self.config.validate()
        prompts = load_prompts(self.config.data, tokenizer)
        self.prompts = [torch.tensor(sample.prompt) for sample in prompts.samples for _ in range(2)]
        model = self.config.load_model(tokenizer)
        self.objective = PPO(self.config, model, prompts)
        book = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32, attn_implementation="eager")
        self.ref = self.snapshot(book, model)
        self.move(model, 1)
        self.old = self.snapshot(book, model)
        with torch.no_grad():
            self.objective.samples(0, prompts.samples)
        self.move(model, 2)
        self.new = self.snapshot(book, model)
        with torch.no_grad():
            self.samples = list(self.objective.samples(1, prompts.samples))

    @staticmethod
    def move(model, seed):
        rng = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.add_((0.3 if "value_head" in name else 0.03) * torch.randn(weight.shape, generator=rng))

    @staticmethod
    def snapshot(book, model):
        """The same weights in a model of Transformers with a value head beside it, which is none of ours."""
        state, found = model.state_dict(), copy.deepcopy(book)
        head = {name.removeprefix("value_head."): state.pop(name).clone().requires_grad_() for name in list(state) if "value_head" in name}
        found.load_state_dict(state)
        return SimpleNamespace(model=found, head=head)

    def ours(self):
        """(metrics, gradients by name) of one step, in two micro-batches and more."""
        bins = micro_batches(self.samples, self.config.max_tokens)
        assert len(bins) > 1
        sums, counts = run_step(self.objective, bins, device=torch.device("cpu"))
        metrics = self.objective.metrics({name: float(value) for name, value in sums.items()}, counts)
        return metrics, {name: weight.grad for name, weight in self.objective.model.named_parameters()}


class Book:
    """The step of `case` in TRL's way: (B, T) tensors of the answers' positions, T the longest answer of the rows."""

    def __init__(self, case, pays="last") -> None:
        self.case, self.config, self.pays = case, case.config, pays
        pad = torch.nn.utils.rnn.pad_sequence
        self.responses = pad(case.answers, batch_first=True)
        queries = pad([p.flip(0) for p in case.prompts], batch_first=True).flip(1)
        self.context = queries.shape[1]
        self.ids = torch.cat((queries, self.responses), 1)
        prompts, answers = (torch.tensor([len(x) for x in xs]) for xs in (case.prompts, case.answers))
        place = torch.arange(self.ids.shape[1])
        self.attention = (place >= self.context - prompts[:, None]) & (place < self.context + answers[:, None])
        last = (answers - 1)[:, None]  # TRL's sequence_lengths
        index = torch.arange(self.responses.shape[1])
        self.mask = index <= last
        self.value_mask = index <= last + (pays == "trl")
        room = last + 1 < self.responses.shape[1]
        self.paid = torch.where(room, last + 1, last) if pays == "trl" else last

    def look(self, at):
        """Log-probs of the answers' tokens, and values of the states before them."""
        positions = (self.attention.cumsum(1) - 1).clamp(min=0)
        hidden = at.model.model(self.ids, attention_mask=self.attention.long(), position_ids=positions).last_hidden_state
        logits = at.model.lm_head(hidden)[:, self.context - 1 : -1] / (TEMPERATURE + 1e-7)
        logps = logits.log_softmax(-1).gather(2, self.responses[:, :, None])[:, :, 0]
        values = (hidden @ at.head["weight"].T)[:, self.context - 1 : -1, 0] + at.head["bias"]
        return logps.masked_fill(~self.mask, 1.0), values.masked_fill(~self.value_mask, 0.0), logits

    @torch.no_grad()
    def generation(self):
        config = self.config
        (old, values, _), (ref, _, _) = self.look(self.case.old), self.look(self.case.ref)
        scores = torch.tensor([0.3 * (int(a.sum()) % 7) - 0.5 for a in self.case.answers])
        if config.missing_eos_penalty is not None:
            scores[~self.case.finished] -= config.missing_eos_penalty
        d = ref - old
        kl = {"k1": -d, "k2": d * d / 2, "k3": d.exp() - 1 - d}[config.kl_estimator]
        rewards = -config.beta * kl
        rewards[torch.arange(len(scores)), self.paid[:, 0]] += scores
        if config.whiten_rewards:
            rewards = whitened(rewards, self.value_mask, shift=False).masked_fill(~self.value_mask, 0.0)
        advantages, running = torch.zeros_like(rewards), torch.zeros(len(scores))
        width = rewards.shape[1]
        for t in reversed(range(width)):
            following = values[:, t + 1] if t < width - 1 else 0.0
            running = rewards[:, t] + config.gamma * following - values[:, t] + config.gamma * config.lam * running
            advantages[:, t] = running
        returns = advantages + values
        found = SimpleNamespace(old=old, values=values, scores=scores, kl=kl, rewards=rewards, raw=advantages, returns=returns)
        found.advantages = whitened(advantages, self.mask)
        return found

    def loss(self, rows=slice(None)):
        """Policy and value loss of a micro-batch of TRL's, and the statistics."""
        found, config = self.generation(), self.config
        logps, values, logits = self.look(self.case.new)
        mask, value_mask = self.mask[rows], self.value_mask[rows]
        moved, advantages = (logps - found.old)[rows], found.advantages[rows]
        ratio, clipped = moved.exp(), moved.exp().clamp(1 - config.cliprange, 1 + config.cliprange)
        policy = torch.maximum(-advantages * ratio, -advantages * clipped)
        values, old, returns = values[rows], found.values[rows], found.returns[rows]
        squares = worst = (values - returns) ** 2
        if config.cliprange_value is not None:
            kept = torch.clamp(values, old - config.cliprange_value, old + config.cliprange_value)
            worst = torch.maximum(squares, (kept - returns) ** 2)
        policy_loss, value_loss = mean(policy, mask), 0.5 * mean(worst, value_mask)
        loss = policy_loss + config.vf_coef * value_loss
        entropy = torch.logsumexp(logits, -1) - (logits.softmax(-1) * logits).sum(-1)
        statistics = {
            "loss/policy_avg": policy_loss,
            "loss/value_avg": value_loss,
            "loss": loss,
            "policy/clipfrac_avg": mean((-advantages * clipped > -advantages * ratio).float(), mask),
            "policy/approxkl_avg": mean(0.5 * moved**2, mask),
            "policy/entropy_avg": mean(entropy[rows], mask),
            "val/clipfrac_avg": mean((worst > squares).float(), value_mask),
            "val/ratio": mean(ratio, mask),
            "objective/scores": found.scores.mean(),
            "objective/entropy": (-found.old * self.mask).sum(1).mean(),
            "objective/kl": (found.kl * self.mask).sum(1).mean(),
            "objective/non_score_reward": -config.beta * (found.kl * self.mask).sum(1).mean(),
            "val/num_eos_tokens": self.case.finished.sum(),
        }
        statistics["objective/rlhf_reward"] = statistics["objective/scores"] + statistics["objective/non_score_reward"]
        return {name: float(value.detach()) for name, value in statistics.items()} | {"differentiable": loss}

    def gradients(self):
        self.loss()["differentiable"].backward()
        found = {name: weight.grad for name, weight in self.case.new.model.named_parameters()}
        return found | {f"value_head.{name}": weight.grad for name, weight in self.case.new.head.items()}


def mean(values, mask):
    return (values * mask).sum() / mask.sum()


def whitened(values, mask, shift=True):
    centre = mean(values, mask)
    variance = mean((values - centre) ** 2, mask) * mask.sum() / (mask.sum() - 1)
    return (values - centre) * torch.rsqrt(variance + 1e-8) + (0.0 if shift else centre)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ppo")
    save_tiny(folder / "model")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    (folder / "reward.py").write_text(REWARD)
    return folder


def same(ours, theirs):
    """To 1e-4 of the largest entry."""
    return float((ours - theirs).abs().max()) <= 1e-4 * float(theirs.abs().max())


CASES = {
    "defaults": {"beta": 0.05},
    "k2": {"kl_estimator": "k2", "beta": 0.3},
    "k3": {"kl_estimator": "k3", "beta": 0.3, "gamma": 0.9, "lam": 0.7},
    "whitened": {"whiten_rewards": True, "beta": 0.3},
    "penalty": {"missing_eos_penalty": 1.5, "beta": 0.3, "kl_estimator": "k3", "whiten_rewards": True},
    "values_clip_early": {"cliprange_value": 0.02, "vf_coef": 1.0},
    "values_never_clip": {"cliprange_value": None, "vf_coef": 0.5},
    "no_reference": {"beta": 0.0},
}


@pytest.mark.parametrize("name", CASES)
def test_a_step(folder, monkeypatch, name):
    case = Case(folder, monkeypatch, **CASES[name])
    book = Book(case)
    found, ours, earned = book.generation(), case.objective.rollouts, case.objective.earned
    assert same(ours.logps, found.old[book.mask]) and same(ours.values, found.values[book.mask])
    assert same(earned.rewards, found.rewards[book.mask])
    assert same(ours.returns, found.returns[book.mask])
    assert same(ours.advantages, found.advantages[book.mask])
    metrics, grads = case.ours()
    statistics = book.loss()
    del statistics["differentiable"]
    assert 0 < statistics["policy/clipfrac_avg"] < 1
    if name == "values_clip_early":
        assert 0 < statistics["val/clipfrac_avg"] < 1
    for key, value in statistics.items():
        if key in metrics:
            assert metrics[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
    absent = {"val/clipfrac_avg"} if case.config.cliprange_value is None else set()
    absent |= {"objective/kl", "objective/non_score_reward", "objective/rlhf_reward"} if not case.config.beta else set()
    assert statistics.keys() - metrics.keys() == absent
    theirs = book.gradients()
    assert grads.keys() == theirs.keys()
    for key, value in theirs.items():
        assert float(value.abs().max()) > 0 and same(grads[key], value), key


@pytest.mark.parametrize("name", CASES)
def test_a_step_whose_answers_fill_their_rows_is_literally_that_of_trl(folder, monkeypatch, name):
    case = Case(folder, monkeypatch, lengths=(7,) * 6, **CASES[name])
    book = Book(case, pays="trl")
    metrics, grads = case.ours()
    theirs = book.gradients()
    assert metrics["loss"] == pytest.approx(book.loss()["loss"], rel=1e-4)
    assert all(same(grads[key], value) for key, value in theirs.items())


def test_the_score_is_paid_for_the_last_token_and_not_one_later(folder, monkeypatch):
    """Both numbers, for the last token of an answer that is shorter than the longest: TRL's goes by way of the value of its end."""
    case = Case(folder, monkeypatch, beta=0.3)
    ours, trl = (Book(case, pays=pays) for pays in ("last", "trl"))
    found, theirs = ours.generation(), trl.generation()
    row, last = 0, LENGTHS[0] - 1
    kl, score = 0.3 * float(found.kl[row, last]), float(found.scores[row])
    before, after = float(theirs.values[row, last]), float(theirs.values[row, last + 1])
    assert after != 0 and found.values[row, last + 1] == 0
    assert float(found.raw[row, last]) == pytest.approx(score - kl - before, rel=1e-5)
    assert float(theirs.raw[row, last]) == pytest.approx(after - kl - before + 0.95 * (score - after), rel=1e-4)
    at = ours.mask.flatten().nonzero()[:, 0].tolist().index(row * LONGEST + last)
    assert float(case.objective.rollouts.advantages[at]) == pytest.approx(float(found.advantages[row, last]), rel=1e-4)
    metrics, _ = case.ours()
    assert metrics["loss"] == pytest.approx(ours.loss()["loss"], rel=1e-4)
    assert abs(metrics["loss"] - trl.loss()["loss"]) > 0.01 * abs(metrics["loss"])


def test_means_are_those_of_the_step_and_not_of_micro_batches(folder, monkeypatch):
    """Both numbers: TRL averages the means of its micro-batches, so its loss depends on how answers of unlike length are cut."""
    case = Case(folder, monkeypatch)
    book = Book(case)
    metrics, _ = case.ours()
    cuts = [sum(book.loss(slice(i, i + n))["loss"] for i in range(0, 6, n)) * n / 6 for n in (1, 2, 3)]
    assert metrics["loss"] == pytest.approx(book.loss()["loss"], rel=1e-4)
    assert len({round(x, 4) for x in (metrics["loss"], *cuts)}) == 4
