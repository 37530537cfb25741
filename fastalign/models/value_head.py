"""Reward models: the trunk of a causal LM under a score head, one number per sequence.

In memory and on disk a reward model is Transformers' own `*ForSequenceClassification` with one label: what training writes is
what `AutoModelForSequenceClassification.from_pretrained` reads. The score is `hidden . weight` without a bias at the last
token that is not the pad token, which is where Transformers reads it. A tokenizer whose pad token is its EOS token therefore
puts the score on the token before EOS, in training as in use.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastalign.errors import HeadMismatchError, ModelError
from fastalign.models.config import LoraConfig, ModelConfig
from fastalign.models.heads import active_module
from fastalign.models.load import prepare, read_config, read_model, resolve_adapter
from fastalign.models.trunk import causal_lm, evaluation, stock_attention, text_config, trunk
from fastalign.types import PackedBatch, on_device

_WEIGHT = "score.weight"

# Largest difference of a score, as a share of its scale: orders above rounding, orders below a wrong token or head.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}


def load_reward_model(model: str | Path | ModelConfig, *, pad_token_id: int, lora: LoraConfig | None = None) -> Any:
    """The reward model at a path, or a fresh one on the causal LM there, with packed attention; with `lora` a PeftModel.

    A fresh score head is drawn from N(0, 1/(D+1)) (Stiennon 2020, arXiv:2009.01325) by torch's global generator. Under an
    adapter the score head is trained in full. `pad_token_id` goes into the config, where Transformers looks for it.
    Raises ModelError for architectures without a sequence classification class in Transformers, whose reward models nothing
    could load, for classifiers of several labels, and where `load_model` does.
    """
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoModelForSequenceClassification

    options = model if isinstance(model, ModelConfig) else ModelConfig(str(model))
    options, lora = resolve_adapter(options, lora)
    path, config = options.path, read_config(options)
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise ModelError(f"{path}: Transformers has no sequence classification model of type {config.model_type}, as a reward model is one")
    trained = _is_classifier(config)
    if trained and config.num_labels != 1:
        raise ModelError(f"{path}: a classifier of {config.num_labels} labels; a reward model has one score")
    config.num_labels = 1
    text = config.get_text_config(decoder=True)
    text.pad_token_id = config.pad_token_id = pad_token_id
    if hasattr(text, "output_router_logits"):
        text.output_router_logits = False  # the classification models have no load-balancing loss
    loaded = read_model(options, AutoModelForSequenceClassification, config=config, may_lack=() if trained else (_WEIGHT,))
    head = getattr(loaded, "score", None)
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise ModelError(f"{path}: {type(loaded).__name__} has no score head, a linear layer without a bias, but a {type(head).__name__}")
    if not trained:
        nn.init.normal_(head.weight, std=(head.in_features + 1) ** -0.5)
    return prepare(loaded, options, lora, task="SEQ_CLS")


def is_reward_model(path: str | Path) -> bool:
    """Whether a folder holds a reward model or an adapter of one; a hub name is none. Raises ModelError for a config that is no JSON."""
    for name in ("adapter_config.json", "config.json"):
        if not (file := Path(path) / name).is_file():
            continue
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ModelError(f"{file}: no JSON ({error}); the folder is damaged, write or copy it again") from error
        names = config.get("architectures") or ()
        return config.get("task_type") == "SEQ_CLS" or any(name.endswith("ForSequenceClassification") for name in names)
    return False


def scores(model: Any, batch: PackedBatch) -> Tensor:
    """(S,) float32: the score of each sequence of `batch`, with gradient to trunk and head."""
    hidden, weight = _head_inputs(model, batch)
    return F.linear(hidden, weight)[:, 0].float()


def check_scores(model: Any, batch: PackedBatch, *, sequences: int = 4) -> float:
    """Compare the packed scores of the first sequences of `batch` with the model's own, one sequence at a time, as `self_check` does.

    Returns the largest difference as a share of the scores' scale: the largest of them, or |hidden| |weight| / sqrt(D) where
    all happen to be small. Raises HeadMismatchError beyond the tolerance.
    """
    causal = causal_lm(model)
    with evaluation(model):
        hidden, weight = _head_inputs(model, batch)
        packed = F.linear(hidden, weight)[:sequences, 0].float()
        with stock_attention(model):
            parts = batch.sequences()[:sequences]
            own = torch.cat([causal(input_ids=batch.input_ids[None, rows], use_cache=False).logits[:, 0].float() for rows in parts])
    scale = max(float(own.abs().max()), float(hidden.norm(dim=1).max() * weight.detach().norm()) / hidden.shape[1] ** 0.5)
    worst = float((packed - own).abs().max()) / max(scale, 1e-30)
    dtype = next(model.parameters()).dtype
    if not worst <= _TOLERANCE[dtype]:
        raise HeadMismatchError(
            f"{type(causal).__name__}: packed scores differ from the model's own by up to {worst:.3g} of their size (tolerance "
            f"{_TOLERANCE[dtype]:g}). Training would optimise another model than the one that scores, so it does not start"
        )
    return worst


def _head_inputs(model: Any, batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """(S, D) hidden states that are scored and the head's weight (1, D), in float32 at least."""
    causal = causal_lm(model)
    hidden = trunk(model, batch).hidden.index_select(0, _last_tokens(batch, text_config(causal).pad_token_id))
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return hidden.to(wide), active_module(causal.score).weight.to(wide)


def _last_tokens(batch: PackedBatch, pad_token_id: int) -> Tensor:
    """(S,) the row of each sequence's last token that is not padding; of a sequence of nothing else its first, as in Transformers."""
    rows = torch.arange(batch.input_ids.shape[0], device=batch.input_ids.device)
    seen = torch.where(batch.input_ids != pad_token_id, rows, -1).cummax(0).values
    starts, stops = batch.cu_seqlens[:-1].long(), batch.cu_seqlens[1:].long()
    last = seen[stops - 1]
    if batch.shared is None:
        return last.maximum(starts)
    begin, ends = (on_device(torch.tensor(x), rows.device) for x in (batch.shared.prefix, batch.shared.ends))
    begin = torch.where(begin >= 0, begin, torch.arange(len(begin), device=rows.device))  # the piece that each sequence begins with
    return torch.where(last >= starts, last, last[begin].maximum(starts[begin]))[ends]


def _is_classifier(config: Any) -> bool:
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())
