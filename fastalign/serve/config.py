"""Options of `fastalign serve`."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fastalign.errors import ConfigError


@dataclass
class ServeConfig:
    """Answers over HTTP (OpenAI's chat completions, and a page to chat with), and keeps the answers and what people think of them."""

    model: str  # folder of the base model, with its tokenizer
    data: str = "feedback.db"  # database of answers, feedback, versions and tokens; made where there is none
    host: str = "127.0.0.1"  # address to listen on; 0.0.0.0 for all, behind a proxy that speaks TLS
    port: int = 8000  # 0: a free one
    name: str = ""  # what clients call the model; empty: the name of its folder
    versions: str = ""  # folder under which versions may be added over HTTP; empty: the folder of the database
    open: bool = False  # no tokens: everybody on this machine may do everything; on a loopback address only
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # precision of the weights; auto: as they are stored
    device: str = "auto"  # auto: cuda where there is one, else cpu
    max_new_tokens: int = 1024  # of an answer whose request does not say how many
    max_rows: int = 16  # answers that are made together
    max_tokens: int = 32768  # of the answers made together, with prompts, padding and all that may be generated; bounds the cache
    max_read: int = 512  # tokens of prompts that are read at once, while running answers wait: a longer prompt is read in parts
    max_waiting: int = 256  # requests that may wait; more are told to come back (503)
    rate: int = 120  # requests per minute and token; more are told to wait (429)
    concurrent: int = 16  # requests at the same time and token
    max_body: int = 1048576  # bytes of a request
    timeout: float = 5.0  # seconds to wait for a locked database
    grace: int = 60  # seconds that running answers have after SIGTERM
    cors: list[str] = field(default_factory=list)  # origins whose pages may call the service, such as https://example.org
    loop: str = ""  # YAML file of fastalign online: learn from the feedback in this process, on the model that answers, by turns
    memory_budget: float | None = None  # GiB that this learning may take beside the weights; null: all that is free
    patience: float = 1.0  # seconds for which it waits while requests keep coming; 0: it has every other turn
    log_prompts: bool = False  # write conversations into the log

    def validate(self) -> None:
        """Raises ConfigError for options that contradict each other or are out of range."""
        if self.open and not is_loopback(self.host):
            raise ConfigError(f"--open lets anybody in, so --host must be a loopback address such as 127.0.0.1, got {self.host}")
        for name in ("max_new_tokens", "max_rows", "max_tokens", "max_read", "max_waiting", "rate", "concurrent", "max_body", "grace"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if not 0 <= self.port < 65536:
            raise ConfigError(f"port must be from 0 to 65535, got {self.port}")
        if not self.timeout > 0:
            raise ConfigError(f"timeout must be positive, got {self.timeout}")
        if not self.loop and (self.memory_budget, self.patience) != (None, 1.0):
            raise ConfigError("memory_budget and patience count only where this process learns; set --loop loop.yaml")
        if self.memory_budget is not None and not self.memory_budget > 0:
            raise ConfigError(f"memory_budget must be positive, or null, got {self.memory_budget}")
        if not 0 <= self.patience < float("inf"):
            raise ConfigError(f"patience must be 0 or more and finite, got {self.patience}")
        if "*" in self.cors:
            raise ConfigError("cors must name origins; '*' would let every page on the web use the tokens that it is given")
        if not Path(self.model).is_dir():
            raise ConfigError(f"--model {self.model!r}: no such folder; give the folder of a model")

    @property
    def model_name(self) -> str:
        """What clients call the model."""
        return self.name or Path(self.model).resolve().name

    @property
    def version_folder(self) -> Path:
        """Where versions that are added over HTTP must lie."""
        return (Path(self.versions) if self.versions else Path(self.data).parent).resolve()


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address.

    >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("0.0.0.0")
    (True, True, False)
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
