"""Who may do what, and how much of it: tokens, roles, rates, sizes, and the headers that every response carries."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from fastalign.errors import DataError, FastalignError, ModelError, NotFoundError, StoreConflictError, StoreError
from fastalign.serve.config import ServeConfig, is_loopback
from fastalign.serve.engine import QueueFullError
from fastalign.serve.records import Role
from fastalign.serve.store import Store
from fastalign.serve.wire import ApiError, read_object

log = logging.getLogger("fastalign.serve")

HEADERS = {"cache-control": "no-store", "x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}
BODY_SECONDS = 30.0  # to send a body in
KEPT_CALLERS = 10_000  # whose rate is remembered


class ClientGoneError(Exception):
    """Nobody waits for the answer any longer."""


@dataclass
class Allowance:
    """What a caller has left."""

    tokens: float
    at: float
    running: int = 0


@dataclass(frozen=True)
class Caller:
    """Who calls: a token, or in an open service the machine itself."""

    key: str
    role: Role
    allowance: Allowance
    many_users: bool = True  # those whom its requests name are believed to be as many


class Guard:
    """Lets callers in, or raises ApiError: 401, 403, 421 for a foreign Host header, 429 with Retry-After."""

    def __init__(self, store: Store, config: ServeConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self.store, self.config, self.clock = store, config, clock
        self._allowances: dict[str, Allowance] = {}

    async def admit(self, request: Request, role: Role) -> Caller:
        """The caller, whose request counts as running until `leave`."""
        if self.config.open:
            self._check_host(request)
            key, has, many = "open", "operator", True
        else:
            kind, _, secret = request.headers.get("authorization", "").partition(" ")
            token = self.store.check_token(secret.strip()) if kind.lower() == "bearer" else None  # one row by its key: no work for a thread
            if token is None:
                told = "no valid token; send the header Authorization: Bearer TOKEN (fastalign serve token add makes one)"
                raise ApiError(401, told, kind="authentication_error", code="invalid_api_key", headers={"www-authenticate": "Bearer"})
            key, has, many = token.id, token.role, token.many_users
        allowance = self._allowance(key)
        if role == "operator" and has != "operator":
            raise ApiError(403, "this needs a token with the role operator", kind="permission_error", code="insufficient_role")
        if allowance.tokens < 1:
            wait = (1 - allowance.tokens) * 60 / self.config.rate
            self._too_many(f"more than {self.config.rate} requests a minute", wait)
        if allowance.running >= self.config.concurrent:
            self._too_many(f"{allowance.running} requests of this token are running", 1)
        allowance.tokens -= 1
        allowance.running += 1
        return Caller(key, "operator" if has == "operator" else "user", allowance, many)

    def leave(self, caller: Caller) -> None:
        """The request of a caller has ended."""
        caller.allowance.running -= 1

    def _allowance(self, key: str) -> Allowance:
        now = self.clock()
        if len(self._allowances) > KEPT_CALLERS:
            full = [
                k
                for k, a in self._allowances.items()
                if not a.running and a.tokens + (now - a.at) * self.config.rate / 60 >= self.config.rate
            ]
            for old in full:
                del self._allowances[old]
        allowance = self._allowances.setdefault(key, Allowance(float(self.config.rate), now))
        allowance.tokens = min(float(self.config.rate), allowance.tokens + (now - allowance.at) * self.config.rate / 60)
        allowance.at = now
        return allowance

    def _too_many(self, told: str, wait: float) -> None:
        headers = {"retry-after": str(max(1, round(wait + 0.5)))}
        raise ApiError(429, f"{told}; slow down", kind="rate_limit_error", code="rate_limit_exceeded", headers=headers)

    def _check_host(self, request: Request) -> None:
        """An open service is for this machine: a page elsewhere whose name is made to point here must not get in."""
        host = request.headers.get("host", "")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if not is_loopback(name.strip("[]")):
            raise ApiError(421, f"an open service answers to localhost only, not to {host!r:.80}; use tokens to serve other names")
        origin = request.headers.get("origin")
        if origin is not None and origin not in self.config.cors and not _is_local(origin):
            raise ApiError(403, f"an open service takes no requests from pages of {origin!r:.80}; --cors names those that may send them")


def _is_local(origin: str) -> bool:
    try:
        return is_loopback(urlsplit(origin).hostname or "")
    except ValueError:
        return False


class Endpoint:
    """One operation behind the guard: admits the caller, runs `handler(request, caller)`, and explains what goes wrong."""

    def __init__(self, guard: Guard, role: Role, handler: Callable[[Request, Caller], Awaitable[Response]]) -> None:
        self.guard, self.role, self.handler = guard, role, handler
        self.__name__ = handler.__name__

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        caller, began = None, time.perf_counter()
        status = 499
        try:
            try:
                caller = await self.guard.admit(request, self.role)
                response = await self.handler(request, caller)
            except ClientGoneError:
                return
            except Exception as error:
                response = error_response(error)
            status = response.status_code
            await response(scope, receive, send)
        finally:
            if caller is not None:
                self.guard.leave(caller)
            took = (time.perf_counter() - began) * 1000
            who = caller.key if caller else "nobody"
            log.info("%s %s %d %.0f ms %s", scope["method"], self.handler.__name__, status, took, who)


async def read_body(request: Request, limit: int, *, optional: bool = False) -> dict[str, Any]:
    """The JSON object that a request sends; where it is `optional`, {} for nothing.

    Raises ApiError 408, 413 and 415, and 400 for what is no JSON object.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    unfit = ApiError(415, f"the content type must be application/json, got {kind!r:.80}") if kind != "application/json" else None
    if unfit and (kind or not optional):
        raise unfit
    declared = request.headers.get("content-length", "0")
    if not declared.isdigit() or int(declared) > limit:
        raise ApiError(413, f"a body may have {limit} bytes", code="body_too_large", headers={"connection": "close"})

    async def receive() -> bytes:
        data = bytearray()
        async for chunk in request.stream():
            data += chunk
            if len(data) > limit:
                raise ApiError(413, f"a body may have {limit} bytes", code="body_too_large", headers={"connection": "close"})
        return bytes(data)

    try:
        data = await asyncio.wait_for(receive(), BODY_SECONDS)
    except asyncio.TimeoutError as error:
        raise ApiError(408, f"the body did not come within {BODY_SECONDS:g} s", headers={"connection": "close"}) from error
    if optional and not data:
        return {}
    if unfit:
        raise unfit
    return read_object(data)


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """JSON with the headers of every response."""
    body = json.dumps(content, ensure_ascii=False, allow_nan=False).encode()
    return Response(body, status, {**HEADERS, **(headers or {})}, "application/json")


