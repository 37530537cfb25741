"""The service's description of itself, OpenAPI 3.1."""

from __future__ import annotations

from typing import Any

from fastalign import __version__
from fastalign.serve.records import MAX_COMPARED, MAX_RATING, MAX_REASON
from fastalign.serve.wire import MAX_CHOICES, MAX_MESSAGES, MAX_STOPS, MAX_TOP, ROLES

TEXT: dict[str, Any] = {"type": "string"}
NUMBER: dict[str, Any] = {"type": "number"}
COUNT: dict[str, Any] = {"type": "integer", "minimum": 0}
WORD = {"type": "string", "maxLength": 64}

_STATUSES = {
    400: "malformed, unknown or unsupported; the message names the parameter",
    401: "no valid token",
    403: "the token's role does not allow this",
    404: "no such answer, version or model",
    408: "the body did not come in time",
    409: "contradicts what is stored, or the version cannot be loaded; what answered before goes on",
    413: "the body is too large",
    415: "the content type is not application/json",
    421: "an open service asked by another name than localhost",
    429: "too many requests; Retry-After says when to try again",
    503: "the queue or the database is full or locked; Retry-After says when to try again",
}


def document(model: str, *, open_service: bool) -> dict[str, Any]:
    """The description of a service whose model is called `model`."""
    secured: dict[str, Any] = {} if open_service else {"security": [{"token": []}]}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "fastalign serve",
            "version": __version__,
            "description": f"Chat with {model!r} by OpenAI's protocol, and feedback on its answers.",
        },
        "paths": _paths(),
        "components": {"schemas": _schemas(model), "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
        **secured,
    }


def _paths() -> dict[str, Any]:
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    completion = _answer("an answer, or with stream: true its chunks as server-sent events", _ref("Completion"))
    completion["200"]["content"]["text/event-stream"] = {"schema": {}}
    versions = _list(_ref("Version"))
    versions["properties"]["database"] = TEXT
    version = _answer("the version", _ref("Version"))
    return {
        "/v1/chat/completions": {"post": _operation("complete", "Answer a conversation", completion, _ref("ChatRequest"))},
        "/v1/feedback": {"post": _operation("feedback", "Judge an answer", _answer("kept, on the disk", _ref("Kept")), _ref("Feedback"))},
        "/v1/models": {"get": _operation("models", "The model", _answer("one model", _list(_ref("Model"))))},
        "/v1/models/{name}": {
            "parameters": [name],
            "get": _operation("model", "The model by its name", _answer("the model", _ref("Model"))),
        },
        "/admin/versions": {
            "get": _operation("versions", "All versions", _answer("the oldest first, and where they are kept", versions)),
            "post": _operation("add_version", "Add a candidate", _answer("added", _ref("Version"), 201), _ref("NewVersion")),
        },
        "/admin/versions/{name}/promote": {
            "parameters": [name],
            "post": _operation("promote", "Answer with this version from now on", version, _ref("Promotion"), required=False),
        },
        "/admin/versions/{name}/metrics": {
            "parameters": [name],
            "post": _operation("set_metrics", "Add to what is known of a version", version, _object(metrics=_ref("Metrics"))),
        },
        "/admin/rollback": {"post": _operation("roll_back", "Answer with the version that was live before", version, _ref("Rollback"))},
        "/admin/feedback": {"get": _operation("feedback_counts", "Feedback per day", _answer("counts", _list(_ref("DayCount"))))},
        "/admin/events": {"get": _operation("events", "What happened", _answer("the last hundred", _list(_ref("Event"))))},
        "/healthz": {
            "get": {
                "operationId": "health",
                "summary": "Whether the service answers",
                "security": [],
                "responses": {"200": _response("it does", _ref("Health")), "503": _response("it does not", _ref("Health"))},
            }
        },
    }


