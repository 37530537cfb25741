"""The loop in the process of the service: it learns and measures on the weights that answer, in turns with the answers."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from fastalign.errors import ConfigError, FastalignError
from fastalign.objectives.base import RunConfig
from fastalign.serve.config import ServeConfig
from fastalign.serve.engine import Engine
from fastalign.serve.loop.config import OnlineConfig
from fastalign.serve.loop.loop import Interrupted, Loop
from fastalign.serve.models import Models
from fastalign.serve.records import BASE
from fastalign.serve.store import Store
from fastalign.serve.swaps import Swaps
from fastalign.serve.training import MeasuredModels, SharedModel
from fastalign.train.config import load
from fastalign.train.folder import locked
from fastalign.train.loop import train

log = logging.getLogger("fastalign")


class ServiceModels:
    """A workshop on the base model of `models`: no second copy of its weights, and never at the same time as an answer."""

    def __init__(self, models: Models, *, memory_budget: float | None) -> None:
        self.service, self.host = models, SharedModel(models, memory_budget=memory_budget)

    def train(self, config: RunConfig) -> str | None:
        return train(config, on=self.host).interrupted

    @contextmanager
    def models(self) -> Iterator[Models]:
        yield MeasuredModels(self.service, self.host, self._pause)

    def _pause(self) -> None:
        if self.host.stopping:
            raise Interrupted(self.host.stopping)
        self.host.pause()


class Learner:
    """The loop in a thread of its own. Raises ConfigError for options that a loop in the service's process cannot have."""

    def __init__(self, config: ServeConfig, store: Store, engine: Engine) -> None:
        options = load(config.loop, OnlineConfig)
        for name, default in (("serve", ""), ("data", ""), ("rounds", None), ("wait", True), ("dry_run", False)):
            if getattr(options, name) != default:
                raise ConfigError(
                    f"{config.loop}: {name} is for fastalign online; a service that learns itself goes on until it is stopped"
                )
        if options.dtype != "auto" or options.device != "auto":
            raise ConfigError(f"{config.loop}: dtype and device are those of the service; leave them at auto")
        if options.reward_model:
            raise ConfigError(f"{config.loop}: reward_model trains a model of another kind; run fastalign online in a process of its own")
        options = replace(options, serve=config.data)
        options.validate()
        folder = options.folder(Path(config.data).resolve())
        self.workshop = ServiceModels(engine.models, memory_budget=config.memory_budget)
        self.loop = Loop(options, store, Swaps(store, engine), self.workshop, folder, store.version(BASE))
        self.thread = threading.Thread(target=self._work, name="loop", daemon=True)

    def start(self) -> None:
        """Begin, or go on where an earlier loop was."""
        self.thread.start()

    def stop(self) -> None:
        """End after the step in progress, with a checkpoint."""
        self.loop.stopping.set()
        self.workshop.host.stop("SIGTERM")
        self.thread.join()

    def _work(self) -> None:
        try:
            with locked(self.loop.rounds.folder):
                self.loop.run()
        except Interrupted:
            log.info("the round goes on when the service is started again")
        except FastalignError as error:
            log.error("the loop has stopped, and the service goes on without it: %s", error)
            self.loop.store.add_event("loop stopped", {"reason": str(error)})
