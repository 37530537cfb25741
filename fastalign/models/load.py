"""Loading a causal language model so that it can be trained on packed sequences."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from fastalign import attention
from fastalign.errors import ConfigError, ModelError
from fastalign.models.adapters import add_adapter, check_adapter_folder
from fastalign.models.architecture import check_config, check_model
from fastalign.models.config import LoraConfig, ModelConfig
from fastalign.models.trunk import causal_lm

_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")


def load_model(
    model: str | Path | ModelConfig | nn.Module,
    *,
    lora: LoraConfig | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    device: str = "auto",
    gradient_checkpointing: bool = False,
    dropout: bool = False,
    trust_remote_code: bool = False,
) -> Any:
    """A causal LM with packed attention installed: the model, or with `lora` a PeftModel around it.

    `model` is a folder or hub name (of a model, or of a PEFT adapter, which is then trained further), a ModelConfig, which
    holds the other options too, or a model of Transformers, which is changed in place; its dtype and device stay unless
    given. A fresh adapter draws its first weights from torch's global generator. Weights are read from safetensors only.
    Raises ModelError for a folder without usable weights and for architectures that cannot be packed, with the reason.
    """
    attention.register()
    options = ModelConfig("", dtype, device, gradient_checkpointing, dropout, trust_remote_code)
    if isinstance(model, nn.Module):
        loaded: Any = model
        causal = causal_lm(model)
        check_config(causal.config, "")
        if dtype != "auto":
            loaded.to(getattr(torch, dtype))
    else:
        options = model if isinstance(model, ModelConfig) else replace(options, path=str(model))
        if (Path(options.path) / "adapter_config.json").is_file():
            if lora is not None and lora.enabled:
                raise ModelError(f"{options.path} is an adapter; give its base model as model.path and the adapter as lora.adapter")
            lora = LoraConfig(adapter=options.path)
            options = replace(options, path=_base_of(options.path))
        loaded = causal = _from_path(options)
    check_model(causal, options.path)
    causal.set_attn_implementation(attention.NAME)
    if not options.dropout:
        _disable_dropout(causal)
    loaded.to(_device(options.device, loaded))
    if lora is not None and lora.enabled:
        loaded = add_adapter(loaded, lora)
    if options.gradient_checkpointing:
        causal.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return loaded


def _from_path(options: ModelConfig) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    path = options.path
    _check_folder(path)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=options.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot read the model's config: {error}") from error
    check_config(config, path)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=options.dtype if options.dtype == "auto" else getattr(torch, options.dtype),
            use_safetensors=True,
            attn_implementation=attention.NAME,
            trust_remote_code=options.trust_remote_code,
            output_loading_info=True,
        )
    except Exception as error:  # safetensors, hub, config and size errors have no common base; all mean that the folder cannot be used
        raise ModelError(f"{path}: cannot load the weights: {error}") from error
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise ModelError(f"{path}: the weight files lack {shown}, which would start from random numbers; download the model again")
    return model


def _check_folder(path: str) -> None:
    """Raise ModelError for a local path that holds no model; anything else is taken for a hub name."""
    folder = Path(path)
    if not folder.is_dir():
        if folder.exists() or path.startswith((".", "/", "~")) or path.count("/") > 1:
            raise ModelError(f"model.path {path!r}: no such folder")
        return
    if not (folder / "config.json").is_file():
        raise ModelError(f"{path}: no config.json; model.path must be a folder written by save_pretrained, or a hub name")
    if any(folder.glob("*.safetensors")):
        index = folder / "model.safetensors.index.json"
        shards = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else set()
        absent = sorted(name for name in shards if not (folder / name).is_file())
        if absent:
            raise ModelError(f"{path}: weight file {absent[0]} is missing ({len(absent)} of {len(shards)}); download the model again")
        return
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if pickles:
        raise ModelError(
            f"{path}: its weights are a pickle ({pickles[0]}), which can run code when read, so it is not. Convert it where you trust it: "
            f"AutoModelForCausalLM.from_pretrained({path!r}).save_pretrained(NEW_FOLDER) writes safetensors"
        )
    raise ModelError(f"{path}: no weights (*.safetensors) beside config.json; download or save them there")


def _base_of(adapter: str) -> str:
    check_adapter_folder(adapter)
    base = json.loads((Path(adapter) / "adapter_config.json").read_text()).get("base_model_name_or_path")
    if not base:
        raise ModelError(f"{adapter}: adapter_config.json names no base model; give it as model.path and the adapter as lora.adapter")
    return base


def _device(name: str, model: nn.Module) -> torch.device:
    if name != "auto":
        try:
            torch.empty(0, device=name)
        except (RuntimeError, AssertionError, ValueError) as error:
            raise ConfigError(f"model.device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
        return torch.device(name)
    return torch.device("cuda") if torch.cuda.is_available() else next(model.parameters()).device


def _disable_dropout(model: nn.Module) -> None:
    module: Any
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
