"""The ASGI application: its routes, its pages, and how it starts and ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from fastalign.serve.admin import Admin
from fastalign.serve.chat import Chat
from fastalign.serve.config import ServeConfig
from fastalign.serve.engine import Engine
from fastalign.serve.guard import HEADERS, Caller, Endpoint, Guard, error_response, json_response, read_body
from fastalign.serve.openapi import document
from fastalign.serve.store import Store
from fastalign.serve.wire import ApiError, parse_feedback

PAGES = Path(__file__).parent / "pages"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


class Api:
    """The operations that are neither chat nor administration."""

    def __init__(self, config: ServeConfig, store: Store, engine: Engine) -> None:
        self.config, self.store, self.engine = config, store, engine
        live = store.live_version()
        self.created = int(live.created) if live else 0

    async def feedback(self, request: Request, caller: Caller) -> Response:
        """Keep feedback on an answer; when this returns it is on the disk."""
        body = await read_body(request, self.config.max_body)
        feedback = parse_feedback(body, lambda user: self.store.user_key(caller.key, user))
        if not caller.many_users:
            feedback = replace(feedback, voice=self.store.user_key(caller.key))
        stored = await asyncio.wrap_future(self.store.add_feedback_later(feedback))
        return json_response({"object": "feedback", "id": stored.id, "answer": stored.answer, "kind": stored.kind})

    async def models(self, request: Request, caller: Caller) -> Response:
        """The one model, and the version that answers now."""
        return json_response({"object": "list", "data": [self._model()]})

    async def model(self, request: Request, caller: Caller) -> Response:
        """The one model by its name."""
        name = request.path_params["name"]
        if name != self.config.model_name:
            raise ApiError(404, f"there is no model {name!r:.80}; this service has {self.config.model_name!r}", code="model_not_found")
        return json_response(self._model())

    async def health(self, request: Request) -> Response:
        """Whether the service answers; for everybody, and so without a word about the data."""
        alive = self.engine.alive
        state = {"status": "ok" if alive else "failed", "open": self.config.open, "model": self.config.model_name}
        return json_response(state, 200 if alive else 503)

    def _model(self) -> dict[str, Any]:
        version = self.engine.models.current.version
        return {"id": self.config.model_name, "object": "model", "created": self.created, "owned_by": "fastalign", "version": version}


def create_app(config: ServeConfig, store: Store, engine: Engine, stop: Callable[[], None] | None = None) -> Starlette:
    """The application over a store and an engine, which it ends when it ends; before that it calls `stop`.

    Raises TemplateError where the model's tokenizer has no chat template.
    """
    guard, api, admin = Guard(store, config), Api(config, store, engine), Admin(config, store, engine)
    chat = Chat(config, store, engine)
    description = json_response(document(config.model_name, open_service=config.open)).body

    async def openapi(request: Request) -> Response:
        return Response(description, 200, HEADERS, "application/json")

    routes: list[BaseRoute] = [
        Route("/v1/chat/completions", Endpoint(guard, "user", chat.complete), methods=["POST"]),
        Route("/v1/feedback", Endpoint(guard, "user", api.feedback), methods=["POST"]),
        Route("/v1/models", Endpoint(guard, "user", api.models), methods=["GET"]),
        Route("/v1/models/{name}", Endpoint(guard, "user", api.model), methods=["GET"]),
        Route("/admin/versions", Endpoint(guard, "operator", admin.versions), methods=["GET"]),
        Route("/admin/versions", Endpoint(guard, "operator", admin.add_version), methods=["POST"]),
        Route("/admin/versions/{name}/promote", Endpoint(guard, "operator", admin.promote), methods=["POST"]),
        Route("/admin/versions/{name}/metrics", Endpoint(guard, "operator", admin.set_metrics), methods=["POST"]),
        Route("/admin/rollback", Endpoint(guard, "operator", admin.roll_back), methods=["POST"]),
        Route("/admin/feedback", Endpoint(guard, "operator", admin.feedback), methods=["GET"]),
        Route("/admin/events", Endpoint(guard, "operator", admin.events), methods=["GET"]),
        Route("/healthz", api.health, methods=["GET"]),
        Route("/openapi.json", openapi, methods=["GET"]),
        *(Route(path, _page(name), methods=["GET"]) for path, name in (("/", "chat.html"), ("/operator", "operator.html"))),
        *(Route(f"/pages/{file.name}", _page(file.name), methods=["GET"]) for file in sorted(PAGES.iterdir()) if file.suffix != ".html"),
    ]

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        if stop is not None:
            await asyncio.to_thread(stop)
        await asyncio.to_thread(engine.stop)
        await asyncio.to_thread(store.close)

    middleware = []
    if config.cors:
        sent = ["authorization", "content-type"]
        middleware = [Middleware(CORSMiddleware, allow_origins=config.cors, allow_methods=["GET", "POST"], allow_headers=sent)]
    handlers: dict[Any, Any] = {HTTPException: _http_error, Exception: _unforeseen}
    app = Starlette(routes=routes, middleware=middleware, lifespan=lifespan, exception_handlers=handlers)
    app.router.redirect_slashes = False
    return app


def _page(name: str) -> Any:
    """A file of the pages, read once."""
    content, kind = (PAGES / name).read_bytes(), _TYPES[Path(name).suffix]
    headers = {**HEADERS, "content-security-policy": POLICY, "x-frame-options": "DENY", "cache-control": "no-cache"}

    async def page(request: Request) -> Response:
        return Response(content, 200, headers, f"{kind}; charset=utf-8")

    return page


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    told = {404: "there is no such path; GET /openapi.json lists them", 405: "not with this method"}.get(error.status_code, error.detail)
    known = ApiError(error.status_code, told, headers=dict(error.headers or {}))
    return json_response(known.body, known.status, known.headers)


async def _unforeseen(request: Request, error: Exception) -> Response:
    return error_response(error)
