"""Supervised fine-tuning: imitate the completions (or the turns of the assistant, or whole texts) of the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor

from fastalign.data.config import SupervisedDataConfig
from fastalign.data.samples import Samples
from fastalign.data.supervised import load_supervised
from fastalign.losses.supervised import dft, nll, z_loss
from fastalign.models.heads import head_spec
from fastalign.models.trunk import trunk
from fastalign.objectives.base import Dataset, RunConfig
from fastalign.segments import segment_expand
from fastalign.types import HeadOutput, PackedBatch, Sample


@dataclass
class SFTConfig(RunConfig):
    """Supervised fine-tuning: makes a model write what the data writes. Always packed; what is scored is up to the data."""

    name: ClassVar[str] = "sft"

    data: SupervisedDataConfig = field(default_factory=SupervisedDataConfig)
    learning_rate: float = 2e-5
    """Peak of the schedule. The default is for full fine-tuning; an adapter wants about ten times more."""
    loss_type: Literal["nll", "dft"] = "nll"
    """nll: negative log-likelihood; dft: each token weighted by its probability (Wu 2025)."""
    label_smoothing: float = 0.0
    """Share of the target that is spread over the whole vocabulary; nll only."""
    z_loss: float = 0.0
    """Weight of the squared log-normaliser (PaLM: 1e-4)."""

    def validate(self) -> None:
        super().validate()
        self._require_choice("loss_type", ("nll", "dft"))
        self._require("label_smoothing", 0 <= self.label_smoothing < 1, "in [0, 1)")
        self._require("z_loss", 0 <= self.z_loss < float("inf"), "0 or more and finite")
        if self.label_smoothing and self.loss_type != "nll":
            self._require("label_smoothing", False, f"0 with loss_type={self.loss_type}: only nll has a smoothed form")

    def load_data(self, tokenizer: Any, vocab_size: int | None) -> Samples:
        return load_supervised(self.data, tokenizer, vocab_size=vocab_size)

    def objective(self, model: Any, data: Dataset, folder: Path) -> SFT:
        return SFT(self, model)


class SFT:
    """loss = sum_t w_t loss_t / (scored tokens of the step), with w_t the weight of the token's sample (1 where it has none).

    Metrics are those of TRL's SFTTrainer (entropy and mean_token_accuracy are means over the step's scored tokens), and `nll`,
    the mean negative log-likelihood in nats per token whatever the loss is; exp(nll) is the perplexity. The auxiliary loss of
    a mixture of experts is weighted by the micro-batch's share of the step's tokens, and so depends on the cut.
    """

    def __init__(self, config: SFTConfig, model: Any) -> None:
        self.model = model
        self.head = head_spec(model)
        self.loss_type, self.smoothing, self.z_loss = config.loss_type, config.label_smoothing, config.z_loss
        self.differentiable = ("logps", *["lse"] * bool(self.smoothing or self.z_loss), *["mean_logits"] * bool(self.smoothing))
        self.outputs = (*self.differentiable, *(("entropy", "is_top1") if config.metrics == "full" else ()))
        self.budget = config.logits_budget

    def denominators(self, samples: Sequence[Sample]) -> dict[str, float]:
        return {"tokens": float(max(1, sum(sample.num_targets for sample in samples)))}

    def loss(self, batch: PackedBatch, denominators: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        found = trunk(self.model, batch)
        weight = segment_expand(batch.weight, batch.live_cu_seqlens, batch.live_target.shape[0])  # a sample is one sequence
        sums: dict[str, Tensor] = {}

        def loss_of_slab(out: HeadOutput, rows: slice) -> Tensor:
            losses = dft(out.logps) if self.loss_type == "dft" else nll(out.logps, out.lse, out.mean_logits, label_smoothing=self.smoothing)
            if self.z_loss and out.lse is not None:
                losses = losses + self.z_loss * z_loss(out.lse)
            for name, value in _metric_sums(out).items():
                sums[name] = sums[name] + value if name in sums else value
            return (losses * weight[rows]).sum() / denominators["tokens"]

        loss = self.head.loss(
            found.hidden.index_select(0, batch.live),
            batch.live_target,
            loss_of_slab,
            outputs=self.outputs,
            differentiable=self.differentiable,
            live_rows=batch.live_target.shape[0],
            budget=self.budget,
        )
        if found.aux_loss is not None:
            share = batch.live_target.shape[0] / denominators["tokens"]
            sums["aux_loss"] = share * found.aux_loss.detach()
            loss = loss + share * found.aux_loss
        sums["loss"] = loss.detach()
        return loss, sums

    def metrics(self, sums: dict[str, float], denominators: dict[str, float]) -> dict[str, float]:
        whole = ("loss", "aux_loss")
        return {name: total if name in whole else total / denominators["tokens"] for name, total in sums.items()}


def _metric_sums(out: HeadOutput) -> dict[str, Tensor]:
    sums = {"nll": -out.logps.detach().sum()}
    if out.entropy is not None and out.is_top1 is not None:
        sums |= {"entropy": out.entropy.detach().sum(), "mean_token_accuracy": out.is_top1.float().sum()}
    return sums
