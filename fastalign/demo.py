"""`fastalign demo`: build a small language model from nothing, train it with one of the objectives, and show what changed.

Everything is generated here: the text, the byte-level BPE tokenizer, the Qwen3 model that is pretrained on the text, and
the training data. The training run itself is the user's: `fastalign.train` on a model folder and a JSONL file, both
left in the output folder together with the command that repeats it.
"""

from __future__ import annotations

import json
import random
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastalign import demo_data, demo_online, demo_task
from fastalign.demo_model import (
    Size,
    answer_log_probs,
    build_model,
    build_tokenizer,
    conversations,
    load,
    one_thread,
    pretrain,
    sample,
    sequence_logps,
)
from fastalign.errors import ConfigError, OutputError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

Row = dict[str, Any]

COLOURS = {"helpful": "green", "dismissive": "red", "mixed": "yellow", "neither": "yellow"}
BATCH_SIZE = 16
_PAIR = ("chosen", "rejected")
_SORTING = {"rewards": ["exact_match"], "num_generations": 8, "max_completion_length": 8, "learning_rate": 2e-4}
_CRITICISED = _SORTING | {"num_generations": 4, "value_learning_rate": 2e-3}  # every answer is used four times
OWN_FILES = (
    "model", "train.jsonl", "heldout.jsonl", "samples.jsonl", "run", "teacher", "online", "feedback.db", "feedback.db-wal",
    "feedback.db-shm", "demo.json",
)  # fmt: skip


def _as_given(rows: Sequence[Row]) -> list[Row]:
    return list(rows)


def _helpful(rows: Sequence[Row]) -> list[Row]:
    return [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]


def _either(rows: Sequence[Row]) -> list[Row]:
    return [{"prompt": row["prompt"], "completion": row[_PAIR[k % 2]]} for k, row in enumerate(rows)]


def _labelled(rows: Sequence[Row]) -> list[Row]:
    return [row | {"label": k % 2 == 0} for k, row in enumerate(_either(rows))]


def _unclosed(rows: Sequence[Row]) -> list[Row]:
    """Pairs without their closing sentences, whose last letter alone would tell the manners apart."""
    return [row | {key: [row[key][0] | {"content": demo_data.without_closer(row[key][0]["content"])}] for key in _PAIR} for row in rows]


@dataclass(frozen=True)
class World:
    """What the demo's model has read before it is trained."""

    conversations: Callable[[random.Random], Iterator[list[dict[str, str]]]]
    kinds: str  # of conversations
    unseen: str  # what the held-out questions are about
    batch: int = 1  # conversations per row of `Size.pretrain_batch`: short ones go together
    answers_only: bool = False


MANNERS = World(demo_data.conversations, "half helpful, half dismissive", "things")
DIGITS = World(
    demo_task.conversations, "where digits are copied, reversed, or sorted either way", "sets of digits", batch=3, answers_only=True
)


@dataclass(frozen=True)
class Recipe:
    """What a demo trains, on what, and how."""

    title: str
    config: str  # class in fastalign
    data: str  # what a row of the training data is, in the plural
    rows: Callable[[Sequence[Row]], list[Row]]  # of the training data, from preference pairs
    options: dict[str, Any]
    world: World = MANNERS


