"""An engine that is a running vLLM server: it is told the adapter that is being trained, and answers by it.

The protocol is that of `vllm serve` as its documentation and source describe it (main branch at 002032ee, 2026; the oldest version
with all of its fields is 0.10.2): /v1/models, /v1/completions with token ids, /v1/load_lora_adapter, /v1/unload_lora_adapter. Our tests
speak it to a stand-in server, not to vLLM itself. The server is started like this:

    VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve MODEL --enable-lora --max-lora-rank 16 --logprobs-mode processed_logprobs

Only adapters are sent. A version of the adapter is a folder that the server must be able to read, under the same path, and has a name
of its own: vLLM finds cached prefixes again by the adapter's name, so a name that came back with other weights would be answered from
what the old weights made of the prompt.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np

from fastalign.errors import ConfigError, RolloutError
from fastalign.rollout.engine import Sampling
from fastalign.rollout.generate import Completion
from fastalign.rollout.versions import Versions

logger = logging.getLogger("fastalign")

PAUSE = 0.5  # seconds before a request is made again; doubles each time
LONGEST_PAUSE = 30.0
START = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve MODEL --enable-lora --logprobs-mode processed_logprobs"
RESUME = "then continue the run with --resume"


@dataclass
class VLLMServerConfig:
    """A running vLLM server that answers the prompts."""

    url: str = "http://127.0.0.1:8000/v1"
    """Where it listens, with the /v1."""
    model: str | None = None
    """Name under which it serves the base model; null: model.path."""
    adapter_folder: str | None = None
    """Folder for the adapter on its way to the server, which reads it under the same path; null: adapters/ in the run's folder."""
    api_key_env: str = "VLLM_API_KEY"
    """Environment variable that holds the key, where the server asks for one."""
    timeout: float = 600.0
    """Seconds to wait for one answer."""
    retries: int = 3
    """Further attempts after a request that failed, with growing pauses."""
    workers: int = 256
    """Requests that are under way at the same time; the server batches them."""

    def validate(self) -> None:
        """Raise ConfigError for the first option that is out of range."""
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"vllm.url must begin with http:// or https://, as in http://127.0.0.1:8000/v1, got {self.url!r}")
        if not 0 < self.timeout < math.inf or self.retries < 0 or self.workers < 1:
            raise ConfigError(
                f"vllm.timeout must be positive, retries 0 or more, workers 1 or more: {self.timeout}, {self.retries}, {self.workers}"
            )


