"""Distillation: bring a model's distribution of the next token to that of a larger one, on the texts of the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor

from fastalign.data.config import SupervisedDataConfig
from fastalign.data.samples import Samples
from fastalign.data.supervised import load_supervised
from fastalign.data.tokenizer import load_tokenizer
from fastalign.errors import ConfigError, ModelError, TemplateError
from fastalign.head.divergence_function import DivergenceOutput
from fastalign.losses.supervised import nll
from fastalign.models.config import ModelConfig
from fastalign.models.heads import HeadSpec, head_spec
from fastalign.models.load import load_model
from fastalign.models.trunk import evaluation, trunk
from fastalign.objectives.base import Dataset, RunConfig
from fastalign.segments import segment_expand
from fastalign.types import HeadOutput, PackedBatch, Sample


@dataclass
class TeacherConfig:
    """The model to learn from, which stays as it is."""

    path: str = ""
    """A Transformers model folder, a hub name, or the folder of a PEFT adapter, with the vocabulary of the model."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of its weights; auto: as they are stored."""
    trust_remote_code: bool = False
    """Run Python code that comes with it."""

    def on(self, device: str) -> ModelConfig:
        """How it is loaded."""
        return ModelConfig(self.path, dtype=self.dtype, device=device, trust_remote_code=self.trust_remote_code)


@dataclass
class DistillConfig(RunConfig):
    """Distillation: a model learns the whole distribution of every scored token from a frozen teacher of the same vocabulary."""

    name: ClassVar[str] = "distill"
    divides_head: ClassVar[bool] = False

    data: SupervisedDataConfig = field(default_factory=SupervisedDataConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)

    learning_rate: float = 2e-5
    """Peak of the schedule. The default is for full fine-tuning; an adapter wants about ten times more."""
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    """From the teacher q: forward_kl KL(q || p) covers all that it does, reverse_kl KL(p || q) keeps to what it does most, jsd is
    in between."""
    beta: float = 0.5
    """Of jsd: beta KL(q || m) + (1 - beta) KL(p || m) with m = (1 - beta) p + beta q (GKD, Agarwal 2024)."""
    temperature: float = 1.0
    """Divides the logits of both models."""
    nll_weight: float = 0.0
    """Share of the negative log-likelihood of the data in the loss, the rest being the divergence."""

    def validate(self) -> None:
        super().validate()
        if not self.teacher.path:
            raise ConfigError("teacher.path: no teacher given; set --teacher.path DIR (a Transformers model folder or hub name)")
        self._require_choice("divergence", ("forward_kl", "reverse_kl", "jsd"))
        self._require("beta", 0 <= self.beta <= 1, "in [0, 1]")
        self._require_use("beta", self.divergence == "jsd", "divergence=jsd")
        self._require("temperature", 0 < self.temperature < float("inf"), "positive and finite")
        self._require("nll_weight", 0 <= self.nll_weight < 1, "in [0, 1); nll alone is `fastalign sft`")

    @property
    def unpredicted(self) -> str | None:
        return "the teacher lies on the device, too, and its logits"

    def load_model(self, tokenizer: Any) -> Any:
        try:
            own = load_tokenizer(self.teacher.path, trust_remote_code=self.teacher.trust_remote_code).get_vocab()
        except TemplateError as error:
            raise ModelError(f"teacher.path: {error}") from error
        theirs = {i: token for token, i in own.items()}
        vocabulary = tokenizer.get_vocab().items()
        if differing := sorted((i, token) for token, i in vocabulary if own.get(token, i) != i or theirs.get(i, token) != token):
            i, token = differing[0]
            raise ConfigError(
                f"teacher {self.teacher.path} and model {self.model.path} have different vocabularies (id {i} is {theirs.get(i)!r} there "
                f"and {token!r} here); distil from a teacher of the same family"
            )
        return super().load_model(tokenizer)

    def load_data(self, tokenizer: Any, vocab_size: int | None) -> Samples:
        return load_supervised(self.data, tokenizer, vocab_size=vocab_size)

    def objective(self, model: Any, data: Dataset, folder: Path) -> Distill:
        return Distill(self, model, load_model(self.teacher.on(self.model.device)))


