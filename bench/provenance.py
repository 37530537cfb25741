"""What every row of a benchmark says about where its numbers come from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Base of the dataclasses of rows; `machine.describe` and `machine.command` give the values, and `table.write` puts them last."""

    machine: str = ""
    system: str = ""
    versions: str = ""
    commit: str = ""
    command: str = ""
