"""Preference pairs: a prompt, a chosen and a rejected completion, with the prompt given or implied."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from fastalign.data.config import DataConfig, SourceConfig
from fastalign.data.examples import Dropped, Example, Fields, check_ending
from fastalign.data.messages import Turns, common_prefix_length, has_text
from fastalign.data.samples import Format, Samples, load
from fastalign.data.sources import Row, kind_of
from fastalign.errors import DataError

_PROMPT_ALIASES = ("question", "instruction", "query", "input", "context", "prompts")


def load_preferences(config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, vocab_size: int | None = None) -> Samples:
    """Pairs as samples with the completions (chosen, rejected); see `load` for the arguments and errors."""
    return load(PAIRS, config, tokenizer, vocab_size=vocab_size)


def parse_pair(place: str, index: int, row: Row, config: SourceConfig) -> Sequence[Example | Dropped]:
    """Checks one row and splits off its prompt, explicit or implicit as TRL's `extract_prompt` finds it.

    Gives one example, or Dropped for an empty or identical pair; raises DataError, naming place, column and remedy, for a
    row that is malformed.
    """
    fields = Fields(place, row, config)
    fields.require("chosen", "rejected")
    _refuse_misspelt_prompt(fields)
    chosen, rejected = fields.turns("chosen"), fields.turns("rejected")
    names = fields.names
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise DataError(
            f"{place}: column {names['chosen']!r} is {kind_of(chosen)} but {names['rejected']!r} is {kind_of(rejected)}; "
            "give both as text or both as messages"
        )
    options = fields.options()
    prompt = fields.turns("prompt") if "prompt" in fields else None
    if prompt is not None and not has_text(prompt):
        raise DataError(f"{fields.where('prompt')}: the prompt is empty; give a prompt or remove the row")
    if reason := _drop_reason(chosen, rejected, options["weight"]):
        return [Dropped(place, reason)]
    prompt, chosen, rejected = _with_prompt(fields, prompt, chosen, rejected)
    check_ending(fields.where("chosen"), chosen)
    check_ending(fields.where("rejected"), rejected)
    if reason := _drop_reason(chosen, rejected, options["weight"]):
        return [Dropped(place, reason)]
    return [Example(place, index, prompt, (chosen, rejected), **options)]


PAIRS = Format("pair", ("chosen", "rejected"), parse_pair)


def with_prompt(fields: Fields, prompt: Turns, name: str, completion: Turns) -> Turns:
    """`completion`, found to be of the prompt's kind and not to begin with the prompt's messages."""
    names = fields.names
    if isinstance(prompt, str) != isinstance(completion, str):
        wanted = '[{"role": "user", "content": ...}]' if isinstance(prompt, str) else "text"
        raise DataError(
            f"{fields.where('prompt')} is {kind_of(prompt)} but {names[name]!r} is {kind_of(completion)}; "
            f"give all as text or all as messages (the prompt as {wanted})"
        )
    if not isinstance(prompt, str) and completion[: len(prompt)] == prompt:
        raise DataError(
            f"{fields.where(name)} repeats the messages of {names['prompt']!r}, which would train on the prompt twice; "
            f"remove the column {names['prompt']!r} or the repeated messages"
        )
    return completion


def _refuse_misspelt_prompt(fields: Fields) -> None:
    """Without `prompt` the prompt is what chosen and rejected share, which would hide a column that was meant to be it."""
    if "prompt" in fields:
        return
    near = fields.near_miss("prompt", cutoff=0.75)
    if not near and isinstance(fields.value("chosen"), str):
        near = [key for key in fields.row if key not in fields.names.values() and key.lower() in _PROMPT_ALIASES][:1]
    if near:
        raise DataError(
            f"{fields.where('prompt')} is missing, but there is {near[0]!r}; rename it or set "
            f"data.columns {{prompt: {near[0]}}}, or remove it if chosen and rejected both begin with the prompt"
        )


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


def _with_prompt(fields: Fields, prompt: Turns | None, chosen: Turns, rejected: Turns) -> tuple[Turns, Turns, Turns]:
    if prompt is None:
        return _split_prompt(fields, chosen, rejected)
    if isinstance(prompt, str) and not isinstance(chosen, str) and common_prefix_length(chosen, rejected):
        return _split_prompt(fields, chosen, rejected)  # the prompt column only repeats what the messages hold
    return prompt, with_prompt(fields, prompt, "chosen", chosen), with_prompt(fields, prompt, "rejected", rejected)


def _split_prompt(fields: Fields, chosen: Turns, rejected: Turns) -> tuple[Turns, Turns, Turns]:
    """The common beginning is the prompt; a space before the completions belongs to them, as in TRL's `extract_prompt`."""
    length = common_prefix_length(chosen, rejected)
    if length == min(len(chosen), len(rejected)):
        length -= 1  # one continues the other: its last item stays a completion
    elif length and chosen[length - 1] == " ":
        length -= 1
    if not has_text(chosen[:length]):
        names = fields.names
        raise DataError(
            f"{fields.place}: no column {names['prompt']!r}, and {names['chosen']!r} and {names['rejected']!r} share no beginning "
            f"to serve as the prompt; add a column {names['prompt']!r}"
        )
    return chosen[:length], chosen[length:], rejected[length:]