class Distill:
    """loss = sum_t w_t ((1 - a) divergence_t + a nll_t) / (scored tokens of the step), with a = nll_weight and w_t the sample's weight.

    The metrics divergence, nll, entropy and mean_token_accuracy are means over the step's scored tokens; at a temperature other
    than 1 nll is there only when the loss has it, and entropy and accuracy not at all. A teacher whose head has more rows, as
    padding may leave it, is cut to the model's.
    """

    def __init__(self, config: DistillConfig, model: Any, teacher: Any) -> None:
        self.model, self.teacher = model, teacher.requires_grad_(False)
        self.head = head_spec(model)
        self.teacher_head = _cut(head_spec(teacher), len(self.head.weight), config.teacher.path)
        self.nll_weight = config.nll_weight
        self.tempered = config.temperature != 1.0
        self.outputs = ("entropy", "is_top1") if config.metrics == "full" and not self.tempered else ()
        self.options: dict[str, Any] = {"kind": config.divergence, "beta": config.beta, "temperature": config.temperature}
        self.budget = config.logits_budget

    def denominators(self, samples: Sequence[Sample]) -> dict[str, float]:
        return {"tokens": float(max(1, sum(sample.num_targets for sample in samples)))}

    def loss(self, batch: PackedBatch, denominators: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        with evaluation(self.teacher):
            taught = trunk(self.teacher, batch).hidden.index_select(0, batch.live)
        found = trunk(self.model, batch)
        hidden, target, rows = found.hidden.index_select(0, batch.live), batch.live_target, batch.live_target.shape[0]
        weight = segment_expand(batch.weight, batch.live_cu_seqlens, rows) / denominators["tokens"]  # a sample is one sequence
        sums: dict[str, Tensor] = {}

        def add(values: dict[str, Tensor | None]) -> None:
            for name, value in values.items():
                if value is not None:
                    total = value.detach().float().sum()
                    sums[name] = sums[name] + total if name in sums else total

        def divergence_of_slab(out: DivergenceOutput, rows: slice) -> Tensor:
            losses = (1 - self.nll_weight) * out.divergence
            add({"divergence": out.divergence, "entropy": out.entropy, "mean_token_accuracy": out.is_top1})
            if not self.tempered and out.logps is not None:
                add({"nll": -out.logps})
                losses = losses + self.nll_weight * nll(out.logps) if self.nll_weight else losses
            return (losses * weight[rows]).sum()

        def nll_of_slab(out: HeadOutput, rows: slice) -> Tensor:  # at temperature 1, where the divergence has another
            add({"nll": -out.logps})
            return self.nll_weight * (nll(out.logps) * weight[rows]).sum()

        loss = self.head.divergence_loss(
            hidden,
            self.teacher_head,
            taught,
            divergence_of_slab,
            target,
            outputs=self.outputs,
            differentiable=("divergence", *["logps"] * bool(self.nll_weight and not self.tempered)),
            live_rows=rows,
            budget=self.budget,
            **self.options,
        )
        if self.nll_weight and self.tempered:
            loss = loss + self.head.loss(hidden, target, nll_of_slab, live_rows=rows, budget=self.budget)
        if found.aux_loss is not None:
            share = rows / denominators["tokens"]
            sums["aux_loss"] = share * found.aux_loss.detach()
            loss = loss + share * found.aux_loss
        sums["loss"] = loss.detach()
        return loss, sums

    def metrics(self, sums: dict[str, float], denominators: dict[str, float]) -> dict[str, float]:
        whole = ("loss", "aux_loss")
        return {name: total if name in whole else total / denominators["tokens"] for name, total in sums.items()}


def _cut(head: HeadSpec, rows: int, path: str) -> HeadSpec:
    """The teacher's head over the first `rows` tokens."""
    if len(head.weight) < rows:
        raise ModelError(
            f"{path}: the teacher's head has {len(head.weight)} rows, the model's {rows}; resize the model's embeddings to the vocabulary"
        )
    lora = head.lora and head.lora._replace(b=head.lora.b[:rows])
    return replace(head, weight=head.weight[:rows], bias=None if head.bias is None else head.bias[:rows], lora=lora)
