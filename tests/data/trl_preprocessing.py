"""The token ids that TRL 1.16's DPOTrainer and its collator make of rows: the oracle of the data tests."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase
from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer

datasets.disable_progress_bars()

Scored = tuple[list[int], list[int]]  # a sequence, and 1 where TRL's completion mask scores the token


def trl_pairs(
    rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int | None = None, truncation: str = "keep_start"
) -> list[tuple[Scored, Scored]]:
    """(chosen, rejected) of every row that TRL keeps, through its own `_prepare_dataset` and collator."""
    args: Any = SimpleNamespace(dataset_num_proc=None, max_length=max_length, truncation_mode=truncation)
    trainer: Any = SimpleNamespace(_tokenizer=tokenizer)
    prepared = DPOTrainer._prepare_dataset(trainer, datasets.Dataset.from_list(rows), tokenizer, args, "train")
    collator = DataCollatorForPreference(pad_token_id=-1, max_length=max_length, truncation_mode=truncation)
    pairs = []
    for example in prepared:
        batch = collator([example])
        sides = []
        for ids, mask in zip(batch["input_ids"].tolist(), batch["completion_mask"].tolist()):
            length = ids.index(-1) if -1 in ids else len(ids)
            sides.append((ids[:length], mask[:length]))
        pairs.append((sides[0], sides[1]))
    return pairs
