"""Data of any kind from file to samples: read, check, tokenize, cut, drop what teaches nothing, hold out by prompt."""

from __future__ import annotations

import hashlib
import logging
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from fastalign.data.config import DataConfig
from fastalign.data.encode import Encoded, Encoder
from fastalign.data.examples import Dropped, Example, Parse
from fastalign.data.report import DataReport
from fastalign.data.sources import Row, scan_rows
from fastalign.data.templates import read_chat_template
from fastalign.errors import DataError
from fastalign.types import Sample

logger = logging.getLogger(__name__)

_BATCH_EXAMPLES = 512


@dataclass
class Part:
    """The usable samples of one source; `prompt_keys[i]` is equal for samples with the same prompt."""

    samples: list[Sample] = field(default_factory=list)
    prompt_keys: list[bytes] = field(default_factory=list)
    places: list[str] = field(default_factory=list)

    def add(self, sample: Sample, prompt_key: bytes, place: str) -> None:
        self.samples.append(sample)
        self.prompt_keys.append(prompt_key)
        self.places.append(place)


@dataclass(frozen=True)
class Format:
    """One kind of data: how a row is read, and what its parts are called in reports."""

    noun: str  # what a sample is, as "pair"
    names: tuple[str, ...]  # of its completions; one name for all of them if they have none of their own
    parse: Parse
    describe: Callable[[Sequence[Sample], DataReport], None] = lambda samples, report: None  # adds counts to a part's report
    check: Callable[[Sequence[Sample], Any, str], None] = lambda samples, config, source: None  # refuses training samples as a whole


@dataclass
class Samples:
    """Samples to train on and held-out ones. Indices of held-out samples are not used by training samples."""

    samples: list[Sample]
    eval_samples: list[Sample]
    report: DataReport
    eval_report: DataReport | None
    fingerprint: str  # sha256 over everything that the samples of both parts hold


def load(data: Format, config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, vocab_size: int | None = None) -> Samples:
    """Reads, checks and tokenizes `config.path` and its held-out part, and logs what was dropped, cut or odd.

    `vocab_size` is the number of rows of the LM head (None: the tokenizer's size). Order is the source's. Raises
    ConfigError for the options, TemplateError for the tokenizer, DataError naming every bad row (the first five in full).
    """
    config.validate()
    part, report = read_part(data, config, tokenizer, vocab_size=vocab_size)
    report.raise_for_problems()
    held_out, eval_report = Part(), None
    if config.eval_path or config.eval_split:
        held_out, eval_report = read_part(data, config, tokenizer, vocab_size=vocab_size, held_out=True, first_index=report.examples)
        eval_report.raise_for_problems()
        if shared := len(set(part.prompt_keys) & set(held_out.prompt_keys)):
            eval_report.notices["prompts of the held-out data are also trained on; held-out metrics will look too good"] = shared
    elif config.eval_fraction:
        part, held_out = split_by_prompt(part, config.eval_fraction, data.noun)
    data.check(part.samples, config, config.path)
    for one in filter(None, (report, eval_report)):
        logger.info(one.summary())
        for line in one.warnings():
            logger.warning(line)
    return Samples(part.samples, held_out.samples, report, eval_report, fingerprint(part.samples, held_out.samples))


def read_part(
    data: Format,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    vocab_size: int | None = None,
    held_out: bool = False,
    first_index: int = 0,
) -> tuple[Part, DataReport]:
    """All samples of a source and the report on its rows; bad rows are in `report.problems`, and nothing is raised for them.

    Without a tokenizer only the structure is checked, and no samples are made.
    """
    path = (config.eval_path or config.path) if held_out else config.path
    split, subset = (config.eval_split or config.split) if held_out else config.split, config.subset
    if held_out and config.eval_path and Path(config.eval_path).expanduser().is_file():
        split, subset = config.eval_split or "train", None  # those of data.path, which a file does not have
    report, part = DataReport(source=path, noun=data.noun), Part()
    examples = _examples(data, scan_rows(path, split, subset), config, report, first_index)
    if tokenizer is None:
        for _ in examples:
            report.samples += 1
        return part, report
    if config.chat_template is not None:
        tokenizer.chat_template = read_chat_template(config.chat_template)
    encoder = Encoder(tokenizer, vocab_size)
    while batch := list(islice(examples, _BATCH_EXAMPLES)):
        for example, result in zip(batch, encoder.encode(batch)):
            if isinstance(result, DataError):
                report.add_problem(example.place, result)
            elif isinstance(cut := _cut(result, data, config, report), Dropped):
                report.drop(*cut)
            else:
                part.add(cut, example.prompt_key(), example.place)
    report.notices.update(encoder.all_notices())
    report.samples = len(part.samples)
    data.describe(part.samples, report)
    return part, report


