"""HTTP whose replies go out in one piece: what is written in one turn of the event loop is one call of the system.

Each such call lets the thread that computes have the interpreter, and getting it back takes longer than the call; uvicorn makes one for
the head of a reply and one for its body.
"""

from __future__ import annotations

import asyncio
from typing import Any


class Joining:
    """An asyncio transport that writes what it was given at the end of the turn, in order, and before it closes."""

    def __init__(self, transport: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._given: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Take bytes."""
        if not self._given:
            self._loop.call_soon(self._flush)
        self._given.append(bytes(data))

    def close(self) -> None:
        """Write what is left, and close."""
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        given, self._given = self._given, []
        if given and not self._transport.is_closing():
            self._transport.write(given[0] if len(given) == 1 else b"".join(given))


def protocol() -> type[asyncio.Protocol]:
    """uvicorn's protocol for HTTP, the fast one where it is installed, on such transports."""
    try:
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol as Base
    except ImportError:
        from uvicorn.protocols.http.h11_impl import H11Protocol as Base  # type: ignore[assignment]

    class Protocol(Base):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(Joining(transport, self.loop))  # type: ignore[arg-type]

    return Protocol
