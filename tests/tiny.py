"""Tiny models, tokenizers and preference rows, built in code: no download, a few milliseconds each, the same on every run."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

VOCAB_SIZE = 320  # of the tokenizer: 256 bytes, the special tokens, and the merges that fit

EOS, PAD, USER, ASSISTANT, SYSTEM = "<|end|>", "<|pad|>", "<|user|>", "<|assistant|>", "<|system|>"

# Prefix-stable: what is rendered for the prompt begins what is rendered for prompt and answer.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

_NOUNS = ["river", "stone", "lamp", "garden", "train", "letter", "window", "bread", "cloud", "harbour", "violin", "engine"]
_VERBS = ["holds", "follows", "paints", "opens", "carries", "mends", "finds", "keeps"]
_ADJECTIVES = ["small", "bright", "old", "quiet", "heavy", "green", "clever", "slow"]


def sentence(rng: random.Random, words: int) -> str:
    """`words` words drawn from a small vocabulary, e.g. "old river keeps bright lamp"."""
    return " ".join(rng.choice((_ADJECTIVES, _NOUNS, _VERBS)[i % 3]) for i in range(words))


def tiny_tokenizer(
    kind: str = "bpe",  # "bpe": byte-level, encodes any text; "word": one id per word of `sentence`
    *,
    eos: str | None = EOS,
    pad: str | None = PAD,
    chat_template: str | None = CHAT_TEMPLATE,
    vocab_size: int = VOCAB_SIZE,
) -> PreTrainedTokenizerFast:
    """A trained tokenizer; `eos`, `pad` and `chat_template` may be None to build the ones that must be refused."""
    special = [t for t in dict.fromkeys((eos, pad, USER, ASSISTANT, SYSTEM)) if t is not None]
    if kind == "bpe":
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        rng = random.Random(0)
        corpus = [sentence(rng, 9) for _ in range(40)]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        core.train_from_iterator(
            corpus, trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=special, show_progress=False)
        )
    elif kind == "word":
        words = [*special, "<unk>", *_ADJECTIVES, *_NOUNS, *_VERBS]
        core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
        core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        core.add_special_tokens(special)
    else:
        raise ValueError(f"kind must be 'bpe' or 'word', not {kind!r}")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos, pad_token=pad, unk_token="<unk>" if kind == "word" else None)
    tokenizer.chat_template = chat_template
    return tokenizer


# What differs from the shared tiny shape, per architecture. Windows of 8 make sliding attention matter on short texts;
# head_dim, where an architecture has one, is not hidden_size / heads, so that mixing the two up shows.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "output_router_logits": True},
    "mistral": {"head_dim": 16, "sliding_window": 8},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True, "sliding_window": None},
    "gemma2": {
        "head_dim": 16,
        "sliding_window": 8,
        "final_logit_softcapping": 3.0,
        "attn_logit_softcapping": 5.0,
        "query_pre_attn_scalar": 16,
    },
    "gemma3_text": {
        "head_dim": 16,
        "sliding_window": 8,
        "query_pre_attn_scalar": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi": {"num_key_value_heads": 4},
    "phi3": {"sliding_window": None},
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 6.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3},
    "cohere2": {"sliding_window": 8, "logit_scale": 0.25, "layer_types": ["sliding_attention", "full_attention"]},
    "olmo2": {},
    "smollm3": {"no_rope_layers": [1, 0]},
    "gpt2": {},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8},
}
ALIASES = {"gemma3": "gemma3_text"}


def tiny_config(family: str = "qwen3", *, vocab_size: int = VOCAB_SIZE, hidden_size: int = 32, layers: int = 2, **overrides: Any) -> Any:
    """The Transformers config of a two-layer model; `overrides` go into it as they are."""
    family = ALIASES.get(family, family)
    options: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 2 * hidden_size,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": None,
        "initializer_range": 0.3,  # logits of a nat and more, so that a wrong head or mask is visible
    }
    if family == "gpt2":
        options = {"vocab_size": vocab_size, "n_embd": hidden_size, "n_layer": layers, "n_head": 4, "n_positions": 512, "eos_token_id": 0}
        options |= {"bos_token_id": None, "initializer_range": 0.3, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return AutoConfig.for_model(family, **(options | FAMILIES[family] | overrides))


def tiny_model(
    family: str = "qwen3", *, vocab_size: int = VOCAB_SIZE, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> PreTrainedModel:
    """A random causal LM in eval mode. Biases and norm weights are randomised too: at 0 and 1 they would hide mistakes."""
    config = tiny_config(family, vocab_size=vocab_size, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def save_tiny(path: str | Path, family: str = "qwen3", *, tokenizer: PreTrainedTokenizerFast | None = None, **model_options: Any) -> Path:
    """Write a model folder (safetensors, config, tokenizer) as a user would have it, and return its path."""
    path = Path(path)
    tokenizer = tokenizer or tiny_tokenizer()
    model_options.setdefault("vocab_size", max(VOCAB_SIZE, len(tokenizer)))
    if tokenizer.eos_token_id is not None:
        model_options.setdefault("eos_token_id", tokenizer.eos_token_id)
    tiny_model(family, **model_options).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def preference_rows(n: int, seed: int = 0, *, conversational: bool = False, prompt_words: tuple[int, int] = (2, 8),
                    completion_words: tuple[int, int] = (1, 12)) -> list[dict[str, Any]]:  # fmt: skip
    """`n` rows with `prompt`, `chosen`, `rejected`: strings, or lists of messages when `conversational`."""
    rng = random.Random(seed)
    rows: list[dict[str, Any]] = []
    while len(rows) < n:
        prompt = sentence(rng, rng.randint(*prompt_words))
        chosen, rejected = (" " + sentence(rng, rng.randint(*completion_words)) for _ in range(2))
        if chosen == rejected:
            continue
        row: dict[str, Any] = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        if conversational:
            roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
            row = {key: [{"role": roles[key], "content": text.strip()}] for key, text in row.items()}
        rows.append(row)
    return rows


def write_every_format(folder: Path) -> None:
    """pairs, completions, singles, rankings and prompts .jsonl, of the same 24 pairs."""
    pairs = preference_rows(24)
    files: dict[str, list[dict[str, Any]]] = {
        "pairs": pairs,
        "completions": [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs],
        "singles": [{"prompt": row["prompt"], "completion": row["chosen"], "label": k % 3 != 1} for k, row in enumerate(pairs)],
        "rankings": [
            {"prompt": a["prompt"], "completions": [a["chosen"], a["rejected"], b["chosen"]], "ranks": [2, 1, 3]}
            for a, b in pairwise(pairs)
            if b["chosen"] not in (a["chosen"], a["rejected"])
        ],
        "prompts": [{"prompt": row["prompt"]} for row in pairs],
    }
    for name, content in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
