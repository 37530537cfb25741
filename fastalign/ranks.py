"""The processes of a run: one alone, or several that `torchrun` started, each with a share of every step.

`current()` is the run's; code that divides work or must agree asks it and needs no case of its own for a process alone.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist

from fastalign.errors import ConfigError, FastalignError, RankError

Value = TypeVar("Value")

GRACE = 30.0  # seconds to end in, once what started a process is gone; as torchrun gives when it is asked to end

_FAILURE = "fastalign/failure"  # the key in the store under which the first rank to fail says why


@dataclass
class ParallelConfig:
    """Several processes, started by torchrun."""

    shard: Literal["full", "optimizer"] = "full"
    """What the processes divide among themselves. full: the weights, gradients and optimizer state of the layers, each layer gathered
    when it runs (FSDP2); optimizer: the optimizer's state alone, for the least traffic where weights and gradients fit on every device."""
    head: Literal["whole", "vocab"] = "whole"
    """Whether every process holds the whole language-model head, or (vocab) its share of the rows, their gradient and their optimizer
    state, and scores the tokens of all processes with them."""
    replicas: int = 1
    """Into so many groups the processes are divided, each of which holds everything once: with as many as there are nodes, layers
    are gathered inside a node (hybrid sharding)."""

    def validate(self) -> None:
        """Raise ConfigError for an option that is out of range."""
        if self.shard not in ("full", "optimizer"):
            raise ConfigError(f"parallel.shard must be full or optimizer, got {self.shard!r}")
        if self.head not in ("whole", "vocab"):
            raise ConfigError(f"parallel.head must be whole or vocab, got {self.head!r}")
        if self.replicas < 1:
            raise ConfigError(f"parallel.replicas must be at least 1, got {self.replicas}")

    def check(self, processes: int) -> None:
        """Raise ConfigError for options that do not fit the number of processes."""
        if processes == 1 and self != ParallelConfig():
            raise ConfigError(
                "parallel: options of several processes, but there is one; start with torchrun --nproc_per_node N -m fastalign ..., "
                "or leave them out"
            )
        if processes % self.replicas:
            raise ConfigError(f"parallel.replicas {self.replicas} does not divide the {processes} processes; set a divisor of {processes}")
        if self.head == "vocab" and self.replicas == processes:
            raise ConfigError("parallel.head vocab divides the head inside a group, and each is one process; set fewer --parallel.replicas")


