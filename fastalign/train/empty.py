"""The model of a run without storage: of what is at `model.path`, its config alone is read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastalign import attention
from fastalign.errors import ModelError
from fastalign.models.adapters import add_adapter, check_adapter_folder
from fastalign.models.architecture import check_config
from fastalign.models.config import LoraConfig, ModelConfig
from fastalign.models.load import prepare
from fastalign.objectives.base import RunConfig


def empty_model(config: RunConfig) -> Any:
    """The model of the run on the meta device, prepared as a loaded one is. Raises ModelError where its config cannot be read."""
    return with_options(bare_model(config), config)


def bare_model(config: RunConfig) -> Any:
    """The same as it is built, before adapters, checkpointing and what else its options ask for; of those the dtype counts."""
    from transformers import AutoConfig, AutoModelForCausalLM

    options, _ = _base(config)
    try:
        read = AutoConfig.from_pretrained(options.path, trust_remote_code=options.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(f"{options.path}: cannot read the model's config: {error}") from error
    check_config(read, options.path)
    attention.register()
    dtype = getattr(torch, options.dtype) if options.dtype != "auto" else read.dtype or torch.float32
    if config.name == "reward":
        read.tie_word_embeddings = False
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(read, dtype=dtype, attn_implementation=attention.NAME)
        if config.name == "reward":  # another head, of one row
            model.lm_head = nn.Linear(read.get_text_config().hidden_size, 1, bias=False, dtype=dtype)
    return model


def with_options(model: Any, config: RunConfig) -> Any:
    """`model`, which `bare_model` made and which is changed, with the adapter and the options of the run."""
    options, lora = _base(config)
    with torch.device("meta"):
        if lora.adapter is None:
            return prepare(model, options, lora)
        saved = _adapter(lora.adapter)
        same = LoraConfig(r=saved["r"], alpha=saved.get("lora_alpha"), targets=saved["target_modules"])
        same.modules_to_save = saved.get("modules_to_save") or []
        return add_adapter(prepare(model, options, None), same)


def _base(config: RunConfig) -> tuple[ModelConfig, LoraConfig]:
    """On the meta device; where the path is an adapter's, that of its base."""
    options, lora = replace(config.model, device="meta"), config.lora
    if (Path(options.path) / "adapter_config.json").is_file():
        options, lora = replace(options, path=_adapter(options.path)["base_model_name_or_path"]), LoraConfig(adapter=options.path)
    return options, lora


def _adapter(path: str) -> dict[str, Any]:
    check_adapter_folder(path)
    return json.loads((Path(path) / "adapter_config.json").read_text())
