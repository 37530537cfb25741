"""`fastalign data check`: every bad row of a data file with its remedy, counts, and a few samples with their loss mask."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from typing import ClassVar

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from fastalign.data.config import DataConfig, PromptDataConfig, RankedDataConfig, SupervisedDataConfig, UnpairedDataConfig
from fastalign.data.encode import decode
from fastalign.data.preferences import PAIRS
from fastalign.data.prompts import PROMPTS
from fastalign.data.ranked import RANKED
from fastalign.data.report import DataReport
from fastalign.data.samples import Format, Part, read_part, split_by_prompt
from fastalign.data.sources import scan_rows
from fastalign.data.supervised import SUPERVISED
from fastalign.data.tokenizer import head_vocab_size
from fastalign.data.unpaired import UNPAIRED
from fastalign.errors import ConfigError, DataError
from fastalign.types import Sample

FORMATS: dict[type[DataConfig], Format] = {
    SupervisedDataConfig: SUPERVISED,
    RankedDataConfig: RANKED,
    DataConfig: PAIRS,
    UnpairedDataConfig: UNPAIRED,
    PromptDataConfig: PROMPTS,
}
OBJECTIVES: dict[str, type[DataConfig]] = {  # what trains on which data
    "sft": SupervisedDataConfig,
    "reward": RankedDataConfig,
    **dict.fromkeys(("dpo", "orpo", "cpo", "simpo"), DataConfig),
    "kto": UnpairedDataConfig,
    **dict.fromkeys(("grpo", "rloo", "reinforce_pp", "ppo", "online_dpo"), PromptDataConfig),
}
_ALL_COLUMNS = tuple(dict.fromkeys(name for kind in FORMATS for name in kind.column_names))
SHOWN_PROBLEMS = 20
_HEAD_CHARS, _TAIL_CHARS = 500, 1000  # of a long text, what a rendered sample shows


@dataclass
class AnyDataConfig(SupervisedDataConfig, UnpairedDataConfig, RankedDataConfig):
    """The data set, and the options of each kind of data."""

    column_names: ClassVar[tuple[str, ...]] = _ALL_COLUMNS

    def of(self, objective: str = "") -> DataConfig:
        """The options as those of the data that `objective` trains on; without one, of what the first row looks like.

        Raises ConfigError for an unknown objective, and for an option or column that this kind of data does not have.
        """
        if objective and objective not in OBJECTIVES:
            raise ConfigError(f"objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}")
        name = objective or self._looks_like()
        kind, defaults = OBJECTIVES[name], AnyDataConfig()
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != getattr(defaults, f.name)}
        if foreign := sorted(set(given) - {f.name for f in fields(kind)}):
            raise ConfigError(f"data.{foreign[0]} is no option of data for {name}; leave it out, or choose the data's --objective")
        return kind(**given)

    def _looks_like(self) -> str:
        rows = scan_rows(self.path, self.split, self.subset)
        row = next((row for _, row in rows if isinstance(row, dict)), {})
        columns = {*row, *self.columns}
        if "completions" in columns:
            return "reward"
        if "label" in columns:
            return "kto"
        if columns & {"chosen", "rejected"}:
            return "dpo"
        if columns & {"text", "messages", "completion"}:
            return "sft"
        return "grpo" if "prompt" in columns else "dpo"


def check(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase | None, console: Console, samples: int = 3, *, vocab_size: int | None = None
) -> int:
    """Validates the whole of `config.path` (and its held-out part), prints what it found, and returns the exit status.

    0 when every row can be used or is dropped for a stated reason and a pair is left, else 1. Without a tokenizer only the
    structure of the rows is checked. `vocab_size` is the number of rows of the LM head; by default that of the tokenizer's
    folder, or else the tokenizer's size. Text of the data is shown with its control characters escaped.
    """
    config.validate()
    if tokenizer is not None and vocab_size is None:
        vocab_size = head_vocab_size(tokenizer.name_or_path)
    data, failed = FORMATS[type(config)], False
    for held_out in (False, True) if config.eval_path or config.eval_split else (False,):
        pairs, report = read_part(data, config, tokenizer, vocab_size=vocab_size, held_out=held_out)
        _print_problems(report, console)
        _print_counts(report, pairs, config, tokenizer, console)
        for notice, count in report.notices.most_common():
            console.print(Text(f"note ({count:,} rows): {visible(notice)}", style="yellow"), soft_wrap=True)
        if tokenizer is not None:
            for k in _choose(pairs.samples, report, samples):
                _print_sample(pairs.samples[k], pairs.places[k], data, config, report, tokenizer, console)
            if pairs.samples and not held_out:
                failed |= _refused(data, pairs, config, console)
        failed |= bool(report.problems) or not report.samples
        _print_verdict(report, tokenizer, console)
    return int(failed)


def _refused(data: Format, pairs: Part, config: DataConfig, console: Console) -> bool:
    try:
        data.check(pairs.samples, config, config.path)
    except DataError as error:
        console.print(Text(visible(str(error)), style="red"), soft_wrap=True)
        return True
    return False


def visible(text: str) -> str:
    """Text in which control, format and other invisible characters are written as escapes, so that it cannot move the
    cursor, recolour or reorder what the terminal shows; a line break is shown and kept.

    >>> visible("a\\x1b[31mb")
    'a\\\\x1b[31mb'
    """
    return "".join("↵\n" if c == "\n" else c if _is_plain(c) else _escape(c) for c in text)


def _is_plain(char: str) -> bool:
    return char in " \u200c\u200d" or (char.isprintable() and unicodedata.category(char) not in ("Cf", "Co"))


def _escape(char: str) -> str:
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _print_problems(report: DataReport, console: Console) -> None:
    lines = report.problem_lines()
    for line in lines[:SHOWN_PROBLEMS]:
        console.print(Text(visible(line), style="red"), soft_wrap=True)
    if len(lines) > SHOWN_PROBLEMS:
        console.print(Text(f"... and {len(lines) - SHOWN_PROBLEMS:,} more kinds of problem", style="red"))


def _print_counts(report: DataReport, pairs: Part, config: DataConfig, tokenizer: PreTrainedTokenizerBase | None, console: Console) -> None:
    table = Table(title=Text(visible(report.source)), title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column(overflow="fold")

    def row(name: str, count: int | str, note: str = "") -> None:
        table.add_row(Text(name), Text(count if isinstance(count, str) else f"{count:,}"), Text(visible(note)))

    row("rows", report.rows)
    text = f"{report.conversational:,} rows hold messages, the others text" if report.conversational else "plain text"
    row(f"{report.noun}s", report.samples, text)
    for name, count in report.counts.items():
        row(name, count)
    if report.problems:
        row("cannot be used", len(report.problems), "listed above")
    for reason, count in report.dropped.most_common():
        row("dropped", count, f"{reason} (first at {report.dropped_at[reason]})")
    if tokenizer is not None:
        row("truncated", len(report.truncated), f"max_length={config.max_length}, {config.truncation}")
        if any(sample.completions for sample in pairs.samples):
            row("tokens", sum(sample.num_tokens for sample in pairs.samples), "all sequences, as trained on")
            row("scored", sum(sample.num_targets for sample in pairs.samples), "tokens that are labels")
        else:
            row("tokens", sum(len(sample.prompt) for sample in pairs.samples), "of prompts, to be answered")
        same = ", also the padding token: harmless, nothing is padded" if tokenizer.pad_token == tokenizer.eos_token else ""
        row("EOS", str(tokenizer.eos_token_id), f"{tokenizer.eos_token!r}{same}")
        if config.eval_fraction and len(set(pairs.prompt_keys)) > 1:
            train, held_out = split_by_prompt(pairs, config.eval_fraction)
            row("held out", len(held_out.samples), f"by prompt; {len(train.samples):,} {report.noun}s are left to train on")
    console.print(table)
    if report.lengths:
        _print_lengths(report.lengths, console)


def _print_lengths(lengths: Mapping[str, Sequence[int]], console: Console) -> None:
    table = Table(title="tokens before truncation", title_justify="left")
    for head in ("", "min", "median", "90 %", "99 %", "max", "mean"):
        table.add_column(head, justify="right" if head else "left")
    for name, values in lengths.items():
        ordered = sorted(values)
        ranks = [ordered[round(q * (len(ordered) - 1))] for q in (0.0, 0.5, 0.9, 0.99, 1.0)]
        table.add_row(name, *(f"{value:,}" for value in ranks), f"{sum(ordered) / len(ordered):,.1f}")
    console.print(table)


def _choose(samples: Sequence[Sample], report: DataReport, count: int) -> list[int]:
    """The first samples, the last of them one that was truncated if any was."""
    chosen = list(range(min(count, len(samples))))
    if chosen and not any(samples[k].index in report.truncated for k in chosen):
        chosen[-1] = next((k for k, sample in enumerate(samples) if sample.index in report.truncated), chosen[-1])
    return chosen


def _print_sample(
    sample: Sample,
    place: str,
    data: Format,
    config: DataConfig,
    report: DataReport,
    tokenizer: PreTrainedTokenizerBase,
    console: Console,
) -> None:
    weight = f" · weight {sample.weight:g}" if sample.weight != 1.0 else ""
    margin = f" · margin {sample.margin:g}" if sample.margin else ""
    console.print(Text(f"\n{visible(place)}{weight}{margin}", style="bold"), soft_wrap=True)
    cut = sample.index in report.truncated
    full = [cut and len(context) + len(c) == config.max_length for context, c in zip(sample.contexts, sample.completions)]
    start_cut = cut and config.truncation == "keep_end"
    prompt = Text(f"prompt ({len(sample.prompt):,} tokens, not scored)\n", style="dim")
    if start_cut:
        prompt.append("[start cut] ", style="yellow")
    prompt.append_text(_tokens(sample.prompt, tokenizer, "dim", "dim bold"))
    if sample.prompt or start_cut:
        console.print(prompt, soft_wrap=True)
    for k, (completion, context, at_limit) in enumerate(zip(sample.completions, sample.contexts, full)):
        name, colour = _name(sample, k, data)
        text = Text()
        scored = "scored" if not sample.masks or all(sample.masks[k]) else f"{sum(sample.masks[k]):,} scored"
        text.append(f"{name} ({len(completion):,} tokens, {scored})\n", style=f"bold {colour}")
        if start_cut and at_limit and len(context) < len(sample.prompt):
            text.append(f"[its prompt starts {len(sample.prompt) - len(context):,} tokens later] ", style="yellow")
        mask = list(sample.masks[k]) if sample.masks else [True] * len(completion)
        mask[:1] = [mask[0] and bool(context)] if mask else []  # nothing comes before a first token
        for live, group in groupby(zip(completion, mask), key=lambda pair: pair[1]):
            styles = (colour, f"bold reverse {colour}") if live else ("dim", "dim bold")
            text.append_text(_tokens([token for token, _ in group], tokenizer, *styles))
        if at_limit and config.truncation == "keep_start" and completion[-1] != tokenizer.eos_token_id:
            text.append(" [end cut: no EOS]", style="yellow")
        console.print(text, soft_wrap=True)


def _name(sample: Sample, k: int, data: Format) -> tuple[str, str]:
    """What completion `k` is called, and its colour: green is what training makes likelier."""
    last = len(sample.completions) - 1
    if len(data.names) > 1:
        return data.names[k], ("green", "red")[k]
    if last:
        return f"{k + 1}. of {last + 1}, score {sample.labels[k]:g}", "green" if not k else "red" if k == last else "yellow"
    if sample.labels:
        return ("desirable", "green") if sample.labels[0] else ("undesirable", "red")
    return data.names[0], "green"


def _tokens(ids: Iterable[int], tokenizer: PreTrainedTokenizerBase, style: str, special_style: str) -> Text:
    """Decoded ids, special tokens in their own style; the middle of a long text left out."""
    special = set(tokenizer.all_special_ids)
    text = Text()
    run: list[int] = []

    def flush() -> None:
        if run:
            text.append(visible(decode(tokenizer, run)), style=style)
            run.clear()

    for token in ids:
        if token in special:
            flush()
            text.append(visible(str(tokenizer.convert_ids_to_tokens(token))), style=special_style)
        else:
            run.append(token)
    flush()
    hidden = len(text) - _HEAD_CHARS - _TAIL_CHARS
    if hidden <= 0:
        return text
    middle = Text(f" [... {hidden:,} characters ...] ", style="yellow")
    return text[:_HEAD_CHARS] + middle + text[-_TAIL_CHARS:]


def _print_verdict(report: DataReport, tokenizer: PreTrainedTokenizerBase | None, console: Console) -> None:
    if report.problems:
        console.print(Text(f"\n{len(report.problems):,} of {report.rows:,} rows cannot be used; mend or remove them", style="bold red"))
    elif not report.samples:
        console.print(Text(f"\nno {report.noun} is left to train on", style="bold red"))
    else:
        rest = "" if tokenizer else "; structure only: add --model.path DIR to check tokens and see samples"
        console.print(Text(f"\nok: {report.samples:,} {report.noun}s{rest}", style="bold green"))
