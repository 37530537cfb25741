"""The tokenizer of a model folder, and what preference data needs of it."""

from __future__ import annotations

import json
import logging
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fastalign.data.templates import read_chat_template
from fastalign.errors import TemplateError

logger = logging.getLogger("fastalign")


def load_tokenizer(
    path: str | Path, chat_template: str | Path | None = None, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub model, with the Jinja file `chat_template` in place of its own template.

    A padding token that equals EOS is fine: sequences are packed and never padded, so EOS is always a label. Raises
    TemplateError when there is no tokenizer, no EOS, or the template file is not valid Jinja.
    """
    absent = "" if Path(path).exists() else f"no folder of that name here{_nearest_folder(Path(path))}"
    if absent and (str(path).startswith((".", "/", "~")) or str(path).count("/") > 1):
        raise TemplateError(f"{path}: no usable tokenizer: {absent}; check the path")
    if absent and ("/" not in str(path) or "did you mean" in absent):  # the hub's client tries for minutes where there is no network
        logger.info("%s: %s; asking the hub", path, absent)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).split("\n", 1)[0]
        remedy = "the folder needs tokenizer.json and tokenizer_config.json"
        if absent:
            reason, remedy = f"{absent}, and the hub gives none: {reason}", "check the path, or the hub name and the network"
        raise TemplateError(f"{path}: no usable tokenizer: {reason}; {remedy}") from error
    require_eos(tokenizer)
    if chat_template is not None:
        tokenizer.chat_template = read_chat_template(chat_template)
    return tokenizer


def _nearest_folder(path: Path) -> str:
    here = [folder.name for folder in path.parent.iterdir() if folder.is_dir()] if path.parent.is_dir() else []
    near = get_close_matches(path.name, here, n=1)
    return f" (did you mean {str(path.parent / near[0])!r}?)" if near else ""


def require_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises TemplateError unless the tokenizer has an EOS token that stands for itself."""
    name = tokenizer.name_or_path or "the tokenizer"
    remedy = 'set "eos_token" in tokenizer_config.json to the token that ends an answer'
    if tokenizer.eos_token is None:
        raise TemplateError(f"{name}: no EOS token, so the model could never learn to stop; {remedy}")
    if tokenizer.convert_ids_to_tokens(tokenizer.eos_token_id) != tokenizer.eos_token:
        raise TemplateError(f"{name}: the EOS token {tokenizer.eos_token!r} is not in the vocabulary; {remedy}")


def head_vocab_size(path: str | Path) -> int | None:
    """Rows of the LM head that a model folder's config.json declares; None without such a folder or entry."""
    return _declared(path, "vocab_size")


def context_window(path: str | Path) -> int | None:
    """Longest sequence, in tokens, that a model folder's config.json declares; None without such a folder or entry."""
    return _declared(path, "max_position_embeddings", "n_positions")


def _declared(path: str | Path, *names: str) -> int | None:
    try:
        config: Any = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    found = (part.get(name) for part in (config, config.get("text_config") or {}) for name in names)
    return next((number for number in found if isinstance(number, int)), None)