class Ranks:
    """One process alone. Its subclass is one of several; every method there is called by all of them, in the same order."""

    index = 0
    size = 1

    @property
    def is_first(self) -> bool:
        """Whether this process logs, reports and writes what is there once."""
        return self.index == 0

    @property
    def name(self) -> str:
        """Who speaks, for messages; empty for a process alone."""
        return ""

    def gather(self, value: Value) -> list[Value]:
        """The `value` of every rank, in their order."""
        return [value]

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank."""
        return any(self.gather(flag))

    def share(self, count: int) -> range:
        """Which of `count` equal pieces of work are this rank's."""
        return range(self.index, count, self.size)

    def spread(self, count: int, work: Callable[[Sequence[int]], Sequence[Value]]) -> list[Value]:
        """What `work` gives for each of `count` pieces, every rank doing its share of them; `work` gets their numbers."""
        with self.together():
            own = list(work(self.share(count)))
        found: list[Any] = [None] * count
        for index, part in enumerate(self.gather(own)):
            found[index :: self.size] = part
        return found

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that all ranks leave alike: where one raises, the others raise a RankError that says what it raised."""
        yield

    @contextmanager
    def serving(self, others: Callable[[], None]) -> Iterator[None]:
        """A block in which a rank, before it waits for all, does `others`: what those that are not there yet may need of it."""
        yield

    def died(self, error: BaseException) -> None:
        """Leave word of why this rank goes, for those that wait for it."""

    def explained(self, error: BaseException) -> BaseException:
        """`error`, or what is behind it when it says no more than that another rank is gone."""
        return error


class _Several(Ranks):
    """One of the processes that torchrun started."""

    def __init__(self) -> None:
        self.index, self.size = dist.get_rank(), dist.get_world_size()
        self.hosts = dist.new_group(backend="gloo")  # objects and flags travel between hosts, no device waits for them
        self.store = dist.distributed_c10d._get_default_store()  # type: ignore[attr-defined]
        self.meanwhile: Callable[[], None] = _nothing

    @property
    def name(self) -> str:
        return f"rank {self.index} of {self.size}"

    def gather(self, value: Value) -> list[Value]:
        found: list[Any] = [None] * self.size
        self.meanwhile()
        dist.all_gather_object(found, value, group=self.hosts)
        return found

    @contextmanager
    def together(self) -> Iterator[None]:
        error: Exception | None = None
        try:
            yield
        except Exception as own:
            if isinstance(own, RankError) or hasattr(own, "told"):  # of a block inside, which the others left alike
                raise
            error = own
        said = self.gather(None if error is None else _text(error))
        if error is not None:
            error.told = True  # type: ignore[attr-defined]
            raise error
        for index, text in enumerate(said):
            if text is not None:
                raise RankError(f"rank {index} of {self.size} stopped: {text}")

    @contextmanager
    def serving(self, others: Callable[[], None]) -> Iterator[None]:
        before, self.meanwhile = self.meanwhile, others
        try:
            yield
            others()
        finally:
            self.meanwhile = before

    def died(self, error: BaseException) -> None:
        if isinstance(error, RankError) or _is_of_transport(error):
            return
        with suppress(RuntimeError):  # the store may be gone as well
            if not self.store.check([_FAILURE]):
                self.store.set(_FAILURE, f"{self.name} stopped: {_text(error)}")

    def explained(self, error: BaseException) -> BaseException:
        if not _is_of_transport(error):
            return error
        reason = "another process ended without a word (killed, or its machine is gone); what started them may say more"
        with suppress(RuntimeError):
            if self.store.check([_FAILURE]):
                reason = self.store.get(_FAILURE).decode()
        return RankError(f"{reason}; continue with --resume, which takes the newest whole checkpoint")


def current() -> Ranks:
    """The ranks of the run in progress; one alone outside of `joined`."""
    return _current


_current = Ranks()


@contextmanager
def joined(device: str = "auto") -> Iterator[Ranks]:
    """Join the other processes for a run on `device`, where torchrun started several: nccl between CUDA devices, else gloo.

    Each takes the CUDA device of its local rank, and ends when torchrun is gone (`end_with_parent`). Raises ConfigError when a host has
    fewer devices than processes.
    """
    global _current
    if _current.size > 1 or int(os.environ.get("WORLD_SIZE", "1")) == 1 or "MASTER_ADDR" not in os.environ:
        yield _current
        return
    end_with_parent()
    own = dist.is_initialized()
    if not own:
        local, cuda = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.is_available() and device in ("auto", "cuda")
        if cuda and local >= torch.cuda.device_count():
            raise ConfigError(
                f"{torch.cuda.device_count()} CUDA devices for at least {local + 1} processes on this host; start torchrun with "
                f"--nproc_per_node {torch.cuda.device_count()}"
            )
        if cuda:
            torch.cuda.set_device(local)
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    before, _current = _current, _Several()
    try:
        yield _current
    except BaseException as error:
        _current.died(error)
        cause = _current.explained(error)
        if cause is error:
            raise
        raise cause from error
    else:
        if not own:
            dist.destroy_process_group()
    finally:
        _current = before


def end_with_parent(grace: float = GRACE) -> None:
    """End this process when the one that started it has ended, even by a SIGKILL: nobody would know of it any more, or end it.

    It gets a SIGTERM, and where it has not ended by that within `grace` seconds, such as in a collective that never returns, a SIGKILL.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(min(1.0, grace))
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(grace)
        os.kill(os.getpid(), signal.SIGKILL)

    if not any(thread.name == _WATCHER for thread in threading.enumerate()):
        threading.Thread(target=watch, name=_WATCHER, daemon=True).start()


_WATCHER = "fastalign: ends with its parent"


def _nothing() -> None:
    pass


def _text(error: BaseException) -> str:
    return str(error) if isinstance(error, FastalignError) else f"{type(error).__name__}: {error}"


def _is_of_transport(error: BaseException) -> bool:
    """Whether torch or gloo report by `error` that a peer is gone; they have no class for it that both use."""
    words = ("connection closed", "connection reset", "connection refused", "broken pipe", "socket", "timed out", "timeout", "nccl")
    foreign = isinstance(error, RuntimeError) and not isinstance(error, FastalignError)
    return foreign and any(word in str(error).lower() for word in words)
