"""Clients of the service that cost little themselves: requests written before they are timed, over connections that stay open."""

from __future__ import annotations

import asyncio
import json
import re
import time
from typing import Any, NamedTuple


class Reply(NamedTuple):
    """What came back, and after how many seconds the last byte of it."""

    status: int
    body: bytes
    seconds: float
    timing: dict[str, float]  # of the header Server-Timing, in milliseconds

    @property
    def content(self) -> dict[str, Any]:
        """The JSON object of a reply that is no stream. Raises RuntimeError for any status but 200."""
        if self.status != 200:
            raise RuntimeError(f"the service answered {self.status}: {self.body.decode()}")
        return dict(json.loads(self.body))


class Connection:
    """One client's connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def to(cls, url: str) -> Connection:
        host, port = url.removeprefix("http://").split(":")
        return cls(*await asyncio.open_connection(host, int(port)))

    async def send(self, request: bytes) -> Reply:
        """Send a request and wait for the whole reply."""
        began = time.perf_counter()
        self.writer.write(request)
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        length = re.findall(r"(?im)^content-length: (\d+)", head)
        body = await (self.reader.readexactly(int(length[0])) if length else self._chunks())
        took = time.perf_counter() - began
        timing = re.findall(r"(?im)^server-timing: (.*)$", head)
        parts = {name: float(value) for name, value in re.findall(r"(\w+);dur=([\d.]+)", timing[0])} if timing else {}
        return Reply(int(head.split(" ", 2)[1]), body, took, parts)

    async def _chunks(self) -> bytes:
        found = b""
        while size := int(await self.reader.readline(), 16):
            found += (await self.reader.readexactly(size + 2))[:-2]
        await self.reader.readline()
        return found

    def close(self) -> None:
        self.writer.close()


def post(path: str, content: dict[str, Any]) -> bytes:
    """A request, ready to be sent."""
    body = json.dumps(content).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


class Judge:
    """Somebody who judges the last answer again and again while others ask, so many times a second."""

    def __init__(self, connection: Connection, answer: str, rate: float) -> None:
        self.connection, self.answer, self.rate = connection, answer, rate
        self.seconds: list[float] = []  # of each judgement, until it was acknowledged
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Judge:
        self._task = asyncio.ensure_future(self._judge())
        return self

    async def __aexit__(self, *_: object) -> None:
        """The judgement that is being sent is acknowledged first."""
        task, self._task = self._task, None
        assert task is not None
        await task

    async def _judge(self) -> None:
        while self._task is not None:
            reply = await self.connection.send(post("/v1/feedback", {"answer": self.answer, "rating": len(self.seconds)}))
            assert reply.content["object"] == "feedback"
            self.seconds.append(reply.seconds)
            await asyncio.sleep(1 / self.rate)
