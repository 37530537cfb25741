"""What a measurement was taken on, and how much memory the process holds."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
from importlib import metadata
from pathlib import Path

import torch

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def rss_mib() -> float:
    """Resident memory of this process now."""
    return _status("VmRSS")


def peak_rss_mib() -> float:
    """The largest resident memory of this process since it began, or since `reset_peak_rss`."""
    return _status("VmHWM")


def reset_peak_rss() -> None:
    """Begin a new peak (Linux: proc(5), clear_refs)."""
    CLEAR_REFS.write_text("5")


def _status(key: str) -> float:
    if not STATUS.exists():
        raise SystemExit("bench: memory is read from /proc/self/status, which only Linux has")
    found = re.search(rf"^{key}:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)
    assert found, key
    return int(found[1]) / 1024


def describe(packages: list[str], device: torch.device | None = None) -> dict[str, str]:
    """Machine, with its GPU where `device` is one, versions and commit: columns of every table."""
    info = Path("/proc/cpuinfo").read_text()

    def field(key: str) -> str:
        found = re.search(rf"^{key}\s*: (.*)$", info, re.MULTILINE)
        return found[1].strip() if found else "?"

    flags = set(field("flags").split())
    vector = next((name for flag, name in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if flag in flags), "no AVX2")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cpu = (
        f"{field('model name')} (family {field('cpu family')}, model {field('model')}), {os.cpu_count()} cores, {vector}, {memory:.0f} GiB"
    )
    if device is not None and device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        cpu = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}; {cpu}"
    installed = {distribution.name.replace("_", "-"): distribution.version for distribution in metadata.distributions()}
    versions = ", ".join(f"{name} {installed.get(name, 'absent')}" for name in packages)
    return {
        "machine": cpu,
        "system": platform.platform(),
        "versions": f"Python {platform.python_version()}, {versions}",
        "commit": commit(),
    }


def command(name: str, argv: list[str]) -> str:
    """How to measure the same again: the arguments that decide what is measured and how, without the folder for the result."""
    at = argv.index("--output") if "--output" in argv else len(argv)
    return shlex.join(["python", "-m", "bench", name, *argv[:at], *argv[at + 2 :]])


def commit() -> str:
    """The checked-out commit, marked when tracked files differ from it."""
    root = Path(__file__).resolve().parent.parent

    def git(*args: str) -> str:
        return subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + (" (modified)" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