RECIPES = {
    "sft": Recipe("SFT: imitate helpful answers", "SFTConfig", "helpful answers", _helpful, {"learning_rate": 3e-4}),
    "reward": Recipe("Reward model: helpful scores above dismissive", "RewardConfig", "pairs", _unclosed, {"learning_rate": 3e-4}),
    "dpo": Recipe("DPO: helpful over dismissive", "DPOConfig", "pairs", _as_given, {"learning_rate": 1e-4, "beta": 0.3}),
    "orpo": Recipe("ORPO: helpful over dismissive", "ORPOConfig", "pairs", _as_given, {"learning_rate": 3e-4}),
    "cpo": Recipe("CPO: helpful over dismissive", "CPOConfig", "pairs", _as_given, {"learning_rate": 1e-4}),
    "simpo": Recipe("SimPO: helpful over dismissive", "SimPOConfig", "pairs", _as_given, {"learning_rate": 1e-4}),
    "kto": Recipe("KTO: single answers, helpful or not", "KTOConfig", "labelled answers", _labelled, {"learning_rate": 3e-4, "beta": 0.3}),
    "distill": Recipe(
        "Distillation: a helpful teacher, on answers of either manner", "DistillConfig", "answers", _either, {"learning_rate": 3e-4}
    ),
    "gkd": Recipe(
        "On-policy distillation: a helpful teacher, on the model's own answers",
        "GKDConfig",
        "prompts",
        _as_given,
        {"learning_rate": 3e-4, "lmbda": 1.0, "divergence": "reverse_kl", "max_completion_length": 64},
    ),
    "grpo": Recipe("GRPO: digits in ascending order, by reward alone", "GRPOConfig", "prompts", _as_given, _SORTING, DIGITS),
    "rloo": Recipe("RLOO: digits in ascending order, by reward alone", "RLOOConfig", "prompts", _as_given, _SORTING, DIGITS),
    "reinforce_pp": Recipe(
        "REINFORCE++: digits in ascending order, by reward alone", "ReinforcePPConfig", "prompts", _as_given, _SORTING, DIGITS
    ),
    "ppo": Recipe("PPO: digits in ascending order, by reward and a critic", "PPOConfig", "prompts", _as_given, _CRITICISED, DIGITS),
    "online_dpo": Recipe(
        "Online DPO: digits in ascending order, by ranking its own answers",
        "OnlineDPOConfig",
        "prompts",
        _as_given,
        _SORTING,
        DIGITS,
    ),
}

MEASURES = {  # of a verdict: label and form
    "success": ("answers that are right", "{:.0%}"),
    "accuracy": ("preference accuracy", "{:.3f}"),
    "margin": ("margin, nats", "{:+.2f}"),
    "perplexity": ("perplexity of helpful answers", "{:.2f}"),
    "divergence": ("KL from the teacher, nats per token", "{:.3f}"),
    "helpful": ("sampled answers that help", "{:.0%}"),
    "on_topic": ("sampled answers on topic", "{:.0%}"),
    "words": ("words per sampled answer", "{:.1f}"),
    "score_accuracy": ("helpful scores higher (before: by log-prob)", "{:.3f}"),
    "score_margin": ("difference of the scores", "{:+.2f}"),
}


