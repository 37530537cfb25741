"""Another commit beside the working tree: its checkout is gone however a benchmark ends, and medians are compared."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import base, head_base, table
from bench.__main__ import main
from bench.head_rows import Row

REPOSITORY = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed: a checkout for --base is unproven here")
MEASURED = Row("cpu", 64, 512, 32, "float32", "dpo", "fastalign, slab, dpo", True, median_ms=2.0, min_ms=1.0, max_ms=3.0, repeats=5,
               bare_gemms_ms=1.0, peak_memory_mib=40.0)  # fmt: skip


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", "-C", str(folder), *identity, *words], capture_output=True, text=True, check=True).stdout


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "repository"
    (root / "fastalign").mkdir(parents=True)
    (root / "fastalign" / "__init__.py").write_text("")
    git(tmp_path, "init", "--quiet", str(root))
    git(root, "add", ".")
    git(root, "commit", "--quiet", "-m", "first")
    monkeypatch.setattr(base, "ROOT", root)
    return root


def trees(repository: Path) -> int:
    """How many git knows of, the repository's own among them; and no folder of one is left."""
    assert not (repository.parent / "base-tree").exists()
    return git(repository, "worktree", "list").count("\n")


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError, None])
def test_a_checkout_is_gone_after_the_benchmark(repository: Path, tmp_path: Path, error: type[BaseException] | None) -> None:
    def use() -> None:
        with base.checkout("HEAD", tmp_path) as package:
            assert (package / "fastalign" / "__init__.py").is_file() and git(repository, "worktree", "list").count("\n") == 2
            if error:
                raise error

    if error:
        with pytest.raises(error):
            use()
    else:
        use()
    assert trees(repository) == 1


def test_a_checkout_that_is_interrupted_while_git_makes_it_is_gone(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = base._git

    def interrupted(*words: str) -> Any:
        done = run(*words)
        if "add" in words:
            run("worktree", "lock", str(tmp_path / "base-tree"))  # as git does while it makes one
            raise KeyboardInterrupt
        return done

    monkeypatch.setattr(base, "_git", interrupted)
    with pytest.raises(KeyboardInterrupt), base.checkout("HEAD", tmp_path):
        pass
    assert trees(repository) == 1


def test_sigterm_ends_a_benchmark_as_an_interrupt_does(repository: Path, tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from bench import base; base.ROOT = Path(sys.argv[1])\n"
        "with base.checkout('HEAD', Path(sys.argv[2])):\n    print('there', flush=True); time.sleep(300)"
    )
    command = [sys.executable, "-c", code, str(repository), str(tmp_path)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout is not None and started.stdout.readline() == "there\n"
        started.send_signal(signal.SIGTERM)
        assert started.wait(timeout=200) == 128 + signal.SIGTERM
    assert trees(repository) == 1


def test_a_commit_that_is_not_there_is_named(repository: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"bench: --base nonesuch: .*nonesuch"), base.checkout("nonesuch", tmp_path):
        pass
    assert trees(repository) == 1


def test_medians_over_the_turns_are_compared() -> None:
    here = [replace(MEASURED, median_ms=ms, peak_memory_mib=40.0) for ms in (2.0, 9.0, 3.0)]
    there = [replace(MEASURED, median_ms=ms, peak_memory_mib=60.0) for ms in (8.0, 6.0, 1.0)]
    rows = [*head_base._medians(here, None), *head_base._medians(there, "abc")]
    assert [row.side for row in rows] == [MEASURED.side, f"{MEASURED.side}@abc"] and rows[0].repeats == 15
    assert "| 64, 512, 32, float32 | dpo | fastalign, slab, dpo | 3 | 6 | 2.000 | 40 | 60 | 1.500 |" in head_base.comparison(rows, "abc")
    (failed,) = head_base._medians([*here, replace(MEASURED, median_ms=None, status="failed: x")], None)
    assert failed.status == "failed: x" and head_base.comparison([failed, rows[1]], "abc").count("\n") == 1


def test_options_that_mean_nothing_with_a_base_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--append"], ["--limit", "9"]):
        with pytest.raises(SystemExit):
            main(["head", "--base", "HEAD", *words])
        assert "--base: goes with neither --append nor --limit" in capsys.readouterr().err


@pytest.mark.slow
def test_the_head_of_another_commit_is_measured_beside_this_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["head", "--quick", "--device", "cpu", "--base", "HEAD", "--tasks", "dpo", "logps", "--dtypes", "float32"]
    assert main([*words, "--output", str(tmp_path)]) == 0
    rows = table.read(tmp_path / "base_head_cpu.csv", Row)
    assert len(rows) == 4 and [row.side.endswith("@HEAD") for row in rows] == [False, False, True, True]
    assert all(row.ours and row.status == "measured" and (row.median_ms or 0) > 0 for row in rows)
    assert capsys.readouterr().out.count("| 64, 512, 32, float32 | ") == 2
    assert "base-tree" not in subprocess.run(["git", "worktree", "list"], cwd=base.ROOT, capture_output=True, text=True, check=True).stdout
