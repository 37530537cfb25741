"""`fastalign online`: waits for feedback, goes through a round, and looks at how the live version is liked, again and again."""

from __future__ import annotations

import logging
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from fastalign.errors import ConfigError, ModelError, NumericsError, StoreConflictError
from fastalign.models.config import ModelConfig
from fastalign.objectives.base import RunConfig
from fastalign.serve.loop.collect import Collected, collect, new_feedback
from fastalign.serve.loop.config import OnlineConfig
from fastalign.serve.loop.gate import decide
from fastalign.serve.loop.learn import check_options, run_config
from fastalign.serve.loop.live import fallen
from fastalign.serve.loop.measure import measure
from fastalign.serve.loop.page import write_page
from fastalign.serve.loop.rounds import Round, Rounds
from fastalign.serve.loop.switch import Database, Service, Switch
from fastalign.serve.models import Models
from fastalign.serve.records import BASE, Version
from fastalign.serve.store import Store
from fastalign.train.folder import locked
from fastalign.train.loop import train

log = logging.getLogger("fastalign")


class Interrupted(Exception):
    """Somebody wants the work to end; it goes on from what is on the disk."""


class Workshop(Protocol):
    """Where the loop trains and measures: on models of its own, or on those of the service in whose process it runs."""

    def train(self, config: RunConfig) -> str | None:
        """Carry out or continue a run; the name of the signal that ended it early."""

    @contextmanager
    def models(self) -> Iterator[Models]:
        """The base model, to answer and to be measured with adapters on it."""
        yield  # type: ignore[misc]


@dataclass(frozen=True)
class OwnModels:
    """Models that are loaded for each step and freed after it."""

    options: ModelConfig

    def train(self, config: RunConfig) -> str | None:
        return train(config).interrupted

    @contextmanager
    def models(self) -> Iterator[Models]:
        yield Models(self.options)


def online(config: OnlineConfig) -> int:
    """Run the loop until it is stopped, or has done what `config` asks for. Returns the exit code.

    Raises a FastalignError for anything that can be mended; the round of the moment goes on where it was when the loop starts again.
    """
    config.validate()
    service = Service(config.serve, config.token_env) if config.is_remote else None
    path = Path(service.database() if service and not config.data else config.data or config.serve)
    if not path.is_file():
        raise ConfigError(f"{path}: no such database; give the one of the service by --data, or start the service once")
    with Store(path) as store:
        base = next((version for version in store.versions() if version.name == BASE), None)
        if base is None:
            raise ConfigError(f"{path}: no service has answered from this database yet; start fastalign serve once")
        workshop = OwnModels(ModelConfig(path=base.folder, dtype=config.dtype, device=config.device))
        loop = Loop(config, store, service or Database(store), workshop, config.folder(path), base)
        if config.dry_run:
            loop.preview()
            return 0
        with locked(loop.rounds.folder):
            try:
                loop.run()
            except Interrupted as stopped:
                log.warning("stopped by %s; the round goes on when the loop is started again", stopped)
                return 128 + int(signal.Signals[str(stopped)])
    return 0