def error_response(error: Exception) -> Response:
    """Status, headers and body of what went wrong; what nobody foresaw is logged and told as 500 without details."""
    known = as_api_error(error)
    if known.status == 500:
        log.error("unexpected %s: %s", type(error).__name__, error, exc_info=error)
    return json_response(known.body, known.status, known.headers)


def as_api_error(error: Exception) -> ApiError:
    """Our errors as statuses."""
    if isinstance(error, ApiError):
        return error
    told, again = str(error), {"retry-after": "1"}
    if isinstance(error, NotFoundError):
        return ApiError(404, told, kind="not_found_error", code="not_found")
    if isinstance(error, StoreConflictError):
        return ApiError(409, told, kind="conflict_error", code="conflict")
    if isinstance(error, QueueFullError):
        return ApiError(503, told, kind="overloaded_error", code="queue_full", headers=again)
    if isinstance(error, StoreError):
        log.warning("%s", told)  # names the file, which is nobody's business outside
        told = "the database cannot be used just now (locked, or its disk full); nothing was kept, try again"
        return ApiError(503, told, kind="server_error", code="store_unavailable", headers={"retry-after": "2"})
    if isinstance(error, ModelError):
        return ApiError(409, told, kind="conflict_error", code="version_unusable")
    if isinstance(error, (DataError, FastalignError)):
        return ApiError(400, told)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return ApiError(503, "no memory left for this answer; try again later", kind="server_error", code="out_of_memory", headers=again)
    return ApiError(500, "the service failed; its log says how", kind="server_error", code="internal_error")
