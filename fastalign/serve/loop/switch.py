"""How the loop changes the version that answers: through a service, or in the database of one that does not run."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from typing import Any, Protocol

from fastalign.errors import ConfigError, ModelError, RolloutError, StoreConflictError
from fastalign.serve.store import Store


class Switch(Protocol):
    """Changes the version that answers. Both raise StoreConflictError when another version than expected is involved by now.

    `serve.swaps.Swaps` is that of a service in this process.
    """

    def promote(self, name: str, expected: str) -> object:
        """Answer with version `name` in the place of `expected`. Raises ModelError when it cannot answer; then nothing changes."""

    def roll_back(self, expected: str, reason: str) -> object:
        """Answer with version `expected` again, which was live before."""


class Database:
    """Of a service that does not run: it will answer with the live version when it starts."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def promote(self, name: str, expected: str) -> None:
        self.store.promote(name, expected=expected)

    def roll_back(self, expected: str, reason: str) -> None:
        self.store.roll_back(expected, reason=reason)


class Service:
    """A running service, over HTTP. A service that is away is waited for; RolloutError after `patience` seconds.

    >>> Service("http://127.0.0.1:8000/", "").url
    'http://127.0.0.1:8000'
    """

    def __init__(self, url: str, token_env: str, *, timeout: float = 600.0, patience: float = 300.0) -> None:
        self.url, self.token_env, self.timeout, self.patience = url.rstrip("/"), token_env, timeout, patience
        token = os.environ.get(token_env, "")
        self.headers = {"content-type": "application/json", **({"authorization": f"Bearer {token}"} if token else {})}
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}) if _is_local(self.url) else urllib.request.ProxyHandler())

    def promote(self, name: str, expected: str) -> None:
        self._ask(f"admin/versions/{name}/promote", {"expected": expected})

    def roll_back(self, expected: str, reason: str) -> None:
        self._ask("admin/rollback", {"to": expected, "reason": reason})

    def database(self) -> str:
        """Where the service's database is, on the service's machine."""
        return str(self._ask("admin/versions")["database"])

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        deadline = time.monotonic() + self.patience
        while True:
            request = urllib.request.Request(f"{self.url}/{path}", None if body is None else json.dumps(body).encode(), self.headers)
            try:
                with self.opener.open(request, timeout=self.timeout) as reply:
                    found: dict[str, Any] = json.load(reply)
                    return found
            except urllib.error.HTTPError as error:
                told, code = _told(error)
                if error.code in (401, 403):
                    raise ConfigError(
                        f"{self.url} lets only operators change versions ({told}); put the token of one into the environment variable "
                        f"{self.token_env}: fastalign serve token add --role operator"
                    ) from error
                if error.code == 409:
                    raise (ModelError if code == "version_unusable" else StoreConflictError)(told) from error
                if error.code not in (429, 503) or time.monotonic() > deadline:
                    raise RolloutError(f"{self.url}/{path}: HTTP {error.code}: {told}") from error
            except (OSError, ValueError) as error:  # refused, reset, timed out, half a reply
                if time.monotonic() > deadline:
                    raise RolloutError(f"{self.url}: the service is away ({error}); start it, and the loop goes on from here") from error
            time.sleep(0.5)


def _is_local(url: str) -> bool:
    from urllib.parse import urlsplit

    from fastalign.serve.config import is_loopback

    return is_loopback(urlsplit(url).hostname or "")


def _told(error: urllib.error.HTTPError) -> tuple[str, str]:
    """Message and code of the service's error."""
    try:
        found = json.load(error)["error"]
        return str(found["message"]), str(found["code"])
    except (ValueError, KeyError, TypeError, OSError):
        return str(error.reason), ""
