"""Another commit beside this working tree: `python -m bench dpo --base REF` trains with both in turns, each run in a fresh process.

`python -m bench head --base REF` does the same with the head (bench/head_base.py).

The benchmark is this working tree's, the `fastalign` that it imports is that of REF, from a git worktree of its own.
"""

from __future__ import annotations

import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from bench.training_rows import Measurement
from bench.training_sides import SIDES

ROOT = Path(__file__).resolve().parent.parent


def side_of(side: str, ref: str) -> str:
    """What a side of fastalign is called with the package of `ref`."""
    return f"{side}@{ref}"


@contextmanager
def checkout(ref: str, folder: Path) -> Iterator[Path]:
    """A folder that holds the package `fastalign` of `ref` and nothing else, for PYTHONPATH; its native library is built if it differs."""
    tree, package = folder / "base-tree", folder / "base-package"
    try:
        with _ended_by_sigterm():
            done = _git("worktree", "add", "--detach", str(tree), ref)
            if done.returncode:
                raise SystemExit(f"bench: --base {ref}: {done.stderr.strip()}")
            _native(ref, tree)
            package.mkdir()
            (package / "fastalign").symlink_to(tree / "fastalign", target_is_directory=True)
            yield package
    finally:
        _git("worktree", "remove", "--force", "--force", str(tree))  # twice: one that was being made is locked
        shutil.rmtree(tree, ignore_errors=True)


def _git(*words: str) -> subprocess.CompletedProcess[str]:
    """Git in the repository; a Ctrl-C at the terminal is not for it."""
    return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, start_new_session=True)


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends what is inside by SystemExit, so that it is cleaned up after."""

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def check_import(package: Path, environment: dict[str, str], place: Path) -> None:
    """Stop where another `fastalign` would be imported, as of an installation that goes before PYTHONPATH."""
    code = "import fastalign, pathlib; print(pathlib.Path(fastalign.__file__).resolve())"
    found = subprocess.run([sys.executable, "-c", code], env=environment, cwd=place, capture_output=True, text=True, check=True)
    if not Path(found.stdout.strip()).is_relative_to((package / "fastalign").resolve()):
        raise SystemExit(f"bench: --base: {found.stdout.strip()} is imported in place of {package / 'fastalign'}; uninstall that one")


def comparison(rows: Sequence[Measurement], ref: str) -> str:
    """A table of medians: this working tree, `ref`, and how much faster and leaner this working tree is."""
    lines = [
        f"| training | side | tokens/s | at {ref} | speed ratio | growth, MiB | at {ref} | memory ratio |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for training in dict.fromkeys(row.training for row in rows):
        for side, about in SIDES.items():
            pair = [[row for row in rows if row.training == training and row.side == name] for name in (side, side_of(side, ref))]
            if not all(pair):
                continue
            speed = [statistics.median(row.tokens_per_second for row in some) for some in pair]
            memory = [statistics.median(row.rss_growth_mib for row in some) for some in pair]
            cells = [training, about.text, f"{speed[0]:.0f}", f"{speed[1]:.0f}", f"{speed[0] / speed[1]:.3f}"]
            lines.append(f"| {' | '.join([*cells, f'{memory[0]:.0f}', f'{memory[1]:.0f}', f'{memory[1] / memory[0]:.3f}'])} |")
    return "\n".join(lines)


def _native(ref: str, tree: Path) -> None:
    """The native library of `ref`, where this working tree has one: copied if its sources are the same, else built."""
    here = ROOT / "build" / "native"
    libraries = sorted(here.glob("libfastalign_native.*"))
    if not libraries:
        return
    if subprocess.run(["git", "-C", str(ROOT), "diff", "--quiet", ref, "--", "kernels", "CMakeLists.txt"]).returncode == 0:
        (tree / "build" / "native").mkdir(parents=True)
        shutil.copy2(libraries[0], tree / "build" / "native")
        return
    subprocess.run(["bash", "kernels/build.sh", sys.executable], cwd=tree, check=True)
