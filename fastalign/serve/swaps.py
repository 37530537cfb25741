"""Changes of the version that answers, in the engine and in the store together."""

from __future__ import annotations

from typing import Any

from fastalign.errors import ModelError, StoreConflictError
from fastalign.serve.engine import Engine
from fastalign.serve.records import Version
from fastalign.serve.store import Store, check_live


class Swaps:
    """Promotes and takes back versions of a running service. A version that cannot answer is refused (ModelError) and noted."""

    def __init__(self, store: Store, engine: Engine) -> None:
        self.store, self.engine = store, engine

    def promote(self, name: str, expected: str | None = None) -> Version:
        """Answer with version `name` from now on. Raises StoreConflictError when another version than `expected` is live."""
        version = self.store.version(name)
        if version.state == "live" and self.engine.models.current.version == name:
            return version
        if version.state != "live":
            check_live(self.store.live_version(), expected)  # before anything is read; what counts is that it is so at the change
        return self._swap(version, lambda: self.store.promote(name, expected=expected))

    def roll_back(self, expected: str | None, reason: str) -> Version:
        """Answer with the version that was live before. Raises StoreConflictError when that is another one than `expected`."""
        target = self.store.rollback_target()
        if expected is not None and expected != target.name:
            raise StoreConflictError(f"a roll-back leads to version {target.name!r}, not to {expected!r:.80}; look again")
        return self._swap(target, lambda: self.store.roll_back(target.name, reason=reason))

    def _swap(self, version: Version, commit: Any) -> Version:
        try:
            found: Version = self.engine.swap(version.name, version.folder, commit)
            return found
        except ModelError as error:
            self.store.add_event("refused", {"version": version.name, "reason": str(error)})
            raise
