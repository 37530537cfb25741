"""Options of a model and of its low-rank adapter."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from fastalign.errors import ConfigError


@dataclass
class ModelConfig:
    """Which model to train, and how it is held."""

    path: str = ""
    """A Transformers model folder, a hub name, or the folder of a PEFT adapter."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the weights; auto: as they are stored."""
    device: str = "auto"
    """auto: cuda where there is one, else cpu."""
    quantization: Literal["nf4"] | None = None
    """nf4: the linear layers are held in 4 bits, and an adapter is trained on them (QLoRA)."""
    gradient_checkpointing: bool | Literal["auto"] = False
    """Recompute each layer in the backward instead of keeping its activations. auto: none, or no more than the memory at hand is predicted
    to need when the run starts; config.yaml names what was settled, with checkpoint_keep."""
    checkpoint_every: int = 1
    """With gradient_checkpointing: only every so many layers, the others keep their activations."""
    checkpoint_keep: Literal["nothing", "attention", "products"] = "nothing"
    """With gradient_checkpointing: what of a layer is kept all the same; the results of attention, or of attention and of linear layers."""
    checkpoint_offload: bool = False
    """With gradient_checkpointing: the inputs of the layers wait in host memory."""
    mlp_chunk: int = 0
    """Tokens that go through the MLP of a layer at a time, the wide activations of the others being computed again; 0: all."""
    liger_kernels: bool = False
    """Liger's Triton kernels for norms, rotary embedding and gated MLPs (CUDA, `fastalign[liger]`)."""
    dropout: bool = False
    """Keep the model's own dropout (not that of LoRA); off, as for every preference loss, unless asked for."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""

    def validate(self) -> None:
        """Raise ConfigError for an option that is out of range, or that would change nothing."""
        if self.gradient_checkpointing not in (True, False, "auto"):
            raise ConfigError(f"model.gradient_checkpointing must be true, false or auto, got {self.gradient_checkpointing!r}")
        if self.checkpoint_every < 1:
            raise ConfigError(f"model.checkpoint_every must be at least 1, got {self.checkpoint_every}")
        if self.mlp_chunk < 0:
            raise ConfigError(f"model.mlp_chunk must be a number of tokens, or 0 for all at once, got {self.mlp_chunk}")
        if self.mlp_chunk and self.checkpoint_keep == "products":
            raise ConfigError(
                "model.mlp_chunk drops what model.checkpoint_keep products keeps; set checkpoint_keep to attention, or one of them"
            )
        for option, default in (("checkpoint_every", 1), ("checkpoint_keep", "nothing"), ("checkpoint_offload", False)):
            if getattr(self, option) != default and self.gradient_checkpointing == "auto":
                raise ConfigError(
                    f"model.{option} is of gradient checkpointing that you choose; set --model.gradient_checkpointing true, or leave it "
                    "out where that is auto"
                )
            if getattr(self, option) != default and not self.gradient_checkpointing:
                raise ConfigError(f"model.{option} counts only with gradient checkpointing; set --model.gradient_checkpointing true, too")


@dataclass
class LoraConfig:
    """A low-rank adapter (Hu 2021, arXiv:2106.09685) to train in place of the model's weights."""

    r: int = 0
    """Rank; 0: train all weights of the model."""
    alpha: float | None = None
    """Scale of the update is alpha / r (with rslora: alpha / sqrt(r)); null: 2 r."""
    dropout: float = 0.0
    """Share of the adapter's inputs that are zeroed in training."""
    targets: str | list[str] = "all-linear"
    """Names of the layers to adapt, lm_head included; all-linear: every linear layer but lm_head (may stand in a list, too)."""
    modules_to_save: list[str] = field(default_factory=list)
    """Layers to train in full beside the adapter and to keep in it, e.g. lm_head."""
    rslora: bool = False
    """Rank-stabilised (Kalajdzievski 2023): the scale does not vanish as r grows."""
    dora: bool = False
    """Learn the length of every row of a weight apart from its direction (Liu 2024); slower, and not of lm_head."""
    adapter: str | None = None
    """Folder of an existing PEFT adapter to train further; replaces the options above."""
    reference: Literal["start", "base"] = "start"
    """Of an existing adapter: whether the reference is the model with that adapter as it was, or the model without any."""

    @property
    def enabled(self) -> bool:
        """Whether an adapter is trained."""
        return self.r > 0 or self.adapter is not None

    def validate(self, *, beside: str = "") -> None:
        """Raise ConfigError for an option that is out of range, or that would change nothing: those of a fresh adapter count only
        with r above 0 and without an existing adapter, which may also be what `beside` names (a model.path)."""
        if self.r < 0:
            raise ConfigError(f"lora.r must be a rank, or 0 to train all weights, got {self.r}")
        existing = "lora.adapter" if self.adapter is not None else beside
        fresh = ("alpha", "dropout", "targets", "modules_to_save", "rslora", "dora")
        given = [name for name in ("r", *fresh) if getattr(self, name) != getattr(LoraConfig(), name)]
        if existing and given:
            raise ConfigError(f"lora.{given[0]}: {existing} is an adapter with options of its own; leave lora.{given[0]} out")
        if given and not self.r:
            raise ConfigError(f"lora.{given[0]} counts only with an adapter, and all weights are trained (lora.r 0); set --lora.r 16, too")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise ConfigError(f"lora.alpha must be positive and finite, or null for 2 r, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora.dropout must be in [0, 1), got {self.dropout}")
        if self.reference not in ("start", "base"):
            raise ConfigError(f"lora.reference must be one of start, base, got {self.reference!r}")
        if self.reference == "base" and not existing:
            raise ConfigError("lora.reference counts only where an existing adapter is trained further; leave it at start")
