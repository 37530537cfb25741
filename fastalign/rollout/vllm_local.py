"""An engine that is vLLM in this process, on the GPU that trains: it sleeps while the model is trained, and answers by its weights.

Written from the source of vLLM 0.28.0, 0.30.0 and 0.33.0; our tests run it on a stand-in with the signatures of 0.33.0, not on vLLM itself.
An adapter is handed over as a folder of its own version (LoRARequest), so that vLLM keeps the base model, which it puts into the host's
memory while it sleeps (level 1). Where all weights are trained it forgets them while it sleeps (level 2), and reads the new ones from a
folder in the model's own format (its worker's reload_weights).
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastalign.errors import ConfigError, DependencyError, RolloutError
from fastalign.models.adapters import POLICY, has_adapter
from fastalign.models.trunk import causal_lm
from fastalign.rollout.engine import Sampling
from fastalign.rollout.generate import Completion
from fastalign.rollout.versions import Versions
from fastalign.rollout.vllm_server import RESUME, completion, seed_of

OLDEST, NEXT = (0, 28), (0, 34)  # versions that were read, and the first one that was not
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has room for; it takes lower ones, too


@dataclass
class VLLMLocalConfig:
    """vLLM in the process of the run."""

    gpu_memory_utilization: float = 0.4
    """Share of the GPU's memory for its weights and its cache, which must be free beside the trained model when it starts."""
    sleep: bool = True
    """Give this memory back while the model is trained; without an adapter, read the weights anew in any case."""
    enforce_eager: bool = False
    """No CUDA graphs: slower answers, a quicker start, less memory."""
    folder: str | None = None
    """Folder for the weights on their way to vLLM; null: adapters/ in the run's folder."""

    def validate(self) -> None:
        """Raise ConfigError for the first option that is out of range."""
        if not 0 < self.gpu_memory_utilization < 1:
            raise ConfigError(f"vllm_local.gpu_memory_utilization must be between 0 and 1, got {self.gpu_memory_utilization}")


