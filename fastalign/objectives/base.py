"""What the training loop knows of an algorithm: its options (`RunConfig`) and its loss (`Objective`)."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from torch import Tensor, nn

from fastalign.data.config import DataConfig
from fastalign.errors import ConfigError
from fastalign.models.config import LoraConfig, ModelConfig
from fastalign.models.load import load_model
from fastalign.models.selfcheck import self_check
from fastalign.ranks import ParallelConfig
from fastalign.types import PackedBatch, Sample


class Objective(Protocol):
    """A loss over micro-batches whose results add up to that of the optimizer step, however the step is cut."""

    def denominators(self, samples: Sequence[Sample]) -> dict[str, float]:
        """What the sums of `loss` are divided by, counted over all samples of the step before its first micro-batch."""

    def loss(self, batch: PackedBatch, denominators: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        """The micro-batch's share of the step's loss, ready for `backward()`, and detached scalars for the metrics.

        Over the micro-batches of a step the scalars are added up, but of names that begin with min_ or max_ that is kept.
        """

    def metrics(self, sums: dict[str, float], denominators: dict[str, float]) -> dict[str, float]:
        """The step's metrics, under TRL's names, from the sums over all its micro-batches."""


@runtime_checkable
class Prepared(Protocol):
    """An objective whose loss couples all samples of a step."""

    @property
    def prepares(self) -> bool:
        """Whether `prepare` does anything with the options of the run."""

    def prepare(self, samples: Sequence[Sample], max_tokens: int | None = None) -> None:
        """Called without gradient before the step's first micro-batch, with all its samples: what `loss` must know of the others.

        `max_tokens` of a micro-batch are known to fit, or are tried next; None: as many as the options say.
        """


@runtime_checkable
class Stateful(Protocol):
    """An objective that changes from step to step. Checkpoints hold its state, so that a resumed run is the same run."""

    def after_step(self, step: int) -> None:
        """Called after optimizer step `step`, counted from 1."""

    def state(self) -> dict[str, Tensor]:
        """All that `after_step` has changed."""

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Put back what `state` gave."""


@runtime_checkable
class Online(Protocol):
    """An objective that trains on what the model says to the samples of the data, which are prompts."""

    def samples(self, step: int, prompts: Sequence[Sample]) -> Sequence[Sample]:
        """What optimizer step `step`, counted from 0, trains on. Called without gradient, once for each step in turn."""

    def shown(self, step: int) -> list[dict[str, Any]]:
        """A few of the answers that optimizer step `step`, counted from 1, trains on, each a JSON object; [] when none are due."""

    def evaluate(self, prompts: Sequence[Sample]) -> dict[str, float]:
        """Metrics of what the model says to held-out prompts."""


@runtime_checkable
class Copying(Protocol):
    """An objective that may hold further models with a head over the same vocabulary."""

    @property
    def copies(self) -> list[nn.Module]:
        """Those on the device."""


class Dataset(Protocol):
    """Tokenized samples; `fingerprint` changes with anything that changes them."""

    samples: list[Sample]
    eval_samples: list[Sample]
    fingerprint: str


