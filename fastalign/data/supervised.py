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
    kinds = [kind for kind in _KINDS if kind in fields]
    if not kinds:
        fields.require("prompt" if "prompt" not in fields else "completion")
    if len(kinds) > 1:
        first, second = (fields.names[kind] for kind in kinds[:2])
        raise DataError(f"{place}: columns {first!r} and {second!r} exclude each other: which is to be trained on? Remove the other")
    kind = kinds[0]
    fields.require(*(("prompt", "completion") if kind == "completion" else (kind,)))
    if kind != "completion" and "prompt" in fields:
        names = fields.names
        raise DataError(f"{place}: a column {names['prompt']!r} goes with {names['completion']!r}, not with {names[kind]!r}; remove one")
    options = fields.options()
    completion = fields.turns(kind)
    if kind != "completion" and isinstance(completion, str) != (kind == "text"):
        expected = "text; name a list of messages 'messages'" if kind == "text" else "a list of messages; name a text 'text'"
        raise DataError(f"{fields.where(kind)}: expected {expected}")
    prompt = _prompt(fields, completion) if kind == "completion" else None
    if not has_text(completion):
        return [Dropped(place, f"{kind} {'are' if kind == 'messages' else 'is'} empty")]
    if not options["weight"]:
        return [Dropped(place, "weight is 0")]
    check_ending(fields.where(kind), completion)
    scored = _scored(fields, config, prompt, completion)
    return [Example(place, index, prompt, (completion,), scored=scored, **options)]


SUPERVISED = Format("sample", ("completion",), parse_supervised)


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
