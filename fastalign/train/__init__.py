"""The training loop and what it stands on: config, step, optimizer, checkpoints, metrics, report.

`fastalign.train` is this package, and called it is `fastalign.train.loop.train`: Python binds a package's name in its parent over
any function of that name, so the package itself has to be callable.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastalign.objectives.base import RunConfig
    from fastalign.train.host import Host
    from fastalign.train.loop import Callback, TrainResult


class _CallablePackage(ModuleType):
    def __call__(self, config: RunConfig, *, callbacks: Sequence[Callback] = (), on: Host | None = None) -> TrainResult:
        from fastalign.train.loop import ALONE, train

        return train(config, callbacks=callbacks, on=on or ALONE)


sys.modules[__name__].__class__ = _CallablePackage
