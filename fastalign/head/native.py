"""The native library: where it is found, and how it is loaded. `kernels/include` documents its functions.

It is optional. A wheel built with FASTALIGN_NATIVE=1 holds it beside this file; a checkout finds it in `build/native`,
where the first lines of CMakeLists.txt build it. Nothing is loaded before the first call that needs it.
"""

from __future__ import annotations

import ctypes
import sys
from functools import lru_cache
from pathlib import Path

import torch

from fastalign.errors import DependencyError

VERSION = 1  # FASTALIGN_VERSION in kernels/include/fastalign_native.h
NAME = "libfastalign_native.dylib" if sys.platform == "darwin" else "libfastalign_native.so"
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
BUILD = "build it in a checkout (cmake -S . -B build/native && cmake --build build/native) or install with FASTALIGN_NATIVE=1"


def find() -> Path | None:
    """The library's file, if there is one."""
    here = Path(__file__).resolve().parent
    places = (here / NAME, here.parent.parent / "build" / "native" / NAME)
    return next((path for path in places if path.is_file()), None)


@lru_cache
def library() -> ctypes.CDLL:
    """The library, loaded once. Raises DependencyError where it is absent, cannot be loaded, or is of another version."""
    path = find()
    if path is None:
        raise DependencyError(f"impl 'native' needs the native library, which is not there: {BUILD}, or use impl='torch'")
    try:
        found = ctypes.CDLL(str(path))
    except OSError as error:
        raise DependencyError(f"{path} cannot be loaded ({error}): {BUILD} again, or remove the file") from error
    if found.fastalign_version() != VERSION:
        raise DependencyError(f"{path} has version {found.fastalign_version()}, this fastalign needs {VERSION}: {BUILD} again")
    found.fastalign_isa.restype = found.fastalign_threading.restype = ctypes.c_char_p
    return found


def isa() -> str:
    """The instruction set in use: avx512, avx2, neon or scalar."""
    return library().fastalign_isa().decode()


def select_isa(name: str) -> None:
    """Use another instruction set from now on, "best" for the best one; for tests. ValueError if the machine lacks it."""
    if library().fastalign_select_isa(name.encode()):
        raise ValueError(f"this machine or build of the native library has no instruction set {name!r}")


def threading() -> str:
    """Where parallel work runs: "openmp", on the threads of the runtime that torch has loaded, or "threads" of its own."""
    return library().fastalign_threading().decode()


def check(status: int, what: str) -> None:
    """Raises RuntimeError for a status that is no success: what callers must rule out before."""
    if status:
        raise RuntimeError(f"{what} refused its arguments with status {status}")
