"""The command line: help, mistakes, exit codes, and the smaller commands end to end. Training is in tests/train."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import preference_rows, save_tiny

from fastalign import cli
from fastalign.errors import DataError

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, "-m", "fastalign"]


def run(*words: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *words], cwd=ROOT, capture_output=True, text=True, **options)  # type: ignore[call-overload,no-any-return]


def test_help_without_arguments_and_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    shown = []
    for words in ([], ["--help"], ["-h"], ["help"]):
        assert cli.main(words) == 0
        shown.append(capsys.readouterr().out)
    assert len(set(shown)) == 1
    for command in ("dpo", "eval", "report RUN", "data check FILE", "demo"):
        assert f"\n  {command}" in shown[0]


def test_help_is_quick_because_nothing_heavy_is_imported() -> None:
    code = (
        "import json, sys; before = set(sys.modules); from fastalign.cli import main; main(['--help']); "
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = json.loads(done.stdout.splitlines()[-1])
    assert "fastalign.cli" in loaded and not {"torch", "transformers", "rich", "numpy"} & set(loaded)
    assert len(loaded) < 200  # torch alone brings over a thousand


@pytest.mark.parametrize("words", ["dpo", "eval", "data check", "demo", "report", "data"])
def test_every_command_has_help(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*words.split(), "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: fastalign {words}")


def test_help_of_dpo_names_every_option_once(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["dpo", "--help"])
    words = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  --")]
    assert len(words) == len(set(words))
    assert {"--model.path", "--data.path", "--output", "--beta", "--batch_size", "--max_tokens", "--lora.r", "--resume"} <= set(words)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("fastalign 0.")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("dop", "unknown command 'dop'; did you mean dpo?"),
        ("evl", "did you mean eval?"),
        ("xyzzy", "fastalign --help lists all"),
        ("data chek f", "unknown command data 'chek'; did you mean data check?"),
        ("data check", "data check needs a file"),
        ("report", "report takes the folder of one run, got 'nothing'"),
        ("report a b", "got 'a b'"),
        ("report nowhere", "nowhere: not the folder of a run"),
        ("dpo --learning_rat 1", "unknown option --learning_rat; did you mean --learning_rate?"),
        ("dpo --beta x", "--beta: expected a number, got 'x'; for example --beta 0.1"),
        ("dpo", "set --output"),
        ("dpo --beta 0 --output r --model.path m --data.path d", "beta must be positive"),
        ("dpo --lora.alpha 9 --output r --model.path m --data.path d", "set --lora.r 16, too"),
        ("distill --beta 0.1 --teacher.path t --output r --model.path m --data.path d", "counts only with divergence=jsd"),
        ("dpo --resume --output nowhere", "--resume: nowhere has no config.yaml, so there is no run to resume"),
        ("eval", "set --model.path"),
        ("eval --model.path m", "set --data.path"),
        ("demo --objective dpx", "dpx"),
    ],
)
def test_mistakes_are_one_line_on_stderr(
    line: str, words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(line.split()) == 2
    out, error = capsys.readouterr()
    assert error.startswith("error: ")
    assert words in error
    assert "Traceback" not in error
    assert out == ""
    assert list(tmp_path.iterdir()) == []  # a refused command leaves nothing behind


def failing(error: BaseException) -> object:
    def command(argv: list[str]) -> int:
        raise error

    return command


def test_debug_shows_where_an_error_comes_from(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli, "_report", failing(DataError("bad row")))
    assert cli.main(["report", "x", "--debug"]) == 2
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert error.endswith("error: bad row\n")


def test_interrupt_is_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli, "_report", failing(KeyboardInterrupt()))
    assert cli.main(["report", "x"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_bug_is_not_dressed_up_as_a_mistake_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_report", failing(ZeroDivisionError("ours")))
    with pytest.raises(ZeroDivisionError):
        cli.main(["report", "x"])


def test_a_reader_that_leaves_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*COMMAND, "--help"], cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.stderr == ""
    assert done.returncode == 128 + signal.SIGPIPE


def test_module_and_exit_code() -> None:
    done = run("nonsense")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: unknown command 'nonsense'")


def test_report_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 0.5}) + "\n")
    assert cli.main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
    assert (tmp_path / "report" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_interrupt_then_resume_with_nothing_but_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C ends a run with a checkpoint and exit code 130; `--resume --output RUN` alone finishes it."""
    save_tiny(tmp_path / "my-model")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in preference_rows(40)))
    words = "dpo --model.path my-model --data.path pairs.jsonl --output run --batch_size 4 --max_steps 24 --metrics basic"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    slow = (  # steps that take a second, so that the run has not ended when this process sees the first one
        "import sys, time; from fastalign.cli import entry; from fastalign.train.loop import _Run; step = _Run._step;"
        "_Run._step = lambda run: (step(run), time.sleep(1)); entry()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", slow, *words.split()], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=400)
    assert process.returncode == 130, error
    assert "continue with --resume" in error
    done = len(metrics.read_text().splitlines())
    assert 0 < done < 24
    assert not (tmp_path / "run" / "final").exists()

    monkeypatch.chdir(tmp_path)
    assert cli.main(["dpo", "--resume", "--output", "run"]) == 0
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == list(range(1, 25))
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()
    assert (tmp_path / "run" / "final" / "README.md").exists()
    assert (tmp_path / "run" / "report.html").exists()
    assert cli.main(["dpo", "--resume", "--output", "run", "--beta", "0.3"]) == 2
