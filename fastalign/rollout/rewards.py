"""Rewards of completions: functions with TRL's signature, and the usual ones built in.

A reward function is called once for all completions of a generation, by keywords:

    reward(prompts=[...], completions=[...], completion_ids=[[int, ...], ...], **columns) -> list[float | None]

with one entry per completion in each list: `prompts` and `completions` are text, or messages where the prompt is a
conversation, and every other column of the prompt's row, unless it has one of these names, is repeated for its completions.
It may be a coroutine function. None means that this function has nothing to say of a completion.

Beside a service in the same process answers go on while a reward function is waited for. One that runs a model on the service's device, or
draws torch's random numbers, says so by an attribute `on_device = True`, and has the device for itself.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import nullcontext
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from fastalign.errors import ConfigError, RewardError
from fastalign.pausing import aside
from fastalign.rollout.functions import load_callable
from fastalign.rollout.judges import Turns, as_text

Rewards = list[float | None]
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")


@dataclass(frozen=True)
class Reward:
    """A named reward function and its weight in the sum."""

    name: str
    function: Callable[..., Any]
    weight: float = 1.0


def exact_match(completions: Sequence[Turns], answer: Sequence[str], **_: Any) -> Rewards:
    """1 where the completion is the column `answer`, white space around both aside, else 0.

    >>> exact_match(["42 ", "41"], answer=["42", "42"])
    [1.0, 0.0]
    """
    return [float(completion_text(c).strip() == str(a).strip()) for c, a in zip(completions, answer)]


def numeric_match(completions: Sequence[Turns], answer: Sequence[Any], **_: Any) -> Rewards:
    """1 where the last number in the completion equals the column `answer` as a number, else 0; None where `answer` is no number.

    Thousands may be parted by commas, and fractions are numbers: 1,000.50 and 1/2.

    >>> numeric_match(["so it is 1,000.0", "12 or 13", "none"], answer=["1000", "12", "3"])
    [1.0, 0.0, 0.0]
    """
    rewards: Rewards = []
    for completion, wanted in zip(completions, answer):
        target, said = last_number(str(wanted)), last_number(completion_text(completion))
        rewards.append(None if target is None else float(said == target))
    return rewards


def tagged_format(completions: Sequence[Turns], **_: Any) -> Rewards:
    """1 where the completion is <think>...</think> followed by <answer>...</answer> and nothing else, else 0.

    >>> tagged_format(["<think>hm</think> <answer>4</answer>", "4"])
    [1.0, 0.0]
    """
    shape = re.compile(r"\s*<think>(?:(?!</?think>).)*</think>\s*<answer>(?:(?!</?answer>).)*</answer>\s*", re.DOTALL)
    return [float(bool(shape.fullmatch(completion_text(c)))) for c in completions]


def soft_overlong(length: int, margin: int) -> Callable[..., Rewards]:
    """0 up to `length - margin` tokens, then falling to -1 at `length` and beyond. DAPO, Yu 2025, arXiv:2503.14476 eq. 13.

    >>> soft_overlong(10, 4)(completion_ids=[[0] * 6, [0] * 8, [0] * 12])
    [0.0, -0.5, -1.0]
    """
    if not 0 < margin <= length:
        raise ConfigError(f"soft_overlong needs 0 < margin <= length, got margin {margin} and length {length}")

    def reward(completion_ids: Sequence[Sequence[int]], **_: Any) -> Rewards:
        return [-min(1.0, max(0.0, (len(ids) - (length - margin)) / margin)) + 0.0 for ids in completion_ids]

    return reward


def repetition(n: int = 3) -> Callable[..., Rewards]:
    """Minus the share of n-grams of tokens that repeat an earlier one. Yeo 2025, arXiv:2502.03373 appendix C.2.

    >>> repetition(2)(completion_ids=[[1, 2, 3, 4], [5, 5, 5, 5, 5]])
    [0.0, -0.75]
    """
    if n < 1:
        raise ConfigError(f"repetition counts n-grams of at least 1 token, got {n}")

    def reward(completion_ids: Sequence[Sequence[int]], **_: Any) -> Rewards:
        rewards: Rewards = []
        for ids in completion_ids:
            grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
            rewards.append(len(set(grams)) / len(grams) - 1 if grams else 0.0)
        return rewards

    return reward


BUILT_IN: dict[str, Callable[..., Rewards]] = {
    "exact_match": exact_match,
    "numeric_match": numeric_match,
    "tagged_format": tagged_format,
    "repetition": repetition(),
}


FORMS = {"soft_overlong": "soft_overlong:LENGTH:MARGIN", "repetition": "repetition or repetition:N"}  # numbers of tokens


def built_in(name: str) -> Callable[..., Rewards] | None:
    """The built-in reward that `name` names, its numbers after colons; None for other names. Raises ConfigError for other numbers.

    >>> built_in("repetition:2")(completion_ids=[[5, 5, 5]])
    [-0.5]
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    kind, *numbers = name.split(":")
    if kind not in FORMS:
        return None
    if len(numbers) != (2 if kind == "soft_overlong" else 1) or not all(number.isascii() and number.isdigit() for number in numbers):
        raise ConfigError(f"rewards: write {FORMS[kind]}, with whole numbers of tokens, got {name!r}")
    given = [int(number) for number in numbers]
    return soft_overlong(*given) if kind == "soft_overlong" else repetition(*given)


