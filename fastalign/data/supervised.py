"""Data for supervised fine-tuning: texts, conversations, or prompts with their completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from fastalign.data.config import SupervisedDataConfig
from fastalign.data.examples import Dropped, Example, Fields, check_ending
from fastalign.data.messages import Turns, has_text
from fastalign.data.preferences import with_prompt
from fastalign.data.samples import Format, Samples, load
from fastalign.data.sources import Row
from fastalign.errors import DataError

_KINDS = ("messages", "text", "completion")  # the column that tells what a row is


def load_supervised(config: SupervisedDataConfig, tokenizer: PreTrainedTokenizerBase, *, vocab_size: int | None = None) -> Samples:
    """Samples with one completion each; see `load` for the arguments and errors.

    Of prompt-completion rows the completion is scored, of texts and conversations every token, unless the options say
    otherwise. A sample's prompt is what comes before its first scored token, and `masks` tells which of the tokens after
    that are scored when not all are.
    """
    return load(SUPERVISED, config, tokenizer, vocab_size=vocab_size)


def parse_supervised(place: str, index: int, row: Row, config: SupervisedDataConfig) -> Sequence[Example | Dropped]:
    """Checks one row; gives one example, or Dropped for an empty one. Raises DataError for a row that is malformed."""
    fields = Fields(place, row, config)
    kind = _kind(fields)
    options = fields.options()
    completion = fields.turns(kind)
    if kind != "completion" and isinstance(completion, str) != (kind == "text"):
        expected = "text; name a list of messages 'messages'" if kind == "text" else "a list of messages; name a text 'text'"
        raise DataError(f"{fields.where(kind)}: expected {expected}")
    prompt = _prompt(fields, completion) if kind == "completion" else None
    if kind != "completion" and "prompt" in fields and not _repeats(fields.value("prompt"), completion):
        names = fields.names
        raise DataError(
            f"{place}: a column {names['prompt']!r} goes with {names['completion']!r}, and {names[kind]!r} starts otherwise; remove one"
        )
    if not has_text(completion):
        return [Dropped(place, f"{kind} {'are' if kind == 'messages' else 'is'} empty")]
    if not options["weight"]:
        return [Dropped(place, "weight is 0")]
    check_ending(fields.where(kind), completion)
    scored = _scored(fields, config, prompt, completion)
    return [Example(place, index, prompt, (completion,), scored=scored, **options)]


SUPERVISED = Format("sample", ("completion",), parse_supervised)


def _kind(fields: Fields) -> str:
    """The column that the row is trained on: the only one there, or the only one there that the user has named."""
    fields.require()
    kinds = [kind for kind in _KINDS if kind in fields]
    kinds = [kind for kind in kinds if kind in fields.config.columns] or kinds
    if len(kinds) > 1:
        first, second = kinds[:2]
        raise DataError(
            f"{fields.place}: there are both {fields.names[first]!r} and {fields.names[second]!r}; say which to train on, "
            f"as data.columns {{{first}: {fields.names[first]}}}"
        )
    kind = kinds[0] if kinds else "completion"
    fields.require(*(("prompt", "completion") if kind == "completion" else (kind,)))
    return kind


def _repeats(prompt: Any, completion: Turns) -> bool:
    """Whether a prompt column only repeats what a text or conversation begins with."""
    if isinstance(prompt, str) and not isinstance(completion, str):
        first = next((message.get("content") for message in completion if message["role"] == "user"), None)
        return isinstance(first, str) and prompt.strip() == first.strip()
    return prompt is None or (bool(prompt) and completion[: len(prompt)] == prompt)


def _prompt(fields: Fields, completion: Turns) -> Turns:
    prompt = fields.turns("prompt")
    with_prompt(fields, prompt, "completion", completion)
    if not has_text(prompt):
        raise DataError(
            f"{fields.where('prompt')}: the prompt is empty; give a prompt, or rows with the column "
            f"{'text' if isinstance(prompt, str) else 'messages'!r} alone"
        )
    return prompt


def _scored(fields: Fields, config: SupervisedDataConfig, prompt: Turns | None, completion: Turns) -> Any:
    if config.completion_only and prompt is None:
        raise DataError(
            f"{fields.place}: data.completion_only is set, but the row has no prompt and completion; "
            "split it into the columns 'prompt' and 'completion', or leave the option out"
        )
    if not config.assistant_only:
        return "all" if prompt is None or config.completion_only is False else "completion"
    if isinstance(completion, str):
        raise DataError(f"{fields.place}: data.assistant_only is set, but the row is text; give messages, or leave the option out")
    if all(message["role"] != "assistant" for message in completion):
        raise DataError(f"{fields.place}: data.assistant_only is set, but no message has the role 'assistant'; remove the row")
    return "assistant" if prompt is None or config.completion_only is False else "assistant_in_completion"