class VLLMEngine:
    """The Engine on vLLM in this process; `output` is the run's folder, `max_tokens` the longest prompt and its answer.

    An answer is drawn with a seed of its own, made of `seed` and its place among the prompts. What vLLM draws with it is the same again
    only up to rounding, which depends on what is computed together. vLLM applies min_p first, then top_k and top_p. Log-probs are those
    of the distribution that it draws from. vLLM starts with the first `sync`, and leaves random numbers as they were.

    Raises RolloutError when vLLM cannot start, fails, or answers something else than what was asked for. Raises OutputError when the
    weights cannot be written.
    """

    def __init__(self, model: Any, config: VLLMLocalConfig, *, output: str | Path, max_tokens: int) -> None:
        self.model, self.config, self.max_tokens = model, config, max_tokens
        self.versions = Versions(model, config.folder or Path(output) / "adapters", output=output)
        self.adapter = has_adapter(model)
        self.llm: Any = None
        self.asleep = False
        self.request: Any = None  # for the adapter as it was last handed over

    def sync(self) -> None:
        for name in self.versions.old():
            self.versions.drop(name)
        path = self.versions.write("vllm_local.folder")
        with _named("take the weights", "look at its log"), _own_random_numbers():
            if self.llm is None:
                self.llm = self._start()
            if self.asleep:
                self.llm.wake_up(tags=["weights"])
            if self.adapter:
                from vllm.lora.request import LoRARequest

                self.request = LoRARequest(path.name, self.versions.count, str(path))
            else:
                self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(path)})
                self.llm.reset_prefix_cache()  # it finds prefixes again by their tokens alone
            if self.asleep:
                self.llm.wake_up(tags=["kv_cache"])
            self.asleep = False

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seed: Sequence[int]) -> list[Completion]:
        if not prompts:
            return []
        assert self.llm is not None and not self.asleep, "sync comes first"
        from vllm import SamplingParams

        options = {name: getattr(sampling, name) for name in ("temperature", "top_k", "top_p", "min_p")}
        given = [
            SamplingParams(
                **options,
                max_tokens=sampling.max_new_tokens,
                seed=seed_of(seed, i),
                stop_token_ids=[sampling.eos_token_id],
                ignore_eos=True,  # vLLM's own idea of it
                logprobs=0,  # of the drawn token alone
                detokenize=False,
            )
            for i in range(len(prompts))
        ]
        asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        with _named("answer", "lower --vllm_local.gpu_memory_utilization if memory ran out"), _own_random_numbers():
            found = self.llm.generate(asked, given, use_tqdm=False, lora_request=self.request)
        if len(found) != len(prompts):
            raise RolloutError(f"vllm: {len(found)} answers to {len(prompts)} prompts, {RESUME}")
        return [self._read(i, reply, prompt, sampling) for i, (reply, prompt) in enumerate(zip(found, prompts))]

    def rest(self) -> None:
        if self.llm is not None and self.config.sleep and not self.asleep:
            with _named("sleep", "set --vllm_local.sleep false"):
                self.llm.sleep(level=1 if self.adapter else 2)
            self.asleep = True

    def _read(self, place: int, reply: Any, prompt: Sequence[int], sampling: Sampling) -> Completion:
        (said,) = reply.outputs
        try:
            if list(reply.prompt_token_ids) != list(prompt):
                raise ValueError("the prompt that was answered is not the one that was asked")
            by = None if reply.lora_request is None else reply.lora_request.lora_name
            if by != (None if self.request is None else self.request.lora_name):
                raise ValueError(f"answered by {by!r}, not by the adapter {self.request and self.request.lora_name!r}")
            tokens = list(said.token_ids)
            logps = said.logprobs and [at[token].logprob for token, at in zip(tokens, said.logprobs, strict=True)]
            return completion(tokens, logps, sampling, ended_by=said.finish_reason)
        except (ValueError, KeyError) as error:
            raise RolloutError(f"vllm, answer {place}: {error}, {RESUME}") from error

    def _start(self) -> Any:
        vllm = load_vllm()
        causal = causal_lm(self.model)
        rank = {}
        if self.adapter:
            lora = self.model.peft_config[POLICY]
            largest = max(lora.r, *(lora.rank_pattern or {}).values(), 1)
            fitting = [known for known in RANKS if known >= largest]
            if not fitting:
                raise ConfigError(f"lora.r: vLLM takes adapters of rank {RANKS[-1]} at most, got {largest}; set --engine transformers")
            rank = {"enable_lora": True, "max_loras": 1, "max_lora_rank": fitting[0]}
        return vllm.LLM(
            causal.name_or_path,
            dtype=str(causal.get_input_embeddings().weight.dtype).removeprefix("torch."),  # its auto takes float16 for float32
            gpu_memory_utilization=self.config.gpu_memory_utilization,
            enforce_eager=self.config.enforce_eager,
            enable_sleep_mode=self.config.sleep,
            max_model_len=self.max_tokens,
            logprobs_mode="processed_logprobs",
            generation_config="vllm",  # not the model's own, which may hold penalties
            **rank,
        )


def load_vllm() -> Any:
    """The module. Raises DependencyError where it is absent or of a version that was not read, ConfigError among several processes."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        raise ConfigError("engine: vllm answers in the process of a run on one GPU; set --engine vllm_server, or transformers")
    # In this process, not beside it: it shares the GPU, and the order of its work is the same again.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    wanted = f"vllm>={'.'.join(map(str, OLDEST))},<{'.'.join(map(str, NEXT))}"
    try:
        import vllm
    except ImportError as error:
        raise DependencyError(f"engine vllm needs vLLM ({error}): pip install '{wanted}', or set --engine transformers") from error
    found = tuple(int(part) if part.isdigit() else -1 for part in vllm.__version__.split(".")[:2])
    if not OLDEST <= found < NEXT:
        raise DependencyError(f"engine vllm knows {wanted}, and {vllm.__version__} is installed: pip install '{wanted}'")
    return vllm


@contextmanager
def _named(what: str, remedy: str) -> Iterator[None]:
    """Errors of vLLM, which may be of any kind, as RolloutErrors."""
    try:
        yield
    except (ConfigError, DependencyError):
        raise
    except (RuntimeError, ValueError, TypeError, OSError, AssertionError) as error:
        raise RolloutError(f"vllm: cannot {what} ({type(error).__name__}: {error}); {remedy}, {RESUME}") from error


@contextmanager
def _own_random_numbers() -> Iterator[None]:
    """vLLM in this process sets the seeds of all generators when it starts; a run draws on as if it had not."""
    before = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
