"""Judges: one score per completion of a prompt, from a function, or from a model behind an OpenAI-compatible endpoint.

An endpoint compares two completions at a time, always in both orders, because language models favour a position; or it
rates each completion on a scale. A reply that holds no verdict is asked for again, and then is a JudgeError: nothing is
made up, and the caller decides what becomes of the row.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal, NamedTuple, Protocol

from fastalign.errors import DependencyError, JudgeError
from fastalign.rollout import functions
from fastalign.rollout.functions import load_callable

Turns = str | list[dict[str, Any]]  # text, or messages
VERDICT = re.compile(r"\[\[\s*(A|B|TIE|-?\d+(?:\.\d+)?)\s*\]\]", re.IGNORECASE)
CRITERIA = "Prefer the answer that is more helpful, correct and harmless. Length and style alone are no merit."


class Verdict(NamedTuple):
    """What a judge says of the completions of one prompt."""

    scores: tuple[float, ...]  # higher is better; from comparisons: the share of comparisons won, a tie counting half
    consistent: int = 0  # pairs on which both orders named the same winner, or a tie
    compared: int = 0  # pairs that were asked in both orders
    first_wins: int = 0  # of the 2 * compared replies, those for the answer that stood first
    second_wins: int = 0


class Judge(Protocol):
    """Scores the completions of one prompt; may be called from several threads."""

    @property
    def fingerprint(self) -> str:
        """Changes with whatever changes the scores."""

    def __call__(self, prompt: Turns, completions: Sequence[Turns], columns: dict[str, Any]) -> Verdict:
        """Raises JudgeError when no verdict is to be had."""


@dataclass(frozen=True)
class FunctionJudge:
    """A Python function with the signature of TRL's reward functions.

    `function(prompts=[...], completions=[...], **columns)` gets one entry per completion, the prompt and every other
    column of the row repeated, and returns one finite number for each.
    """

    function: Callable[..., Sequence[float]]
    name: str
    fingerprint: str = ""

    def __call__(self, prompt: Turns, completions: Sequence[Turns], columns: dict[str, Any]) -> Verdict:
        repeated = {name: [value] * len(completions) for name, value in columns.items()}
        try:
            scores = list(self.function(prompts=[prompt] * len(completions), completions=list(completions), **repeated))
        except Exception as error:
            raise JudgeError(f"the judge {self.name} raised {type(error).__name__}: {error}") from error
        good = len(scores) == len(completions) and all(isinstance(s, (int, float)) and math.isfinite(s) for s in scores)
        if not good:
            raise JudgeError(f"the judge {self.name} must return {len(completions)} finite numbers, got {scores!r:.200}")
        return Verdict(tuple(float(s) for s in scores))


def load_function(name: str) -> FunctionJudge:
    """The judge `package.module:function` or `path/to/file.py:function`. Raises ConfigError when there is no such function."""
    function = load_callable(name, "judge.function")
    return FunctionJudge(function, name, functions.fingerprint(name, function))


class EndpointJudge:
    """A model behind an OpenAI-compatible `/v1/chat/completions`.

    mode "compare" asks which of two completions is better, each pair in both orders: k (k - 1) replies for k completions.
    "rate" asks for a number on `scale` for each. Transport errors, rate limits and time-outs are retried by the client,
    with growing pauses; a reply without a verdict is asked for again, at most `retries` times.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        mode: Literal["compare", "rate"] = "compare",
        scale: tuple[float, float] = (1.0, 10.0),
        criteria: str = CRITERIA,
        api_key_env: str = "OPENAI_API_KEY",
        timeout: float = 60.0,
        retries: int = 3,
        max_reply_tokens: int = 1024,
    ) -> None:
        try:
            from openai import OpenAI
        except ImportError as error:
            raise DependencyError("a judge behind an endpoint needs the openai client: pip install 'fastalign[judge]'") from error
        self.client = OpenAI(base_url=url, api_key=os.environ.get(api_key_env) or "none", timeout=timeout, max_retries=retries)
        self.model, self.mode, self.scale, self.criteria, self.retries = model, mode, scale, criteria, retries
        self.max_reply_tokens = max_reply_tokens
        self.fingerprint = f"{mode} {model} at {url}, scale {scale}, criteria {criteria}"

    def __call__(self, prompt: Turns, completions: Sequence[Turns], columns: dict[str, Any]) -> Verdict:
        if self.mode == "rate":
            return Verdict(tuple(self._rate(prompt, completion) for completion in completions))
        if len(completions) < 2:
            raise JudgeError("a comparison needs two completions: use judge.mode=rate for rows with one")
        won = [0.0] * len(completions)
        consistent = first_wins = second_wins = 0
        pairs = list(combinations(range(len(completions)), 2))
        for i, j in pairs:
            forward = self._compare(prompt, completions[i], completions[j])  # share won by the answer that stands first
            swapped = self._compare(prompt, completions[j], completions[i])
            won[i] += forward + 1 - swapped
            won[j] += swapped + 1 - forward
            consistent += forward == 1 - swapped
            first_wins += (forward == 1) + (swapped == 1)
            second_wins += (forward == 0) + (swapped == 0)
        asked = 2 * (len(completions) - 1)
        return Verdict(tuple(w / asked for w in won), consistent, len(pairs), first_wins, second_wins)

    def _compare(self, prompt: Turns, a: Turns, b: Turns) -> float:
        question = (
            f"Two answers to the same conversation follow. {self.criteria}\n\n"
            f"<conversation>\n{as_text(prompt)}\n</conversation>\n\n<answer_a>\n{as_text(a)}\n</answer_a>\n\n"
            f"<answer_b>\n{as_text(b)}\n</answer_b>\n\n"
            "Weigh them briefly. Then end with your verdict alone on the last line: [[A]], [[B]] or [[TIE]]."
        )
        value = {"A": 1.0, "B": 0.0, "TIE": 0.5}
        return self._ask(question, value.get, "[[A]], [[B]] or [[TIE]]")

    def _rate(self, prompt: Turns, completion: Turns) -> float:
        low, high = self.scale
        question = (
            f"Rate the answer to the following conversation from {low:g} (worst) to {high:g} (best). {self.criteria}\n\n"
            f"<conversation>\n{as_text(prompt)}\n</conversation>\n\n<answer>\n{as_text(completion)}\n</answer>\n\n"
            f"Weigh it briefly. Then end with the number alone on the last line, in double brackets, such as [[{high:g}]]."
        )

        def number(text: str) -> float | None:
            return float(text) if text not in ("A", "B", "TIE") and low <= float(text) <= high else None

        return self._ask(question, number, f"a number from {low:g} to {high:g} in double brackets")

    def _ask(self, question: str, read: Callable[[str], float | None], wanted: str) -> float:
        import openai

        messages: list[Any] = [{"role": "user", "content": question}]
        reply = ""
        for _ in range(self.retries + 1):
            try:
                answer = self.client.chat.completions.create(
                    model=self.model, messages=messages, temperature=0, max_tokens=self.max_reply_tokens
                )
            except (openai.OpenAIError, ValueError) as error:  # ValueError: a body that is no JSON
                raise JudgeError(f"the judge {self.model} at {self.client.base_url} did not answer: {error}") from error
            reply = _text_of(answer)
            found = VERDICT.findall(reply)
            value = read(found[-1].upper()) if found else None
            if value is not None:
                return value
            messages = [*messages[:1], {"role": "assistant", "content": reply}, {"role": "user", "content": f"Reply with {wanted} only."}]
        raise JudgeError(f"the judge {self.model} gave no verdict in {self.retries + 1} replies; the last was {reply!r:.200}")


def _text_of(answer: Any) -> str:
    """What a chat reply says: "" where it holds no text, as the page of a proxy or an object of another shape does not."""
    try:
        content = answer.choices[0].message.content
    except (AttributeError, IndexError, TypeError):
        return ""
    return content if isinstance(content, str) else ""


def as_text(turns: Turns) -> str:
    """A conversation as a judge reads it.

    >>> print(as_text([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]))
    user: Hi
    assistant: Hello
    """
    if isinstance(turns, str):
        return turns
    lines = []
    for message in turns:
        content = message.get("content") or ""
        text = content if isinstance(content, str) else "".join(part["text"] for part in content)
        calls = f" {message['tool_calls']}" if message.get("tool_calls") else ""
        lines.append(f"{message['role']}: {text}{calls}")
    return "\n".join(lines)
