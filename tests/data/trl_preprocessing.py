"""The token ids and labels that TRL 1.16's trainers make of rows: the oracle of the data tests."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase
from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference, KTOTrainer
from trl.trainer.reward_trainer import RewardTrainer
from trl.trainer.sft_trainer import SFTTrainer

datasets.disable_progress_bars()

Scored = tuple[list[int], list[int]]  # a sequence, and 1 where TRL scores the token


def trl_pairs(
    rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int | None = None, truncation: str = "keep_start"
) -> list[tuple[Scored, Scored]]:
    """(chosen, rejected) of every row that TRL keeps, through its own `_prepare_dataset` and collator."""
    prepared = _prepare(DPOTrainer, rows, tokenizer, max_length, truncation)
    collator = DataCollatorForPreference(pad_token_id=-1, max_length=max_length, truncation_mode=truncation)
    pairs = []
    for example in prepared:
        chosen, rejected = _unpadded(collator([example]))
        pairs.append((chosen, rejected))
    return pairs


def trl_supervised(
    rows: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    truncation: str = "keep_start",
    *,
    completion_only: bool | None = None,
    assistant_only: bool = False,
) -> list[Scored]:
    """Sequences and labels of SFTTrainer; by default completion-only for prompt-completion rows, as it decides itself."""
    only = "completion" in rows[0] if completion_only is None else completion_only
    prepared = _prepare(
        SFTTrainer, rows, tokenizer, max_length, truncation, stub={"completion_only_loss": only, "chat_template": None},
        assistant_only_loss=assistant_only, packing=False, formatting_func=None,
    )  # fmt: skip
    return [(example["input_ids"], [int(label != -100) for label in example["labels"]]) for example in prepared]


def trl_unpaired(
    rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
) -> list[tuple[Scored, bool]]:
    """(sequence, label) of every sample that KTOTrainer keeps; it cuts at the end only."""
    stub = {"calculate_KL": False, "desirable_weight": 1.0, "undesirable_weight": 1.0}
    prepared = _prepare(KTOTrainer, rows, tokenizer, max_length, "keep_start", stub=stub)
    collator = DataCollatorForUnpairedPreference(pad_token_id=-1, max_length=max_length)
    return [(_unpadded(collator([example]))[0], bool(example["label"])) for example in prepared]


def trl_reward(
    rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
) -> list[tuple[list[int], list[int]]]:
    """(chosen, rejected) sequences of RewardTrainer, which leaves out what is too long."""
    return [(example["chosen_ids"], example["rejected_ids"]) for example in _prepare(RewardTrainer, rows, tokenizer, max_length, "")]


def _prepare(
    trainer: Any, rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int | None, truncation: str,
    stub: dict[str, Any] | None = None, assistant_only_loss: bool = False, **arguments: Any,
) -> Any:  # fmt: skip
    args = SimpleNamespace(
        dataset_num_proc=None, max_length=max_length, truncation_mode=truncation, assistant_only_loss=assistant_only_loss,
        dataset_text_field="text", shuffle_dataset=False, per_device_train_batch_size=2,
    )  # fmt: skip
    itself = SimpleNamespace(_tokenizer=tokenizer, **(stub or {}))
    return trainer._prepare_dataset(itself, datasets.Dataset.from_list(rows), tokenizer, args, dataset_name="train", **arguments)


def _unpadded(batch: Any) -> list[Scored]:
    sides = []
    for ids, mask in zip(batch["input_ids"].tolist(), batch["completion_mask"].tolist()):
        length = ids.index(-1) if -1 in ids else len(ids)
        sides.append((ids[:length], mask[:length]))
    return sides
