"""Runs what the documentation shows: every command and every Python block of README.md and docs/*.md, in order.

A page runs in a folder of its own that holds what the pages take for granted: `my-model/` (a tiny model), `pairs.jsonl` and
`heldout.jsonl`. A YAML block whose first line is a comment with a file name, such as `# run.yaml`, becomes that file. Services get
free ports in place of those that a page names.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from tiny import preference_rows, save_tiny

from fastalign import cli
from fastalign.train import plan as planning
from fastalign.train.remedies import remedies

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]

# Commands that set up a machine, or take minutes and have tests of their own. Everything else must run here.
NOT_HERE = ("git clone ", "cd ", "make", "pip install ", "python -m pip ", "python -m venv ", "uv ", "source ", "sudo ", "fastalign demo")


@dataclass(frozen=True)
class Block:
    language: str
    text: str
    line: int


def blocks(text: str) -> list[Block]:
    """The fenced code blocks of a Markdown page."""
    found, start, language, lines = [], None, "", []
    for number, line in enumerate(text.splitlines(), 1):
        fence = re.match(r"\s*```(\S*)", line)
        if fence and start is None:
            start, language, lines = number, fence[1], []
        elif fence:
            found.append(Block(language, "\n".join(lines), start or 0))
            start = None
        elif start is not None:
            lines.append(line)
    assert start is None, f"line {start}: code block without end"
    return found


def commands(block: Block) -> list[str]:
    """The shell commands of a block: continued lines joined, comments and prompts off; of a console block only what follows `$ `."""
    lines = block.text.replace("\\\n", " ").splitlines()
    if block.language == "console":
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    return [text for line in lines if (text := re.sub(r"(^|\s)#.*", "", line).strip())]


def execute(command: str) -> None:
    """Run one command; `fastalign ...` in this process, which is the same code and saves importing torch each time."""
    words = shlex.split(command)
    if words[0] == "fastalign" and not set(command) & set("|<>&;$`"):
        code = cli.main(words[1:])
    else:
        code = subprocess.run(["bash", "-euo", "pipefail", "-c", command]).returncode
    assert code == 0, f"{command!r} ended with {code}"


def with_free_ports(text: str) -> str:
    """The page with every port that one of its services listens at replaced: another program may have it."""
    named = sorted(set(re.findall(r"--port (\d+)", text)))
    with ExitStack() as stack:
        held = [stack.enter_context(socket.socket()) for _ in named]
        for own in held:
            own.bind(("127.0.0.1", 0))
        free = {port: str(own.getsockname()[1]) for port, own in zip(named, held)}
    return re.sub("|".join(rf"\b{port}\b" for port in named), lambda found: free[found[0]], text) if named else text


def run_page(text: str) -> int:
    """Execute a page in the current folder; returns how many commands and Python blocks ran."""
    ran = 0
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(text):
        if block.language in ("bash", "sh", "shell", "console"):
            for command in commands(block):
                if not command.startswith(NOT_HERE):
                    execute(command)
                    ran += 1
        elif block.language == "python":
            exec(compile(block.text, f"the Python block at line {block.line}", "exec"), names)
            ran += 1
        elif block.language in ("yaml", "yml") and (name := re.match(r"#\s*(\S+\.ya?ml)\s*$", block.text.splitlines()[0])):
            Path(name[1]).write_text(block.text + "\n", encoding="utf-8")
    return ran


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the files that the pages speak of, and `fastalign` and `python` on the path."""
    save_tiny(tmp_path / "my-model")
    for name, seed in (("pairs.jsonl", 0), ("heldout.jsonl", 1)):
        rows = preference_rows(32, seed, conversational=True)
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    bin_folder = tmp_path / ".bin"
    bin_folder.mkdir()
    for name, words in (("fastalign", '-m fastalign "$@"'), ("python", '"$@"')):
        (bin_folder / name).write_text(f"#!/bin/sh\nexec {shlex.quote(sys.executable)} {words}\n")
        (bin_folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # as of `python` in that folder
    monkeypatch.setattr(planning, "remedies", lambda config, half: [r for r in remedies(config, half=half) if r.kind == "reference"])
    monkeypatch.setattr(planning, "GRID", (512, 8192))  # a plan is tested whole in test_plan.py, and takes 10 s
    yield tmp_path
    for file in tmp_path.glob("*.pid"):  # what a page has started and, failing, not stopped
        with suppress(ProcessLookupError, ValueError):
            os.kill(int(file.read_text()), signal.SIGKILL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page(page: Path, folder: Path) -> None:
    ran = run_page(with_free_ports(page.read_text(encoding="utf-8")))
    if page == ROOT / "README.md":
        assert ran >= 5  # train, resume, evaluate, report, check: the README has not lost its commands


def test_the_runner_of_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runner itself: order, continuations, comments, prompts, skips, YAML files, Python, and failures that do fail."""
    monkeypatch.chdir(tmp_path)
    page = """
```bash
make demo            # skipped
echo one > log       # a comment
echo two \\
  >> log
```
```console
$ cat run.yaml >> log || echo early >> log
output that is not run: false
```
```yaml
# run.yaml
beta: 0.2
```
```bash
cat run.yaml >> log
fastalign --version
```
```python
text = open("log").read()
```
```python
open("seen", "w").write(text)
```
```text
exit 1
```
"""
    assert run_page(page) == 7
    assert (tmp_path / "seen").read_text() == "one\ntwo\nearly\n# run.yaml\nbeta: 0.2\n"
    for broken in ("```bash\nfalse | cat\n```", "```bash\nfastalign report nowhere\n```", "```bash\nno-such-command-here\n```"):
        with pytest.raises(AssertionError, match="ended with"):
            run_page(broken)
    with pytest.raises(ZeroDivisionError):
        run_page("```python\n1 / 0\n```")
    with pytest.raises(AssertionError, match="line 1: code block without end"):
        run_page("```bash\nls")


def test_services_of_a_page_listen_at_free_ports() -> None:
    first, again, other, rows = with_free_ports("serve --port 8177\ncurl :8177/x\nserve --port 8178\n81779 rows").splitlines()
    port = first.removeprefix("serve --port ")
    assert port != "8177" and again == f"curl :{port}/x" and other not in (first, "serve --port 8178") and rows == "81779 rows"
    assert with_free_ports("8177 rows") == "8177 rows"
