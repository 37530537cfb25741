"""A row of data in one shape for every kind of training: a prompt and its completions, each text or messages."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal, NamedTuple

from fastalign.data.config import SourceConfig
from fastalign.data.messages import Turns, check_turns
from fastalign.data.sources import Row, kind_of
from fastalign.errors import DataError

_TEMPLATE_ARGUMENTS = ("conversation", "tools", "add_generation_prompt", "continue_final_message", "tokenize", "return_dict")


@dataclass(frozen=True)
class Example:
    """A valid row. The prompt and the completions are all text or all message lists.

    Without a prompt (None) the one completion is a whole text or conversation; without completions it is a prompt to
    answer. `index` counts examples from 0, `scored` says which tokens are labels, `labels` and `margin` are those of `Sample`.
    """

    place: str
    index: int
    prompt: Turns | None
    completions: tuple[Turns, ...]
    tools: list[Any] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    weight: float = 1.0
    labels: tuple[float, ...] = ()
    margin: float = 0.0
    scored: Literal["completion", "all", "assistant", "assistant_in_completion"] = "completion"

    @property
    def conversational(self) -> bool:
        return not isinstance(self.completions[0] if self.completions else self.prompt, str)

    def prompt_key(self) -> bytes:
        """Digest that is equal for equal prompts (text or messages, with their tools).

        The prompt of a whole conversation is what comes before the assistant first speaks; that of a text is the text.
        """
        prompt = self.prompt
        if prompt is None:
            prompt = self.completions[0]
            if not isinstance(prompt, str):
                prompt = prompt[: next((i for i, message in enumerate(prompt) if message["role"] == "assistant"), None)]
        return _digest([prompt, self.tools])

    def content_key(self) -> bytes:
        """Digest that is equal for examples with the same prompt, completions and labels."""
        return _digest([self.prompt, self.tools, self.template_kwargs, self.completions, self.labels, self.margin])


class Dropped(NamedTuple):
    """A well-formed row that teaches nothing, and why."""

    place: str
    reason: str


Parse = Callable[[str, int, Row, Any], Sequence[Example | Dropped]]  # (place, index of the first example, row, config)


class Fields:
    """One row under our column names. Every error names the place, the column as the data calls it, and the remedy."""

    def __init__(self, place: str, row: Row, config: SourceConfig) -> None:
        self.place, self.row, self.config = place, row, config
        self.names = {name: config.columns.get(name, name) for name in config.column_names}

    def __contains__(self, name: str) -> bool:
        return self.names[name] in self.row

    def where(self, name: str) -> str:
        return f"{self.place}: column {self.names[name]!r}"

    def require(self, *names: str) -> None:
        """Raises DataError for the first of `names`, or of the columns that the user has renamed, that the row lacks."""
        for name in (*names, *self.config.columns):
            if name not in self:
                raise DataError(f"{self.where(name)} is missing{self._missing_hint(name, names)}")

    def value(self, name: str, default: Any = None) -> Any:
        return self.row.get(self.names[name], default)

    def turns(self, name: str) -> Turns:
        return check_turns(self.place, self.names[name], self.row[self.names[name]])

    def number(self, name: str, remedy: str) -> float:
        return self.as_number(self.where(name), self.row[self.names[name]], remedy)

    @staticmethod
    def as_number(where: str, value: Any, remedy: str) -> float:
        """`value` as a finite float; booleans and text are no numbers."""
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise DataError(f"{where}: expected a number, got {kind_of(value)}; {remedy}")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise DataError(f"{where}: expected a finite number, got {kind_of(value)}; {remedy}")
        return number

    def options(self) -> dict[str, Any]:
        """What every kind of row may carry: tools, template_kwargs and weight, as `Example` names them."""
        return {"tools": self._tools(), "template_kwargs": self._template_kwargs(), "weight": self._weight()}

    def _tools(self) -> list[Any] | None:
        value, where = self.value("tools"), self.where("tools")
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: text that is not JSON ({error}); give a list of tool schemas") from error
        if value is None:
            return None
        if not isinstance(value, (list, tuple)) or not all(isinstance(tool, dict) for tool in value):
            raise DataError(f"{where}: expected a list of tool schemas (objects) or its JSON text, got {kind_of(value)}")
        return list(value)

    def _template_kwargs(self) -> dict[str, Any]:
        value, where = self.value("chat_template_kwargs"), self.where("chat_template_kwargs")
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise DataError(f"{where}: expected an object such as {{'enable_thinking': false}}, got {kind_of(value)}")
        for name in _TEMPLATE_ARGUMENTS:
            if name in value:
                raise DataError(f"{where}: {name!r} is set by the trainer; remove it")
        return {name: item for name, item in value.items() if item is not None}

    def _weight(self) -> float:
        if "weight" not in self:
            return 1.0
        remedy = "give a finite number, 0 or more, or leave the column out"
        weight = self.number("weight", remedy)
        if weight < 0:
            raise DataError(
                f"{self.where('weight')}: expected a finite number of at least 0, got {kind_of(self.value('weight'))}; {remedy}"
            )
        return weight

    def near_miss(self, name: str, cutoff: float = 0.7) -> list[str]:
        """Columns of the row that are none of ours and look like a misspelt `name`."""
        others = [key for key in self.row if key not in self.names.values()]
        return get_close_matches(self.names[name], others, n=1, cutoff=cutoff)

    def _missing_hint(self, name: str, required: Sequence[str]) -> str:
        have = ", ".join(repr(key) for key in self.row) or "none"
        missing, config = self.names[name], self.config
        near = self.near_miss(name) or [key for key in self.row if key not in self.names.values() and key.startswith(missing)]
        if near:
            meant = f": did you mean {name!r}? Rename it, or set" if missing == name else "; set"
            return f", but there is {near[0]!r}{meant} data.columns {{{name}: {near[0]}}}"
        if missing != name:
            return f" (columns: {have}); data.columns says that {name!r} is there"
        if looks := describe_format(set(self.row)):
            return f" (columns: {have}); these look like {looks}, while {config.purpose} needs {config.needs}"
        if any(other in self for other in required):
            return f" (columns: {have}); {config.purpose} needs {config.needs}"
        return f" (columns: {have}); {config.purpose} needs {config.needs}: rename columns with data.columns"


def describe_format(columns: set[str]) -> str | None:
    """What a row with these columns looks like, for a reader who has brought the wrong kind of data."""
    if {"prompt", "completion", "label"} <= columns:
        return "unpaired preference (KTO) rows: a prompt, one completion and a label"
    if {"prompt", "completions", "labels"} <= columns:
        return "stepwise supervision (process reward) rows"
    if {"prompt", "completions"} <= columns:
        return "ranked completions"
    if {"messages", "rejected_response"} <= columns:
        return "ms-swift preference rows: 'messages' with the chosen answer and a 'rejected_response'"
    if {"chosen", "rejected"} <= columns:
        return "preference pairs"
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
    if "prompt" in columns and not columns & {"chosen", "rejected", "completion"}:
        return "prompts only (GRPO, PPO)"
    return None


def check_ending(where: str, turns: Turns) -> None:
    """Raises DataError when messages that the model should learn to write end with somebody else's."""
    if turns and not isinstance(turns, str) and turns[-1]["role"] in ("user", "system", "developer"):
        raise DataError(
            f"{where}: the last message has role {turns[-1]['role']!r}, expected 'assistant'; "
            "a completion ends with what the model should say, so remove what follows it"
        )


def _digest(value: Any) -> bytes:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).digest()
