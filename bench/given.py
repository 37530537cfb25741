"""Online training without its answering: both sides take the answers, advantages and log-probs of a prompt from its row.

What is then timed is the update alone, the rest of each side's own training step and loop included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def answer_from_rows(objective: Any, generations: list[int]) -> None:
    """Let an online objective of fastalign take what `write_rollouts` wrote, in place of generating it.

    The tokens of every generation, those of a prompt once per answer, are added to `generations`.
    """
    from fastalign.objectives.rollouts import Rollouts

    columns = objective.rollout.data.columns

    def roll(prompts: Sequence[Any], seed: Sequence[int], *, refill: int = 0) -> Rollouts:
        rows = [columns[prompt.index] for prompt in prompts]
        answers = [answer for row in rows for answer in row["answers"]]
        generations.append(sum(len(p.prompt) * len(row["answers"]) for p, row in zip(prompts, rows)) + sum(map(len, answers)))
        return Rollouts(
            prompts=torch.tensor([prompt.index for prompt, row in zip(prompts, rows) for _ in row["answers"]]),
            tokens=torch.tensor([token for answer in answers for token in answer]),
            lengths=torch.tensor([len(answer) for answer in answers]),
            finished=torch.ones(len(answers), dtype=torch.bool),
            rewards=torch.zeros(len(answers), 1),
            advantages=torch.tensor([advantage for row in rows for advantage in row["advantages"]]),
            logps=torch.tensor([x for row in rows for answer in row["old_logps"] for x in answer]),
            ref_logps=torch.tensor([x for row in rows for answer in row["ref_logps"] for x in answer]),
            draws=torch.ones(len(rows), dtype=torch.int64),
        )

    objective.rollout.roll = roll
    objective.advantages = lambda rollouts: rollouts.advantages


class AnswersFromRows:
    """The same for TRL's online trainers, before which it goes among the bases. Padding is that of the trainer's own method."""

    def _generate_and_score_completions(self: Any, inputs: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        from trl.trainer.utils import pad

        def padded(rows: Sequence[torch.Tensor], side: str = "right", value: int = 0) -> torch.Tensor:
            return pad(list(rows), padding_value=value, padding_side=side, pad_to_multiple_of=self.pad_to_multiple_of)

        places = [(row, i % self.num_generations) for i, row in enumerate(inputs)]  # the answers to a prompt come one after the other
        prompts = [torch.tensor(self.processing_class(row["prompt"])["input_ids"]) for row in inputs]
        answers = [torch.tensor(row["answers"][k]) for row, k in places]
        pad_id = self.processing_class.pad_token_id
        return {
            "prompt_ids": padded(prompts, "left", pad_id),
            "prompt_mask": padded([torch.ones_like(x) for x in prompts], "left"),
            "completion_ids": padded(answers, value=pad_id),
            "completion_mask": padded([torch.ones_like(x) for x in answers]),
            "advantages": torch.tensor([row["advantages"][k] for row, k in places]),
            "old_per_token_logps": padded([torch.tensor(row["old_logps"][k]) for row, k in places]),
            "ref_per_token_logps": padded([torch.tensor(row["ref_logps"][k]) for row, k in places]),
            "num_items_in_batch": torch.tensor(sum(map(len, answers))),
        }


def no_reward(**_: Any) -> list[float]:
    """TRL's online trainers want a reward function; this one is never called."""
    raise AssertionError("the answers are given, with their advantages")
