"""`fastalign serve`: puts store, models and engine together, listens, and makes and revokes tokens."""

from __future__ import annotations

import logging
import os
import queue
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from logging.handlers import QueueHandler, QueueListener
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastalign.errors import ConfigError, DependencyError, ModelError
from fastalign.models.config import ModelConfig
from fastalign.serve.config import ServeConfig
from fastalign.serve.records import BASE
from fastalign.serve.store import Store

if TYPE_CHECKING:
    from fastalign.serve.engine import Engine

log = logging.getLogger("fastalign")

SWITCH = 0.0005  # seconds that the event loop waits for the thread that computes; Python's 0.005, for each of a reply's turns, add up


def serve(config: ServeConfig) -> None:
    """Answer until SIGTERM or SIGINT; answers that are being given then are finished.

    Raises ConfigError, ModelError, StoreError and DependencyError before anything is answered.
    """
    config.validate()
    sys.setswitchinterval(SWITCH)
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise DependencyError("the service needs starlette and uvicorn: pip install 'fastalign[serve]'") from error
    listener = _listen(config)
    try:
        app = build(config)
        address = listener.getsockname()
        place = f"[{address[0]}]" if ":" in address[0] else address[0]
        log.info("%s answers at http://%s:%d (stop with Ctrl-C)", config.model_name, place, address[1])
        with writing_aside(log):
            uvicorn.Server(uvicorn.Config(app, **server_options(config))).run(sockets=[listener])
    finally:
        listener.close()


@contextmanager
def writing_aside(logger: logging.Logger) -> Iterator[None]:
    """Inside, what is logged is written by a thread of its own, in order: a line for each request would hold up all others."""
    handlers = list(logger.handlers)
    if not handlers:  # whoever has set logging up for the whole process keeps it
        yield
        return
    lines: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    aside, listener = QueueHandler(lines), QueueListener(lines, *handlers, respect_handler_level=True)  # type: ignore[arg-type]
    listener.start()
    logger.handlers[:] = [aside]
    try:
        yield
    finally:
        logger.handlers[:] = handlers
        listener.stop()


def server_options(config: ServeConfig) -> dict[str, Any]:
    """How uvicorn listens. Clients and proxies must close an idle connection before it does (httpx after 5 s, nginx after 60 s):
    one that sends a request while the service closes sees the request fail."""
    from fastalign.serve.joined import protocol

    quiet: dict[str, Any] = {"http": protocol(), "access_log": False, "log_level": "warning", "server_header": False}
    return {**quiet, "lifespan": "on", "timeout_graceful_shutdown": config.grace, "timeout_keep_alive": 75}


def build(config: ServeConfig) -> Any:
    """The ASGI application that `config` describes, with the live version loaded; it ends its threads when its lifespan ends."""
    from fastalign.serve.api import create_app
    from fastalign.serve.engine import Engine
    from fastalign.serve.models import Models

    store = Store(config.data, timeout=config.timeout)
    try:
        models = Models(ModelConfig(path=config.model, dtype=config.dtype, device=config.device))
        limits = {name: getattr(config, name) for name in ("max_rows", "max_tokens", "max_waiting", "max_read")}
        engine = Engine(models, **limits)
        try:
            _go_live(config, store, engine)
            if not config.open and not any(token.revoked is None for token in store.tokens()):
                log.warning("no tokens yet, so nobody gets in: fastalign serve token add --data %s --role user", config.data)
            if not config.loop:
                return create_app(config, store, engine)
            from fastalign.serve.loop.beside import Learner

            models.turns.patience = config.patience
            learner = Learner(config, store, engine)
            app = create_app(config, store, engine, learner.stop)
            learner.start()
            return app
        except BaseException:
            engine.stop()
            raise
    except BaseException:
        store.close()
        raise


def _go_live(config: ServeConfig, store: Store, engine: Engine) -> None:
    """Answer with the live version of the database, which at first is the base model."""
    folder = str(Path(config.model).resolve())
    known = next((version for version in store.versions() if version.name == BASE), None)
    if known is None:
        store.add_version(BASE, folder)
        store.promote(BASE)
    elif known.folder != folder:
        if Path(known.folder).is_dir():
            raise ConfigError(f"{config.data} belongs to the model in {known.folder}, not to {folder}; give that, or another --data")
        store.move_version(BASE, folder)
    live = store.live_version()
    assert live is not None
    try:
        engine.swap(live.name, live.folder, lambda: store.add_event("started", {"version": live.name}))
    except ModelError as error:
        raise ModelError(
            f"version {live.name!r} is live in {config.data} but cannot be loaded: {error}; bring it back, or go back to the version "
            f"before with fastalign serve rollback --data {config.data}"
        ) from error


def _listen(config: ServeConfig) -> socket.socket:
    """A socket at the address of `config`. Raises ConfigError where it cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
            0
        ]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        told = error.strerror or str(error)
        raise ConfigError(f"cannot listen on {config.host}:{config.port} ({told}); choose another --port or --host") from error
    return listener


@dataclass
class TokenConfig:
    """Makes, lists and revokes the tokens that let clients in. A new one is printed once and cannot be shown again."""

    data: str = "feedback.db"  # database of the service
    role: Literal["user", "operator"] = "user"  # of a new token; operators may also change versions
    note: str = ""  # what a new token is for
    many_users: bool = False  # a new token speaks for many users, whom its requests name; else what they say counts as one user's
    id: str = ""  # the token to revoke


@dataclass
class RollbackConfig:
    """Makes the version that was live before live again, in the database alone: for a service that does not run."""

    data: str = "feedback.db"  # database of the service


def token(action: str, config: TokenConfig) -> None:
    """Carry out `fastalign serve token add|list|revoke` and print what came of it. Raises StoreError."""
    if action != "add":
        _must_exist(config.data)
    if action == "revoke" and not config.id:
        raise ConfigError("token revoke needs --id; fastalign serve token list shows the ids")
    with Store(config.data) as store:
        if action == "add":
            made, secret = store.add_token(config.role, config.note, many_users=config.many_users)
            log.info("token %s with the role %s; it is not shown again:", made.id, made.role)
            print(secret)
        elif action == "revoke":
            store.revoke_token(config.id)
            log.info("token %s is revoked", config.id)
        else:
            for one in store.tokens():
                state = "revoked" if one.revoked is not None else "valid"
                speaks = "many users" if one.many_users else "one user"
                print(f"{one.id}  {one.role:8}  {state:7}  {speaks:10}  {time.strftime('%Y-%m-%d', time.gmtime(one.created))}  {one.note}")


def command(words: Sequence[str]) -> int:
    """`fastalign serve ...` after the first word."""
    from fastalign.train.config import parse

    words = list(words)
    if words[:1] == ["token"]:
        if words[1:2] not in (["add"], ["list"], ["revoke"]):
            raise ConfigError("serve token needs add, list or revoke, as in fastalign serve token add --role operator")
        token(words[1], parse(words[2:], TokenConfig))
    elif words[:1] == ["rollback"]:
        options = parse(words[1:], RollbackConfig)
        _must_exist(options.data)
        with Store(options.data) as store:
            log.info("version %s is live now", store.roll_back(reason="by hand").name)
    else:
        serve(parse(words, ServeConfig))
    return 0


def _must_exist(data: str) -> None:
    if not os.path.exists(data):
        raise ConfigError(f"--data {data}: no such database; give the one of the service")