class Refused(RolloutError):
    """The server answered that it will not (a status in the 400s): to ask again is no use."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Server:
    """Requests in JSON. Connections that fail, time-outs, 429 and the 500s are tried again, `config.retries` times."""

    def __init__(self, config: VLLMServerConfig) -> None:
        self.config, self.url = config, config.url.rstrip("/")
        key = os.environ.get(config.api_key_env)
        self.headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})

    def names(self) -> list[str]:
        """Of the models and adapters that are served."""
        return [str(card["id"]) for card in self._json("models")["data"]]

    def complete(self, body: dict[str, Any]) -> Any:
        """The reply of /v1/completions."""
        return self._json("completions", body)

    def load(self, name: str, path: Path) -> None:
        """Load the adapter in `path`."""
        try:
            self._request("load_lora_adapter", {"lora_name": name, "lora_path": str(path)})
        except Refused:
            if name not in self.names():  # else an attempt whose reply was lost did it
                raise

    def unload(self, name: str) -> None:
        """Unload an adapter. A server that has lost it, or cannot, is no reason to stop: nothing asks for it again."""
        try:
            self._request("unload_lora_adapter", {"lora_name": name}, retries=0)
        except RolloutError as error:
            logger.debug("unloading an old adapter: %s", error)

    def _json(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = self._request(path, body)
        try:
            return json.loads(data)
        except ValueError as error:
            raise RolloutError(
                f"{self.url}/{path}: not JSON but {data[:80]!r}; set --vllm.url to that of a vLLM server, {RESUME}"
            ) from error

    def _request(self, path: str, body: dict[str, Any] | None = None, *, retries: int | None = None) -> bytes:
        retries = self.config.retries if retries is None else retries
        data = None if body is None else json.dumps(body).encode()
        problem, remedy = "", ""
        for attempt in range(retries + 1):
            if attempt:
                time.sleep(min(PAUSE * 2 ** (attempt - 1), LONGEST_PAUSE))
            try:
                request = urllib.request.Request(f"{self.url}/{path}", data, self.headers)
                with urllib.request.urlopen(request, timeout=self.config.timeout) as reply:
                    return bytes(reply.read())
            except urllib.error.HTTPError as error:
                problem, remedy = f"HTTP {error.code}: {_said(error)}", "look at the server's log and mend it"
                if error.code < 500 and error.code != 429:
                    raise Refused(f"{self.url}/{path}: {problem}", error.code) from error
            except (OSError, HTTPException) as error:
                reason = getattr(error, "reason", error)
                if isinstance(reason, TimeoutError):
                    problem, remedy = f"no answer within {self.config.timeout:g} s", "raise --vllm.timeout, or lower --vllm.workers"
                else:
                    problem, remedy = f"cannot be reached ({reason})", "start the server, or set --vllm.url"
        raise RolloutError(f"{self.url}/{path}: {problem}, after {retries + 1} attempts; {remedy}, {RESUME}")


class VLLMServerEngine:
    """The Engine on a vLLM server, for a model that is a PeftModel; `output` is the run's folder.

    An answer is drawn with a seed of its own, made of `seed` and its place among the prompts. What vLLM draws with it is the same again
    only up to rounding, which depends on what is computed together, unless the server is batch-invariant (VLLM_BATCH_INVARIANT=1).

    The server applies min_p first, then top_k and top_p, where Transformers applies it last; the log-probs are those of what it drew.
    They are checked to be so (--logprobs-mode processed_logprobs) where it makes a difference: with another temperature than 1, and
    with top_k, top_p or min_p.

    Raises RolloutError when the server is away, refuses, or replies with something else than what was asked for; then every answer of
    the generation is dropped. Raises OutputError when the adapter cannot be written.
    """

    def __init__(self, model: Any, config: VLLMServerConfig, *, output: str | Path) -> None:
        self.config, self.server = config, Server(config)
        self.versions = Versions(model, config.adapter_folder or Path(output) / "adapters", output=output)
        self.adapter: str | None = None
        self.checked = False

    def sync(self) -> None:
        old = set(self.versions.old())
        if not self.versions.count:
            old |= {name for name in self.server.names() if name.startswith(f"{self.versions.run}-")}
        for name in sorted(old):
            self.server.unload(name)  # first: a server with room for one adapter drops it for the new one, and cannot unload it then
            self.versions.drop(name)
        path = self.versions.write("vllm.adapter_folder")
        self.adapter = path.name
        try:
            self.server.load(self.adapter, path)
        except Refused as error:
            remedy = f"let it read {path}, with a --max-lora-rank of at least lora.r, and start it like this: {START}; {RESUME}"
            raise RolloutError(f"{error}; {remedy}") from error

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seed: Sequence[int]) -> list[Completion]:
        if not prompts:
            return []
        if not self.checked and (sampling.temperature != 1 or sampling.truncated):
            self._check_mode(prompts[0], sampling.eos_token_id)
            self.checked = True
        with ThreadPoolExecutor(min(self.config.workers, len(prompts))) as pool:
            return list(pool.map(lambda i: self._answer(prompts[i], sampling, seed_of(seed, i)), range(len(prompts))))

    def rest(self) -> None:
        pass

    def _answer(self, prompt: Sequence[int], sampling: Sampling, seed: int) -> Completion:
        body = {
            "model": self.adapter,
            "prompt": list(prompt),
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "seed": seed,
            "logprobs": 0,  # of the drawn token alone
            "return_token_ids": True,
            "stop_token_ids": [sampling.eos_token_id],
            "ignore_eos": True,  # the server's own idea of it, and those of the model's generation_config.json; whence the penalties, too
            "include_stop_str_in_output": True,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
        }
        try:
            reply = self.server.complete(body)
        except Refused as error:
            remedy = f"it has lost the adapter: was it started anew? Where it runs, {RESUME}" if error.status == 404 else RESUME
            raise RolloutError(f"{error}; {remedy}") from error
        try:
            return self._read(reply, prompt, sampling)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            what = str(error) if type(error) is ValueError else f"a reply that is none of /v1/completions ({type(error).__name__}: {error})"
            raise RolloutError(f"{self.server.url}/completions: {what}, {RESUME}") from error

    def _read(self, reply: Any, prompt: Sequence[int], sampling: Sampling) -> Completion:
        """The completion in a reply. Raises ValueError, naming the remedy, where it is not what was asked for."""
        choice = reply["choices"][0]
        tokens, logps = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
        if reply["model"] != self.adapter:
            raise ValueError(f"answered by {reply['model']!r}, not by the adapter {self.adapter!r}; see to it that no proxy renames models")
        if not tokens:
            raise ValueError("a reply without token_ids; vLLM 0.10.2 or later is needed, and no proxy that drops fields")
        if choice.get("prompt_token_ids") not in (None, list(prompt)):
            raise ValueError("the prompt that was answered is not the one that was asked; let the server neither cut nor change it")
        return completion(tokens, logps, sampling, ended_by=choice.get("finish_reason"))

    def _check_mode(self, prompt: Sequence[int], eos_token_id: int) -> None:
        """Of one token that can be drawn, the processed log-prob is 0; the raw one is not. A tie of two may be drawn, so most must be."""
        found = self._answer(prompt, replace(Sampling(8, eos_token_id), top_k=1), 0)
        if sum(abs(logp) < 1e-3 for logp in found.logps) * 2 < len(found.logps):
            raise RolloutError(
                f"{self.server.url}: its log-probs are not those of the distribution that it draws from (temperature, top_k, "
                f"top_p, min_p); start the server with --logprobs-mode processed_logprobs, {RESUME}"
            )


def check_server(config: VLLMServerConfig, model: str) -> None:
    """Raise RolloutError unless the server is there and serves the base model, by the name in `config` or as `model`."""
    server, wanted = Server(config), config.model or model
    try:
        names = server.names()
    except Refused as error:
        raise RolloutError(f"{error}; set --vllm.url to that of a vLLM server, and the key it asks for in {config.api_key_env}") from error
    except (KeyError, TypeError) as error:
        raise RolloutError(f"{server.url}/models: no list of models; set --vllm.url to that of a vLLM server") from error
    if wanted not in names:
        raise RolloutError(f"{server.url}: serves no model {wanted!r} but {', '.join(names) or 'none'}; set --vllm.model, or --vllm.url")


def completion(tokens: Sequence[int], logps: Sequence[Any] | None, sampling: Sampling, *, ended_by: object) -> Completion:
    """What vLLM drew. Raises ValueError, naming the remedy, unless it is whole, with a log-prob for each token."""
    if not logps or len(logps) != len(tokens) or not all(isinstance(x, (int, float)) and math.isfinite(x) for x in logps):
        got = "none" if not logps else f"{len(logps)}, or one that is no number"
        raise ValueError(f"a reply of {len(tokens)} tokens with log-probs: {got}; let the server give one for each")
    finished = tokens[-1] == sampling.eos_token_id
    whole = finished or len(tokens) == sampling.max_new_tokens
    if not whole or len(tokens) > sampling.max_new_tokens or sampling.eos_token_id in tokens[:-1]:
        raise ValueError(
            f"an answer of {len(tokens)} tokens that ended by {ended_by!r}, where it should have "
            f"{sampling.max_new_tokens} or end with the token {sampling.eos_token_id}; raise the server's --max-model-len, "
            "and give it no stop tokens of its own"
        )
    return Completion(tuple(int(token) for token in tokens), tuple(float(x) for x in logps), finished)


def seed_of(seed: Sequence[int], place: int) -> int:
    """In [0, 2^63), what vLLM takes, for the prompt at `place`.

    >>> len({seed_of((3, step), place) for step in range(3) for place in range(3)})
    9
    """
    return int(np.random.SeedSequence([*seed, place]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _said(error: urllib.error.HTTPError) -> str:
    """The message in the body of an error of vLLM, or what there is of one."""
    try:
        text = error.read().decode(errors="replace")
    except (OSError, HTTPException):
        return str(error.reason)
    try:
        found = json.loads(text)
        return str(found["error"]["message"] if isinstance(found.get("error"), dict) else found.get("message") or found["detail"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return text[:200] or str(error.reason)