def _schemas(model: str) -> dict[str, Any]:
    answer = {"type": "string", "minLength": 1, "maxLength": 128}
    part = _object(type={"const": "text"}, text=TEXT)
    message = _object(role={"enum": list(ROLES)}, content={"anyOf": [TEXT, {"type": "array", "items": part}]})
    stop = {"type": "string", "minLength": 1, "maxLength": 256}
    limit = {"type": "integer", "minimum": 1, "maximum": 2**31 - 1}
    judged = {
        "thumb": {"enum": ["up", "down"]},
        "chosen_over": {"type": "array", "items": TEXT, "minItems": 1, "maxItems": MAX_COMPARED - 1, "uniqueItems": True},
        "rating": {"type": "number", "minimum": -MAX_RATING, "maximum": MAX_RATING},
        "edit": {"type": "string", "pattern": r"\S"},
    }
    feedback = _object(answer=answer)
    feedback["properties"] |= {
        **judged,
        "reason": {"type": "string", "maxLength": MAX_REASON},
        "user": {"type": "string", "maxLength": 256},
    }
    feedback["oneOf"] = [{"required": [kind]} for kind in judged]
    chat = _object(model={"enum": [model]}, messages={"type": "array", "items": message, "minItems": 1, "maxItems": MAX_MESSAGES})
    chat["properties"] |= {
        "stream": {"type": "boolean"},
        "stream_options": _optional(include_usage={"type": "boolean"}),
        "n": {"type": "integer", "minimum": 1, "maximum": MAX_CHOICES},
        "temperature": {"type": "number", "minimum": 0, "maximum": 2},
        "top_p": {"type": "number", "minimum": 0, "maximum": 1},
        "max_tokens": limit,
        "max_completion_tokens": limit,
        "stop": {"anyOf": [stop, {"type": "array", "items": stop, "maxItems": MAX_STOPS}]},
        "seed": {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
        "logprobs": {"type": "boolean"},
        "top_logprobs": {"type": "integer", "minimum": 0, "maximum": MAX_TOP},
        "user": {"type": "string", "maxLength": 256},
    }
    choice = _object(
        index=COUNT,
        answer_id=TEXT,
        message=_object(role=TEXT, content=TEXT, refusal={"type": "null"}),
        finish_reason={"enum": ["stop", "length"]},
    )
    choice["properties"]["logprobs"] = {"type": ["object", "null"]}
    usage = _object(prompt_tokens=COUNT, completion_tokens=COUNT, total_tokens=COUNT)
    new_version = _object(
        name={"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"}, folder={"type": "string", "minLength": 1}
    )
    new_version["properties"] |= {"parent": WORD, "metrics": _ref("Metrics")}
    version = _object(
        name=TEXT, folder=TEXT, parent=_maybe(TEXT), created=NUMBER, state={"enum": ["candidate", "live", "retired", "rolled_back"]},
        metrics={"type": "object"}, promoted=_maybe(NUMBER), replaced=_maybe(TEXT),
    )  # fmt: skip
    version["properties"]["answers"] = COUNT
    schemas = {
        "ChatRequest": chat,
        "Completion": _object(
            id=TEXT,
            object=TEXT,
            created=COUNT,
            model=TEXT,
            system_fingerprint=TEXT,
            choices={"type": "array", "items": choice},
            usage=usage,
        ),
        "Feedback": feedback,
        "Kept": _object(object=TEXT, id=COUNT, answer=TEXT, kind=TEXT),
        "Model": _object(id=TEXT, object=TEXT, created=COUNT, owned_by=TEXT, version=TEXT),
        "NewVersion": new_version,
        "Version": version,
        "Metrics": {"type": "object", "additionalProperties": {"type": ["number", "string", "boolean"]}},
        "Promotion": _optional(expected=WORD),
        "Rollback": _optional(to=WORD, reason={"type": "string", "maxLength": 4000}),
        "DayCount": _object(day=TEXT, version=TEXT, kind=TEXT, count=COUNT, positive=COUNT),
        "Event": _object(id=COUNT, kind=TEXT, detail={"type": "object"}, created=NUMBER),
        "Health": _object(status={"enum": ["ok", "failed"]}, open={"type": "boolean"}, model=TEXT),
    }
    error = _object(message=TEXT, type=TEXT, param=_maybe(TEXT), code=_maybe(TEXT))
    for sent in ("ChatRequest", "Feedback", "NewVersion", "Promotion", "Rollback"):
        schemas[sent]["additionalProperties"] = False
    return {**schemas, "Error": _object(error=error)}


def _operation(
    name: str, summary: str, responses: dict[str, Any], body: dict[str, Any] | None = None, *, required: bool = True
) -> dict[str, Any]:
    failures = {str(status): _response(text, _ref("Error")) for status, text in _STATUSES.items()}
    found: dict[str, Any] = {"operationId": name, "summary": summary, "responses": {**responses, **failures}}
    if body is not None:
        found["requestBody"] = {"required": required, "content": {"application/json": {"schema": body}}}
    return found


def _answer(text: str, schema: dict[str, Any], status: int = 200) -> dict[str, Any]:
    return {str(status): _response(text, schema)}


def _response(text: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": text, "content": {"application/json": {"schema": schema}}}


def _object(**required: Any) -> dict[str, Any]:
    return {"type": "object", "properties": dict(required), "required": list(required)}


def _optional(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": dict(properties)}


def _list(item: dict[str, Any]) -> dict[str, Any]:
    return _object(object=TEXT, data={"type": "array", "items": item})


def _maybe(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}
