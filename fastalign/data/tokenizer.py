"""The tokenizer of a model folder, its chat template, and what preference data needs of both."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fastalign.errors import TemplateError

_GENERATION_TAG = re.compile(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}")


def load_tokenizer(
    path: str | Path, chat_template: str | Path | None = None, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub model, with the Jinja file `chat_template` in place of its own template.

    A padding token that equals EOS is fine: sequences are packed and never padded, so EOS is always a label. Raises
    TemplateError when there is no tokenizer, no EOS, or the template file is not valid Jinja.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).split("\n", 1)[0]
        raise TemplateError(f"{path}: no usable tokenizer: {reason}; the folder needs tokenizer.json and tokenizer_config.json") from error
    require_eos(tokenizer)
    if chat_template is not None:
        tokenizer.chat_template = read_chat_template(chat_template)
    return tokenizer


def read_chat_template(path: str | Path) -> str:
    """The text of a Jinja chat template file, checked for syntax. Raises TemplateError with file and line."""
    import jinja2

    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")
    except OSError as error:
        raise TemplateError(f"{path}: the chat template cannot be read: {error.strerror}; check data.chat_template") from error
    except UnicodeDecodeError as error:
        raise TemplateError(f"{path}: the chat template is not UTF-8 (byte offset {error.start}); re-save it as UTF-8") from error
    if "{" not in text:
        raise TemplateError(f"{path}: the chat template holds no Jinja expression; it must loop over 'messages'")
    try:
        # Transformers adds the tag {% generation %}, which Jinja alone does not know.
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_GENERATION_TAG.sub("", text))
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(f"{path}:{error.lineno}: the chat template is not valid Jinja: {error.message}") from error
    return text


def require_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises TemplateError unless the tokenizer has an EOS token that stands for itself."""
    name = tokenizer.name_or_path or "the tokenizer"
    remedy = 'set "eos_token" in tokenizer_config.json to the token that ends an answer'
    if tokenizer.eos_token is None:
        raise TemplateError(f"{name}: no EOS token, so the model could never learn to stop; {remedy}")
    if tokenizer.convert_ids_to_tokens(tokenizer.eos_token_id) != tokenizer.eos_token:
        raise TemplateError(f"{name}: the EOS token {tokenizer.eos_token!r} is not in the vocabulary; {remedy}")


def require_chat_template(tokenizer: PreTrainedTokenizerBase, place: str) -> None:
    """Raises TemplateError when rows hold messages and the tokenizer cannot render them."""
    if not tokenizer.chat_template:
        raise TemplateError(
            f"{place}: the row holds messages, but {tokenizer.name_or_path or 'the tokenizer'} has no chat template; "
            "give one with data.chat_template FILE.jinja, or use plain text columns"
        )


def head_vocab_size(path: str | Path) -> int | None:
    """Rows of the LM head that a model folder's config.json declares; None without such a folder or entry."""
    try:
        config: Any = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    size = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    return size if isinstance(size, int) else None
