"""The weights that are being trained as folders, one for each time they are handed to another program.

Every version has a name of its own: vLLM finds cached prefixes again by the adapter's name, so a name that came back with other weights
would be answered from what the old weights made of the prompt.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from platform import node
from typing import Any
from uuid import uuid4

from safetensors import SafetensorError

from fastalign.errors import OutputError
from fastalign.models.save import save_final


class Versions:
    """Of `model`, in `folder`, for the run in `output`. The adapter alone where one is trained, else the whole model.

    Names say whose versions are whose where runs share a folder or a server; what a killed process left behind is this run's, too.
    """

    def __init__(self, model: Any, folder: str | Path, *, output: str | Path) -> None:
        self.model, self.folder = model, Path(folder).resolve()
        self.run = f"fastalign-{hashlib.sha256(f'{node()}:{Path(output).resolve()}'.encode()).hexdigest()[:8]}"
        self.process, self.count = uuid4().hex[:8], 0

    def old(self) -> list[str]:
        """Names of the versions in the folder."""
        return sorted(path.name for path in self.folder.glob(f"{self.run}-*"))

    def drop(self, name: str) -> None:
        """Delete a version, if it is there."""
        shutil.rmtree(self.folder / name, ignore_errors=True)

    def write(self, option: str) -> Path:
        """The weights as they are now, in a new folder. Raises OutputError, naming the option that sets `folder`, when that fails."""
        self.count += 1
        path = self.folder / f"{self.run}-{self.process}-{self.count}"
        try:
            save_final(self.model, None, path)
        except (OSError, SafetensorError) as error:
            raise OutputError(f"{path}: cannot write the weights for vLLM ({error}); make room or set --{option}") from error
        return path
