"""Unpaired preferences: a prompt, one completion, and whether it is desirable. Pairs are taken apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from fastalign.data.config import UnpairedDataConfig
from fastalign.data.examples import Dropped, Example, Fields, check_ending
from fastalign.data.messages import has_text
from fastalign.data.preferences import parse_pair, with_prompt
from fastalign.data.report import DataReport
from fastalign.data.samples import Format, Samples, load
from fastalign.data.sources import Row, kind_of
from fastalign.errors import DataError
from fastalign.types import Sample

LABELS = {"true": True, "false": False, "good": True, "bad": False, "desirable": True, "undesirable": False}
_LABELS_REMEDY = "give true or false, 1 or 0, or one of the words " + ", ".join(map(repr, LABELS))


def load_unpaired(config: UnpairedDataConfig, tokenizer: PreTrainedTokenizerBase, *, vocab_size: int | None = None) -> Samples:
    """Samples with one completion and the label 1 (desirable) or 0; see `load` for the arguments and errors.

    Raises DataError also when the training samples are of one class and `one_class` is not set.
    """
    return load(UNPAIRED, config, tokenizer, vocab_size=vocab_size)


def parse_unpaired(place: str, index: int, row: Row, config: UnpairedDataConfig) -> Sequence[Example | Dropped]:
    """Checks one row; gives one example, two for a pair, or Dropped for an empty one. Raises DataError for a malformed row."""
    fields = Fields(place, row, config)
    if "completion" not in fields and "label" not in fields and "chosen" in fields:
        return _unpair(parse_pair(place, index, row, config))
    fields.require("prompt", "completion", "label")
    label = parse_label(fields.where("label"), fields.value("label"))
    options = fields.options()
    prompt, completion = fields.turns("prompt"), fields.turns("completion")
    if not has_text(prompt):
        raise DataError(f"{fields.where('prompt')}: the prompt is empty; give a prompt or remove the row")
    with_prompt(fields, prompt, "completion", completion)
    if not has_text(completion):
        return [Dropped(place, "completion is empty")]
    if not options["weight"]:
        return [Dropped(place, "weight is 0")]
    check_ending(fields.where("completion"), completion)
    return [Example(place, index, prompt, (completion,), labels=(float(label),), **options)]


def parse_label(where: str, value: Any) -> bool:
    """A label as it may be written: a boolean, 0 or 1, or one of the words of LABELS in any case."""
    if isinstance(value, (bool, int, float)) and value in (0, 1):
        return bool(value)
    if isinstance(value, str) and value.lower() in LABELS:
        return LABELS[value.lower()]
    got = f"the text {value[:40]!r}" if isinstance(value, str) else kind_of(value)
    raise DataError(f"{where}: expected a label, got {got}; {_LABELS_REMEDY}")


def _unpair(parsed: Sequence[Example | Dropped]) -> Sequence[Example | Dropped]:
    [pair] = parsed
    if isinstance(pair, Dropped):
        return [pair, pair]
    return [
        Example(
            pair.place, pair.index + k, pair.prompt, (completion,), pair.tools, pair.template_kwargs, pair.weight, labels=(float(1 - k),)
        )
        for k, completion in enumerate(pair.completions)
    ]


def _describe(samples: Sequence[Sample], report: DataReport) -> None:
    desirable = sum(sample.labels[0] == 1.0 for sample in samples)
    report.counts |= {"desirable": desirable, "undesirable": len(samples) - desirable}
    if pairs := report.examples - report.rows:
        report.notices["pairs were taken apart: the chosen completion is desirable, the rejected one undesirable"] = pairs
    low, high = sorted((desirable, len(samples) - desirable))
    if low and high > 4 / 3 * low:
        name, least = ("desirable_weight", high / low) if desirable == low else ("undesirable_weight", 3 / 4 * high / low)
        report.notices[
            f"{desirable:,} desirable to {len(samples) - desirable:,} undesirable completions: {name} between {least:.3g} and "
            f"{4 / 3 * least:.3g} would bring their weights into the ratio that KTO recommends, 1 to 4/3"
        ] = len(samples)


def _check(samples: Sequence[Sample], config: UnpairedDataConfig, source: str) -> None:
    classes = {sample.labels[0] for sample in samples}
    if len(classes) == 1 and not config.one_class:
        name, other = ("desirable", "undesirable") if classes == {1.0} else ("undesirable", "desirable")
        raise DataError(f"{source}: all {len(samples):,} completions to train on are {name}; add {other} ones, or set data.one_class true")


UNPAIRED = Format("completion", ("completion",), parse_unpaired, _describe, _check)
