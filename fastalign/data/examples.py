"""One row of preference data, checked and brought into one shape: prompt, chosen, rejected, each text or messages."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, NamedTuple

from fastalign.data.config import COLUMNS
from fastalign.data.messages import Turns, check_turns, common_prefix_length, has_text
from fastalign.data.sources import Row, kind_of
from fastalign.errors import DataError

_PROMPT_ALIASES = ("question", "instruction", "query", "input", "context", "prompts")
_TEMPLATE_ARGUMENTS = ("conversation", "tools", "add_generation_prompt", "continue_final_message", "tokenize", "return_dict")


@dataclass(frozen=True)
class PreferenceExample:
    """A valid row. `prompt`, `chosen` and `rejected` are all text or all message lists; `index` counts rows from 0."""

    place: str
    index: int
    prompt: Turns
    chosen: Turns
    rejected: Turns
    tools: list[Any] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    weight: float = 1.0

    @property
    def conversational(self) -> bool:
        return not isinstance(self.prompt, str)

    def prompt_key(self) -> bytes:
        """Digest that is equal for equal prompts (text or messages, with their tools)."""
        text = json.dumps([self.prompt, self.tools], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).digest()


class Dropped(NamedTuple):
    """A well-formed row that teaches nothing, and why."""

    place: str
    reason: str


def parse_example(place: str, index: int, row: Row, columns: Mapping[str, str]) -> PreferenceExample | Dropped:
    """Checks one row and splits off its prompt, explicit or implicit as TRL's `extract_prompt` finds it.

    `columns` maps our column names to the row's. Returns Dropped for an empty or identical pair; raises DataError, naming
    place, column and remedy, for a row that is malformed.
    """
    names = {name: columns.get(name, name) for name in COLUMNS}
    for name in ("chosen", "rejected", *columns):
        if names[name] not in row:
            raise DataError(f"{place}: column {names[name]!r} is missing{_missing_hint(row, name, names)}")
    _refuse_misspelt_prompt(place, row, names)
    chosen = check_turns(place, names["chosen"], row[names["chosen"]])
    rejected = check_turns(place, names["rejected"], row[names["rejected"]])
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise DataError(
            f"{place}: column {names['chosen']!r} is {kind_of(chosen)} but {names['rejected']!r} is {kind_of(rejected)}; "
            "give both as text or both as messages"
        )
    tools = _tools(place, names["tools"], row.get(names["tools"]))
    template_kwargs = _template_kwargs(place, names["chat_template_kwargs"], row.get(names["chat_template_kwargs"]))
    weight = _weight(place, names["weight"], row.get(names["weight"], 1.0) if names["weight"] in row else 1.0)
    prompt = check_turns(place, names["prompt"], row[names["prompt"]]) if names["prompt"] in row else None
    if prompt is not None and not has_text(prompt):
        raise DataError(f"{place}: column {names['prompt']!r}: the prompt is empty; give a prompt or remove the row")
    if reason := _drop_reason(chosen, rejected, weight):
        return Dropped(place, reason)
    prompt, chosen, rejected = _with_prompt(place, names, prompt, chosen, rejected)
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        if turns and not isinstance(turns, str) and turns[-1]["role"] in ("user", "system", "developer"):
            raise DataError(
                f"{place}: column {names[name]!r}: the last message has role {turns[-1]['role']!r}, expected 'assistant'; "
                "a completion ends with what the model should say, so remove what follows it"
            )
    if reason := _drop_reason(chosen, rejected, weight):
        return Dropped(place, reason)
    return PreferenceExample(place, index, prompt, chosen, rejected, tools, template_kwargs, weight)


def describe_format(columns: set[str]) -> str | None:
    """What a row with these columns looks like, for a reader who has brought the wrong kind of data."""
    if {"prompt", "completion", "label"} <= columns:
        return "unpaired preference (KTO) rows: a prompt, one completion and a label"
    if {"prompt", "completions", "labels"} <= columns:
        return "stepwise supervision (process reward) rows"
    if {"messages", "rejected_response"} <= columns:
        return "ms-swift preference rows: 'messages' with the chosen answer and a 'rejected_response'"
    if {"prompt", "completion"} <= columns:
        return "prompt-completion (SFT) rows"
    if {"instruction", "output"} <= columns:
        return "Alpaca (SFT) rows"
    if columns & {"conversations", "conversation"}:
        return "ShareGPT (SFT) rows"
    if "messages" in columns:
        return "conversations for SFT"
    if "text" in columns:
        return "text for SFT or pretraining"
    if "prompt" in columns and not columns & {"chosen", "rejected"}:
        return "prompts only (GRPO, PPO)"
    return None


def _missing_hint(row: Row, name: str, names: Mapping[str, str]) -> str:
    have = ", ".join(repr(key) for key in row) or "none"
    others = [key for key in row if key not in names.values()]
    missing = names[name]
    near = get_close_matches(missing, others, n=1, cutoff=0.7) or [key for key in others if key.startswith(missing)]
    if near:
        meant = f": did you mean {name!r}? Rename it, or set" if missing == name else "; set"
        return f", but there is {near[0]!r}{meant} data.columns {{{name}: {near[0]}}}"
    if missing != name:
        return f" (columns: {have}); data.columns says that {name!r} is there"
    if looks := describe_format(set(row)):
        return f" (columns: {have}); these look like {looks}, while preference training needs 'prompt', 'chosen' and 'rejected'"
    if {"chosen", "rejected"} & set(row):
        return f" (columns: {have}); every pair needs both 'chosen' and 'rejected'"
    return f" (columns: {have}); preference rows have 'prompt', 'chosen' and 'rejected': rename columns with data.columns"


def _refuse_misspelt_prompt(place: str, row: Row, names: Mapping[str, str]) -> None:
    """Without `prompt` the prompt is what chosen and rejected share, which would hide a column that was meant to be it."""
    if names["prompt"] in row:
        return
    others = [key for key in row if key not in names.values()]
    near = get_close_matches(names["prompt"], others, n=1, cutoff=0.75)
    if not near and isinstance(row[names["chosen"]], str):
        near = [key for key in others if key.lower() in _PROMPT_ALIASES][:1]
    if near:
        raise DataError(
            f"{place}: column {names['prompt']!r} is missing, but there is {near[0]!r}; rename it or set "
            f"data.columns {{prompt: {near[0]}}}, or remove it if chosen and rejected both begin with the prompt"
        )


def _tools(place: str, column: str, value: Any) -> list[Any] | None:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{place}: column {column!r}: text that is not JSON ({error}); give a list of tool schemas") from error
    if value is None:
        return None
    if not isinstance(value, (list, tuple)) or not all(isinstance(tool, dict) for tool in value):
        raise DataError(f"{place}: column {column!r}: expected a list of tool schemas (objects) or its JSON text, got {kind_of(value)}")
    return list(value)


def _template_kwargs(place: str, column: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise DataError(f"{place}: column {column!r}: expected an object such as {{'enable_thinking': false}}, got {kind_of(value)}")
    for name in _TEMPLATE_ARGUMENTS:
        if name in value:
            raise DataError(f"{place}: column {column!r}: {name!r} is set by the trainer; remove it")
    return {name: item for name, item in value.items() if item is not None}


def _weight(place: str, column: str, value: Any) -> float:
    remedy = "give a finite number, 0 or more, or leave the column out"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise DataError(f"{place}: column {column!r}: expected a number, got {kind_of(value)}; {remedy}")
    try:
        weight = float(value)
    except OverflowError:
        weight = math.inf
    if not 0.0 <= weight < math.inf:
        raise DataError(f"{place}: column {column!r}: expected a finite number of at least 0, got {kind_of(value)}; {remedy}")
    return weight


def _drop_reason(chosen: Turns, rejected: Turns, weight: float) -> str | None:
    if not has_text(chosen):
        return "chosen is empty"
    if not has_text(rejected):
        return "rejected is empty"
    if chosen == rejected:
        return "chosen and rejected are identical"
    if not weight:
        return "weight is 0"
    return None


def _with_prompt(place: str, names: Mapping[str, str], prompt: Turns | None, chosen: Turns, rejected: Turns) -> tuple[Turns, Turns, Turns]:
    if prompt is None:
        return _split_prompt(place, names, chosen, rejected)
    if isinstance(prompt, str) != isinstance(chosen, str):
        if isinstance(prompt, str) and common_prefix_length(chosen, rejected):
            return _split_prompt(place, names, chosen, rejected)  # the prompt column only repeats what the messages hold
        wanted = '[{"role": "user", "content": ...}]' if isinstance(prompt, str) else "text"
        raise DataError(
            f"{place}: column {names['prompt']!r} is {kind_of(prompt)} but {names['chosen']!r} is {kind_of(chosen)}; "
            f"give all three as text or all as messages (the prompt as {wanted})"
        )
    if not isinstance(prompt, str):
        for name, turns in (("chosen", chosen), ("rejected", rejected)):
            if turns[: len(prompt)] == prompt:
                raise DataError(
                    f"{place}: column {names[name]!r} repeats the messages of {names['prompt']!r}, which would train on the prompt twice; "
                    f"remove the column {names['prompt']!r} or the repeated messages"
                )
    return prompt, chosen, rejected


def _split_prompt(place: str, names: Mapping[str, str], chosen: Turns, rejected: Turns) -> tuple[Turns, Turns, Turns]:
    """The common beginning is the prompt; a space before the completions belongs to them, as in TRL's `extract_prompt`."""
    length = common_prefix_length(chosen, rejected)
    if length == min(len(chosen), len(rejected)):
        length -= 1  # one continues the other: its last item stays a completion
    elif length and chosen[length - 1] == " ":
        length -= 1
    if not has_text(chosen[:length]):
        raise DataError(
            f"{place}: no column {names['prompt']!r}, and {names['chosen']!r} and {names['rejected']!r} share no beginning "
            f"to serve as the prompt; add a column {names['prompt']!r}"
        )
    return chosen[:length], chosen[length:], rejected[length:]
