"""Who may write in an output folder, and what a foreign or broken one says."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastalign.errors import OutputError
from fastalign.train.folder import claim, publish, writing


def test_an_unused_claim_leaves_no_folder(tmp_path: Path) -> None:
    with claim(tmp_path / "a" / "run") as folder:
        assert folder.path.is_dir()
    assert not (tmp_path / "a" / "run").exists()


def test_another_run_is_kept_unless_asked(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(OutputError, match=r"holds another run; .*--resume.*--overwrite"), claim(tmp_path):
        pass
    for options in ({"resume": True}, {"overwrite": True}):
        with claim(tmp_path, **options):
            assert (tmp_path / "metrics.jsonl").exists()
    assert (tmp_path / "metrics.jsonl").read_text() == "{}\n"


def test_a_fresh_start_deletes_the_run_and_nothing_else(tmp_path: Path) -> None:
    for name in ("checkpoints/step-000001", "checkpoints/.writing-step-000002", ".writing-final", "final", "reference", "notes"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("metrics.jsonl", "config.yaml", "notes/idea.txt", "thesis.tex"):
        (tmp_path / name).write_text("x")
    with claim(tmp_path, resume=True) as folder:
        folder.begin(fresh=False)
        assert not list(tmp_path.rglob(".writing-*"))
        assert (tmp_path / "checkpoints" / "step-000001").is_dir()
        assert (tmp_path / "metrics.jsonl").read_text() == "x"
        folder.begin(fresh=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "metrics.jsonl", "notes", "thesis.tex"]
    assert (tmp_path / "metrics.jsonl").read_text() == ""


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}])
def test_a_folder_of_something_else_is_refused_whatever_is_asked(tmp_path: Path, options: dict[str, bool]) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(OutputError, match=r"not a run's \(thesis.tex\)"), claim(tmp_path, **options):
        pass
    assert (tmp_path / "thesis.tex").read_text() == "x"


def test_a_second_process_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    code = "import sys; from fastalign.train.folder import claim; claim(sys.argv[1], resume=True).__enter__()"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with claim(tmp_path):
        second = subprocess.run(command, capture_output=True, text=True)
        assert tmp_path.exists()  # empty still, and not the second one's to remove
        (tmp_path / "metrics.jsonl").write_text("")
        assert second.returncode == 1
        assert "another process is at work in this folder" in second.stderr
    assert subprocess.run(command, capture_output=True).returncode == 0


def test_a_path_that_cannot_be_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(OutputError, match=rf"{path}: cannot write in the output folder .*choose another --output"), claim(path):
            pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere; unproven here: the message for a read-only folder")
def test_a_read_only_folder_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="Permission denied"), claim(tmp_path):
        pass


def test_failures_while_writing_name_the_place_and_the_remedy(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match=r"checkpoint: cannot write \(No space left on device\); free space .*--resume"),
        writing(Path("checkpoint")),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(OutputError, match=r"cannot write \(Read-only file system\); make it writable"), writing(Path("checkpoint")):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def test_publish_replaces_whole_folders(tmp_path: Path) -> None:
    old, new = tmp_path / "final", tmp_path / "new"
    for folder, name in ((old, "old"), (new, "new")):
        folder.mkdir()
        (folder / name).write_text(name)
    publish(new, old)
    assert [p.name for p in tmp_path.iterdir()] == ["final"]
    assert [p.name for p in old.iterdir()] == ["new"]


def test_a_refused_folder_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(OutputError), claim(tmp_path):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_system_without_locks_is_said_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*_: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", no_locks)
    with claim(tmp_path / "run") as folder:
        assert folder.path.is_dir()
    assert "has no locks (No locks available)" in caplog.text
