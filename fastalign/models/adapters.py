"""PEFT adapters: making one, training one further, and switching between it and the reference."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from fastalign.errors import ConfigError, ModelError
from fastalign.models.config import LoraConfig

POLICY, REFERENCE, CRITIC = "default", "reference", "critic"


def add_adapter(model: Any, lora: LoraConfig, task: str = "CAUSAL_LM") -> Any:
    """A PeftModel that trains the adapter of `lora`: a fresh one, whose update starts at 0, or an existing one.

    `task` is PEFT's: of a SEQ_CLS model the score head is trained in full and kept in the adapter. An existing adapter is
    loaded twice: to be trained, and, unless the reference is the base model, frozen as the adapter "reference".
    """
    import peft

    if hasattr(model, "peft_config"):
        raise ConfigError("the model has an adapter already; merge it (merge_and_unload) or pass the base model")
    if lora.adapter is not None:
        check_adapter_folder(lora.adapter)
        wrapped = peft.PeftModel.from_pretrained(model, lora.adapter, adapter_name=POLICY, is_trainable=True)
        if lora.reference == "start":
            wrapped.load_adapter(lora.adapter, adapter_name=REFERENCE, is_trainable=False)
        wrapped.set_adapter(POLICY)
        return wrapped
    config = peft.LoraConfig(
        task_type=task,
        r=lora.r,
        lora_alpha=2 * lora.r if lora.alpha is None else lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=_targets(model, lora.targets),
        modules_to_save=list(lora.modules_to_save) or None,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
    )
    try:
        return peft.get_peft_model(model, config)
    except ValueError as error:
        raise ConfigError(f"lora.targets={lora.targets!r} does not fit the model: {error}") from error


def check_adapter_folder(path: str) -> None:
    """Raise ModelError unless `path` holds a LoRA adapter in safetensors that can be switched off."""
    folder = Path(path)
    if not (folder / "adapter_config.json").is_file():
        raise ModelError(f"lora.adapter {path!r}: no adapter_config.json there; it must be the folder of a PEFT adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    if (kind := config.get("peft_type")) != "LORA":
        raise ModelError(f"{path}: a {kind} adapter; only LoRA adapters can be trained further")
    if (bias := config.get("bias", "none")) != "none":
        raise ModelError(
            f"{path}: the adapter trains biases of the model in place (bias {bias!r}), so that the model without it, the reference, would "
            "move along; merge it (merge_and_unload) and train a fresh adapter, or make one with bias 'none'"
        )
    if not (folder / "adapter_model.safetensors").is_file():
        found = "only a pickle (adapter_model.bin), which is not read" if (folder / "adapter_model.bin").is_file() else "no weights"
        raise ModelError(f"{path}: {found}; load it with PEFT where you trust it, and save_pretrained writes adapter_model.safetensors")


def has_adapter(model: Any) -> bool:
    """Whether `model` is a PeftModel."""
    return hasattr(model, "peft_config") and hasattr(model, "disable_adapter")


@contextmanager
def reference_adapter(model: Any) -> Iterator[None]:
    """`model` as its reference: with the adapter "reference" where it has one, else with no adapter."""
    if REFERENCE not in model.peft_config:
        with kept_flags(model), model.disable_adapter():
            yield
        return
    with kept_flags(model):
        _activate(model, REFERENCE)
        try:
            yield
        finally:
            _activate(model, POLICY)


@contextmanager
def critic_adapter(model: Any) -> Iterator[None]:
    """`model` with its adapter "critic" in place of the policy's; what the policy trains in full is as in the base model.

    A backward of what is computed inside belongs inside, too: gradient checkpointing computes it again.
    """
    with kept_flags(model):
        _activate(model, CRITIC)
        try:
            yield
        finally:
            _activate(model, POLICY)


def _activate(model: Any, name: str) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.set_adapter(name if name in module.modules_to_save else [])
        elif isinstance(module, BaseTunerLayer):
            module.set_adapter(name)


@contextmanager
def kept_flags(model: nn.Module) -> Iterator[None]:
    """PEFT changes which parameters require a gradient as it switches adapters; this puts them back."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _targets(model: Any, targets: str | list[str]) -> str | list[str]:
    """PEFT takes "all-linear" alone; in a list it stands for the names of all linear layers but the head."""
    if isinstance(targets, str) or "all-linear" not in targets:
        return targets
    from transformers.pytorch_utils import Conv1D

    heads = (model.get_output_embeddings(), getattr(model, "score", None))
    linear = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D)) and module not in heads]
    names = {name.rsplit(".", 1)[-1] for name in linear}
    return sorted(names | (set(targets) - {"all-linear"}))