def split_by_prompt(part: Part, fraction: float, noun: str = "sample") -> tuple[Part, Part]:
    """Holds out prompts, in the order of their digests, until `fraction` of the samples (at least one) is held out.

    The choice depends on the prompts alone: not on row order, seeds or the state of any generator.
    """
    counts: dict[bytes, int] = {}
    for key in part.prompt_keys:
        counts[key] = counts.get(key, 0) + 1
    if len(counts) < 2:
        raise DataError(f"data.eval_fraction={fraction} needs at least two different prompts, there is {len(counts)}; give data.eval_path")
    wanted, taken, chosen = max(1, round(fraction * len(part.samples))), 0, set()
    for key in sorted(counts)[:-1]:
        if taken >= wanted:
            break
        chosen.add(key)
        taken += counts[key]
    parts = Part(), Part()
    for sample, key, place in zip(part.samples, part.prompt_keys, part.places):
        parts[key in chosen].add(sample, key, place)
    return parts


def fingerprint(*parts: Sequence[Sample]) -> str:
    """sha256 over everything that samples hold: the same data, cut and split the same way, in the same order."""
    digest = hashlib.sha256(b"fastalign samples 2")
    for samples in parts:
        digest.update(array("q", [len(samples)]).tobytes())
        for sample in samples:
            sequences = (sample.prompt, *sample.completions, *sample.masks)
            counts = map(len, (sample.completions, sample.masks, sample.skip, sample.labels, *sequences))
            digest.update(array("q", [sample.index, *counts, *sample.skip]).tobytes())
            for ids in sequences:
                digest.update(array("q", ids).tobytes())
            digest.update(array("d", [sample.weight, sample.margin, *sample.labels]).tobytes())
    return digest.hexdigest()


def _examples(
    data: Format, rows: Iterator[tuple[str, Row | DataError]], config: DataConfig, report: DataReport, first_index: int
) -> Iterator[Example]:
    used = {config.columns.get(name, name) for name in config.column_names}
    seen_columns: set[str] = set()
    seen_rows: set[bytes] = set()
    for place, row in rows:
        report.rows += 1
        try:
            if isinstance(row, DataError):
                raise row
            seen_columns.update(row)
            examples = data.parse(place, first_index + report.examples, row, config)
        except DataError as error:
            report.add_problem(place, error)
            report.examples += 1
            continue
        report.examples += len(examples)
        for example in examples:
            if isinstance(example, Dropped):
                report.drop(*example)
                continue
            if config.deduplicate:
                key = example.content_key()
                if key in seen_rows:
                    report.drop(place, "repeats an earlier row")
                    continue
                seen_rows.add(key)
            report.conversational += example.conversational
            yield example
    for name in sorted(seen_columns - used):
        if near := get_close_matches(name, sorted(set(config.column_names) - _REQUIRED), n=1, cutoff=0.75):
            report.notices[f"column {name!r} is not used; did you mean {near[0]!r}?"] += report.rows


_REQUIRED = {"prompt", "chosen", "rejected", "completion", "completions", "messages", "text"}  # missing ones are errors of their own


def _cut(encoded: Encoded, data: Format, config: DataConfig, report: DataReport) -> Sample | Dropped:
    """The sample of an encoded example, no sequence longer than max_length, or why there is none."""
    example = encoded.example
    report.count_lengths(len(encoded.prompt), [(name, len(ids)) for name, ids in zip(_names(data, encoded), encoded.completions)])
    prompt, completions, masks = tuple(encoded.prompt), [tuple(c) for c in encoded.completions], [tuple(m) for m in encoded.masks]
    skip = [0] * len(completions)
    limit, longest = config.max_length, max(map(len, completions), default=0)
    over = limit is not None and len(prompt) + longest > limit
    after = f" after truncation to max_length={limit}" if over else ""
    if limit is not None and over:
        if config.truncation == "drop":
            return Dropped(example.place, f"longer than max_length={limit}")
        if config.truncation == "keep_start":
            if len(prompt) >= limit:
                return Dropped(example.place, f"the prompt fills max_length={limit}, so {_the(completions)} cut away")
            room = limit - len(prompt)
            completions, masks = [completion[:room] for completion in completions], [mask[:room] for mask in masks]
        else:
            completions, masks = [completion[-limit:] for completion in completions], [mask[-limit:] for mask in masks]
            cuts = [max(0, len(prompt) + len(completion) - limit) for completion in completions]
            prompt, skip = prompt[min(cuts) :], [cut - min(cuts) for cut in cuts]
    if len(set(completions)) < len(completions):
        who = f"{' and '.join(data.names)} are" if len(data.names) > 1 else "two completions are"
        return Dropped(example.place, f"{who} identical{after or ' as tokens'}")
    sample = Sample(
        example.index,
        prompt,
        tuple(completions),
        example.weight,
        tuple(skip) if any(skip) else (),
        example.labels,
        example.margin,
        () if all(map(all, masks)) else tuple(masks),
    )
    if example.scored != "completion" and not sample.num_targets:
        return Dropped(example.place, f"no scored token is left{after}")
    if over:
        report.truncated.add(example.index)
    return sample


def _names(data: Format, encoded: Encoded) -> Sequence[str]:
    return data.names if len(data.names) > 1 else data.names * len(encoded.completions)


def _the(completions: Sequence[Any]) -> str:
    return "the completions are" if len(completions) > 1 else "the completion is"