def run(objective: str = "dpo", output: str | Path = "demo", *, size: Size | None = None, console: Console | None = None) -> dict[str, Any]:
    """Run the demo into the folder `output` and print it; returns what `demo.json` holds.

    Raises ConfigError for an objective that has no demo, OutputError when `output` holds anything but an earlier demo.
    """
    from rich.console import Console

    from fastalign.train.report import write_report

    size, console = size or Size(), console or Console()
    if objective == "online":
        return demo_online.run(_claim(Path(output)), size, console)
    if objective not in RECIPES:
        raise ConfigError(f"demo: no demo for objective {objective!r}; there is one for {', '.join(RECIPES)}, online")
    recipe = RECIPES[objective]
    world = recipe.world
    size = replace(size, pretrain_batch=size.pretrain_batch * world.batch)
    folder = _claim(Path(output))
    started = time.perf_counter()

    console.rule("[bold]1. A language model without taste")
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, size)
    console.print(
        f"Qwen3 architecture, {sum(p.numel() for p in model.parameters()):,} parameters, vocabulary {len(tokenizer)}; pretraining on "
        f"{size.pretrain_steps * size.pretrain_batch:,} generated conversations, {world.kinds}"
    )
    with one_thread():
        loss = pretrain(model, tokenizer, size, console, world.conversations(random.Random(1)), answers_only=world.answers_only)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    console.print(f"pretraining loss {loss:.2f} nats per token, {time.perf_counter() - started:.0f} s")

    pairs, asked = make_prompts(size) if world is DIGITS else make_pairs(tokenizer, size)
    for name, rows in (("train", pairs), ("heldout", asked)):
        _write_rows(folder / f"{name}.jsonl", recipe.rows(rows))
    reward = objective == "reward"
    if reward:
        judge: Judge = judge_scores
        asked = recipe.rows(asked)
    elif world is DIGITS:
        judge = judge_success
    else:
        judge = partial(judge_answers, teacher=_teach(folder, pairs, size, console) if objective in ("distill", "gkd") else None)
    with one_thread():
        before, shown_before = judge(model, tokenizer, asked, size)

    console.rule(f"[bold]2. {recipe.title}")
    unseen = f"the {len(asked)} held-out questions are about {world.unseen} that occur in no training text"
    console.print(f"{len(pairs)} {recipe.data}; {unseen}")
    result, command = align(folder, recipe, size)
    trained = load(result / "final", reward=reward)
    with one_thread():
        after, shown_after = judge(trained, tokenizer, asked, size)

    console.rule("[bold]3. Before and after")
    samples = [{**old, "before": old["shown"], "after": new["shown"]} for old, new in zip(shown_before, shown_after)]
    for row in samples:
        del row["shown"]
    for home in (folder, result):  # the report shows those in the run's folder
        _write_rows(home / "samples.jsonl", samples)
    write_report(result)
    summary = {
        "objective": objective,
        "seconds": round(time.perf_counter() - started, 1),
        "pretraining_loss": loss,
        "before": before,
        "after": after,
        "command": command,
        "report": str(result / "report.html"),
    }
    (folder / "demo.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    _show(console, samples, summary)
    return summary


def make_pairs(tokenizer: PreTrainedTokenizerFast, size: Size) -> tuple[list[Row], list[Row]]:
    """Training and held-out preference rows; both answers of a pair have equally many tokens."""

    def count_tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    training = demo_data.pairs(random.Random(2), size.pairs, held_out=False, count_tokens=count_tokens)
    heldout = demo_data.pairs(random.Random(3), size.heldout, held_out=True, count_tokens=count_tokens)
    return training, heldout


def make_prompts(size: Size) -> tuple[list[Row], list[Row]]:
    """Training and held-out prompts with their right answers."""
    training = demo_task.prompts(random.Random(2), size.pairs, held_out=False)
    return training, demo_task.prompts(random.Random(3), size.heldout, held_out=True)


def align(folder: Path, recipe: Recipe, size: Size) -> tuple[Path, str]:
    """Train as a user would. Returns the run's folder and the command that repeats it."""
    from fastalign import train
    from fastalign.train.card import command

    config: Any = getattr(import_module("fastalign"), recipe.config)(
        output=str(folder / "run"), batch_size=BATCH_SIZE, epochs=size.epochs, **recipe.options
    )
    config.model.path, config.data.path, config.data.eval_path = (str(folder / name) for name in ("model", "train.jsonl", "heldout.jsonl"))
    if recipe.config in ("DistillConfig", "GKDConfig"):
        config.teacher.path = str(folder / "teacher" / "final")
    train(config)
    program = "fastalign" if shutil.which("fastalign") else f"{shlex.quote(sys.executable)} -m fastalign"
    return folder / "run", command(replace(config, output=str(folder / "again"))).replace("fastalign", program, 1)


def _teach(folder: Path, pairs: Sequence[Row], size: Size, console: Console) -> PreTrainedModel:
    """A teacher: the model of the demo, fine-tuned on helpful answers."""
    from fastalign import SFTConfig, train

    console.print("a copy of it learns to help, by SFT; it will be the teacher")
    _write_rows(folder / "helpful.jsonl", _helpful(pairs))
    config = SFTConfig(output=str(folder / "teacher"), batch_size=BATCH_SIZE, epochs=size.epochs, **RECIPES["sft"].options)
    config.model.path, config.data.path = str(folder / "model"), str(folder / "helpful.jsonl")
    train(config)
    (folder / "helpful.jsonl").unlink()
    return load(folder / "teacher" / "final")


# A judge says what a model does on the held-out questions: measures, and what to show of each question. It asks plain
# Transformers, not the trainer.
Judge = Callable[["PreTrainedModel", "PreTrainedTokenizerFast", Sequence[Row], Size], tuple[dict[str, float], list[dict[str, str]]]]


def judge_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: Sequence[Row], size: Size, *, teacher: PreTrainedModel | None = None
) -> tuple[dict[str, float], list[dict[str, str]]]:
    """How likely the helpful answers are beside the dismissive ones, and the answers that the model itself gives to some questions."""
    log_probs, target = answer_log_probs(model, tokenizer, rows, "chosen")
    chosen = sequence_logps(log_probs, target)
    margins = chosen - sequence_logps(*answer_log_probs(model, tokenizer, rows, "rejected"))
    asked = rows[: size.samples]
    answers = sample(model, tokenizer, [row["prompt"] for row in asked])
    nouns = [next(n for n in demo_data.NOUNS if n in row["prompt"][0]["content"]) for row in asked]
    verdict = {
        "accuracy": (margins > 0).float().mean().item(),
        "margin": margins.mean().item(),
        "perplexity": (-chosen.sum() / (target >= 0).sum()).exp().item(),
        "helpful": _share(demo_data.manner_of(answer) == "helpful" for answer in answers),
        "on_topic": _share(noun in answer for noun, answer in zip(nouns, answers)),
        "words": sum(len(answer.split()) for answer in answers) / len(answers),
    }
    if teacher is not None:
        taught, _ = answer_log_probs(teacher, tokenizer, rows, "chosen")
        verdict["divergence"] = (taught.exp() * (taught - log_probs)).sum(-1)[target >= 0].mean().item()
    return verdict, [{"prompt": row["prompt"][0]["content"], "shown": answer} for row, answer in zip(asked, answers)]


