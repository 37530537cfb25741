"""Where a run trains: in a process of its own, or in one that holds the base model already and has other work for the device."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from fastalign.errors import ConfigError
from fastalign.models.load import resolve_adapter
from fastalign.models.shared import SharedWeights
from fastalign.objectives.base import RunConfig
from fastalign.ranks import Ranks

logger = logging.getLogger("fastalign")


class Host:
    """A process that does nothing but train."""

    memory_budget: float | None = None  # bytes that the run may take beside the weights, by its prediction; None: all there are
    stopping: str | None = None  # why the run should end after the step in progress, with a checkpoint

    def admit(self, config: RunConfig, ranks: Ranks) -> RunConfig:
        """The run as it is done here. Raises ConfigError for one that cannot be."""
        return config

    def load(self, config: RunConfig, tokenizer: Any) -> Any:
        """The model to train."""
        return config.load_model(tokenizer)

    def turn(self) -> AbstractContextManager[None]:
        """Around everything that runs the model or draws random numbers; may be inside of another one."""
        return nullcontext()

    def pause(self) -> None:
        """Called inside of a turn between two micro-batches, or two tokens that are generated: others may go first."""

    def aside(self) -> AbstractContextManager[None]:
        """Around what waits inside of a turn, such as for a judge: others may go meanwhile."""
        return nullcontext()


class SharedHost(Host):
    """A process with a base model in memory, on which a run trains an adapter without a second copy of its weights.

    The run has modules of its own around them (`SharedWeights.model`), so that nothing in the process's own model changes, and
    nothing is left in it. Its result is that of a run that loads the model itself, bit for bit.
    """

    def __init__(self, weights: SharedWeights) -> None:
        self.weights = weights

    def admit(self, config: RunConfig, ranks: Ranks) -> RunConfig:
        if type(config).load_model is not RunConfig.load_model:
            raise ConfigError(
                f"{config.name} trains another model than a language model with an adapter, so it cannot share one; run fastalign "
                f"{config.name} in a process of its own"
            )
        if ranks.size > 1:
            raise ConfigError(f"one process shares its model with the run, and there are {ranks.size}; start one, without torchrun")
        given, (options, lora) = self.weights.options, resolve_adapter(config.model, config.lora)
        if not _same(options.path, given.path):
            raise ConfigError(f"model.path {config.model.path}: that is on {options.path}, and in memory is {given.path}; give this one")
        if lora is None or not lora.enabled:
            raise ConfigError("lora.r 0 would train the weights that others use; set --lora.r 16 to train an adapter on them")
        device = self.weights.device
        present = {"dtype": (self.weights.dtype,), "device": (str(device), device.type), "quantization": (given.quantization,)}
        for option, here in present.items():
            if (wanted := getattr(options, option)) not in ("auto", *here):
                word = here[0] or "null"
                raise ConfigError(f"model.{option} {wanted or 'null'}, but the model in memory has {word}; set --model.{option} {word}")
        if options.liger_kernels:
            raise ConfigError("model.liger_kernels changes functions that every model of the process calls; leave it out")
        if getattr(config, "engine", "") == "vllm":
            raise ConfigError("engine vllm has weights of its own; set --engine transformers")
        if (reference := getattr(config, "reference", "auto")) in ("copy", "stream"):
            raise ConfigError(f"reference {reference} holds a second model; set --reference auto, which is the model in memory")
        if getattr(config, "sync_ref_model", False):
            raise ConfigError("sync_ref_model holds a second model, which follows the first one; leave it out")
        return config

    def load(self, config: RunConfig, tokenizer: Any) -> Any:
        return self.weights.model(*resolve_adapter(config.model, config.lora))


def _same(path: str, other: str) -> bool:
    return path == other or (Path(path).is_dir() and Path(path).resolve() == Path(other).resolve())


@contextmanager
def stop_requests() -> Iterator[list[str]]:
    """A list that names the first SIGINT or SIGTERM to arrive; the second one acts as it would have without us."""
    requests: list[str] = []
    if threading.current_thread() is not threading.main_thread():  # Python delivers signals to the main thread only
        yield requests
        return

    def request(number: int, _: Any) -> None:
        requests.append(signal.Signals(number).name)
        signal.signal(number, before[number])
        logger.warning("%s: stopping after this step; send it again to stop at once", requests[0])

    before = {int(number): signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
