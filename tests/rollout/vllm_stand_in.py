"""A stand-in for `vllm serve` on this machine: the protocol that vLLM documents, spoken by a tiny model on the CPU.

Written from vLLM's documentation and source, not from what fastalign sends: an unknown field is an error here, and so are a name
that is loaded twice and a folder that is no adapter.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

FIELDS = {
    "model", "prompt", "max_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "logprobs", "return_token_ids", "stop_token_ids",
    "ignore_eos", "include_stop_str_in_output", "repetition_penalty", "presence_penalty", "frequency_penalty",
}  # fmt: skip
Trouble = Callable[[str, int], int | float | bytes | None]


class StandIn:
    """Serves the model in `folder` by its path; `model_eos` ends an answer, too, where a request does not ignore it.

    trouble    of (path, requests before this one on it): a status to fail with, seconds to be late, a body to send; None: as it should be
    change     what becomes of the one choice of a reply, in place
    """

    def __init__(self, folder: Path, *, raw: bool = False, stale: bool = False, model_eos: int = 1) -> None:
        self.folder, self.raw, self.stale, self.model_eos = str(folder), raw, stale, model_eos
        self.base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.adapters: dict[str, Path] = {}
        self.loads: list[str] = []
        self.most = 0  # adapters that were there at the same time
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.trouble: Trouble = lambda path, before: None
        self.change: Callable[[dict[str, Any]], None] = lambda choice: None
        self.model: Any = None
        self.lock = threading.Lock()
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.reply({})

            def do_POST(self) -> None:
                self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def reply(self, body: dict[str, Any]) -> None:
                status, found = stand_in.answer(self.path, body)
                data = found if isinstance(found, bytes) else json.dumps(found).encode()
                with suppress(OSError):  # who asked may have gone by now
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        class Listener(ThreadingHTTPServer):
            request_queue_size = 64

        self.server = Listener(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self) -> StandIn:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        path = path.removeprefix("/v1/")
        with self.lock:
            trouble = self.trouble(path, sum(p == path for p, _ in self.requests))
            self.requests.append((path, body))
            if isinstance(trouble, bytes):
                return 200, trouble
            if isinstance(trouble, int):
                return trouble, {"error": {"message": "as the test wants it", "code": trouble}}
            if trouble is None:
                return getattr(self, f"do_{path}")(body)
        time.sleep(trouble)
        return 200, {}

    def do_models(self, body: dict[str, Any]) -> tuple[int, Any]:
        return 200, {"object": "list", "data": [{"id": name, "object": "model"} for name in (self.folder, *self.adapters)]}

    def do_load_lora_adapter(self, body: dict[str, Any]) -> tuple[int, Any]:
        name, path = body["lora_name"], Path(body["lora_path"])
        if name in self.adapters:
            return error(400, f"The lora adapter '{name}' has already been loaded.")
        if not (path / "adapter_config.json").is_file() or not (path / "adapter_model.safetensors").is_file():
            return error(404, f"The lora adapter '{path}' does not exist")
        if self.model is None:
            self.model = PeftModel.from_pretrained(self.base, path, adapter_name=name).eval()
        elif not self.stale:
            self.model.load_adapter(path, adapter_name=name)
        self.adapters[name] = path
        self.most = max(self.most, len(self.adapters))
        self.loads.append(name)
        return 200, f"Success: LoRA adapter '{name}' added successfully.".encode()

    def do_unload_lora_adapter(self, body: dict[str, Any]) -> tuple[int, Any]:
        if self.adapters.pop(body["lora_name"], None) is None:
            return error(404, f"The lora adapter '{body['lora_name']}' cannot be found.")
        return 200, b"Success"

    def do_completions(self, body: dict[str, Any]) -> tuple[int, Any]:
        if unknown := set(body) - FIELDS:
            return error(400, f"unknown fields {unknown}")
        if body["model"] not in self.adapters:
            return error(404, f"The model `{body['model']}` does not exist.")
        self.model.set_adapter(self.loads[0] if self.stale else body["model"])
        tokens, logps, reason = sample(self.model, body, raw=self.raw, model_eos=self.model_eos)
        choice = {
            "index": 0,
            "text": "",
            "logprobs": {"token_logprobs": logps, "tokens": [f"token_id:{t}" for t in tokens], "top_logprobs": [], "text_offset": []},
            "finish_reason": reason,
            "stop_reason": None,
            "token_ids": tokens if body.get("return_token_ids") else None,
            "prompt_token_ids": body["prompt"] if body.get("return_token_ids") else None,
        }
        self.change(choice)
        return 200, {"id": "cmpl-1", "object": "text_completion", "created": 0, "model": body["model"], "choices": [choice]}


@torch.no_grad()
def sample(model: Any, body: dict[str, Any], *, raw: bool, model_eos: int) -> tuple[list[int], list[float], str]:
    """(tokens, log-probs, reason), in vLLM's order: temperature, min_p, top_k, top_p. A token after another, without a cache."""
    rng = torch.Generator().manual_seed(body["seed"])
    stop = {*body.get("stop_token_ids", []), *([] if body.get("ignore_eos") else [model_eos])}
    tokens: list[int] = []
    logps: list[float] = []
    for _ in range(body["max_tokens"]):
        scores = model(torch.tensor([[*body["prompt"], *tokens]])).logits[0, -1].float()
        unprocessed = scores.log_softmax(-1)
        p = (scores / body.get("temperature", 1.0)).softmax(-1)
        p = p * (p >= body.get("min_p", 0.0) * p.max())
        if k := body.get("top_k", 0):
            p = p * (p >= p.topk(k).values[-1])
        ordered, order = (p / p.sum()).sort(descending=True)
        p = torch.zeros_like(p).scatter(0, order, ordered * (ordered.cumsum(0) - ordered < body.get("top_p", 1.0)))
        token = int(torch.multinomial(p / p.sum(), 1, generator=rng))
        tokens.append(token)
        logps.append(float(unprocessed[token] if raw else (p / p.sum()).log()[token]))
        if token in stop:
            return tokens, logps, "stop"
    return tokens, logps, "length"


def error(status: int, message: str) -> tuple[int, Any]:
    return status, {"error": {"message": message, "type": "BadRequestError", "param": None, "code": status}}