def judge_success(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: Sequence[Row], size: Size
) -> tuple[dict[str, float], list[dict[str, str]]]:
    """How often a sampled answer is right."""
    answers = sample(model, tokenizer, [row["prompt"] for row in rows])
    shown = [{"prompt": row["prompt"][0]["content"], "right": row["answer"], "shown": a} for row, a in zip(rows, answers)]
    return {"success": _share(a == row["answer"] for row, a in zip(rows, answers))}, shown[: size.samples]


@torch.no_grad()
def judge_scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: Sequence[Row], size: Size
) -> tuple[dict[str, float], list[dict[str, str]]]:
    """How often and by how much a helpful answer scores higher than a dismissive one; a language model's score is its log-probability."""
    if hasattr(model, "score"):
        chosen, rejected = (model(**conversations(tokenizer, rows, key)).logits[:, 0] for key in _PAIR)
    else:
        chosen, rejected = (sequence_logps(*answer_log_probs(model, tokenizer, rows, key)) for key in _PAIR)
    verdict = {"score_accuracy": (chosen > rejected).float().mean().item(), "score_margin": (chosen - rejected).mean().item()}
    scores = [f"{good:+.1f} and {bad:+.1f}" for good, bad in zip(chosen.tolist(), rejected.tolist())]
    answers = [{key: row[key][0]["content"] for key in _PAIR} for row in rows]
    return verdict, [
        {"prompt": row["prompt"][0]["content"], **both, "shown": shown} for row, both, shown in zip(rows[: size.samples], answers, scores)
    ]


def _show(console: Console, samples: Sequence[dict[str, str]], summary: dict[str, Any]) -> None:
    from rich.table import Table

    scored = "chosen" in samples[0]
    heads = ("helpful answer", "dismissive answer", "log-probs", "scores") if scored else ("before", "after")
    table = Table("held-out question", *heads, title="scores" if scored else "sampled answers", show_lines=True)
    for row in samples[:6]:
        answers = [row[key] for key in _PAIR] if scored else []
        coloured = [_coloured(row[when], row.get("right")) for when in ("before", "after")]
        table.add_row(row["prompt"], *answers, *coloured)
    console.print(table)

    table = Table(f"held out: {RECIPES[summary['objective']].world.unseen} never seen in training", "before", "after")
    for name, (label, form) in MEASURES.items():
        if name in summary["before"]:
            table.add_row(label, *(form.format(summary[when][name]) for when in ("before", "after")))
    console.print(table)
    console.print(f"{summary['seconds']:.0f} s in all. Report: [bold]{summary['report']}[/bold]", soft_wrap=True)
    console.print(f"Train it again yourself:\n  {summary['command']}", soft_wrap=True, markup=False, highlight=False)


def _coloured(answer: str, right: str | None) -> Text:
    """An answer in the colour of its manner, or of its reward where there is a right one."""
    from rich.text import Text

    if right is None:
        return Text(answer, style=COLOURS[demo_data.manner_of(answer)])
    return Text(f"{answer}  (reward {int(answer == right)})", style="green" if answer == right else "red")


def _write_rows(path: Path, rows: Iterable[Row]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _claim(folder: Path) -> Path:
    """The output folder, made or cleared of an earlier demo; anything else in it is a reason to stop."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        present = {entry.name for entry in folder.iterdir()}
        if present and "demo.json" not in present:
            raise OutputError(f"{folder}: holds something other than a demo ({sorted(present)[0]}, ...); choose another --output")
        for name in OWN_FILES:
            path = folder / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        (folder / "demo.json").write_text("{}\n", encoding="utf-8")
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"{folder}: cannot be used for the demo ({error.strerror or error}); choose another --output") from error
    return folder


def _share(truths: Iterable[bool]) -> float:
    answers = list(truths)
    return sum(answers) / len(answers)
