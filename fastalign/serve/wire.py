"""What clients send, checked, and the shape of errors: OpenAI's for chat, and ours in the same spirit for feedback."""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from fastalign.data.messages import Message
from fastalign.serve.decode import RowSampling
from fastalign.serve.records import Feedback

MAX_CHOICES, MAX_STOPS, MAX_TOP, MAX_MESSAGES = 16, 4, 20, 1024
ROLES = ("system", "developer", "user", "assistant")

# Parameters of OpenAI's that this service does not have, with the values that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "metadata": ({},),
}
_CHAT = (
    "model", "messages", "stream", "stream_options", "n", "temperature", "top_p", "max_tokens", "max_completion_tokens", "stop", "seed",
    "logprobs", "top_logprobs", "user",
)  # fmt: skip
_FEEDBACK = ("answer", "thumb", "chosen_over", "rating", "edit", "reason", "user")


class ApiError(Exception):
    """An answer other than success: a status and OpenAI's error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers or {}
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True)
class ChatRequest:
    """A checked body of POST /v1/chat/completions; max_new_tokens None: what the window and the service leave."""

    model: str
    messages: list[Message]
    n: int
    temperature: float
    top_p: float
    max_new_tokens: int | None
    stops: tuple[str, ...]
    seed: int
    top_logprobs: int | None
    stream: bool
    include_usage: bool
    user: str

    def sampling(self, max_new_tokens: int) -> RowSampling:
        return RowSampling(max_new_tokens, self.temperature, self.top_p, self.stops, self.seed, self.top_logprobs)


def read_object(data: bytes) -> dict[str, Any]:
    """The JSON object in a body. Raises ApiError 400 with the place of the mistake."""

    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is no JSON")

    try:
        body = json.loads(data.decode("utf-8"), parse_constant=refuse)
        json.dumps(body, ensure_ascii=False).encode()  # half of a surrogate pair cannot be stored
    except UnicodeEncodeError as error:
        raise ApiError(400, "the body holds half of a surrogate pair; write the whole pair or remove it") from error
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8 (byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from error
    if not isinstance(body, dict):
        raise ApiError(400, f"the body must be a JSON object, got {_kind(body)}")
    return body


def parse_chat(body: dict[str, Any]) -> ChatRequest:
    """Raises ApiError 400 for a parameter that is unknown, of the wrong type, out of range, or not supported here."""
    _refuse_unknown(body, (*_CHAT, *_NEUTRAL))
    for name, values in _NEUTRAL.items():
        given = body.get(name)
        if given is not None and given not in values:
            raise ApiError(400, f"{name} is not supported here; leave it out", param=name, code="unsupported_parameter")
    model = _text(body, "model", None)
    if model is None:
        raise ApiError(400, "model is missing; GET /v1/models names it", param="model", code="missing_required_parameter")
    stream = _flag(body, "stream")
    options = body.get("stream_options")
    if options is not None:
        if not isinstance(options, dict) or set(options) - {"include_usage", "include_obfuscation"}:
            raise ApiError(400, 'stream_options must be an object such as {"include_usage": true}', param="stream_options")
        if not stream:
            raise ApiError(400, "stream_options needs stream: true", param="stream_options")
    limits = {body[name] for name in ("max_tokens", "max_completion_tokens") if isinstance(body.get(name), int)}
    if len(limits) > 1:
        raise ApiError(400, "max_tokens and max_completion_tokens differ; give one of them", param="max_tokens")
    tokens = [_integer(body, name, 1, 2**31 - 1) for name in ("max_tokens", "max_completion_tokens")]
    top = _integer(body, "top_logprobs", 0, MAX_TOP)
    logprobs = _flag(body, "logprobs")
    if top is not None and not logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    seed = _integer(body, "seed", -(2**63), 2**63 - 1)
    return ChatRequest(
        model=model,
        messages=_messages(body),
        n=_integer(body, "n", 1, MAX_CHOICES) or 1,
        temperature=_number(body, "temperature", 0.0, 2.0, 1.0),
        top_p=_number(body, "top_p", 0.0, 1.0, 1.0) or 1e-9,  # 0: the most probable token alone
        max_new_tokens=next((limit for limit in tokens if limit is not None), None),
        stops=_stops(body),
        seed=secrets.randbits(32) if seed is None else seed % 2**64,
        top_logprobs=(top or 0) if logprobs else None,
        stream=stream,
        include_usage=isinstance(options, dict) and _flag(options, "include_usage"),
        user=_text(body, "user", 256) or "",
    )


def parse_feedback(body: dict[str, Any], user_key: Any) -> Feedback:
    """The feedback in a body; `user_key` of its "user" names who gives it. Raises ApiError 400, or DataError for a value of no meaning."""
    _refuse_unknown(body, _FEEDBACK)
    answer = _text(body, "answer", 128)
    if not answer:
        raise ApiError(
            400, "answer is missing: the answer_id of the choice that is judged", param="answer", code="missing_required_parameter"
        )
    given = [name for name in ("thumb", "chosen_over", "rating", "edit") if body.get(name) is not None]
    if len(given) != 1:
        shown = ", ".join(given) or "none"
        raise ApiError(400, f"give exactly one of thumb, chosen_over, rating and edit, got {shown}", param=given[1] if given else "thumb")
    [name] = given
    value = body[name]
    reason, user = _text(body, "reason", None), user_key(_text(body, "user", 256) or "")
    if name == "thumb":
        if value not in ("up", "down"):
            raise ApiError(400, f'thumb must be "up" or "down", got {value!r:.80}', param="thumb")
        return Feedback(answer, "thumb", value == "up", user, reason)
    if name == "rating":
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ApiError(400, f"rating must be a number, got {_kind(value)}", param="rating")
        return Feedback(answer, "rating", value, user, reason)
    if name == "edit":
        if not isinstance(value, str):
            raise ApiError(400, f"edit must be text, got {_kind(value)}", param="edit")
        return Feedback(answer, "edit", value, user, reason)
    if not (isinstance(value, list) and all(isinstance(other, str) for other in value)):
        raise ApiError(400, "chosen_over must be a list of the ids of the answers that were not chosen", param="chosen_over")
    return Feedback(answer, "choice", tuple(value), user, reason)


def parse_version(body: dict[str, Any]) -> dict[str, Any]:
    """name, folder, parent and metrics of a new version. Raises ApiError 400."""
    _refuse_unknown(body, ("name", "folder", "parent", "metrics"))
    name, folder = _text(body, "name", 64), _text(body, "folder", 4096)
    for key, value in (("name", name), ("folder", folder)):
        if not value or "\0" in value:
            raise ApiError(400, f"{key} is missing; give name and folder of the version", param=key, code="missing_required_parameter")
    return {"name": name, "folder": folder, "parent": _text(body, "parent", 64), "metrics": parse_metrics(body, required=False)}


def parse_metrics(body: dict[str, Any], *, required: bool = True) -> dict[str, Any]:
    """The "metrics" of a body: names and numbers or texts."""
    metrics = body.get("metrics")
    if metrics is None and not required:
        return {}
    if not isinstance(metrics, dict) or not all(isinstance(value, (int, float, str, bool)) for value in metrics.values()):
        raise ApiError(400, "metrics must be an object of numbers and texts", param="metrics")
    return metrics


def parse_promotion(body: dict[str, Any]) -> str | None:
    """The version that the caller expects to replace."""
    _refuse_unknown(body, ("expected",))
    return _text(body, "expected", 64)


def parse_rollback(body: dict[str, Any]) -> tuple[str | None, str]:
    """(the version that the caller expects to get to, the reason)"""
    _refuse_unknown(body, ("to", "reason"))
    return _text(body, "to", 64), _text(body, "reason", 4000) or ""


def _messages(body: dict[str, Any]) -> list[Message]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not 0 < len(messages) <= MAX_MESSAGES:
        raise ApiError(400, f"messages must be a list of 1 to {MAX_MESSAGES} messages", param="messages")
    found = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, dict):
            raise ApiError(400, f"{where} must be an object with role and content, got {_kind(message)}", param=where)
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ApiError(400, f"{where}.role must be one of {', '.join(ROLES)}, got {role!r:.40}", param=f"{where}.role")
        others = [key for key in message if key not in ("role", "content", "name", "refusal") and message[key]]
        if others:
            raise ApiError(400, f"{where}.{others[0]} is not supported here; only text is", param=where, code="unsupported_parameter")
        if isinstance(content, list):
            content = "".join(_part(part, where) for part in content)
        if not isinstance(content, str):
            raise ApiError(400, f"{where}.content must be text, got {_kind(content)}", param=f"{where}.content")
        found.append({"role": role, "content": content})
    return found


def _part(part: Any, where: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise ApiError(400, f'{where}.content may hold parts {{"type": "text", "text": "..."}} only', param=f"{where}.content")
    return part["text"]


def _stops(body: dict[str, Any]) -> tuple[str, ...]:
    stop = body.get("stop")
    stops = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(text, str) and 0 < len(text) <= 256 for text in stops):
        raise ApiError(400, f"stop must be a text or up to {MAX_STOPS} texts, of 1 to 256 characters", param="stop")
    return tuple(stops)


def _refuse_unknown(body: dict[str, Any], known: Collection[str]) -> None:
    unknown = sorted(set(body) - set(known))
    if unknown:
        raise ApiError(
            400, f"unknown parameter {unknown[0]!r:.80}; there are {', '.join(known)}", param=unknown[0][:80], code="unknown_parameter"
        )


def _flag(body: dict[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise ApiError(400, f"{name} must be true or false, got {_kind(value)}", param=name)
    return bool(value)


def _text(body: dict[str, Any], name: str, longest: int | None) -> str | None:
    value = body.get(name)
    if value is not None and not isinstance(value, str):
        raise ApiError(400, f"{name} must be text, got {_kind(value)}", param=name)
    if value is not None and longest is not None and len(value) > longest:
        raise ApiError(400, f"{name} has {len(value)} characters, at most {longest} are allowed", param=name)
    return value


def _integer(body: dict[str, Any], name: str, low: int, high: int) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ApiError(400, f"{name} must be a whole number from {low} to {high}, got {value!r:.40}", param=name)
    return value


def _number(body: dict[str, Any], name: str, low: float, high: float, default: float) -> float:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ApiError(400, f"{name} must be a number from {low:g} to {high:g}, got {value!r:.40}", param=name)
    return float(value)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
