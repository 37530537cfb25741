"""Training beside the service in one process: on the base model that answers, in turns with the answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fastalign.errors import ConfigError
from fastalign.pausing import pausing
from fastalign.serve.models import Installed, Models
from fastalign.train.host import SharedHost


class SharedModel(SharedHost):
    """What `train(config, on=...)` needs to train an adapter on the base model of `models`, in a thread beside the engine's.

    The service's turns go first (`Models.turns`), and what it answers is nothing else than without a training; the adapter is that of
    a run that has the device for itself, bit for bit. It becomes a version from its folder, `output`/final, as any other.

    memory_budget    GiB that training may take beside the weights: micro-batches are as small as its prediction says they must be.
                     None: all that is free; where a device has too little after all, micro-batches become smaller. Raises ConfigError
                     for 0 and less
    """

    def __init__(self, models: Models, *, memory_budget: float | None = None) -> None:
        super().__init__(models.weights)
        if memory_budget is not None and not memory_budget > 0:
            raise ConfigError(f"memory_budget must be a positive number of GiB, or null, got {memory_budget}")
        self.turns = models.turns
        self._random: tuple[torch.Tensor, list[torch.Tensor]] | None = None  # the generators, as training left them
        self.memory_budget = None if memory_budget is None else memory_budget * 2**30

    @contextmanager
    def turn(self) -> Iterator[None]:
        if self.turns.trains:
            yield
            return
        with self.turns.training():
            self._draw_on()
            try:
                yield
            finally:
                self._leave()

    def pause(self) -> None:
        self._settle()
        if self.turns.asked:
            self._leave()
            self.turns.pause()
            self._draw_on()

    @contextmanager
    def aside(self) -> Iterator[None]:
        if not self.turns.trains:
            yield
            return
        self._leave()
        try:
            with self.turns.aside():
                yield
        finally:
            self._draw_on()

    def stop(self, reason: str) -> None:
        """End the run in progress after its step, with a checkpoint to continue from; called by any thread."""
        self.stopping = reason

    def _leave(self) -> None:
        self._settle()
        self._random = torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []

    def _draw_on(self) -> None:
        """Go on with training's own random numbers, whoever has drawn others since: PEFT does when it loads an adapter."""
        if self._random is not None:
            torch.set_rng_state(self._random[0])
            if self._random[1]:
                torch.cuda.set_rng_state_all(self._random[1])

    def _settle(self) -> None:
        """A device works off what is queued for it, and a turn ends when it has: requests wait for one micro-batch, not for several."""
        if self.weights.device.type == "cuda":
            torch.cuda.synchronize()


class MeasuredModels(Models):
    """The base model of a service once more, to measure adapters on it: the same weights, in modules that the service does not use.

    What they compute is computed in the turns of training, and gives way between batches and between tokens; other work (data that is
    read, a judge that is waited for) holds nobody up. `pause` is called there, and may raise what ends the measurement.
    """

    def __init__(self, service: Models, host: SharedModel, pause: Callable[[], object]) -> None:
        self.host, self.pause = host, pause
        super().__init__(service.options, service.weights)

    @contextmanager
    def turn(self) -> Iterator[None]:
        with self.host.turn(), pausing(self.pause):
            self.pause()
            yield

    @contextmanager
    def serving(self, installed: Installed | None = None) -> Iterator[Any]:
        with self.turn(), super().serving(installed) as model:
            yield model
