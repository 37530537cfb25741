"""`fastalign demo`: build a small language model from nothing, give it a preference, and show what changed.

Everything is generated here: the text, the byte-level BPE tokenizer, the Qwen3 model that is pretrained on the text, and
the preference pairs. The training run itself is the user's: `fastalign.train` on a model folder and a JSONL file, both
left in the output folder together with the command that repeats it.
"""

from __future__ import annotations

import json
import random
import shlex
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastalign import demo_data
from fastalign.errors import ConfigError, OutputError

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

EOS, USER, ASSISTANT = "<|end|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
COLOURS = {"helpful": "green", "dismissive": "red", "mixed": "yellow", "neither": "yellow"}
OWN_FILES = ("model", "pairs.jsonl", "heldout.jsonl", "samples.jsonl", "run", "demo.json")


@dataclass(frozen=True)
class Size:
    """How much of everything; the default takes about a minute on two cores."""

    hidden: int = 128
    layers: int = 3
    pretrain_steps: int = 400
    pretrain_batch: int = 24  # conversations
    pairs: int = 1024
    heldout: int = 256
    samples: int = 128
    epochs: int = 1


@dataclass(frozen=True)
class Verdict:
    """What a model does on the held-out questions. Log-probs come from the model's own logits, not from the trainer."""

    accuracy: float  # share of pairs whose chosen answer is more likely than the rejected one
    margin: float  # mean of log p(chosen) - log p(rejected), nats
    helpful: float  # share of sampled answers in the helpful manner
    on_topic: float  # share of sampled answers that name the thing that was asked about
    words: float  # mean words per sampled answer


