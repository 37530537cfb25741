"""A stand-in for the package vllm on a machine without it: the classes and signatures of vLLM 0.33.0 that an in-process engine may use.

Written from vLLM's source, with a tiny model on the CPU behind it. Like vLLM it knows adapters by their number, finds prefixes again by
the adapter's name and the tokens, answers nothing while it sleeps, and has forgotten its weights after a sleep of level 2.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm_stand_in import sample

ENGINE_ARGS = {"enable_lora", "max_loras", "max_lora_rank", "enable_sleep_mode", "logprobs_mode", "max_model_len", "generation_config"}


@dataclass
class SamplingParams:
    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    watermarking: bool | None = None
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        self.temperature = max(self.temperature, 1e-2) if self.temperature > 0 else 0.0
        if self.temperature > 2.0:
            raise ValueError(f"temperature must be in [0, 2], got {self.temperature}.")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}.")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise OverflowError("seed")


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str = ""
    base_model_name: str | None = None
    load_inplace: bool = False
    is_3d_lora_weight: bool = False

    def __post_init__(self) -> None:
        if self.lora_int_id < 1:
            raise ValueError(f"id must be > 0, got {self.lora_int_id}")
        assert self.lora_path, "lora_path cannot be empty"


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: Sequence[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    lora_request: LoRARequest | None = None


@dataclass
class RequestOutput:
    request_id: str
    prompt: str | None
    prompt_token_ids: list[int] | None
    prompt_logprobs: None
    outputs: list[CompletionOutput]
    finished: bool
    lora_request: LoRARequest | None = None


@dataclass
class Trouble:
    """What a test wants to go wrong, and what it may look at."""

    drops_lora: bool = False  # answers by the base model, as if no adapter had been asked for
    first_lora: bool = False  # answers by the first adapter for ever
    raw: bool = False  # log-probs of the model, not of what is drawn from
    change: Callable[[RequestOutput], Any] = lambda reply: None
    fail: str = ""  # the method that raises
    calls: list[str] = field(default_factory=list)
    made: list[LLM] = field(default_factory=list)


class LLM:
    trouble: Trouble

    def __init__(
        self,
        model: str,
        *,
        tokenizer: str | None = None,
        skip_tokenizer_init: bool = False,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        quantization: str | None = None,
        seed: int = 0,
        gpu_memory_utilization: float = 0.92,
        enforce_eager: bool = False,
        **kwargs: Any,
    ) -> None:
        if unknown := set(kwargs) - ENGINE_ARGS:
            raise TypeError(f"EngineArgs.__init__() got an unexpected keyword argument {unknown}")
        self.call("__init__")
        random.seed(seed)
        torch.manual_seed(seed)  # as vLLM's worker does to the process that it is in
        AutoTokenizer.from_pretrained(model)
        self.model, self.options = model, {**kwargs, "dtype": dtype, "gpu_memory_utilization": gpu_memory_utilization}
        self.base: Any = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
        self.peft: Any = None
        self.loaded: list[int] = []  # the numbers of adapters, the one that was used last at the end
        self.prefixes: dict[tuple[str | None, tuple[int, ...]], Any] = {}  # who computed them
        self.resident = {"weights", "kv_cache"}
        self.trouble.made.append(self)

    def call(self, method: str) -> None:
        self.trouble.calls.append(method)
        if self.trouble.fail == method:
            raise RuntimeError("CUDA out of memory, as the test wants it")

    def generate(
        self,
        prompts: Sequence[dict[str, list[int]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: Sequence[LoRARequest] | LoRARequest | None = None,
        priority: int | Sequence[int] | None = None,
        tokenization_kwargs: dict[str, Any] | None = None,
        mm_processor_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        self.call("generate")
        assert self.resident == {"weights", "kv_cache"}, "it sleeps"
        assert isinstance(sampling_params, list) and len(sampling_params) == len(prompts)
        assert lora_request is None or isinstance(lora_request, LoRARequest)
        answering = None if self.trouble.drops_lora else lora_request
        if answering is not None:
            assert self.options.get("enable_lora"), "LoRA is not enabled"
            self._load(answering)
        return [
            self._answer(i, p["prompt_token_ids"], s, answering, lora_request) for i, (p, s) in enumerate(zip(prompts, sampling_params))
        ]

    def _load(self, request: LoRARequest) -> None:
        """By its number: one that is there is not read again, whatever its path holds by now."""
        number, path = request.lora_int_id, Path(request.lora_path)
        if number not in self.loaded:
            assert (path / "adapter_config.json").is_file()
            if self.peft is None:
                self.peft = PeftModel.from_pretrained(self.base, path, adapter_name=str(number)).eval()
            else:
                self.peft.load_adapter(path, adapter_name=str(number))
            assert self.peft.peft_config[str(number)].r <= self.options["max_lora_rank"], "LoRA rank is greater than max_lora_rank"
            self.loaded = [*self.loaded, number][-self.options["max_loras"] :]

    def _answer(
        self, place: int, prompt: list[int], params: SamplingParams, answering: LoRARequest | None, asked: LoRARequest | None
    ) -> RequestOutput:
        assert len(prompt) + (params.max_tokens or 0) <= self.options["max_model_len"]
        now: Any = self.base
        if answering is not None:
            now = self.peft
        elif self.peft is not None:
            self.peft.disable_adapter_layers()
        key = (answering.lora_name if answering else None, tuple(prompt))
        if answering is not None:  # what is cached is of the weights that computed it
            number = self.prefixes.setdefault(key, answering.lora_int_id)
            self.peft.set_adapter("1" if self.trouble.first_lora else str(number))
        elif key in self.prefixes:
            now = copy.deepcopy(self.base)
            now.load_state_dict(self.prefixes[key])
        else:
            self.prefixes[key] = copy.deepcopy(self.base.state_dict())
        body = {"prompt": prompt, "max_tokens": params.max_tokens, "temperature": params.temperature, "top_k": params.top_k}
        body |= {"top_p": params.top_p, "min_p": params.min_p, "seed": params.seed, "stop_token_ids": params.stop_token_ids}
        raw = self.trouble.raw or self.options.get("logprobs_mode", "raw_logprobs") != "processed_logprobs"
        tokens, logps, reason = sample(now, body | {"ignore_eos": params.ignore_eos}, raw=raw, model_eos=1)
        found = None if params.logprobs is None else [{t: Logprob(x)} for t, x in zip(tokens, logps)]
        said = CompletionOutput(0, "", tokens, sum(logps), found, reason, None, asked)
        reply = RequestOutput(str(place), None, prompt, None, [said], True, asked)
        self.trouble.change(reply)
        return reply

    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> list[Any]:
        assert method == "reload_weights", "of a worker's methods, this one"
        return [self._reload_weights(*args, **(kwargs or {}))]

    def _reload_weights(self, weights_iterator: Any = None, weights_path: str | None = None, is_checkpoint_format: bool = True) -> None:
        self.call("reload_weights")
        assert "weights" in self.resident and weights_iterator is None and is_checkpoint_format
        self.base.load_state_dict(AutoModelForCausalLM.from_pretrained(weights_path or self.model, dtype=self.base.dtype).state_dict())

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        self.call("reset_prefix_cache")
        self.prefixes.clear()
        return True

    def sleep(self, level: int = 1, mode: Literal["abort", "wait", "keep"] = "abort") -> None:
        self.call(f"sleep {level}")
        assert self.options.get("enable_sleep_mode"), "sleep mode is not enabled"
        self.resident.clear()
        self.prefixes.clear()
        if level == 2:
            with torch.no_grad():
                for weight in self.base.parameters():
                    weight.fill_(float("nan"))

    def wake_up(self, tags: list[str] | None = None) -> bool:
        self.call("wake_up" + (f" {' '.join(tags)}" if tags else ""))
        self.resident |= set(tags or ("weights", "kv_cache"))
        return self.resident == {"weights", "kv_cache"}


def modules(version: str = "0.33.0") -> tuple[dict[str, ModuleType], Trouble]:
    """vllm and its parts for sys.modules, and what may go wrong in them."""
    trouble = Trouble()
    found = {name: ModuleType(name) for name in ("vllm", "vllm.lora", "vllm.lora.request")}
    found["vllm"].__dict__.update(
        __version__=version, __path__=[], LLM=type("LLM", (LLM,), {"trouble": trouble}), SamplingParams=SamplingParams
    )
    found["vllm.lora"].__dict__.update(__path__=[])
    found["vllm.lora.request"].__dict__.update(LoRARequest=LoRARequest)
    return found, trouble
