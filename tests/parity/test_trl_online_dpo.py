"""`fastalign online_dpo` and TRL 1.16's OnlineDPOTrainer: the same three optimizer steps on the same answers.

TRL asks its model to generate, and gets the answers that ours gets; whatever else it does, with its padding, rewards, pairs, reference,
loss and optimizer, is its own. Ours cuts a step into several packed micro-batches, TRL pads it into one. Two things differ on
purpose, and both numbers are shown: TRL counts padding in objective/kl, objective/entropy and what is made of them; and it makes a pair
of answers that were rewarded alike, the first as the better one.
"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import preference_rows, tiny_tokenizer

from fastalign.data.config import PromptDataConfig
from fastalign.objectives.online_dpo import OnlineDPOConfig
from fastalign.rollout.generate import Completion

pytest.importorskip("trl", reason="TRL is the oracle; without it the equality of a step with TRL's is unproven")
from transformers import AutoModelForCausalLM
from trl.experimental import online_dpo
from trl_runs import BATCH, Run, assert_same_run, run_ours, run_trl, starting_weights, with_adapter, write_inputs

LONGEST = 9
END = tiny_tokenizer().eos_token_id
OF_PAIRS = ("loss", "grad_norm", "learning_rate", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
OF_PAIRS += ("logps/chosen", "logps/rejected", "val/contain_eos_token", "objective/scores", "objective/scores_margin")
OF_TOKENS = ("objective/kl", "objective/entropy", "objective/non_score_reward", "objective/rlhf_reward")
REWARDS = """
import zlib

def own(completions, **columns):
    return [zlib.crc32(c.encode()) % 9973 / 997 - 5 for c in completions]

def often_alike(completions, **columns):
    return [float(zlib.crc32(c.encode()) % 2) for c in completions]

def first_if_alike(completions, **columns):
    return [r + 1e-6 * (i % 2 == 0) for i, r in enumerate(often_alike(completions))]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = preference_rows(BATCH, seed=2)
    folder = write_inputs(tmp_path_factory.mktemp("online_dpo"), {"prompts": [{"prompt": row["prompt"]} for row in rows]})
    (folder / "mine.py").write_text(REWARDS)
    return folder


@pytest.fixture(autouse=True)
def _no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastalign.train.loop.write_report", lambda run: run)


def answer(prompt: Sequence[int], step: int, draw: int) -> list[int]:
    """The prompt's answer number `draw` at a step, of 2 to `LONGEST` tokens; two of three have an end."""
    rng = random.Random(f"{list(prompt)} {step} {draw}")
    tokens = [rng.randrange(10, 300) for _ in range(LONGEST)]
    if rng.random() < 2 / 3:
        tokens = [*tokens[: rng.randint(1, LONGEST - 1)], END]
    return tokens


def ours(folder: Path, output: Path, *, lora: bool = False, reward: str = "own", **options: Any) -> Run:
    def generate(model: Any, prompts: Sequence[Sequence[int]], *, seed: Sequence[int], **_: Any) -> list[Completion]:
        said = [answer(prompt, seed[1] - 1, i % 2) for i, prompt in enumerate(prompts)]
        return [Completion(tuple(tokens), (0.0,) * len(tokens), tokens[-1] == END) for tokens in said]

    given = {"rewards": [f"{folder}/mine.py:{reward}"], "max_completion_length": LONGEST} | options
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("fastalign.rollout.engine.generate", generate)
        return run_ours(OnlineDPOConfig, folder, output, PromptDataConfig(path=str(folder / "prompts.jsonl")), lora=lora, **given)


