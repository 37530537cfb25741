"""The models that a service can answer with: its base model, adapters on it, and other whole models of the same kind.

One thread at a time may call `install`, `activate`, `serving` and `remove`; `read` may run beside them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastalign.data.tokenizer import context_window, load_tokenizer
from fastalign.errors import ModelError
from fastalign.models.adapters import check_adapter_folder
from fastalign.models.config import ModelConfig
from fastalign.models.load import prepare, read_model
from fastalign.models.shared import SharedWeights
from fastalign.models.trunk import evaluation, stock_attention, text_config
from fastalign.serve.turns import Turns


@dataclass(frozen=True)
class Installed:
    """A version that can answer at once: an adapter on the base model, or a model of its own."""

    version: str
    adapter: str | None = None  # PEFT's name of it
    model: Any = None  # None: the base model's


class Models:
    """The base model in `options.path`, and what is installed beside it. Raises ModelError and TemplateError where it cannot be loaded.

    `weights` are those of the base model where they are in memory already; what is installed here is in no other model on them.
    """

    def __init__(self, options: ModelConfig, weights: SharedWeights | None = None) -> None:
        if (Path(options.path) / "adapter_config.json").is_file():
            raise ModelError(f"{options.path} is an adapter; serve its base model, and add the adapter as a version")
        self.options = options
        self.tokenizer = load_tokenizer(options.path, trust_remote_code=options.trust_remote_code)
        self.weights = weights or SharedWeights(options)
        self.base = self.weights.model().eval()
        self.window = context_window(options.path) or getattr(text_config(self.base), "max_position_embeddings", None)
        ends = self.base.generation_config.eos_token_id if self.base.generation_config else None
        several = ends if isinstance(ends, list) else [] if ends is None else [ends]
        self.eos = frozenset([self.tokenizer.eos_token_id, *several])
        self.turns = Turns()
        self.current = Installed("")
        self._peft: Any = None  # a PeftModel around the base model while there is an adapter
        self._count = 0

    def read(self, folder: str) -> Any:
        """The whole model in `folder`, read beside the one that answers; None for an adapter and for the base model.

        Raises ModelError when the folder is gone or holds nothing that can stand in for the base model.
        """
        path = Path(folder)
        if not path.is_dir():
            raise ModelError(f"{folder}: the folder is gone, or is none; add the version again with the folder of a model or adapter")
        if (path / "adapter_config.json").is_file():
            import peft  # noqa: F401  # the first time that takes seconds, for which no answer has to wait here

            try:
                check_adapter_folder(folder)
            except (OSError, ValueError, AttributeError) as error:
                raise ModelError(f"{folder}: its adapter_config.json cannot be used: {error}") from error
            return None
        if path.resolve() == Path(self.options.path).resolve():
            return None
        model = self._read(folder)
        mine, other = (text_config(one).vocab_size for one in (self.base, model))
        if mine != other:
            raise ModelError(
                f"{folder}: a vocabulary of {other} tokens, where the base model's has {mine}; it must be a model trained from it"
            )
        return model

    def install(self, version: str, folder: str, model: Any = None) -> Installed:
        """Make a version ready: `model` is what `read` returned. What answers now stays. Raises ModelError."""
        adapter = None
        if model is None and (Path(folder) / "adapter_config.json").is_file():
            adapter = self._load_adapter(folder)
        installed = Installed(version, adapter, model)
        try:
            self._probe(installed, folder)
        except BaseException:
            self.remove(installed)
            raise
        return installed

    def remove(self, installed: Installed) -> None:
        """Free what only this version needs."""
        if installed.adapter is None:
            return
        if len(self._peft.peft_config) == 1:
            self.base, self._peft = self._peft.unload(), None
        else:
            self._peft.set_adapter(next(name for name in self._peft.peft_config if name != installed.adapter), inference_mode=True)
            self._peft.delete_adapter(installed.adapter)

    def turn(self) -> AbstractContextManager[None]:
        """Around what is computed with their hidden states and heads outside of `serving`."""
        return nullcontext()

    @contextmanager
    def serving(self, installed: Installed | None = None) -> Iterator[Any]:
        """The model of `installed` (None: the current one), which computes with no other adapter inside."""
        installed = installed or self.current
        if installed.model is not None:
            yield installed.model
        elif self._peft is None:
            yield self.base
        elif installed.adapter is None:
            with self._peft.disable_adapter():
                yield self._peft
        else:
            self._peft.set_adapter(installed.adapter, inference_mode=True)
            yield self._peft

    def adapters(self) -> list[str]:
        """PEFT's names of the adapters in memory."""
        return [] if self._peft is None else list(self._peft.peft_config)

    def _read(self, folder: str) -> Any:
        from transformers import AutoModelForCausalLM

        options = ModelConfig(**{**vars(self.options), "path": folder})
        return prepare(read_model(options, AutoModelForCausalLM), options, None).eval().requires_grad_(False)

    def _load_adapter(self, folder: str) -> str:
        import peft

        name = f"version{self._count}"
        self._count += 1
        fresh = self._peft is None
        try:
            if fresh:
                config = peft.PeftConfig.from_pretrained(folder)
                config.inference_mode = True
                self._peft = peft.PeftModelForCausalLM(self.base, config, adapter_name=name)  # type: ignore[arg-type]
            result = self._peft.load_adapter(folder, adapter_name=name, is_trainable=False)
            lacking = [key for key in result.missing_keys if f".{name}." in key]
            if lacking or result.unexpected_keys:
                shown = ", ".join([*lacking, *result.unexpected_keys][:2])
                raise ModelError(f"{folder}: not an adapter of this base model: its weights and the model's layers differ ({shown}, ...)")
        except Exception as error:  # PEFT's, safetensors' and torch's errors have no common base; all mean that it does not fit
            if self._peft is not None and fresh:
                self.base, self._peft = self._peft.unload(), None
            elif self._peft is not None and name in self._peft.peft_config:
                self.remove(Installed("", name))
            if isinstance(error, ModelError):
                raise
            first = str(error).strip().split("\n")
            raise ModelError(f"{folder}: not an adapter of this base model: {' '.join(part.strip() for part in first[:2]):.300}") from error
        return name

    def _probe(self, installed: Installed, folder: str) -> None:
        """A version whose logits are no numbers never answers anybody."""
        with self.serving(installed) as model, evaluation(model), stock_attention(model):
            ids = torch.tensor([[min(self.eos), 0, 1]], device=next(model.parameters()).device)
            finite = bool(torch.isfinite(model(input_ids=ids).logits).all())
        if not finite:
            raise ModelError(f"{folder}: the logits of version {installed.version!r} are not finite; its training must have diverged")
