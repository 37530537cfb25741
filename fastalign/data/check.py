"""`fastalign data check`: every bad row of a data file with its remedy, counts, and a few samples with their loss mask."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from fastalign.data.config import DataConfig
from fastalign.data.encode import decode
from fastalign.data.preferences import PAIRS
from fastalign.data.report import DataReport
from fastalign.data.samples import Part, read_part, split_by_prompt
from fastalign.data.tokenizer import head_vocab_size
from fastalign.types import Sample

SHOWN_PROBLEMS = 20
_HEAD_CHARS, _TAIL_CHARS = 500, 1000  # of a long text, what a rendered sample shows


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
    failed = False
    for held_out in (False, True) if config.eval_path or config.eval_split else (False,):
        pairs, report = read_part(PAIRS, config, tokenizer, vocab_size=vocab_size, held_out=held_out)
        _print_problems(report, console)
        _print_counts(report, pairs, config, tokenizer, console)
        for notice, count in report.notices.most_common():
            console.print(Text(f"note ({count:,} rows): {visible(notice)}", style="yellow"), soft_wrap=True)
        if tokenizer is not None:
            for k in _choose(pairs.samples, report, samples):
                _print_sample(pairs.samples[k], pairs.places[k], config, report, tokenizer, console)
        failed |= bool(report.problems) or not report.samples
        _print_verdict(report, tokenizer, console)
    return int(failed)


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
    row(
        "pairs", report.samples, f"{report.conversational:,} rows hold messages, the others text" if report.conversational else "plain text"
    )
    if report.problems:
        row("cannot be used", len(report.problems), "listed above")
    for reason, count in report.dropped.most_common():
        row("dropped", count, f"{reason} (first at {report.dropped_at[reason]})")
    if tokenizer is not None:
        row("truncated", len(report.truncated), f"max_length={config.max_length}, {config.truncation}")
        row("tokens", sum(sample.num_tokens for sample in pairs.samples), "both sequences of every pair, as trained on")
        scored = sum(sample.num_targets for sample in pairs.samples)
        row("scored", scored, "tokens of the completions")
        same = ", also the padding token: harmless, nothing is padded" if tokenizer.pad_token == tokenizer.eos_token else ""
        row("EOS", str(tokenizer.eos_token_id), f"{tokenizer.eos_token!r}{same}")
        if config.eval_fraction and len(set(pairs.prompt_keys)) > 1:
            train, held_out = split_by_prompt(pairs, config.eval_fraction)
            row("held out", len(held_out.samples), f"by prompt; {len(train.samples):,} pairs are left to train on")
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
    sample: Sample, place: str, config: DataConfig, report: DataReport, tokenizer: PreTrainedTokenizerBase, console: Console
) -> None:
    weight = f" · weight {sample.weight:g}" if sample.weight != 1.0 else ""
    console.print(Text(f"\n{visible(place)}{weight}", style="bold"), soft_wrap=True)
    cut = sample.index in report.truncated
    full = [cut and len(context) + len(c) == config.max_length for context, c in zip(sample.contexts, sample.completions)]
    start_cut = cut and config.truncation == "keep_end"
    prompt = Text(f"prompt ({len(sample.prompt):,} tokens, not scored)\n", style="dim")
    if start_cut:
        prompt.append("[start cut] ", style="yellow")
    prompt.append_text(_tokens(sample.prompt, tokenizer, "dim", "dim bold"))
    console.print(prompt, soft_wrap=True)
    for name, colour, completion, context, at_limit in zip(
        ("chosen", "rejected"), ("green", "red"), sample.completions, sample.contexts, full
    ):
        text = Text()
        text.append(f"{name} ({len(completion):,} tokens, scored)\n", style=f"bold {colour}")
        if start_cut and at_limit and len(context) < len(sample.prompt):
            text.append(f"[its prompt starts {len(sample.prompt) - len(context):,} tokens later] ", style="yellow")
        unscored = 0 if context else 1
        text.append_text(_tokens(completion[:unscored], tokenizer, "dim", "dim bold"))
        text.append_text(_tokens(completion[unscored:], tokenizer, colour, f"bold reverse {colour}"))
        if at_limit and config.truncation == "keep_start" and completion[-1] != tokenizer.eos_token_id:
            text.append(" [end cut: no EOS]", style="yellow")
        console.print(text, soft_wrap=True)


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
        console.print(Text("\nno pair is left to train on", style="bold red"))
    else:
        rest = "" if tokenizer else "; structure only: add --model.path DIR to check tokens and see samples"
        console.print(Text(f"\nok: {report.samples:,} pairs{rest}", style="bold green"))
