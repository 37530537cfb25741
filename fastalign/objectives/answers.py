"""What every algorithm needs in which a model answers prompts: how long its answers may be, and what makes it answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fastalign.data.tokenizer import context_window
from fastalign.errors import ConfigError
from fastalign.objectives.base import RunConfig
from fastalign.ranks import current
from fastalign.rollout.engine import Engine, FirstRank, TransformersEngine
from fastalign.rollout.vllm_local import VLLMEngine, VLLMLocalConfig, load_vllm
from fastalign.rollout.vllm_server import VLLMServerConfig, VLLMServerEngine, check_server


@dataclass
class AnswerConfig(RunConfig):
    """Options of the answers that a model gives while it is trained, and of the engine that makes it give them."""

    vllm: VLLMServerConfig = field(default_factory=VLLMServerConfig)
    vllm_local: VLLMLocalConfig = field(default_factory=VLLMLocalConfig)
    engine: Literal["transformers", "vllm", "vllm_server"] = "transformers"
    """What answers: the trained model itself, vLLM in this process (vllm_local.*), or a running vLLM server that is given the adapter
    (vllm.*; LoRA only)."""
    max_completion_length: int = 256
    """Longest answer, in tokens."""
    completions_every: int = 10
    """Steps between samples of answers in completions.jsonl; 0: none."""
    generation_tokens: int = 16384
    """Prompt and answer tokens that are generated together; bounds the memory of the cache."""

    def validate(self) -> None:
        super().validate()
        for option in ("max_completion_length", "generation_tokens"):
            self._require(option, getattr(self, option) >= 1, "at least 1")
        self._require("completions_every", self.completions_every >= 0, "0 or more")
        self._require_engine()

    @property
    def generates_itself(self) -> bool:
        """Whether a model of this process answers by Transformers' generation."""
        return self.engine == "transformers"

    @property
    def unpredicted(self) -> str | None:
        if self.engine == "vllm":
            return "vLLM in this process takes a share of the device, and asks how long a sequence may be"
        return super().unpredicted

    def make_engine(self, model: Any) -> Engine:
        """What answers prompts by the weights of `model`, which is the one that is trained."""
        if self.engine == "vllm_server":
            if current().size > 1 and self.parallel.shard == "full":
                raise ConfigError("engine vllm_server is given whole weights; with several processes set --parallel.shard optimizer")
            return FirstRank(VLLMServerEngine(model, self.vllm, output=self.output))
        if self.engine == "vllm":
            if current().size > 1 and self.parallel.head == "vocab":
                raise ConfigError("engine vllm is given whole weights; set --parallel.head whole, or --engine transformers")
            room = min(self.token_limit, context_window(self.model.path) or self.token_limit)
            return VLLMEngine(model, self.vllm_local, output=self.output, max_tokens=room)
        return TransformersEngine(model, max_tokens=self.generation_tokens)

    def check_engine(self) -> None:
        """Raise RolloutError or DependencyError where the engine is not there: before anything is loaded or written."""
        if self.engine == "vllm_server":
            check_server(self.vllm, self.model.path)
        if self.engine == "vllm":
            load_vllm()

    def _require_engine(self) -> None:
        self._require_choice("engine", ("transformers", "vllm", "vllm_server"))
        if self.engine != "vllm_server" and self.vllm != VLLMServerConfig():
            raise ConfigError("vllm: options of a vLLM server, but another engine answers; set --engine vllm_server")
        if self.engine != "vllm" and self.vllm_local != VLLMLocalConfig():
            raise ConfigError("vllm_local: options of vLLM in this process, but another engine answers; set --engine vllm")
        if self.engine == "transformers":
            return
        self._require_use("generation_tokens", self.generates_itself, "engine transformers; vLLM bounds its own memory")
        if self.lora.modules_to_save:
            raise ConfigError(
                "lora.modules_to_save: vLLM takes no adapter with whole layers in it; leave it out, or set --engine transformers"
            )
        if self.lora.dora:
            raise ConfigError("lora.dora: vLLM takes plain LoRA adapters only; leave it out, or set --engine transformers")
        if self.engine == "vllm":
            self.vllm_local.validate()
            if self.model.quantization:
                raise ConfigError(
                    "model.quantization: vLLM in this process would answer by the unquantized weights; set --engine transformers"
                )
            return
        self.vllm.validate()
        if not self.lora.enabled and not (Path(self.model.path) / "adapter_config.json").is_file():
            raise ConfigError(
                "engine: only an adapter is sent to a vLLM server, and all weights are trained (lora.r 0); set --lora.r 16, or "
                "--engine vllm or transformers"
            )

    def _require_drawable(self, option: str) -> None:
        """vLLM raises lower temperatures to 0.01, and refuses higher ones."""
        self._require(option, self.engine == "transformers" or 0.01 <= getattr(self, option) <= 2, "from 0.01 to 2, which vLLM draws at")

    def _require_room(self, row: int, prompt: int) -> None:
        """Raise ConfigError unless the longest prompt, `prompt` tokens in the data's row `row`, and the longest answer fit together."""
        needed, window = prompt + self.max_completion_length, context_window(self.model.path)
        both = f"the longest prompt (row {row}, {prompt} tokens) and the longest answer ({self.max_completion_length}) together"
        if needed > self.token_limit:
            remedy = f"set --max_tokens {needed} or more, or a smaller --max_completion_length"
            raise ConfigError(f"max_tokens {self.max_tokens} is less than {both}; {remedy}")
        if window is not None and needed > window:
            remedy = "set a smaller --max_completion_length or --data.max_length"
            raise ConfigError(f"the model's window of {window} tokens is less than {both}; {remedy}")


def is_due(step: int, every: int) -> bool:
    """Whether answers are shown after optimizer step `step`, counted from 1: the first one and every `every`; 0: never."""
    return bool(every) and (step == 1 or step % every == 0)
