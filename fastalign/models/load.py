"""Loading a causal language model so that it can be trained on packed sequences."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from fastalign import attention
from fastalign.errors import ConfigError, ModelError
from fastalign.models.adapters import add_adapter, check_adapter_folder
from fastalign.models.architecture import check_config, check_model
from fastalign.models.checkpointing import enable_checkpointing
from fastalign.models.config import LoraConfig, ModelConfig
from fastalign.models.liger_kernels import install_liger_kernels
from fastalign.models.quantization import keep_trainable, quantization_config
from fastalign.models.sliced_mlp import slice_mlps
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
    options = ModelConfig(
        "",
        dtype=dtype,
        device=device,
        gradient_checkpointing=gradient_checkpointing,
        dropout=dropout,
        trust_remote_code=trust_remote_code,
    )
    if isinstance(model, nn.Module):
        check_config(causal_lm(model).config, "")
        if dtype != "auto":
            model.to(getattr(torch, dtype))
        return prepare(model, options, lora)
    from transformers import AutoModelForCausalLM

    options = model if isinstance(model, ModelConfig) else replace(options, path=str(model))
    options, lora = resolve_adapter(options, lora)
    return prepare(read_model(options, AutoModelForCausalLM), options, lora)


def resolve_adapter(options: ModelConfig, lora: LoraConfig | None) -> tuple[ModelConfig, LoraConfig | None]:
    """Where `options.path` is an adapter: its base model, and the adapter as what is trained further."""
    if not (Path(options.path) / "adapter_config.json").is_file():
        return options, lora
    if lora is not None and lora.enabled:
        raise ModelError(f"{options.path} is an adapter; give its base model as model.path and the adapter as lora.adapter")
    return replace(options, path=_base_of(options.path)), LoraConfig(adapter=options.path, reference=lora.reference if lora else "start")


def prepare(loaded: Any, options: ModelConfig, lora: LoraConfig | None, *, task: str = "CAUSAL_LM") -> Any:
    """Install packed attention in a model of Transformers, and put it on its device, with its adapter (`task`: PEFT's word)."""
    options.validate()
    attention.register()
    causal = causal_lm(loaded)
    check_model(causal, options.path)
    causal.set_attn_implementation(attention.NAME)
    if not options.dropout:
        _disable_dropout(causal)
    place(loaded, options)
    if options.liger_kernels and causal.device.type != "meta":  # without storage there is nothing to run
        install_liger_kernels(loaded)
    if lora is not None and lora.enabled:
        loaded = add_adapter(loaded, lora, task)
    if options.mlp_chunk:
        slice_mlps(causal, options.mlp_chunk)
    if options.gradient_checkpointing is True:  # of auto the run decides, when it knows the model
        enable_checkpointing(causal, options)
    return loaded


def place(loaded: Any, options: ModelConfig) -> Any:
    """Put a model on the device that `options` name; returns it. Raises ConfigError for a device that is not here."""
    return loaded.to(_device(options.device, loaded))


def read_config(options: ModelConfig) -> Any:
    """The Transformers config at `options.path`, of an architecture that can be packed."""
    from transformers import AutoConfig

    _check_folder(options.path)
    try:
        config = AutoConfig.from_pretrained(options.path, trust_remote_code=options.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(f"{options.path}: cannot read the model's config: {error}") from error
    check_config(config, options.path)
    return config


def read_model(options: ModelConfig, auto_class: Any, *, config: Any = None, may_lack: Collection[str] = ()) -> Any:
    """The model at `options.path` as `auto_class` builds it; of its weights only those in `may_lack` may be missing there."""
    path = options.path
    config = read_config(options) if config is None else config
    quantization = quantization_config(options, config)
    attention.register()
    try:
        with _no_load_report() if may_lack else nullcontext():
            loaded: Any = auto_class.from_pretrained(
                path,
                config=config,
                dtype=options.dtype if options.dtype == "auto" else getattr(torch, options.dtype),
                use_safetensors=True,
                attn_implementation=attention.NAME,
                quantization_config=quantization,
                trust_remote_code=options.trust_remote_code,
                output_loading_info=True,
            )
    except Exception as error:  # safetensors, hub, config and size errors have no common base; all mean that the folder cannot be used
        raise ModelError(f"{path}: cannot load the weights: {error}") from error
    model, info = loaded
    if quantization is not None:
        keep_trainable(model)
    missing = sorted(set(info["missing_keys"]) - set(may_lack))
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise ModelError(f"{path}: the weight files lack {shown}, which would start from random numbers; download the model again")
    return model


@contextmanager
def _no_load_report() -> Iterator[None]:
    """Transformers warns at length of the weights that differ between a causal LM and another head on it, and that nobody shards them."""
    logs = [logging.getLogger(f"transformers.{name}") for name in ("modeling_utils", "distributed.tensor_parallel")]
    before = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for log, level in zip(logs, before):
            log.setLevel(level)


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
