"""Odds ratio preference optimisation: imitation and preference in one loss, without a reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fastalign.data.preferences import load_preferences
from fastalign.data.samples import Samples
from fastalign.losses.reference_free import log_odds_ratio, orpo
from fastalign.models.heads import head_spec
from fastalign.models.trunk import trunk
from fastalign.objectives.base import Dataset, RunConfig
from fastalign.objectives.pairs import (
    METRIC_OUTPUTS,
    PairSlab,
    Sums,
    add_aux_loss,
    add_sums,
    count_pairs,
    mean_metrics,
    pair_loss,
    pair_metrics,
)
from fastalign.types import PackedBatch, Sample, on_device


@dataclass
class ORPOConfig(RunConfig):
    """Odds ratio preference optimisation: fine-tunes on the chosen answers and pushes away the rejected ones, without a reference."""

    name: ClassVar[str] = "orpo"

    learning_rate: float = 8e-6
    """Peak of the schedule. The default is for full fine-tuning; an adapter wants about ten times more."""
    beta: float = 0.1
    """Weight of the odds ratio against the likelihood (lambda of the paper)."""
    nll_scope: Literal["completion", "all"] = "completion"
    """Tokens of the likelihood: those of the chosen answer, or of its prompt too, as in TRL."""

    def validate(self) -> None:
        super().validate()
        self._require("beta", self.beta > 0, "positive")
        self._require_choice("nll_scope", ("completion", "all"))

    def load_data(self, tokenizer: Any, vocab_size: int | None) -> Samples:
        return load_preferences(self.data, tokenizer, vocab_size=vocab_size)

    def objective(self, model: Any, data: Dataset, folder: Path) -> ORPO:
        return ORPO(self, model)


class ORPO:
    """loss = sum_i w_i NLL_i / (NLL's tokens of the step) + sum_i w_i orpo_i / (pairs of the step), w_i the pair's weight in the data.

    NLL_i is summed over the tokens of `nll_scope`. Metrics are those of TRL's ORPOTrainer: rewards/* and logps/* from log-probs per
    token, nll_loss, log_odds_chosen and log_odds_ratio (the mean of log sigmoid of it), all unweighted means over the step; logits/*
    and entropy count the completions' tokens (TRL's logits/* the prompts' and the padding's too).
    """

    def __init__(self, config: ORPOConfig, model: Any) -> None:
        self.model = model
        self.head = head_spec(model)
        self.beta, self.budget = config.beta, config.logits_budget
        self.with_prompt = config.nll_scope == "all"
        self.outputs = ("logps", *(METRIC_OUTPUTS if config.metrics == "full" else ()))

    def denominators(self, samples: Sequence[Sample]) -> dict[str, float]:
        counts = count_pairs(samples)
        prompts = sum(max(0, len(sample.contexts[0]) - 1) for sample in samples) if self.with_prompt else 0
        return counts | {"nll_tokens": max(1.0, counts["chosen_tokens"] + prompts)}

    def loss(self, batch: PackedBatch, denominators: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        policy = trunk(self.model, batch)
        sums: Sums = {}

        def loss_of_slab(slab: PairSlab) -> Tensor:
            chosen, rejected = slab.means[0::2], slab.means[1::2]
            weight, nll = slab.of_pairs(batch.weight), -slab.sums[0::2]
            odds = orpo(chosen, rejected, beta=self.beta).loss
            log_odds = log_odds_ratio(chosen.detach(), rejected.detach())
            more = {
                "nll_loss": nll.detach().sum() / denominators["nll_tokens"],
                "log_odds_chosen": log_odds.sum(),
                "log_odds_ratio": -odds.detach().sum() / self.beta,
            }
            add_sums(sums, pair_metrics(self.beta * slab.means, slab.means, slab) | more)
            return (nll * weight).sum() / denominators["nll_tokens"] + (odds * weight).sum() / denominators["samples"]

        loss = pair_loss(self.head, policy.hidden, batch, loss_of_slab, outputs=self.outputs, budget=self.budget)
        if self.with_prompt:
            loss = loss + self._prompt_nll(policy.hidden, batch, denominators["nll_tokens"], sums)
        loss = add_aux_loss(loss, policy.aux_loss, batch, denominators, sums)
        sums["loss"] = loss.detach()
        return loss, sums

    def metrics(self, sums: dict[str, float], denominators: dict[str, float]) -> dict[str, float]:
        return mean_metrics(sums, denominators)

    def _prompt_nll(self, hidden: Tensor, batch: PackedBatch, tokens: float, sums: Sums) -> Tensor:
        """The likelihood term of the prompts of the chosen sequences, which are scored nowhere else."""
        scored = [end - start for start, end in zip(batch.live_bounds[0::2], batch.live_bounds[1::2])]
        spans = [rows[: len(rows) - 1 - count] for rows, count in zip(batch.sequences()[0::2], scored)]
        rows = on_device(torch.tensor(list(chain.from_iterable(spans)), dtype=torch.int64), hidden.device)
        lengths = on_device(torch.tensor([len(span) for span in spans]), hidden.device)
        weight = batch.weight.repeat_interleave(lengths, output_size=rows.shape[0])
        unweighted: list[Tensor] = []

        def nll(out: Any, part: slice) -> Tensor:
            unweighted.append(-out.logps.detach().sum())
            return -(out.logps * weight[part]).sum() / tokens

        options: dict[str, Any] = {"differentiable": ("logps",), "live_rows": rows.shape[0], "budget": self.budget}
        loss = self.head.loss(hidden[rows], batch.input_ids[rows + 1], nll, **options)  # rows repeat where pairs share a prompt
        add_sums(sums, {"nll_loss": torch.stack(unweighted).sum() / tokens})
        return loss