@dataclass
class RunConfig:
    """Options that every algorithm has. A step's result does not depend on `max_tokens`, `share_prompts`, `logits_budget` and `metrics`."""

    name: ClassVar[str] = ""
    divides_head: ClassVar[bool] = True  # whether its head is only asked for log-probs, which several processes can make together

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    output: str = ""
    """Folder of the run: config.yaml, metrics.jsonl, checkpoints/, final/, report.html."""
    resume: bool = False
    """Continue the run in `output` from its newest good checkpoint."""
    overwrite: bool = False
    """Delete the run that is in `output` first."""
    seed: int = 0
    """Of the shuffling, of an adapter's first weights and of dropout."""

    batch_size: int = 8
    """Samples per optimizer step (a preference pair is one sample)."""
    max_tokens: int | Literal["auto"] = 4096
    """Tokens per micro-batch; bounds the memory, does not change the result. auto: as many as the device is predicted to have room for
    when the run starts, and no more than a step has; config.yaml names the number."""
    share_prompts: bool = True
    """Compute a prompt once for all sequences of a micro-batch that begin with it, where it is long enough to save work."""
    epochs: float = 1.0
    """Passes over the data."""
    max_steps: int | None = None
    """Optimizer steps; replaces `epochs`."""

    learning_rate: float = 1e-6
    """Peak of the schedule. The default is for full fine-tuning; an adapter wants about ten times more."""
    lr_schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the rate falls from its peak to 0 at the last step, if it falls."""
    warmup_ratio: float = 0.0
    """Share of the steps over which the learning rate rises from 0."""
    weight_decay: float = 0.0
    """Decoupled (AdamW); not on biases and norms."""
    adam_beta1: float = 0.9
    """Decay per step of the mean of the gradient."""
    adam_beta2: float = 0.999
    """Decay per step of the mean of its square."""
    adam_epsilon: float = 1e-8
    """Added to the root of that mean."""
    optimizer: Literal["adamw", "adamw_8bit", "adamw_offload"] = "adamw"
    """How AdamW's moments are held: in float32; in 8 bits (bitsandbytes); in the host's memory, where the weights are updated, too."""
    update_in_backward: bool = False
    """Update each weight as soon as its gradient is there, and free the gradient; needs max_grad_norm null."""
    max_grad_norm: float | None = 1.0
    """Clip the gradient of a step to this L2 norm; null: never."""
    master_weights: bool = True
    """Keep a float32 copy of trainable 16-bit weights and accumulate their gradient in float32. Without it updates
    smaller than 2^-9 of a bfloat16 weight are lost, or, with `stochastic_rounding`, made with as small a probability. No effect on
    float32 weights."""
    stochastic_rounding: bool = False
    """Round a bfloat16 weight without a float32 copy (master_weights false) up or down at random, so that its mean is exact."""
    max_nonfinite: int = 3
    """Stop after this many steps in a row whose loss or gradient is not finite; each of them is skipped."""

    eval_every: int = 0
    """Steps between evaluations on the held-out split; 0: only at the end."""
    save_every: int = 500
    """Steps between checkpoints; 0: only at the end."""
    keep_checkpoints: int = 2
    """How many of the newest to keep."""
    log_every: int = 1
    """Steps between rows of metrics.jsonl."""
    loggers: list[str] = field(default_factory=list)
    """Further sinks for the metrics: tensorboard, wandb, trackio."""
    metrics: Literal["full", "basic"] = "full"
    """basic leaves out entropy, logits/* and mean_token_accuracy, which need more work on every row of logits."""
    logits_budget: int | None = None
    """Bytes of scratch for logits; null: 2 % of the memory, as a power of two."""
    profile: int = 0
    """Profile this many steps, after two of warm-up: writes profile.md (where the time goes) and profile.json (a trace)."""

    def validate(self) -> None:
        """Raise ConfigError for the first option that is out of range or contradicts another one."""
        if not self.output:
            raise ConfigError("output: no folder given for the run; set --output RUN")
        if not self.model.path:
            raise ConfigError("model.path: no model given; set --model.path DIR (a Transformers model folder or hub name)")
        self.model.validate()
        self.data.validate()
        self.parallel.validate()
        self.lora.validate(beside="model.path" if _is_adapter(self.model.path) else "")
        if self.model.quantization and not self.adapts:
            raise ConfigError("model.quantization: 4-bit weights cannot be trained themselves; set --lora.r 16 to train an adapter on them")
        if self.resume and self.overwrite:
            raise ConfigError("resume and overwrite exclude each other: continue the run in `output`, or delete it")
        for option in ("batch_size", "keep_checkpoints", "log_every", "max_nonfinite"):
            self._require(option, getattr(self, option) >= 1, "at least 1")
        self._require("max_tokens", self.max_tokens == "auto" or self.token_limit >= 1, "at least 1, or auto")
        if self.max_tokens == "auto" and (reason := self.unpredicted):
            raise ConfigError(f"max_tokens auto: {reason}; set a number, such as --max_tokens {RunConfig.max_tokens}")
        if self.model.gradient_checkpointing == "auto" and (reason := self.unsettled):
            raise ConfigError(f"model.gradient_checkpointing auto: {reason}; set it to true or false")
        for option in ("eval_every", "save_every", "seed", "profile"):
            self._require(option, getattr(self, option) >= 0, "0 or more")
        for option in ("learning_rate", "weight_decay"):
            self._require(option, 0 <= getattr(self, option) < math.inf, "0 or more and finite")
        for option in ("adam_beta1", "adam_beta2", "warmup_ratio"):
            self._require(option, 0 <= getattr(self, option) < 1, "in [0, 1)")
        for option in ("epochs", "adam_epsilon"):
            self._require(option, 0 < getattr(self, option) < math.inf, "positive and finite")
        for option in ("max_steps", "max_grad_norm", "logits_budget"):
            self._require(option, getattr(self, option) is None or getattr(self, option) > 0, "positive, or null")
        self._require_choice("optimizer", ("adamw", "adamw_8bit", "adamw_offload"))
        if self.update_in_backward and self.max_grad_norm is not None:
            raise ConfigError(
                "update_in_backward: the norm of the whole gradient is known only when all weights are updated, so it cannot be clipped; "
                "set --max_grad_norm null"
            )
        keeps_none = not self.master_weights and self.optimizer != "adamw_offload"
        self._require_use("stochastic_rounding", keeps_none, "master_weights false, and without adamw_offload")
        self._require_choice("lr_schedule", ("linear", "cosine", "constant"))
        self._require_choice("metrics", ("full", "basic"))

    @property
    def adapts(self) -> bool:
        """Whether an adapter is trained: a fresh one, lora.adapter, or what model.path is."""
        return self.lora.enabled or _is_adapter(self.model.path)

    @property
    def steps_per_draw(self) -> int:
        """Optimizer steps that share one draw of samples from the data."""
        return 1

    @property
    def draw_size(self) -> int:
        """Samples of the data that are drawn together."""
        return self.batch_size

    @property
    def token_limit(self) -> int:
        """`max_tokens` as a number; of auto, which a run replaces by one, no limit."""
        return sys.maxsize if self.max_tokens == "auto" else self.max_tokens

    @property
    def unpredicted(self) -> str | None:
        """Why `max_tokens` cannot be auto: what the prediction of memory does not know of such a run; None: it can."""
        return None

    @property
    def unsettled(self) -> str | None:
        """Why `model.gradient_checkpointing` cannot be auto: what the prediction of memory does not know; None: it can."""
        return self.unpredicted

    def longest(self, sample: Sample) -> list[Sample]:
        """What a step trains on of one `sample` of the data, as long as it may be."""
        return [sample]

    @property
    def copies_model(self) -> bool:
        """Whether the objective makes a second model of the first, all of whose weights must be there then."""
        return getattr(self, "reference", None) in ("copy", "stream") or getattr(self, "sync_ref_model", False)

    def load_model(self, tokenizer: Any) -> Any:
        """The model to train, with packed attention and, if one is trained, its adapter."""
        return load_model(self.model, lora=self.lora)

    def check_model(self, model: Any, batch: PackedBatch) -> None:
        """Raise HeadMismatchError unless `model` gives for `batch` what it gives without us."""
        self_check(model, batch, share=self.share_prompts)

    def load_data(self, tokenizer: Any, vocab_size: int | None) -> Dataset:
        """The training and held-out samples of this algorithm; `vocab_size` rows of the head, if they are known yet."""
        raise NotImplementedError

    def objective(self, model: Any, data: Dataset, folder: Path) -> Objective:
        """The loss of this algorithm for `model`, whose weights are still the initial ones; `folder` is the run's."""
        raise NotImplementedError

    def named_code(self) -> dict[str, str | list[str]]:
        """The options by which code is run that is not fastalign's, with their values. They count only where the user gives them."""
        return {"model.trust_remote_code": "true"} if self.model.trust_remote_code else {}

    def sources(self) -> dict[str, str]:
        """Of the user's own code that makes the loss: a name and the digest of its source, the same in a resumed run."""
        return {}

    def check_ranks(self, processes: int) -> None:
        """Raise ConfigError for options that do not go with this number of processes."""
        self.parallel.check(processes)
        if self.parallel.head == "vocab":
            if not self.divides_head:
                raise ConfigError(f"parallel.head vocab: {self.name} needs more of a head than log-probs; set --parallel.head whole")
            if getattr(self, "reference", None) == "stream":
                raise ConfigError("parallel.head vocab: a reference that is streamed keeps its head whole; set --reference copy")
        alone = {"optimizer": "adamw", "update_in_backward": False}
        for option, value in alone.items() if processes > 1 else ():
            if getattr(self, option) != value:
                raise ConfigError(
                    f"{option} {getattr(self, option)} is of one process, and there are {processes}, which divide the optimizer's state "
                    f"already; set --{option} {str(value).lower()}"
                )

    def _require(self, option: str, good: bool, wanted: str) -> None:
        if not good:
            raise ConfigError(f"{option} must be {wanted}, got {getattr(self, option)!r}")

    def _require_use(self, option: str, used: bool, where: str) -> None:
        """An option that changes nothing was not meant: it must keep its default unless `used`."""
        default = getattr(type(self), option)
        self._require(option, used or getattr(self, option) == default, f"left at {default!r}, which counts only with {where}")

    def _require_choice(self, option: str, choices: Sequence[str]) -> None:
        self._require(option, getattr(self, option) in choices, f"one of {', '.join(choices)}")


def _is_adapter(path: str) -> bool:
    return (Path(path) / "adapter_config.json").is_file()
