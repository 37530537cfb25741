"""Answers and feedback for tests of the loop, in a few words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastalign.serve.records import Answer, Feedback
from fastalign.serve.store import Store


class Talk:
    """A store with the versions base (live) and one (its candidate), to which people say things."""

    def __init__(self, path: Path) -> None:
        self.store = Store(path)
        self.store.add_version("base", path.parent)
        self.store.promote("base")
        self.store.add_version("one", path.parent, parent="base")
        self.waiting: list[Any] = []

    def answers(self, *given: tuple[str, str, str] | Answer, version: str = "base") -> None:
        """(id, question, text), or whole answers."""
        self.store.add_answers([one if isinstance(one, Answer) else made(*one, version=version) for one in given])

    def said(self, *given: tuple[str, str, str, Any]) -> None:
        """(user, kind, answer, value), all of them on the disk when this returns."""
        done = [self.store.add_feedback_later(Feedback(answer, kind, value, user)) for user, kind, answer, value in given]  # type: ignore[arg-type]
        for one in done:
            one.result()


def made(id: str, question: str | Sequence[str], text: str, *, version: str = "base", finish_reason: str = "stop", **more: Any) -> Answer:
    """An answer to a question, or to a conversation whose turns are by user and assistant."""
    turns = [question] if isinstance(question, str) else list(question)
    messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    prompt = tuple("\0".join(turns).encode()) or (0,)
    return Answer(id, f"r{id}", messages, prompt, text, (1,), (-1.0,), version, "asker", 1.0, finish_reason, **more)  # type: ignore[arg-type]
