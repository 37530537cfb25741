"""Functions of the user's own, found by the name that the user gave."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastalign.errors import ConfigError


def fingerprint(name: str, function: Callable[..., Any]) -> str:
    """`name` and a digest of the file that defines the function: another fingerprint once the file is edited."""
    try:
        file = inspect.getsourcefile(inspect.unwrap(function))
        content = Path(file).read_bytes() if file else b""
    except (OSError, TypeError):  # built in, or made at run time
        content = b""
    return f"{name} {hashlib.sha256(content).hexdigest()[:16]}"


def load_callable(name: str, option: str) -> Callable[..., Any]:
    """What `package.module:function` or `path/to/file.py:function` names; modules are looked for in the current folder, too, last.

    Raises ConfigError, naming `option`, when it is not there.
    """
    where, _, attribute = name.rpartition(":")
    if not where or not attribute:
        raise ConfigError(f"{option} must be MODULE:FUNCTION or FILE.py:FUNCTION, got {name!r}")
    try:
        if where.endswith(".py"):
            spec = importlib.util.spec_from_file_location(f"fastalign_user.{Path(where).stem}", where)
            assert spec is not None and spec.loader is not None
            module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up there
            spec.loader.exec_module(module)
        else:
            if (here := os.getcwd()) not in sys.path:  # an installed command does not look there by itself
                sys.path.append(here)
            module = importlib.import_module(where)
    except (ImportError, OSError, SyntaxError) as error:
        raise ConfigError(f"{option}: {where} cannot be loaded: {error}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        known = ", ".join(n for n, f in vars(module).items() if inspect.isfunction(f)) or "none"
        raise ConfigError(f"{option}: {where} has no function {attribute!r} (functions: {known})")
    return function
