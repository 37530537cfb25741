"""Chat templates: reading one from a file, and what a template makes of messages."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from fastalign.data.messages import Message
from fastalign.errors import TemplateError

_GENERATION_TAG = re.compile(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}")
_QUESTION, _ANSWER = "fastalign probe question", "fastalign probe answer"


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


def require_chat_template(tokenizer: PreTrainedTokenizerBase, place: str) -> None:
    """Raises TemplateError when rows hold messages and the tokenizer cannot render them."""
    if not tokenizer.chat_template:
        raise TemplateError(
            f"{place}: the row holds messages, but {tokenizer.name_or_path or 'the tokenizer'} has no chat template; "
            "give one with data.chat_template FILE.jinja, or use plain text columns"
        )


def has_marks(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template marks what the assistant says with {% generation %}."""
    return bool(_GENERATION_TAG.search(str(tokenizer.chat_template)))


def missing_marks(tokenizer: PreTrainedTokenizerBase) -> str:
    """Why a template marks nothing of a conversation as the assistant's, the lines to change, and how."""
    template = str(tokenizer.chat_template)
    remedy = (
        "put {% generation %} before what the assistant writes and {% endgeneration %} behind the token that ends its turn, in a "
        "file for data.chat_template, or train on all turns with data.assistant_only false"
    )
    if not has_marks(tokenizer):
        speaks = [match.start() for match in re.finditer("assistant", template)][:3]
        places = [f"line {template.count(chr(10), 0, at) + 1}: ...{template[max(at - 40, 0) : at + 60]!r}..." for at in speaks]
        shown = f" ({'; '.join(places)})" if places else ""
        return f"the chat template does not mark what the assistant says: it has no {{% generation %}} tag{shown}; {remedy}"
    return f"the chat template has {{% generation %}} tags, but they enclose nothing in this conversation; {remedy}"


@dataclass(frozen=True)
class TemplateTraits:
    """How a template renders a question and an answer."""

    reads_text: bool  # content "..." comes out as its text
    reads_parts: bool  # content [{"type": "text", "text": "..."}] comes out as its text
    turn_end: str  # what is written after the answer; "" also when the template fails on the probe

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> TemplateTraits:
        """Renders a probe conversation with the tokenizer's template."""
        text, parts = (_render_probe(tokenizer, as_parts) for as_parts in (False, True))
        return cls(_QUESTION in text, _QUESTION in parts, (text if _ANSWER in text else parts).rpartition(_ANSWER)[2])

    def adapt(self, messages: list[Message]) -> list[Message]:
        """The messages with their content in the form that the template reads, where it reads only one."""
        if self.reads_parts == self.reads_text:
            return messages
        if self.reads_text:
            return [{**m, "content": _joined(m["content"])} if isinstance(m.get("content"), (list, tuple)) else m for m in messages]
        return [{**m, "content": [{"type": "text", "text": m["content"]}]} if isinstance(m.get("content"), str) else m for m in messages]


def _joined(parts: list[dict[str, Any]]) -> str:
    return "".join(part["text"] for part in parts)


def _render_probe(tokenizer: PreTrainedTokenizerBase, as_parts: bool) -> str:
    """The rendered probe, or "" when the template fails on it or prints the parts as a list."""
    turns = (("user", _QUESTION), ("assistant", _ANSWER))
    messages: list[Any] = [{"role": role, "content": [{"type": "text", "text": text}] if as_parts else text} for role, text in turns]
    try:
        rendered = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception:  # a template is a program; what it refuses is reported with the row it refuses
        return ""
    quoted = any(quote + _QUESTION in rendered for quote in "'\"")
    return "" if as_parts and quoted else rendered
