"""`fastalign serve` in a process of its own, for whoever wants a service for a while: the demo, benchmarks, tests."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastalign.errors import OutputError

KEPT = 200  # of the last lines of its log


class ServiceProcess:
    """The command with these options, which has its model loaded and listens when this returns; ended at the end of a `with` block.

    environment    what differs from this process's. The package is the one that this process runs

    Raises OutputError with the last lines of its log where it ends before it listens.
    """

    def __init__(self, options: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fastalign", "serve", *options],
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **(environment or {})},
        )
        self.told: deque[str] = deque(maxlen=KEPT)  # the last lines of its log
        assert self.process.stderr is not None
        self._log = self.process.stderr
        for line in self._log:
            self.told.append(line)
            if found := re.search(r"answers at (http://\S+)", line):
                self.url: str = found[1]
                break
        else:
            raise OutputError(f"the service ended with {self.process.wait()}: {''.join(list(self.told)[-3:]).strip()}")
        self._reader = threading.Thread(target=self._listen, daemon=True)
        self._reader.start()

    def wait(self, seconds: float | None = None) -> int:
        """Until it has ended and all of its log is in `told`; its exit code. Raises subprocess.TimeoutExpired."""
        code = self.process.wait(seconds)
        self._reader.join()
        return code

    def stop(self) -> None:
        """End it as SIGTERM does, when it has given the answers that it is giving."""
        self.process.terminate()
        self.wait()

    def __enter__(self) -> ServiceProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _listen(self) -> None:
        """A full pipe would stop it."""
        for line in self._log:
            self.told.append(line)