class Loop:
    """The loop over one database, with its rounds in `folder`."""

    def __init__(self, config: OnlineConfig, store: Store, switch: Switch, workshop: Workshop, folder: Path, base: Version) -> None:
        self.config, self.store, self.switch, self.workshop, self.base = config, store, switch, workshop, base
        self.rounds = Rounds(folder)
        self.stopping = threading.Event()
        check_options(config, base.folder)

    def run(self, after_round: Callable[[Round], None] | None = None) -> None:
        """Go through rounds until there were enough of them, there is not enough feedback and `wait` is false, or `stop`."""
        done = 0
        while not self.stopping.is_set() and (self.config.rounds is None or done < self.config.rounds):
            self.look()
            current = self.next()
            if current is not None:
                self.advance(current)
                done += 1
                if after_round is not None:
                    after_round(current)
            elif not self.config.wait:
                fresh, _ = new_feedback(self.store, after=self.rounds.learned)
                log.info("%d new judgements, %d make a round: nothing to do", fresh, self.config.min_feedback)
                return
            else:
                self.stopping.wait(self.config.poll)

    def look(self) -> None:
        """Roll back where the live version is liked less than the one that it replaced."""
        live = self.store.live_version()
        reason = fallen(self.store, self.config.live, good_rating=self.config.collect.good_rating)
        if live is None or live.replaced is None or reason is None:
            return
        log.warning("%s: %s; going back to %s", live.name, reason, live.replaced)
        try:
            self.switch.roll_back(live.replaced, reason)
        except StoreConflictError as conflict:  # somebody was faster
            log.warning("no roll-back: %s", conflict)

    def next(self) -> Round | None:
        """The round that has not ended, or a new one, or None where there is too little feedback for it."""
        last = self.rounds.last()
        if last is not None and last.closed is None:
            log.info("%s goes on", last.name)
            return last
        fresh, upto = new_feedback(self.store, after=self.rounds.learned)
        live = self.store.live_version()
        if fresh < self.config.min_feedback or live is None:
            return None
        if live.name != BASE and not (Path(live.folder) / "adapter_config.json").is_file():
            raise ConfigError(f"version {live.name} is a whole model, and the loop trains adapters on the base model; promote another one")
        begun = self.rounds.begin(parent=live.name, upto=upto, taken=[version.name for version in self.store.versions()])
        log.info("%s: %d new judgements; training from %s", begun.name, fresh, live.name)
        return begun

    def preview(self) -> None:
        """Say what the next round would learn from."""
        fresh, upto = new_feedback(self.store, after=self.rounds.learned)
        with tempfile.TemporaryDirectory() as folder:
            found = self._collect(Path(folder), self.rounds.learned, upto)
        log.info("%d new judgements (%d make a round)", fresh, self.config.min_feedback)
        log.info("%s", _told(found))

    def advance(self, current: Round) -> None:
        """What is left of a round, up to its end."""
        begun, data = current.begun, current.folder / "data"
        if (told := current.read("collected")) is None:
            told = asdict(self._collect(data, begun.after, begun.upto))
            current.write("collected", told)
        collected = Collected(**told)
        log.info("%s: %s", current.name, _told(collected))
        if reason := _unteachable(collected):
            self._end(current, False, [f"{reason}: {_counts(collected)}"], {})
            return
        parent = self.store.version(begun.parent)
        try:
            self._train(current, collected, parent)
        except NumericsError as error:
            self._end(current, False, [f"training diverged: {error}"], {})
            return
        if (figures := current.read("measured")) is None:
            with self.workshop.models() as models:
                figures = measure(
                    models, str(current.run / "final"), parent.folder, self.base.folder, data, self.config.measure, seed=self.config.seed
                )
            current.write("measured", figures)
        decision = decide(figures, self.config.gate)
        promoted, reasons = decision.promote, list(decision.reasons)
        self._add_version(current, figures)
        if promoted and self.store.version(current.name).promoted is None:  # else it went live before the loop was killed
            try:
                self.switch.promote(current.name, begun.parent)
            except (StoreConflictError, ModelError) as error:
                promoted, reasons = False, [*reasons, f"not promoted: {error}"]
        self._end(current, promoted, reasons, figures)

    def _collect(self, folder: Path, after: int, upto: int) -> Collected:
        config = replace(self.config.collect, objective="dpo") if self.config.reward_model else self.config.collect
        return collect(self.store, config, folder, after=after, upto=upto, seed=self.config.seed)

    def _train(self, current: Round, collected: Collected, parent: Version) -> None:
        data = current.folder / "data" / "train.jsonl"
        rewards = None
        if self.config.reward_model:
            self._run(run_config(self.config, "reward", output=current.folder / "reward", data=data, base=self.base.folder))
            rewards = str(current.folder / "reward" / "final")
        algorithm = "grpo" if self.config.reward_model else collected.objective
        options: dict[str, Any] = {"base": self.base.folder, "adapter": None if parent.name == BASE else parent.folder, "rewards": rewards}
        if algorithm == "kto":
            options["labels"] = (collected.counts["rows/good"], collected.counts["rows/bad"])
        self._run(run_config(self.config, algorithm, output=current.run, data=data, **options))

    def _run(self, config: RunConfig) -> None:
        output = Path(config.output)
        if not (output / "final").is_dir() and (signal_name := self.workshop.train(config)) is not None:
            raise Interrupted(signal_name)
        shutil.rmtree(output / "checkpoints", ignore_errors=True)  # the round has what it needs

    def _add_version(self, current: Round, figures: dict[str, Any]) -> None:
        """The candidate, once; the database may have it from before the loop was killed."""
        folder = str((current.run / "final").resolve())
        numbers = {name: value for name, value in figures.items() if isinstance(value, (int, float, str))}
        if interval := figures.get("win_rate_ci95"):
            numbers |= {"win_rate_low": interval[0], "win_rate_high": interval[1]}
        if current.name not in [version.name for version in self.store.versions()]:
            self.store.add_version(current.name, folder, parent=current.begun.parent, metrics=numbers)

    def _end(self, current: Round, promoted: bool, reasons: list[str], figures: dict[str, Any]) -> None:
        told = "; ".join(reasons)
        if not any(event.kind == "round" and event.detail["version"] == current.name for event in self.store.events()):
            self.store.add_event("round", {"version": current.name, "promoted": promoted, "reasons": told})
        current.close(promoted=promoted, reasons=reasons, figures=figures)
        log.info("%s: %s (%s)", current.name, f"{current.name} answers now" if promoted else f"{current.begun.parent} goes on", told)
        write_page(self.rounds, self.store.versions(), self.rounds.folder / "report.html")


def _unteachable(found: Collected) -> str | None:
    """Why nothing can be learned from the data of a round. What is in it is older feedback for the next one."""
    if not found.rows:
        return "no rows are left to learn from"
    if found.objective == "kto" and not (found.counts["rows/good"] and found.counts["rows/bad"]):
        return "all answers were judged alike, and KTO learns from the difference"
    return None


def _told(found: Collected) -> str:
    return f"{found.objective}: {found.rows} rows to train on, {found.held_out_rows} held out ({_counts(found)})"


def _counts(found: Collected) -> str:
    return ", ".join(f"{name} {count}" for name, count in found.counts.items())
