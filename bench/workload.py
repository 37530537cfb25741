"""The model, tokenizer and data that both sides of a training benchmark train on, as files."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Shape:
    """Qwen3 architecture with tied embeddings, as the small Qwen3 models have them; one token per word."""

    vocab_size: int = 32768
    hidden: int = 256
    layers: int = 4
    prompt_words: tuple[int, int] = (5, 40)
    completion_words: tuple[int, int] = (5, 60)
    positions: int = 1024  # that the model is made for

    @property
    def mean_tokens(self) -> float:
        """Of a prompt with one completion and its end."""
        return (sum(self.prompt_words) + sum(self.completion_words)) / 2 + 1

    @property
    def most_tokens(self) -> int:
        return self.prompt_words[1] + self.completion_words[1] + 1

    @property
    def model_text(self) -> str:
        layers = 12 * self.layers * self.hidden**2  # weights, in terms of the proportions of `write_model`
        head = self.vocab_size * self.hidden / (self.vocab_size * self.hidden + layers)
        about = f"Qwen3 architecture, {self.layers} layers, hidden {self.hidden}, V={self.vocab_size}, tied embeddings"
        return f"{about} (the head is {head:.0%} of the products of a token)"

    @property
    def text(self) -> str:
        prompt, completion = self.prompt_words, self.completion_words
        return f"{self.model_text}; prompts of {prompt[0]}-{prompt[1]} words, completions of {completion[0]}-{completion[1]}"


QUICK = Shape(vocab_size=2048, hidden=64, layers=2, prompt_words=(3, 10), completion_words=(3, 15))


def write_model(folder: Path, shape: Shape) -> Path:
    """A random model and its word tokenizer."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    save_tokenizer(folder, shape.vocab_size)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden,
        intermediate_size=3 * shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=shape.hidden // 4,
        max_position_embeddings=shape.positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


def save_tokenizer(folder: Path, size: int) -> None:
    """A tokenizer of `size` words, the first two being the end and the padding."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<eos>": 0, "<pad>": 1} | {f"w{i}": i for i in range(2, size)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>").save_pretrained(folder)


def write_adapter(folder: Path, model: Path, rank: int) -> Path:
    """A LoRA adapter whose update is not zero, so that both sides can start from the same one."""
    import peft
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules="all-linear", init_lora_weights=False)
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model), config).save_pretrained(folder)
    return folder


def write_pairs(path: Path, pairs: int, shape: Shape, *, seed: int = 0) -> Path:
    """`pairs` rows of random words."""
    rng = random.Random(seed)

    def words(bounds: tuple[int, int]) -> str:
        return " ".join(f"w{i}" for i in random_ids(rng, bounds, shape))

    with path.open("w", encoding="utf-8") as file:
        for _ in range(pairs):
            row = {"prompt": words(shape.prompt_words) + " "}
            row |= {"chosen": words(shape.completion_words), "rejected": words(shape.completion_words)}
            file.write(json.dumps(row) + "\n")
    return path


def random_ids(rng: random.Random, bounds: tuple[int, int], shape: Shape) -> list[int]:
    """Ids of words, as many as `bounds` allow."""
    return [rng.randrange(2, shape.vocab_size) for _ in range(rng.randint(*bounds))]


def write_single(path: Path, rows: int, shape: Shape, *, seed: int = 0, labels: bool = True) -> Path:
    """`rows` answers of random words; with `labels` every other one is desirable."""
    pairs = [json.loads(line) for line in write_pairs(path, rows, shape, seed=seed).read_text(encoding="utf-8").splitlines()]
    with path.open("w", encoding="utf-8") as file:
        for k, row in enumerate(pairs):
            single = {"prompt": row["prompt"], "completion": row["chosen"]}
            file.write(json.dumps(single | ({"label": k % 2 == 0} if labels else {})) + "\n")
    return path


def write_rollouts(path: Path, prompts: int, answers: int, shape: Shape, model: Path, adapter: Path | None, *, seed: int = 0) -> Path:
    """`prompts` rows of random words, each with what a generation would have left behind for its `answers` answers.

    answers      token ids, the last one EOS
    advantages   of rewards of 0 and 1, which in every fourth row are all alike, so that there they are 0
    old_logps    one number per token, 0.1 nats off those of `model` with `adapter`: 2 % of the ratios are clipped
    ref_logps    likewise, 0.2 nats off
    """
    import peft
    from transformers import AutoModelForCausalLM

    policy: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if adapter is not None:
        policy = peft.PeftModel.from_pretrained(policy, adapter)
    rng, noise = random.Random(seed), torch.Generator().manual_seed(seed)
    with path.open("w", encoding="utf-8") as file:
        for k in range(prompts):
            prompt = random_ids(rng, shape.prompt_words, shape)
            said = [[*random_ids(rng, shape.completion_words, shape), 0] for _ in range(answers)]
            row = {"prompt": " ".join(f"w{i}" for i in prompt), "answers": said, "old_logps": [], "ref_logps": []}
            good = rng.choice([0, answers]) if k % 4 == 3 else rng.randint(1, answers - 1)
            rewards = torch.tensor([1.0] * good + [0.0] * (answers - good))[torch.randperm(answers, generator=noise)]
            row["advantages"] = ((rewards - rewards.mean()) / (rewards.std() + 1e-4)).tolist()
            for answer in said:
                logps = answer_logps(policy, prompt, answer)
                for name, size in (("old_logps", 0.1), ("ref_logps", 0.2)):
                    row[name].append((logps + size * torch.randn(logps.shape, generator=noise)).tolist())
            file.write(json.dumps(row) + "\n")
    return path


@torch.no_grad()
def answer_logps(policy: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """(len(answer),) log-probs of the tokens of an answer."""
    logits = policy(torch.tensor([prompt + answer]), logits_to_keep=len(answer) + 1).logits[0, :-1]
    return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]
