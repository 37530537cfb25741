"""What the tests of the service share: a tiny base model with two adapters, and a service around them."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import uvicorn
from tiny import save_tiny

from fastalign.models.config import LoraConfig
from fastalign.models.load import load_model
from fastalign.models.save import save_final
from fastalign.serve.config import ServeConfig
from fastalign.serve.engine import Engine
from fastalign.serve.service import _listen, build, server_options
from fastalign.serve.store import Store

HELLO = [{"role": "user", "content": "hello"}]


def save_adapter(base: Path, folder: Path, seed: int, *, size: float = 0.3, targets: str | list[str] = "all-linear") -> Path:
    """A LoRA adapter on `base` that changes what it says; `size` of its random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = load_model(base, lora=LoraConfig(r=4, targets=targets))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(size * torch.randn_like(parameter))
    save_final(model, None, folder)
    return folder


def save_models(folder: Path, **options: Any) -> Path:
    """`base` and the adapters `one` and `two` in a folder."""
    base = save_tiny(folder / "base", **options)
    for seed, name in enumerate(("one", "two"), 1):
        save_adapter(base, folder / name, seed)
    return folder


def bare_answer(model: Any, tokenizer: Any, messages: Sequence[dict[str, str]], tokens: int) -> str:
    """The greedy answer of a model by Transformers alone."""
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens, pad_token_id=0)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


class Running:
    """A service on a port of this machine, in threads of this process; it ends as it does on SIGTERM."""

    def __init__(self, config: ServeConfig) -> None:
        self.config = config
        self.listener = _listen(config)
        self.app = build(config)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.server = uvicorn.Server(uvicorn.Config(self.app, **server_options(config)))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]}, daemon=True)
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive(), "the service did not start"
            time.sleep(0.01)

    @property
    def engine(self) -> Engine:
        return self._endpoint("/v1/chat/completions").engine

    @property
    def store(self) -> Store:
        return self._endpoint("/v1/chat/completions").store

    def _endpoint(self, path: str) -> Any:
        return next(route.endpoint for route in self.app.routes if route.path == path).handler.__self__

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def config_for(models: Path, data: Path, **options: Any) -> ServeConfig:
    """Options of a service for tests: a free port, and limits that are not in the way."""
    base = {"port": 0, "name": "tiny", "versions": str(models), "rate": 1_000_000, "concurrent": 1000, "max_new_tokens": 24, "grace": 20}
    return ServeConfig(model=str(models / "base"), data=str(data / "feedback.db"), **{**base, **options})
