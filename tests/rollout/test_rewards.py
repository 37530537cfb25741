"""Reward functions: what they are given, what they may give back, and who is named when they fail."""

import math
import sys
import time

import pytest
from trl.rewards import get_repetition_penalty_reward, get_soft_overlong_punishment

from fastalign.errors import ConfigError, RewardError
from fastalign.rollout.rewards import Reward, completion_text, exact_match, load_rewards, numeric_match, repetition, score, soft_overlong

IDS = [[1, 2, 3, 1, 2, 3, 1], [4], [], [7] * 9, list(range(12))]
TURNS = [{"role": "assistant", "content": "it is: 4"}]


def scored(function, completions=("a", "b"), timeout=None, **columns):
    ids = [[0]] * len(completions)
    return score([Reward("mine", function)], ["p"] * len(completions), list(completions), ids, columns, timeout=timeout)


def test_repetition_and_length_are_those_of_trl():
    for n in (1, 2, 3):
        assert repetition(n)(completion_ids=IDS) == pytest.approx(get_repetition_penalty_reward(n)(IDS))
    for length, margin in ((10, 4), (9, 9), (12, 1)):
        assert soft_overlong(length, margin)(completion_ids=IDS) == pytest.approx(get_soft_overlong_punishment(length, margin)(IDS))


@pytest.mark.parametrize(
    ("said", "wanted", "reward"),
    [
        ("the answer is -3", "-3", 1.0),
        ("1/2", "0.5", 1.0),
        ("0.1 + 0.2 = 0.3", "0.30", 1.0),
        ("1,234,567", 1234567, 1.0),
        ("3, no, 4", "3", 0.0),
        ("1/0", "1", 0.0),
        ("many", "1", 0.0),
        ("1", "many", None),
    ],
)
def test_numbers_are_compared_exactly(said, wanted, reward):
    assert numeric_match([said], answer=[wanted]) == [reward]


def test_completions_may_be_messages():
    assert exact_match([TURNS], answer=["it is: 4"]) == [1.0]
    assert completion_text(TURNS) == "it is: 4"


def test_functions_get_every_column_and_may_abstain():
    seen = {}

    def mine(**given):
        seen.update(given)
        return [1, None]

    assert scored(mine, answer=["x", "y"])[0] == [1.0]
    assert math.isnan(scored(mine, answer=["x", "y"])[1][0])
    own = {"prompts": ["p", "p"], "completions": ["a", "b"], "completion_ids": [[0], [0]]}
    assert seen == {**own, "answer": ["x", "y"]}
    score([Reward("mine", mine)], ["p", "p"], ["a", "b"], [[0], [0]], {"completions": ["of", "the data"], "answer": ["x", "y"]})
    assert seen == {**own, "answer": ["x", "y"]}


def test_coroutine_functions_are_awaited_also_under_a_time_limit():
    async def mine(completions, **_):
        return [float(len(c)) for c in completions]

    assert scored(mine) == scored(mine, timeout=60.0) == [[1.0], [1.0]]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([1.0], "expected a list of 2 numbers, one per completion, got 1 values"),
        (1.0, "got float"),
        ([1.0, math.nan], r"completion 1 \('b'\) got nan; return a finite number, or None"),
        ([math.inf, 1.0], r"completion 0 \('a'\) got inf"),
        ([1.0, "good"], r"completion 1 \('b'\) got 'good'"),
    ],
)
def test_what_is_no_reward_is_an_error(result, message):
    with pytest.raises(RewardError, match=f"reward mine: .*{message}|reward mine: {message}"):
        scored(lambda **_: result)


def test_exceptions_and_endless_functions_are_named():
    with pytest.raises(RewardError, match="reward mine raised KeyError: 'answer'"):
        scored(lambda **given: given["answer"])
    with pytest.raises(RewardError, match=r"reward mine: no result after 0.05 s"):
        scored(lambda **_: time.sleep(60), timeout=0.05)  # in a thread that is left behind
    with pytest.raises(RewardError, match="reward mine raised TimeoutError"):  # its own, not ours
        scored(_times_out)


def _times_out(**_):
    raise TimeoutError("mine")


def test_rewards_are_loaded_by_name(tmp_path):
    (tmp_path / "own.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n@dataclass\nclass Limits:\n    low: float = 0.0\n\n"
        "def close(completions, **_):\n    return [Limits().low] * len(completions)\n"
    )
    (tmp_path / "torn.py").write_text("def close(:\n")
    found = load_rewards(["numeric_match", f"{tmp_path}/own.py:close"], [1.0, 0.5])
    assert [(r.name, r.weight) for r in found] == [("numeric_match", 1.0), ("close", 0.5)]
    for names, weights, message in [
        (["numbers"], None, "no built-in reward is called 'numbers'"),
        (["repetition"], [1.0, 2.0], "one finite number for each of the 1"),
        (["repetition", "repetition"], None, "two functions have the same name"),
        (["no.py:f"], None, "rewards: no.py cannot be loaded"),
        ([f"{tmp_path}/torn.py:close"], None, r"torn.py cannot be loaded: .*\(torn.py, line 1\)"),
    ]:
        with pytest.raises(ConfigError, match=message):
            load_rewards(names, weights)
    found = load_rewards(["soft_overlong:10:4", "repetition:2", "repetition:1", "repetition"])
    assert [r.name for r in found] == ["soft_overlong:10:4", "repetition:2", "repetition:1", "repetition"]
    alone = (soft_overlong(10, 4), repetition(2), repetition(1), repetition())
    assert [r.function(completion_ids=IDS) for r in found] == [function(completion_ids=IDS) for function in alone]
    for name, message in [
        ("soft_overlong", "write soft_overlong:LENGTH:MARGIN, with whole numbers of tokens, got 'soft_overlong'"),
        ("soft_overlong:10", "write soft_overlong:LENGTH:MARGIN"),
        ("soft_overlong:10:-4", "write soft_overlong:LENGTH:MARGIN"),
        ("soft_overlong:4:10", "needs 0 < margin <= length, got margin 10 and length 4"),
        ("repetition:two", "write repetition or repetition:N, .* got 'repetition:two'"),
        ("repetition:2:3", "write repetition or repetition:N"),
        ("repetition:0", "n-grams of at least 1 token, got 0"),
        ("overlong", "there are exact_match, numeric_match, tagged_format, soft_overlong:LENGTH:MARGIN, repetition or repetition:N, and"),
    ]:
        with pytest.raises(ConfigError, match=message):
            load_rewards([name])
    for bad in (lambda: soft_overlong(3, 4), lambda: repetition(0)):
        with pytest.raises(ConfigError):
            bad()


def test_a_module_is_found_in_the_current_folder_but_not_before_others(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "only_here.py").write_text("def good(completions, **columns):\n    return [2.0] * len(completions)\n")
    (tmp_path / "fractions.py").write_text("raise RuntimeError('not the one that was meant')\n")
    found = load_rewards(["only_here:good"])
    assert found[0].function(completions=["a", "b"]) == [2.0, 2.0]
    assert sys.path[-1] == str(tmp_path)
    assert load_rewards(["fractions:Fraction"])[0].name == "Fraction"
