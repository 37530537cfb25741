"""Preference data from file to samples: read, check, tokenize, cut, drop what teaches nothing, hold out by prompt."""

from __future__ import annotations

import hashlib
import logging
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import islice

from transformers import PreTrainedTokenizerBase

from fastalign.data.config import COLUMNS, DataConfig
from fastalign.data.encode import EncodedPair, PairEncoder
from fastalign.data.examples import Dropped, PreferenceExample, parse_example
from fastalign.data.report import DataReport
from fastalign.data.sources import Row, scan_rows
from fastalign.data.templates import read_chat_template
from fastalign.errors import DataError
from fastalign.types import Sample

logger = logging.getLogger(__name__)

_BATCH_PAIRS = 512


@dataclass
class PreferenceData:
    """Samples to train on and held-out ones. Indices of held-out samples are not used by training samples."""

    samples: list[Sample]
    eval_samples: list[Sample]
    report: DataReport
    eval_report: DataReport | None
    fingerprint: str  # sha256 over token ids, cuts and weights of both parts


@dataclass
class Pairs:
    """The usable pairs of one source; `prompt_keys[i]` is equal for samples with the same prompt."""

    samples: list[Sample] = field(default_factory=list)
    prompt_keys: list[bytes] = field(default_factory=list)
    places: list[str] = field(default_factory=list)

    def add(self, sample: Sample, prompt_key: bytes, place: str) -> None:
        self.samples.append(sample)
        self.prompt_keys.append(prompt_key)
        self.places.append(place)


def load_preferences(config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, vocab_size: int | None = None) -> PreferenceData:
    """Reads, checks and tokenizes `config.path` and its held-out part, and logs what was dropped, cut or odd.

    `vocab_size` is the number of rows of the LM head (None: the tokenizer's size). Order is the source's. Raises
    ConfigError for the options, TemplateError for the tokenizer, DataError naming every bad row (the first five in full).
    """
    config.validate()
    pairs, report = read_pairs(config, tokenizer, vocab_size=vocab_size)
    report.raise_for_problems()
    held_out, eval_report = Pairs(), None
    if config.eval_path or config.eval_split:
        held_out, eval_report = read_pairs(config, tokenizer, vocab_size=vocab_size, held_out=True, first_index=report.rows)
        eval_report.raise_for_problems()
        if shared := len(set(pairs.prompt_keys) & set(held_out.prompt_keys)):
            eval_report.notices["prompts of the held-out data are also trained on; held-out metrics will look too good"] = shared
    elif config.eval_fraction:
        pairs, held_out = split_by_prompt(pairs, config.eval_fraction)
    for part in filter(None, (report, eval_report)):
        logger.info(part.summary())
        for line in part.warnings():
            logger.warning(line)
    return PreferenceData(pairs.samples, held_out.samples, report, eval_report, fingerprint(pairs.samples, held_out.samples))


def read_pairs(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    vocab_size: int | None = None,
    held_out: bool = False,
    first_index: int = 0,
) -> tuple[Pairs, DataReport]:
    """All pairs of a source and the report on its rows; bad rows are in `report.problems`, and nothing is raised for them.

    Without a tokenizer only the structure is checked, and no samples are made.
    """
    path = (config.eval_path or config.path) if held_out else config.path
    split = (config.eval_split or config.split) if held_out else config.split
    report, pairs = DataReport(source=path), Pairs()
    examples = _examples(scan_rows(path, split, config.subset), config, report, first_index)
    if tokenizer is None:
        for _ in examples:
            report.pairs += 1
        return pairs, report
    if config.chat_template is not None:
        tokenizer.chat_template = read_chat_template(config.chat_template)
    encoder = PairEncoder(tokenizer, vocab_size)
    while batch := list(islice(examples, _BATCH_PAIRS)):
        for example, result in zip(batch, encoder.encode(batch)):
            if isinstance(result, DataError):
                report.add_problem(example.place, result)
            else:
                _add_pair(result, config, pairs, report)
    report.notices.update(encoder.all_notices())
    report.pairs = len(pairs.samples)
    return pairs, report


def split_by_prompt(pairs: Pairs, fraction: float) -> tuple[Pairs, Pairs]:
    """Holds out prompts, in the order of their digests, until `fraction` of the pairs (at least one) is held out.

    The choice depends on the prompts alone: not on row order, seeds or the state of any generator.
    """
    counts: dict[bytes, int] = {}
    for key in pairs.prompt_keys:
        counts[key] = counts.get(key, 0) + 1
    if len(counts) < 2:
        raise DataError(f"data.eval_fraction={fraction} needs at least two different prompts, there is {len(counts)}; give data.eval_path")
    wanted, taken, chosen = max(1, round(fraction * len(pairs.samples))), 0, set()
    for key in sorted(counts)[:-1]:
        if taken >= wanted:
            break
        chosen.add(key)
        taken += counts[key]
    parts = Pairs(), Pairs()
    for sample, key, place in zip(pairs.samples, pairs.prompt_keys, pairs.places):
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
    rows: Iterator[tuple[str, Row | DataError]], config: DataConfig, report: DataReport, first_index: int
) -> Iterator[PreferenceExample]:
    used = {config.columns.get(name, name) for name in COLUMNS}
    seen: set[str] = set()
    for index, (place, row) in enumerate(rows, first_index):
        report.rows += 1
        try:
            if isinstance(row, DataError):
                raise row
            seen.update(row)
            example = parse_example(place, index, row, config.columns)
        except DataError as error:
            report.add_problem(place, error)
            continue
        if isinstance(example, Dropped):
            report.drop(*example)
            continue
        report.conversational += example.conversational
        yield example
    for name in sorted(seen - used):
        if near := get_close_matches(name, ("tools", "chat_template_kwargs", "weight"), n=1, cutoff=0.75):
            report.notices[f"column {name!r} is not used; did you mean {near[0]!r}?"] += report.rows


def _add_pair(pair: EncodedPair, config: DataConfig, pairs: Pairs, report: DataReport) -> None:
    example = pair.example
    report.prompt_lengths.append(len(pair.prompt))
    report.chosen_lengths.append(len(pair.chosen))
    report.rejected_lengths.append(len(pair.rejected))
    prompt, chosen, rejected = tuple(pair.prompt), tuple(pair.chosen), tuple(pair.rejected)
    skip: tuple[int, ...] = ()
    limit = config.max_length
    if limit is not None and len(prompt) >= limit and config.truncation == "keep_start":
        report.drop(example.place, f"the prompt fills max_length={limit}, so the completions are cut away")
        return
    if limit is not None and len(prompt) + max(len(chosen), len(rejected)) > limit:
        if config.truncation == "keep_start":
            chosen, rejected = chosen[: limit - len(prompt)], rejected[: limit - len(prompt)]
        else:
            chosen, rejected = chosen[-limit:], rejected[-limit:]
            cuts = [max(0, len(prompt) + len(completion) - limit) for completion in (chosen, rejected)]
            prompt, skip = prompt[min(cuts) :], (cuts[0] - min(cuts), cuts[1] - min(cuts))
        report.truncated.add(example.index)
    if chosen == rejected:
        cut = f" after truncation to max_length={limit}" if example.index in report.truncated else " as tokens"
        report.truncated.discard(example.index)
        report.drop(example.place, f"chosen and rejected are identical{cut}")
        return
    sample = Sample(example.index, prompt, (chosen, rejected), example.weight, skip if any(skip) else ())
    pairs.add(sample, example.prompt_key(), example.place)
