"""Feedback of every kind, read into judgements: completions of a prompt, each with a value, higher is better."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from fastalign.data.config import ScaleConfig
from fastalign.data.examples import Dropped, Fields, check_ending
from fastalign.data.messages import Turns, has_text
from fastalign.data.preferences import with_prompt
from fastalign.data.ranked import check_scale, parse_pair_with_margin, read_completions, read_ranking, read_scores
from fastalign.data.sources import Row
from fastalign.data.unpaired import parse_label
from fastalign.errors import DataError

Scale = Literal["grade", "label", "order"]  # what values are: points on a scale, 1 for good and 0 for bad, or only an order

_SHARED = ("tools", "chat_template_kwargs")


@dataclass
class Judgement:
    """What one row says of completions of its prompt."""

    index: int  # of the row
    place: str
    prompt: Turns
    completions: list[Turns]
    values: list[float]  # one for each, higher is better
    scale: Scale = "order"
    margin: float | None = None  # by how much the first completion of a pair wins, where its row says so
    weight: float = 1.0  # of a pair
    shared: dict[str, Any] | None = None  # columns that every row of the prompt has alike: tools, chat_template_kwargs

    def prompt_key(self) -> bytes:
        """Digest of everything that comes before a completion."""
        return digest([self.prompt, self.shared])

    def split_key(self) -> bytes:
        """As `prompt_key`, but equal also for prompts that differ in case or white space only."""
        prompt = _plain(self.prompt)
        return digest(prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True))


def _plain(value: Any) -> Any:
    """A value whose texts are without case, and have single blanks for their white space and none at their ends."""
    if isinstance(value, str):
        return " ".join(value.casefold().split())
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


@dataclass(frozen=True)
class Kind:
    """One kind of feedback."""

    config: type[ScaleConfig]
    read: Callable[[Fields], Judgement | Dropped]
    merged: bool = False  # the rows of a prompt are on one scale, so that any two completions compare
    paired: bool = False  # a row compares two completions


def _judgement(fields: Fields, prompt: Turns, completions: list[Turns], values: list[float], scale: Scale) -> Judgement | Dropped:
    kept = [i for i, completion in enumerate(completions) if has_text(completion)]
    if not kept:
        return Dropped(fields.place, "empty completion")
    return Judgement(0, fields.place, prompt, [completions[i] for i in kept], [values[i] for i in kept], scale)


def _prompt(fields: Fields) -> Turns:
    prompt = fields.turns("prompt")
    if not has_text(prompt):
        raise DataError(f"{fields.where('prompt')}: the prompt is empty; give a prompt or remove the row")
    return prompt


def _completion(fields: Fields, prompt: Turns, name: str) -> Turns:
    turns = with_prompt(fields, prompt, name, fields.turns(name))
    check_ending(fields.where(name), turns)
    return turns


def _read_ratings(fields: Fields) -> Judgement | Dropped:
    if "completions" in fields:
        fields.require("prompt", "ratings")
        prompt = _prompt(fields)
        completions = read_completions(fields, prompt)
        return _judgement(fields, prompt, completions, read_scores(fields, "ratings", len(completions)), "grade")
    fields.require("prompt", "completion", "rating")
    prompt = _prompt(fields)
    rating = fields.number("rating", "give a finite number, or remove the row")
    check_scale(fields.config, fields.where("rating"), rating)
    return _judgement(fields, prompt, [_completion(fields, prompt, "completion")], [rating], "grade")


def _read_binary(fields: Fields) -> Judgement | Dropped:
    fields.require("prompt", "completion", "label")
    prompt = _prompt(fields)
    label = parse_label(fields.where("label"), fields.value("label"))
    return _judgement(fields, prompt, [_completion(fields, prompt, "completion")], [float(label)], "label")


def _read_listwise(fields: Fields) -> Judgement | Dropped:
    prompt, completions, values = read_ranking(fields)
    return _judgement(fields, prompt, completions, values, "grade" if "scores" in fields else "order")


def _read_pair(fields: Fields) -> Judgement | Dropped:
    [pair] = parse_pair_with_margin(fields.place, 0, fields.row, fields.config)  # type: ignore[arg-type]
    if isinstance(pair, Dropped):
        return pair
    assert pair.prompt is not None
    margin = pair.margin if "margin" in fields or "score_chosen" in fields else None
    return Judgement(0, fields.place, pair.prompt, list(pair.completions), [1.0, 0.0], margin=margin, weight=pair.weight)


def _read_edit(fields: Fields) -> Judgement | Dropped:
    fields.require("prompt", "original", "edited")
    prompt = _prompt(fields)
    original, edited = (_completion(fields, prompt, name) for name in ("original", "edited"))
    if not has_text(original) or not has_text(edited):
        return Dropped(fields.place, "empty completion")
    if original == edited:
        return Dropped(fields.place, "the edit changes nothing")
    return Judgement(0, fields.place, prompt, [edited, original], [1.0, 0.0])


_ANY = ("prompt", *_SHARED)


@dataclass
class RatingsConfig(ScaleConfig):
    """Completions with a rating each, or lists of both."""

    column_names: ClassVar[tuple[str, ...]] = (*_ANY, "completion", "rating", "completions", "ratings")
    purpose: ClassVar[str] = "--from ratings"
    needs: ClassVar[str] = "'prompt', 'completion' and 'rating', or 'prompt', 'completions' and 'ratings'"


@dataclass
class BinaryConfig(ScaleConfig):
    """Completions with a label each."""

    column_names: ClassVar[tuple[str, ...]] = (*_ANY, "completion", "label")
    purpose: ClassVar[str] = "--from binary"
    needs: ClassVar[str] = "'prompt', 'completion' and 'label'"


@dataclass
class ListwiseConfig(ScaleConfig):
    """Lists of completions with ranks or scores."""

    column_names: ClassVar[tuple[str, ...]] = (*_ANY, "completions", "ranks", "scores")
    purpose: ClassVar[str] = "--from listwise"
    needs: ClassVar[str] = "'prompt', 'completions', and 'ranks' or 'scores'"


@dataclass
class PairsConfig(ScaleConfig):
    """Preference pairs."""

    column_names: ClassVar[tuple[str, ...]] = (*_ANY, "chosen", "rejected", "margin", "score_chosen", "score_rejected", "weight")
    purpose: ClassVar[str] = "--from pairs"
    needs: ClassVar[str] = "'prompt', 'chosen' and 'rejected'"


@dataclass
class EditsConfig(ScaleConfig):
    """Completions as they were and as somebody mended them."""

    column_names: ClassVar[tuple[str, ...]] = (*_ANY, "original", "edited")
    purpose: ClassVar[str] = "--from edits"
    needs: ClassVar[str] = "'prompt', 'original' and 'edited'"


KINDS = {
    "ratings": Kind(RatingsConfig, _read_ratings, merged=True),
    "binary": Kind(BinaryConfig, _read_binary, merged=True),
    "listwise": Kind(ListwiseConfig, _read_listwise),
    "pairs": Kind(PairsConfig, _read_pair, paired=True),
    "edits": Kind(EditsConfig, _read_edit, paired=True),
}


def read_judgement(kind: Kind, place: str, index: int, row: Row, config: ScaleConfig) -> Judgement | Dropped:
    """One row of feedback, checked. Raises DataError, naming place, column and remedy, for a row that is malformed."""
    fields = Fields(place, row, config)
    judgement = kind.read(fields)
    if isinstance(judgement, Judgement):
        judgement.index = index
        judgement.shared = {name: fields.value(name) for name in _SHARED if fields.value(name) is not None} or None
    return judgement


def digest(value: Any) -> bytes:
    """16 bytes that differ between different JSON values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()[:16]
