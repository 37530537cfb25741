"""The demo's model: a tokenizer and a small Qwen3 model built and pretrained from nothing, and what plain Transformers makes of them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastalign import demo_data

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

EOS, USER, ASSISTANT = "<|end|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


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


def pretrain(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    size: Size,
    console: Console,
    stream: Iterator[list[dict[str, str]]],
    *,
    answers_only: bool = False,
) -> float:
    """Next-token training on generated conversations, one per row, in plain torch. Returns the mean loss of the last steps.

    With `answers_only` what the user says is not learned.
    """
    from rich.progress import track

    from fastalign import linear_cross_entropy

    speaks = tokenizer.convert_tokens_to_ids(ASSISTANT)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.01)
    steps, warmup, decay = size.pretrain_steps, 20, 0.4 * size.pretrain_steps
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warmup, (steps - step) / decay))
    losses = []
    model.train()
    for _ in track(range(steps), "pretraining", console=console, transient=True):
        texts = tokenizer.apply_chat_template(list(islice(stream, size.pretrain_batch)), tokenize=False)
        rows = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt")
        ids = rows["input_ids"]
        target = ids.masked_fill(rows["attention_mask"] == 0, -100)[:, 1:]
        if answers_only:
            target = target.masked_fill((ids[:, :-1] == speaks).cumsum(1) == 0, -100)
        hidden = model.model(ids[:, :-1], use_cache=False).last_hidden_state  # right padding: a causal model needs no mask
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


def load(folder: Path, *, reward: bool = False) -> PreTrainedModel:
    """A trained folder in plain Transformers."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    auto: Any = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=torch.float32).eval()


def conversations(tokenizer: PreTrainedTokenizerFast, rows: Sequence[dict[str, Any]], key: str) -> Any:
    """The prompts of all rows with their answers row[key], as one padded batch."""
    texts = tokenizer.apply_chat_template([row["prompt"] + row[key] for row in rows], tokenize=False)
    return tokenizer(texts, add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt", return_token_type_ids=False)


@torch.no_grad()
def answer_log_probs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: Sequence[dict[str, Any]], key: str
) -> tuple[Tensor, Tensor]:
    """Log-probs (R, T, V) of every next token of prompt and answer row[key], and the answers' own tokens (R, T), -100 elsewhere."""
    prompts = tokenizer.apply_chat_template([row["prompt"] for row in rows], tokenize=False, add_generation_prompt=True)
    starts = torch.tensor([len(ids) for ids in tokenizer(prompts, add_special_tokens=False)["input_ids"]])
    batch = conversations(tokenizer, rows, key)
    target, position = batch["input_ids"][:, 1:], torch.arange(1, batch["input_ids"].shape[1])
    answer = (position >= starts[:, None]) & (batch["attention_mask"][:, 1:] == 1)
    return model(**batch).logits[:, :-1].float().log_softmax(-1), target.masked_fill(~answer, -100)


def sequence_logps(log_probs: Tensor, target: Tensor) -> Tensor:
    """(R,) nats: log p(answer | prompt), from what `answer_log_probs` gives."""
    return (log_probs.gather(2, target.clamp(min=0)[:, :, None])[:, :, 0] * (target >= 0)).sum(1)


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