def trl(folder: Path, *, lora: bool = False, reward: str = "own", masked: bool = False, **options: Any) -> Run:
    """`masked`: log-probs of padding are 0 in all that it computes."""

    class Told(online_dpo.OnlineDPOTrainer):  # type: ignore[misc]
        def __init__(self, **given: Any) -> None:
            super().__init__(reward_funcs=rewards(folder, reward), **given)
            self.model.generate = self.say

        def say(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> torch.Tensor:
            prompts = [row[kept == 1].tolist() for row, kept in zip(input_ids, attention_mask)]
            said = [answer(p, self.state.global_step, i // (len(prompts) // 2)) for i, p in enumerate(prompts)]
            pad = self.processing_class.pad_token_id
            longest = max(map(len, said))
            return torch.cat((input_ids, torch.tensor([tokens + [pad] * (longest - len(tokens)) for tokens in said])), 1)

        def _forward(self, model: Any, prompt_ids: Any, prompt_mask: Any, completion_ids: Any, completion_mask: Any, *more: Any) -> Any:
            found = super()._forward(model, prompt_ids, prompt_mask, completion_ids, completion_mask, *more)
            return found * completion_mask if masked else found

    model = with_adapter(folder) if lora else AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    data, tokenizer = folder / "prompts.jsonl", folder / "model"
    given = {"max_new_tokens": LONGEST, "gradient_checkpointing": False} | options
    return run_trl(folder, Told, online_dpo.OnlineDPOConfig, model, data, tokenizer=tokenizer, **given)


def rewards(folder: Path, name: str) -> Callable[..., list[float]]:
    spec = importlib.util.spec_from_file_location("mine", folder / "mine.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)  # type: ignore[no-any-return]


def near_zero(name: str) -> float:
    """Metrics that are sums of differences of log-probs, of tens of nats, are 0 to their rounding at the first step."""
    return 1e-4 if name.startswith(("rewards/", "objective/")) else 2e-6


CASES: dict[str, tuple[bool, dict[str, Any]]] = {  # whether an adapter is trained
    "sigmoid": (False, {"beta": 0.1}),
    "ipo, an end is wanted": (False, {"loss_type": "ipo", "beta": 0.3, "missing_eos_penalty": 3.0}),
    "sigmoid, adapter": (True, {"beta": 0.2}),
    "ipo, adapter": (True, {"loss_type": "ipo", "beta": 0.1}),
}


@pytest.mark.parametrize("case", CASES)
def test_three_steps_equal_trl(folder: Path, tmp_path: Path, case: str) -> None:
    lora, options = CASES[case]
    start = starting_weights(folder, lora)
    oracle = trl(folder, lora=lora, **options)
    assert_same_run(ours(folder, tmp_path / "run", lora=lora, **options), oracle, start, OF_PAIRS, near_zero)
    if case == "sigmoid":  # the comparison has the power to fail
        other = ours(folder, tmp_path / "other", beta=0.102)
        with pytest.raises(AssertionError, match="step"):
            assert_same_run(other, oracle, start, OF_PAIRS, near_zero)


def test_trl_counts_padding_in_the_divergence(folder: Path, tmp_path: Path) -> None:
    """In a TRL that does not look at padding every metric is the same; else those are not that it takes over tokens."""
    start = starting_weights(folder, False)
    ragged, padded = ours(folder, tmp_path / "ragged"), trl(folder)
    assert_same_run(ragged, trl(folder, masked=True), start, (*OF_PAIRS, *OF_TOKENS), near_zero)
    assert_same_run(ragged, padded, start, OF_PAIRS, near_zero)
    for step in (1, 2):
        assert padded.steps[step]["objective/entropy"] > 1.2 * ragged.steps[step]["objective/entropy"]
        assert abs(padded.steps[step]["objective/kl"] - ragged.steps[step]["objective/kl"]) > 0.02


def test_trl_makes_a_pair_of_answers_that_are_alike(folder: Path, tmp_path: Path) -> None:
    """Its three steps are ours where the first of them is rewarded a millionth more; left alone, ours have no such pair."""
    start = starting_weights(folder, True)
    oracle = trl(folder, lora=True, reward="often_alike")
    broken, apart = (ours(folder, tmp_path / name, lora=True, reward=name) for name in ("first_if_alike", "often_alike"))
    assert_same_run(broken, oracle, start, OF_PAIRS, near_zero)
    assert all(0 < step["frac_ties"] < 1 for step in apart.steps) and not any(step["frac_ties"] for step in broken.steps)
    assert all(abs(mine["loss"] - theirs["loss"]) > 1e-3 for mine, theirs in list(zip(apart.steps, oracle.steps))[1:3])
    assert all(step["objective/scores_margin"] == pytest.approx(1.0) for step in apart.steps)
    assert all(step["objective/scores_margin"] < 0.9 for step in oracle.steps[:3])