def run(objective: str = "dpo", output: str | Path = "demo", *, size: Size | None = None, console: Console | None = None) -> dict[str, Any]:
    """Run the demo into the folder `output` and print it; returns what `demo.json` holds.

    Raises ConfigError for an objective that has no demo, OutputError when `output` holds anything but an earlier demo.
    """
    from rich.console import Console

    from fastalign.train.report import write_report

    if objective != "dpo":
        raise ConfigError(f"demo: no demo for objective {objective!r}; there is one for dpo")
    size = size or Size()
    console = console or Console()
    folder = _claim(Path(output))
    started = time.perf_counter()

    console.rule("[bold]1. A language model without taste")
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, size)
    console.print(
        f"Qwen3 architecture, {sum(p.numel() for p in model.parameters()):,} parameters, vocabulary {len(tokenizer)}; pretraining on "
        f"{size.pretrain_steps * size.pretrain_batch:,} generated conversations, half helpful, half dismissive"
    )
    with one_thread():
        loss = pretrain(model, tokenizer, size, console)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    console.print(f"pretraining loss {loss:.2f} nats per token, {time.perf_counter() - started:.0f} s")

    pairs, heldout = make_pairs(tokenizer, size)
    for name, rows in (("pairs.jsonl", pairs), ("heldout.jsonl", heldout)):
        (folder / name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    with one_thread():
        before, answers_before = judge(model, tokenizer, heldout, size)

    console.rule("[bold]2. DPO: helpful over dismissive")
    console.print(f"{len(pairs)} pairs; the {len(heldout)} held-out ones name things that occur in no training text")
    result, command = align(folder, size)
    aligned = load(result / "final")
    with one_thread():
        after, answers_after = judge(aligned, tokenizer, heldout, size)

    console.rule("[bold]3. Before and after")
    samples = [
        {"prompt": row["prompt"][0]["content"], "before": old, "after": new}
        for row, old, new in zip(heldout, answers_before, answers_after)
    ]
    for home in (folder, result):  # the report shows those in the run's folder
        (home / "samples.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in samples), encoding="utf-8")
    write_report(result)
    summary = {
        "objective": objective,
        "seconds": round(time.perf_counter() - started, 1),
        "pretraining_loss": loss,
        "before": asdict(before),
        "after": asdict(after),
        "command": command,
        "report": str(result / "report.html"),
    }
    (folder / "demo.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    _show(console, samples, before, after, summary)
    return summary


def build_tokenizer(documents: int = 1000) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on generated conversations; it encodes any text, and all words of the demo in one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    texts = (turn["content"] for turns in islice(demo_data.conversations(random.Random(0)), documents) for turn in turns)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1024, initial_alphabet=alphabet, special_tokens=[EOS, USER, ASSISTANT], show_progress=False)
    core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=EOS, pad_token=EOS, padding_side="left")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(tokenizer: PreTrainedTokenizerFast, size: Size) -> PreTrainedModel:
    """A random Qwen3 model with tied embeddings."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        intermediate_size=3 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=size.hidden // 4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Qwen3ForCausalLM(config)


@contextmanager
def one_thread() -> Iterator[None]:
    """Matrices this small gain little from more cores, and threads that wait for each other cost a lot on a busy machine.

    It also makes the pretrained weights independent of the number of cores.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def pretrain(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, size: Size, console: Console) -> float:
    """Next-token training on generated conversations, one per row, in plain torch. Returns the mean loss of the last steps."""
    from rich.progress import track

    from fastalign import linear_cross_entropy

    stream = demo_data.conversations(random.Random(1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.01)
    steps, warmup, decay = size.pretrain_steps, 20, 0.4 * size.pretrain_steps
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warmup, (steps - step) / decay))
    losses = []
    model.train()
    for _ in track(range(steps), "pretraining", console=console, transient=True):
        texts = tokenizer.apply_chat_template(list(islice(stream, size.pretrain_batch)), tokenize=False)
        rows = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt")
        target = rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)[:, 1:]
        hidden = model.model(rows["input_ids"][:, :-1], use_cache=False).last_hidden_state  # right padding: a causal model needs no mask
        loss = linear_cross_entropy(hidden, model.lm_head.weight, target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    recent = losses[-20:]
    return sum(recent) / len(recent)


def make_pairs(tokenizer: PreTrainedTokenizerFast, size: Size) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and held-out preference rows; both answers of a pair have equally many tokens."""

    def count_tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    training = demo_data.pairs(random.Random(2), size.pairs, held_out=False, count_tokens=count_tokens)
    heldout = demo_data.pairs(random.Random(3), size.heldout, held_out=True, count_tokens=count_tokens)
    return training, heldout


def align(folder: Path, size: Size) -> tuple[Path, str]:
    """Train as a user would. Returns the run's folder and the command that repeats it."""
    from fastalign import DPOConfig, train
    from fastalign.data.config import DataConfig
    from fastalign.models.config import ModelConfig

    options: dict[str, Any] = {"batch_size": 16, "epochs": size.epochs, "learning_rate": 1e-4, "beta": 0.3}
    model, pairs, heldout, output = (folder / name for name in ("model", "pairs.jsonl", "heldout.jsonl", "run"))
    config = DPOConfig(
        model=ModelConfig(path=str(model)),
        data=DataConfig(path=str(pairs), eval_path=str(heldout)),
        output=str(output),
        **options,
    )
    train(config)
    flags = {"model.path": model, "data.path": pairs, "data.eval_path": heldout, "output": folder / "again", **options}
    program = "fastalign" if shutil.which("fastalign") else f"{shlex.quote(sys.executable)} -m fastalign"
    command = f"{program} dpo " + " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in flags.items())
    return output, command


def load(folder: Path) -> PreTrainedModel:
    """A trained folder in plain Transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def judge(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: Sequence[dict[str, Any]], size: Size
) -> tuple[Verdict, list[str]]:
    """The verdict on a model, and its sampled answers to the first `size.samples` questions."""
    margins = sequence_logps(model, tokenizer, rows, "chosen") - sequence_logps(model, tokenizer, rows, "rejected")
    asked = rows[: size.samples]
    answers = sample(model, tokenizer, [row["prompt"] for row in asked])
    nouns = [next(n for n in demo_data.NOUNS if n in row["prompt"][0]["content"]) for row in asked]
    verdict = Verdict(
        accuracy=(margins > 0).float().mean().item(),
        margin=margins.mean().item(),
        helpful=_share(demo_data.manner_of(answer) == "helpful" for answer in answers),
        on_topic=_share(noun in answer for noun, answer in zip(nouns, answers)),
        words=sum(len(answer.split()) for answer in answers) / len(answers),
    )
    return verdict, answers


@torch.no_grad()
def sequence_logps(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: Sequence[dict[str, Any]], key: str) -> torch.Tensor:
    """log p(row[key] | row["prompt"]) of every row, (R,) nats, from the logits of one padded batch."""
    prompts = tokenizer.apply_chat_template([row["prompt"] for row in rows], tokenize=False, add_generation_prompt=True)
    texts = tokenizer.apply_chat_template([row["prompt"] + row[key] for row in rows], tokenize=False)
    batch = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt")
    starts = torch.tensor([len(ids) for ids in tokenizer(prompts, add_special_tokens=False)["input_ids"]])
    logps = model(**batch).logits[:, :-1].float().log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None]).squeeze(2)
    position = torch.arange(1, batch["input_ids"].shape[1])
    answer = (position >= starts[:, None]) & (batch["attention_mask"][:, 1:] == 1)
    return (logps * answer).sum(1)


@torch.no_grad()
def sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[list[dict[str, str]]]) -> list[str]:
    """One sampled answer per prompt, at temperature 1; the same random numbers on every call."""
    texts = tokenizer.apply_chat_template(list(prompts), tokenize=False, add_generation_prompt=True)
    batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt", return_token_type_ids=False)
    generate: Any = model.generate
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ids = generate(**batch, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=40, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def _show(console: Console, samples: list[dict[str, str]], before: Verdict, after: Verdict, summary: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table("held-out question", "before", "after", title="sampled answers", show_lines=True)
    for row in samples[:6]:
        table.add_row(row["prompt"], *(Text(row[when], style=COLOURS[demo_data.manner_of(row[when])]) for when in ("before", "after")))
    console.print(table)

    table = Table("held out: things never seen in training", "before", "after")
    for label, name, form in (
        ("preference accuracy", "accuracy", "{:.3f}"),
        ("margin, nats", "margin", "{:+.2f}"),
        ("sampled answers that help", "helpful", "{:.0%}"),
        ("sampled answers on topic", "on_topic", "{:.0%}"),
        ("words per sampled answer", "words", "{:.1f}"),
    ):
        table.add_row(label, form.format(getattr(before, name)), form.format(getattr(after, name)))
    console.print(table)
    console.print(f"{summary['seconds']:.0f} s in all. Report: [bold]{summary['report']}[/bold]", soft_wrap=True)
    console.print(f"Train it again yourself:\n  {summary['command']}", soft_wrap=True, markup=False, highlight=False)


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
