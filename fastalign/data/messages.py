"""Text and messages: what a prompt or completion may be."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from fastalign.data.sources import kind_of
from fastalign.errors import DataError

Message = dict[str, Any]
Turns = str | list[Message]

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
_FOREIGN_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "ai": "assistant", "prompter": "user"}
_OTHER_CONTENT = ("tool_calls", "reasoning_content", "thinking")  # what a message may hold in place of content


def check_turns(place: str, column: str, value: Any) -> Turns:
    """`value` as text or messages, keys that are null left out. Raises DataError naming place, column, message and remedy."""
    if isinstance(value, str):
        check_text(f"{place}: column {column!r}", value)
        return value
    if isinstance(value, (list, tuple)):
        return [_message(place, column, number, message) for number, message in enumerate(value)]
    raise DataError(f"{place}: column {column!r}: expected text or a list of messages, got {kind_of(value)}; fill it in or remove the row")


def _message(place: str, column: str, number: int, message: Any) -> Message:
    where = f"{place}: column {column!r}, message {number}"
    if not isinstance(message, dict):
        remedy = 'write {"role": "user", "content": "..."}, one row per pair'
        raise DataError(f"{where}: expected an object with 'role' and 'content', got {kind_of(message)}; {remedy}")
    if "role" not in message:
        hint = "'from' and 'value' (ShareGPT) are named 'role' and 'content' here" if "from" in message else "name who speaks"
        raise DataError(f"{where}: 'role' is missing (keys: {', '.join(map(repr, message))}); {hint}")
    role = message["role"]
    if not isinstance(role, str):
        raise DataError(f"{where}: 'role' must be text, got {kind_of(role)}")
    if role not in ROLES:
        near = _FOREIGN_ROLES.get(role.lower()) or next(iter(get_close_matches(role.lower(), ROLES, n=1, cutoff=0.75)), None)
        if near:
            raise DataError(f"{where}: role {role!r} is unknown; did you mean {near!r}?")
    if message.get("content") is None and not any(message.get(key) for key in _OTHER_CONTENT):
        raise DataError(f"{where}: 'content' is {'null' if 'content' in message else 'missing'}; expected text")
    content = message.get("content")
    if isinstance(content, str):
        check_text(where, content)
    elif isinstance(content, (list, tuple)):
        for part in content:
            _check_part(where, part)
            check_text(where, part["text"])
    elif content is not None:
        raise DataError(f"{where}: 'content' must be text or a list of text parts, got {kind_of(content)}")
    return {key: value for key, value in message.items() if value is not None}


def _check_part(where: str, part: Any) -> None:
    if not isinstance(part, dict) or "type" not in part:
        raise DataError(f"{where}: a content part must be {{'type': 'text', 'text': ...}}, got {kind_of(part)}")
    if part["type"] != "text":
        raise DataError(f"{where}: content part of type {part['type']!r}; only text can be trained on, remove the row or the part")
    if not isinstance(part.get("text"), str):
        raise DataError(f"{where}: a text part's 'text' must be text, got {kind_of(part.get('text'))}")


def has_text(turns: Turns) -> bool:
    """Whether anybody says or calls anything; a message of white space does not."""
    if isinstance(turns, str):
        return bool(turns)
    return any(_says(message) for message in turns)


def _says(message: Message) -> bool:
    content = message.get("content", "")
    text = content if isinstance(content, str) else "".join(part["text"] for part in content)
    return bool(text.strip()) or any(message.get(key) for key in _OTHER_CONTENT)


def check_text(where: str, text: str) -> None:
    """Raises DataError when `text` holds half of a surrogate pair, which JSON can write and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise DataError(f"{where}: lone surrogate \\u{code:04x} at character {error.start}; write the whole pair or remove it") from error


def common_prefix_length(left: Sequence[Any], right: Sequence[Any]) -> int:
    """Length of the longest common prefix.

    >>> common_prefix_length([1, 2, 3], [1, 2, 4])
    2
    """
    shorter = min(len(left), len(right))
    if left[:shorter] == right[:shorter]:
        return shorter
    return next(i for i, (a, b) in enumerate(zip(left, right)) if a != b)
