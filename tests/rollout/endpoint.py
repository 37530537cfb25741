"""An OpenAI-compatible endpoint on this machine, whose replies a test decides."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Endpoint:
    """Answers every chat request with `reply(messages) -> text`, or with the status code or the whole body that `reply` returns."""

    def __init__(self, reply: Callable[[list[dict]], str | int | bytes]) -> None:
        self.requests: list[list[dict]] = []
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                messages = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"]
                endpoint.requests.append(messages)
                said = reply(messages)
                status, body = (said, {"error": {"message": "no"}}) if isinstance(said, int) else (200, completion(str(said)))
                data = said if isinstance(said, bytes) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "text/html" if data.startswith(b"<") else "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                with suppress(OSError):  # who asked may have gone by now
                    self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self) -> Endpoint:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def completion(text: str) -> dict:
    message = {"role": "assistant", "content": text}
    return {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [{"index": 0, "message": message}]}


def answers(messages: list[dict]) -> tuple[str, str]:
    """What stands between the tags of a comparison."""
    text = messages[0]["content"]
    a, b = (re.search(f"<answer_{x}>\n(.*)\n</answer_{x}>", text, re.DOTALL) for x in "ab")
    assert a and b
    return a.group(1), b.group(1)


def prefers_longer(messages: list[dict]) -> str:
    a, b = answers(messages)
    return "Both are fine.\n[[TIE]]" if len(a) == len(b) else f"Longer is better here.\n[[{'A' if len(a) > len(b) else 'B'}]]"
