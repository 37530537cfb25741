"""Replies in one piece: what is written together goes out together, in order, and nothing is lost when a connection closes."""

from __future__ import annotations

import asyncio

from fastalign.serve.joined import Joining


class Pipe:
    """A transport that notes what it is told."""

    def __init__(self) -> None:
        self.told: list[bytes | str] = []

    def write(self, data: bytes) -> None:
        self.told.append(data)

    def close(self) -> None:
        self.told.append("close")

    def is_closing(self) -> bool:
        return "close" in self.told

    def get_extra_info(self, name: str) -> str:
        return name


def test_what_is_written_in_one_turn_is_one_piece():
    async def run() -> list[bytes | str]:
        pipe = Pipe()
        joining = Joining(pipe, asyncio.get_running_loop())
        joining.write(b"head")
        buffer = bytearray(b"body")
        joining.write(buffer)
        buffer[:] = b"else"  # whoever wrote it may go on with it
        assert pipe.told == [] and joining.get_extra_info("peername") == "peername"
        await asyncio.sleep(0)
        joining.write(b"next")
        await asyncio.sleep(0)
        joining.write(b"last")
        joining.close()
        joining.write(b"too late")
        await asyncio.sleep(0)
        return pipe.told

    assert asyncio.run(run()) == [b"headbody", b"next", b"last", "close"]


def test_a_service_answers_in_one_piece(monkeypatch):
    """Through uvicorn itself, with whatever reads HTTP there."""
    import uvicorn

    from fastalign.serve.joined import protocol

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
        await send({"type": "http.response.body", "body": b"said"})

    writes = []
    flush = Joining._flush
    monkeypatch.setattr(Joining, "_flush", lambda self: (writes.append(list(self._given)), flush(self)))

    async def run() -> bytes:
        server = uvicorn.Server(uvicorn.Config(app, port=0, http=protocol(), log_level="warning", lifespan="off"))
        serving = asyncio.ensure_future(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        reader, writer = await asyncio.open_connection(*server.servers[0].sockets[0].getsockname())
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        reply = await reader.read()
        server.should_exit = True
        await serving
        return reply

    reply = asyncio.run(run())
    assert reply.startswith(b"HTTP/1.1 200") and reply.endswith(b"said")
    [pieces] = [given for given in ([part for part in one if part] for one in writes) if given]
    assert b"".join(pieces) == reply and len(pieces) == 2
