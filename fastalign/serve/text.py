"""From tokens, one at a time, to the text that may be shown: whole characters only, and nothing from a stop string on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class TextStream:
    """The text of one answer as its tokens come.

    The pieces that `push` and `finish` return add up to the decoded tokens, special tokens left out, up to the first stop
    string. Text that may still become a stop string or part of a longer character is held back.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, tuple(stops)
        self.stopped = False  # a stop string came
        self._ids: list[int] = []
        self._start = self._end = 0  # tokens before `_end` have been read; those from `_start` on are the context of the next
        self._held = ""

    def push(self, token: int) -> str:
        """What can be shown after one more token."""
        self._ids.append(token)
        return self._show(self._read(partial=False), last=False)

    def finish(self) -> str:
        """What was held back, when no more tokens come."""
        return self._show(self._read(partial=True), last=True)

    def _read(self, *, partial: bool) -> str:
        """The text of the tokens since the last call, "" while they end inside a character."""
        before, after = self._decode(self._start, self._end), self._decode(self._start, len(self._ids))
        if not partial and after.endswith("\ufffd"):
            return ""
        self._start, self._end = self._end, len(self._ids)
        return after[len(before) :]

    def _decode(self, start: int, end: int) -> str:
        return self.tokenizer.decode(self._ids[start:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _show(self, text: str, *, last: bool) -> str:
        if self.stopped:
            return ""
        held = self._held + text
        found = [at for stop in self.stops if (at := held.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return held[: min(found)]
        kept = 0 if last else max((_overlap(held, stop) for stop in self.stops), default=0)
        self._held = held[len(held) - kept :]
        return held[: len(held) - kept]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that a stop string begins with.

    >>> _overlap("so far\\n", "\\n\\n"), _overlap("so far", "\\n\\n")
    (1, 0)
    """
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
