"""Writing a trained model so that stock Transformers and PEFT load it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch import nn

from fastalign.errors import ModelError
from fastalign.models.adapters import POLICY, has_adapter
from fastalign.models.critic import without_critic
from fastalign.models.quantization import is_quantized
from fastalign.models.trunk import causal_lm, text_config

log = logging.getLogger(__name__)


def save_final(model: Any, tokenizer: Any, path: str | Path, *, merged: bool = False) -> None:
    """Write `model` and `tokenizer` (None: no tokenizer) to the folder `path`, weights in safetensors.

    A PeftModel becomes a PEFT adapter; with `merged`, the adapter is added to the weights of the model in place, and the
    whole model is written. Raises ModelError for `merged` where the weights are quantized. The config does not name fastalign's
    attention: what is written needs no fastalign. A critic is left out.
    """
    path = Path(path)
    with without_critic(model):
        _save_model(model, path, merged)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)


def _save_model(model: Any, path: Path, merged: bool) -> None:
    causal = causal_lm(model)
    _repair_generation_config(causal)
    if has_adapter(model) and not merged:
        config = model.peft_config[POLICY]
        if config.base_model_name_or_path and Path(config.base_model_name_or_path).is_dir():
            config.base_model_name_or_path = str(Path(config.base_model_name_or_path).resolve())
        # Without save_embedding_layers=False an adapted lm_head would bring a copy of the base model's own head.
        model.save_pretrained(path, selected_adapters=[POLICY], save_embedding_layers=False)
    else:
        if is_quantized(causal):
            raise ModelError("an adapter cannot be merged into 4-bit weights, which would round it away; load the base model unquantized")
        if has_adapter(model):
            _untie(causal)
        whole = model.merge_and_unload(adapter_names=[POLICY]) if has_adapter(model) else causal
        whole.save_pretrained(path)


def _untie(causal: Any) -> None:
    """Give an adapted head a weight of its own: merged into a tied one, the adapter would change the embedding too."""
    head, embedding = causal.get_output_embeddings(), causal.get_input_embeddings()
    for owner in (getattr(head, "base_layer", None), getattr(head, "original_module", None)):
        if owner is not None and owner.weight is embedding.weight:
            owner.weight = nn.Parameter(owner.weight.detach().clone(), requires_grad=owner.weight.requires_grad)
            causal.config.tie_word_embeddings = text_config(causal).tie_word_embeddings = False
            causal.all_tied_weights_keys = {}  # what Transformers 5 leaves out of the file


def _repair_generation_config(causal: Any) -> None:
    """Transformers refuses to write a generation config that contradicts itself, which many published models have."""
    config = getattr(causal, "generation_config", None)
    if config is None:
        return
    try:
        config.validate(strict=True)
    except ValueError as error:
        log.warning("generation_config of the model contradicts itself; saved with do_sample=true, as its sampling options mean: %s", error)
        config.do_sample = True
