"""How often a judge prefers a model's answers to those of another model, or to the data's own."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastalign.data.messages import Turns
from fastalign.data.prompts import Prompts
from fastalign.errors import DataError, JudgeError
from fastalign.rollout.generate import generate
from fastalign.rollout.judges import Judge, Verdict
from fastalign.train.config import write_text
from fastalign.train.label import other_columns
from fastalign.train.measures import wilson
from fastalign.types import Sample


@dataclass(frozen=True)
class Answers:
    """Of one side, in the order of the prompts."""

    turns: list[Turns]
    lengths: list[int]  # in tokens; empty where nothing was generated


def generated(
    model: Any, data: Prompts, samples: Sequence[Sample], *, max_new_tokens: int, temperature: float, max_tokens: int, seed: int = 0
) -> Answers:
    """What `model` says to the prompts; `max_tokens` as in `generate`."""
    done = generate(
        model,
        [sample.prompt for sample in samples],
        max_new_tokens=max_new_tokens,
        eos_token_id=data.tokenizer.eos_token_id,
        temperature=temperature,
        seed=seed,
        max_tokens=max_tokens,
    )
    texts = [str(data.tokenizer.decode(list(c.tokens), skip_special_tokens=True)) for c in done]
    return Answers([_said(data, sample, text) for sample, text in zip(samples, texts)], [len(c.tokens) for c in done])


def written(data: Prompts, samples: Sequence[Sample]) -> Answers:
    """The data's own answers: the column `completion` or `chosen`. Raises DataError where a row has neither."""
    found: list[Turns] = []
    for sample in samples:
        row = data.columns[sample.index]
        answer = row.get("completion", row.get("chosen"))
        if answer is None:
            raise DataError(
                f"row {sample.index}: no 'completion' or 'chosen' to compare with; add one, "
                "or name a model to compare with by --reference DIR"
            )
        found.append(answer)
    return Answers(found, [])


def win_figures(
    judge: Judge, data: Prompts, samples: Sequence[Sample], ours: Answers, theirs: Answers, *, workers: int = 1, output: Path | None = None
) -> dict[str, Any]:
    """Share of the prompts on which `ours` is preferred, ties counting half, with Wilson's 95 % interval; and what went into it.

    Prompts without a verdict do not count and are counted. With `output` the answers and their scores are written there (JSONL).
    Raises JudgeError when no prompt got a verdict.
    """
    outcomes = _judged(judge, data, samples, ours, theirs, workers)
    verdicts = [outcome for outcome in outcomes if isinstance(outcome, Verdict)]
    if not verdicts:
        raise JudgeError(f"no prompt got a verdict, the first: {outcomes[0] if outcomes else 'there are no prompts'}")
    wins = sum(_win(verdict) for verdict in verdicts)
    figures: dict[str, Any] = {"prompts": len(samples), "without_verdict": len(samples) - len(verdicts)}
    figures |= {"win_rate": wins / len(verdicts), "win_rate_ci95": list(wilson(wins, len(verdicts)))}
    figures["ties"] = sum(_win(verdict) == 0.5 for verdict in verdicts)
    if compared := sum(verdict.compared for verdict in verdicts):
        figures["consistent_under_swap"] = sum(verdict.consistent for verdict in verdicts) / compared
    for name, side in (("answer_tokens", ours), ("reference/answer_tokens", theirs)):
        if side.lengths:
            figures[name] = sum(side.lengths) / len(side.lengths)
    if output is not None:
        write_text(output, "".join(_line(data, *row) for row in zip(samples, ours.turns, theirs.turns, outcomes)))
    return figures


def _judged(
    judge: Judge, data: Prompts, samples: Sequence[Sample], ours: Answers, theirs: Answers, workers: int
) -> list[Verdict | JudgeError]:
    from rich.console import Console
    from rich.progress import track

    def one(place: int) -> Verdict | JudgeError:
        index = samples[place].index
        try:
            return judge(data.turns[index], [ours.turns[place], theirs.turns[place]], other_columns(data.columns[index]))
        except JudgeError as error:
            return error

    with ThreadPoolExecutor(workers) as pool:
        found = pool.map(one, range(len(samples)))
        return list(track(found, "judging", total=len(samples), console=Console(stderr=True), disable=not sys.stderr.isatty()))


def _win(verdict: Verdict) -> float:
    mine, other = verdict.scores
    return 0.5 if mine == other else float(mine > other)


def _said(data: Prompts, sample: Sample, text: str) -> Turns:
    return text if isinstance(data.turns[sample.index], str) else [{"role": "assistant", "content": text}]


def _line(data: Prompts, sample: Sample, mine: Turns, other: Turns, outcome: Verdict | JudgeError) -> str:
    row: dict[str, Any] = {"prompt": data.turns[sample.index], "completions": [mine, other]}
    row |= {"scores": list(outcome.scores)} if isinstance(outcome, Verdict) else {"judge_error": str(outcome)}
    return json.dumps(row, ensure_ascii=False) + "\n"