def load_rewards(names: Sequence[str], weights: Sequence[float] | None = None) -> list[Reward]:
    """Built-in names, MODULE:FUNCTION and FILE.py:FUNCTION, with their weights (None: 1 each). Raises ConfigError."""
    weights = [1.0] * len(names) if weights is None else list(weights)
    if len(weights) != len(names) or not all(math.isfinite(w) for w in weights):
        raise ConfigError(f"reward_weights must be one finite number for each of the {len(names)} reward functions, got {weights}")
    found = []
    for name, weight in zip(names, weights):
        function = built_in(name)
        if function is None and ":" not in name:
            known = ", ".join([*(n for n in BUILT_IN if n not in FORMS), *FORMS.values()])
            raise ConfigError(f"rewards: no built-in reward is called {name!r}; there are {known}, and FILE.py:FUNCTION")
        short = name if function else name.rpartition(":")[2]
        found.append(Reward(short, function or load_callable(name, "rewards"), weight))
    names_seen = [reward.name for reward in found]
    if len(set(names_seen)) < len(names_seen):
        raise ConfigError(f"rewards: two functions have the same name, which their metrics could not tell apart: {', '.join(names_seen)}")
    return found


def score(
    rewards: Sequence[Reward],
    prompts: Sequence[Turns],
    completions: Sequence[Turns],
    completion_ids: Sequence[Sequence[int]],
    columns: Mapping[str, Sequence[Any]],
    *,
    timeout: float | None = None,
) -> list[list[float]]:
    """One row per completion, one column per function, unweighted; NaN where a function gave None.

    `timeout`: seconds for one function. Raises RewardError naming the function, and the completion where one is to blame: for
    an exception, a result of another length, and a reward that is no finite number.
    """
    table = []
    for reward in rewards:
        given = {"prompts": list(prompts), "completions": list(completions), "completion_ids": [list(ids) for ids in completion_ids]}
        with nullcontext() if getattr(reward.function, "on_device", False) else aside():
            values = _call(reward, {name: list(column) for name, column in columns.items()} | given, timeout)
        if not isinstance(values, (list, tuple)) or len(values) != len(completions):
            got = f"{len(values)} values" if isinstance(values, (list, tuple)) else type(values).__name__
            raise RewardError(f"reward {reward.name}: expected a list of {len(completions)} numbers, one per completion, got {got}")
        table.append([_number(reward.name, i, value, completions[i]) for i, value in enumerate(values)])
    return [list(row) for row in zip(*table)] if table else [[] for _ in completions]


def completion_text(completion: Turns) -> str:
    """What the assistant said: the text, or the content of a completion in messages."""
    if isinstance(completion, str):
        return completion
    return "\n".join(as_text([message]).partition(": ")[2] for message in completion)


def last_number(text: str) -> Fraction | None:
    """The last number in a text, exactly.

    >>> last_number("3 of 1,000.5")
    Fraction(2001, 2)
    """
    found = NUMBER.findall(text)
    try:
        return Fraction(found[-1].replace(",", "")) if found else None
    except (ValueError, ZeroDivisionError):
        return None


def _call(reward: Reward, given: dict[str, Any], timeout: float | None) -> Any:
    """The function's result; under a time limit it runs in a thread that is left behind when the time is up."""

    def run() -> Any:
        result = reward.function(**given)
        return asyncio.run(_awaited(result)) if inspect.isawaitable(result) else result

    outcome: Future[Any] = Future()
    if timeout is None:
        _settle(outcome, run)
    else:
        threading.Thread(target=_settle, args=(outcome, run), daemon=True).start()
        if not wait([outcome], timeout).done:
            raise RewardError(f"reward {reward.name}: no result after {timeout:g} s; raise reward_timeout, or make the function faster")
    error = outcome.exception()
    if isinstance(error, Exception):
        raise RewardError(f"reward {reward.name} raised {type(error).__name__}: {error}") from error
    return outcome.result()


def _settle(outcome: Future[Any], run: Callable[[], Any]) -> None:
    try:
        outcome.set_result(run())
    except BaseException as error:
        outcome.set_exception(error)


async def _awaited(result: Any) -> Any:
    return await result


def _number(name: str, i: int, value: Any, completion: Turns) -> float:
    if value is None:
        return math.nan
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        shown = completion_text(completion)[:60]
        raise RewardError(f"reward {name}: completion {i} ({shown!r}) got {value!r}; return a finite number, or None to abstain")
    return number
