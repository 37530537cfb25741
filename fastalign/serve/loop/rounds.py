"""The rounds of the loop, each in a folder of its own, which tells how far it is: a step is done when its file is there.

So a loop that is killed goes on where it was, and repeats no step that had ended.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastalign.errors import OutputError
from fastalign.train.config import write_text
from fastalign.train.folder import writing

_NAME = re.compile(r"round-(\d+)")


@dataclass(frozen=True)
class Begun:
    """What a round is made from; nothing that happens later changes it."""

    number: int
    parent: str  # the version that was live
    after: int  # feedback with an id over this one is new
    upto: int  # feedback with an id over this one is of a later round
    time: float


@dataclass(frozen=True)
class Closed:
    """How a round ended."""

    promoted: bool
    reasons: list[str]
    figures: dict[str, Any]
    time: float


class Round:
    """One round, in `folder`."""

    def __init__(self, folder: Path, begun: Begun) -> None:
        self.folder, self.begun = folder, begun
        self.name = folder.name  # also the name of its version

    @property
    def run(self) -> Path:
        """The folder of its training run."""
        return self.folder / "run"

    @property
    def closed(self) -> Closed | None:
        """How it ended, if it has."""
        found = self.read("closed")
        return None if found is None else Closed(**found)

    def close(self, *, promoted: bool, reasons: list[str], figures: dict[str, Any]) -> Closed:
        """End it, durably."""
        closed = Closed(promoted, reasons, figures, time.time())
        self.write("closed", asdict(closed))
        return closed

    def read(self, step: str) -> dict[str, Any] | None:
        """What `write` wrote for a step; None where it is not done."""
        return _read(self.folder / f"{step}.json")

    def write(self, step: str, found: dict[str, Any]) -> None:
        """Note that a step is done, and what came of it; durable when it returns."""
        write_text(self.folder / f"{step}.json", json.dumps(found, ensure_ascii=False, indent=1) + "\n")


class Rounds:
    """All rounds of a loop, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __iter__(self) -> Iterator[Round]:
        """The first one first. Raises OutputError for a file that cannot be read."""
        folders = sorted((path for path in self.folder.glob("round-*") if _NAME.fullmatch(path.name)), key=lambda path: _number(path.name))
        for folder in folders:
            if (found := _read(folder / "begun.json")) is not None:
                yield Round(folder, Begun(**found))

    def last(self) -> Round | None:
        """The newest one."""
        return next(reversed(list(self)), None)

    @property
    def learned(self) -> int:
        """The newest feedback that a round was made from."""
        last = self.last()
        return last.begun.upto if last else 0

    def begin(self, *, parent: str, upto: int, taken: list[str]) -> Round:
        """A new round from the feedback that no round was made from yet; `taken` are names of versions, which none gets again."""
        names = [*taken, *(one.name for one in self)]
        number = 1 + max((_number(name) for name in names if _NAME.fullmatch(name)), default=0)
        begun = Begun(number, parent, self.learned, upto, time.time())
        folder = self.folder / f"round-{number:04d}"
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)  # empty, where a loop was killed between this line and the next
        made = Round(folder, begun)
        made.write("begun", asdict(begun))
        return made


def _number(name: str) -> int:
    found = _NAME.fullmatch(name)
    assert found is not None
    return int(found[1])


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise OutputError(f"{path}: cannot be read ({error}); restore it, or move the folder of its round away, and start again") from error
