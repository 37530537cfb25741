"""metrics.jsonl through writing, killing and resuming; the trackers; what a terminal and a log file show."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from fastalign.errors import CheckpointError, ConfigError, DependencyError, OutputError
from fastalign.train import metrics as metrics_module
from fastalign.train.metrics import MetricsWriter, memory, peak_rss_bytes, read_metrics


def writer(folder: Path, **options: object) -> MetricsWriter:
    settings = {"total_steps": 4, "run_name": "toy", "progress": False, **options}
    return MetricsWriter(folder, **settings)  # type: ignore[arg-type]


def test_one_json_object_per_row(tmp_path: Path) -> None:
    with writer(tmp_path) as logs:
        logs.log(1, {"loss": torch.tensor(0.5), "num_tokens": 10, "mem/peak_rss_gib": 7.0})
        logs.log(1, {"loss": 0.25, "eval_rewards/accuracies": 1.0}, kind="eval")
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [
        {"step": 1, "loss": 0.5, "num_tokens": 10, "mem/peak_rss_gib": 7.0},
        {"step": 1, "eval_loss": 0.25, "eval_rewards/accuracies": 1.0},
    ]


def test_non_finite_numbers_are_valid_json_and_come_back(tmp_path: Path) -> None:
    with writer(tmp_path) as logs:
        logs.log(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.1})
    text = (tmp_path / "metrics.jsonl").read_text()
    strict = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert (strict["a"], strict["b"], strict["c"]) == ("NaN", "Infinity", "-Infinity")
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(row["a"])
    assert (row["b"], row["c"], row["d"]) == (math.inf, -math.inf, 0.1)


def test_training_rows_get_peak_memory(tmp_path: Path) -> None:
    with writer(tmp_path) as logs:
        logs.log(1, {"loss": 1.0})
        logs.log(1, {"loss": 1.0}, kind="eval")
    train, held_out = read_metrics(tmp_path / "metrics.jsonl")
    assert train["mem/peak_rss_gib"] > 0.05  # torch alone is more
    assert set(held_out) == {"step", "eval_loss"}


def test_rows_survive_a_kill(tmp_path: Path) -> None:
    code = (
        "import os, signal; from pathlib import Path; from fastalign.train.metrics import MetricsWriter\n"
        f"w = MetricsWriter(Path({str(tmp_path)!r}), total_steps=9, run_name='x', progress=False)\n"
        "for step in range(1, 4): w.log(step, {'loss': step / 3})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    assert killed.returncode == -9
    assert [row["loss"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1 / 3, 2 / 3, 1.0]


def test_resume_gives_the_file_of_an_uninterrupted_run(tmp_path: Path) -> None:
    def rows(first: int, last: int) -> list[tuple[int, dict[str, float], str]]:
        return [(s, {"loss": 1 / s, "nan": math.nan, "mem/peak_rss_gib": 1.0}, "train") for s in range(first, last + 1)]

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    with writer(whole) as logs:
        for row in rows(1, 4):
            logs.log(*row)
    with writer(cut) as logs:
        for row in rows(1, 3):
            logs.log(*row)
    with open(cut / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # torn by the kill
    with writer(cut, resume_step=2) as logs:
        for row in rows(3, 4):
            logs.log(*row)
    assert (cut / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert os.listdir(cut) == ["metrics.jsonl"]


def test_resume_without_checkpoint_starts_empty(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "eval_loss": 1}\n{"step": 1, "loss": 1}\n')
    writer(tmp_path, resume_step=0).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


@pytest.mark.parametrize("line", ["{broken", "[1]", '{"loss": 1}', '{"step": "x"}', "\x00\x00"])
def test_a_damaged_row_inside_the_file_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1, "loss": 1}}\n{line}\n{{"step": 3, "loss": 1}}\n')
    with pytest.raises(CheckpointError) as caught:
        writer(tmp_path, resume_step=3)
    assert str(caught.value).startswith(f"{path}:2: not a metrics row")
    assert "delete this line" in str(caught.value)
    assert path.read_text().count("\n") == 3  # and the file is as it was


def test_full_disk_is_a_named_error(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here: that a full disk is named stays unproven")
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics_module, "truncate_metrics", lambda path, step: None)
        logs = writer(tmp_path)
    with pytest.raises(OutputError, match=r"metrics\.jsonl: cannot write \(No space left on device\); free space"):
        logs.log(1, {"loss": 1.0})


def test_loggers_are_checked_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown logger 'wanb'; did you mean wandb\?"):
        writer(tmp_path, loggers=["wanb"])
    with pytest.raises(ConfigError, match="known: tensorboard, wandb, trackio"):
        writer(tmp_path, loggers=["qqqq"])
    assert os.listdir(tmp_path) == []


def test_a_missing_logger_names_the_install_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_module, "find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    with pytest.raises(DependencyError, match="pip install trackio"):
        writer(tmp_path, loggers=["trackio"])


class FakeTracker(types.ModuleType):
    """Stands in for wandb and trackio: records calls. What the services do with them stays unproven here."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple[str, object]] = []

    def init(self, **options: object) -> FakeTracker:
        self.calls.append(("init", options))
        return self

    def log(self, values: object, step: int) -> None:
        self.calls.append(("log", (values, step)))

    def finish(self) -> None:
        self.calls.append(("finish", None))


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers_get_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    fake = FakeTracker(name)
    monkeypatch.setitem(sys.modules, name, fake)
    row = {"loss": 0.5, "mem/peak_rss_gib": 1.0}
    with writer(tmp_path, loggers=[name], config={"beta": 0.1}) as logs:
        logs.log(3, row)
        logs.log(3, {"loss": 0.4}, kind="eval")
    kinds = [kind for kind, _ in fake.calls]
    assert kinds == ["init", "log", "log", "finish"]
    init = fake.calls[0][1]
    assert isinstance(init, dict)
    assert (init["name"], init["project"], init["config"]) == ("toy", "fastalign", {"beta": 0.1})
    assert [call[1] for call in fake.calls[1:3]] == [(row, 3), ({"eval_loss": 0.4}, 3)]


def test_a_tracker_that_does_not_start_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeTracker("wandb")
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(fake, "init", lambda **options: 1 / 0)
    with pytest.raises(DependencyError, match="wandb did not start: division by zero; mend that, or leave wandb out of --loggers"):
        writer(tmp_path, loggers=["wandb"])


def test_wandb_resumes_the_same_run_and_a_new_run_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeTracker("wandb")
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for step in (0, 2, 0):
        writer(tmp_path, loggers=["wandb"], resume_step=step).close()
    first, resumed, new = (call[1]["id"] for call in fake.calls if call[0] == "init")  # type: ignore[index]
    assert first == resumed != new


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_at_both_ends_and_for_evaluations(tmp_path: Path) -> None:
    stream = io.StringIO()
    with writer(tmp_path, progress=True, stream=stream, total_steps=50) as logs:
        for step in range(1, 51):
            logs.log(step, {"loss": 0.5, "rewards/accuracies": 0.75, "perf/tokens_per_second": 1234.0, "mem/peak_rss_gib": 2.0})
        logs.log(50, {"loss": 0.25}, kind="eval")
    lines = stream.getvalue().splitlines()
    assert lines == [
        "step 1/50  loss 0.5000  accuracy 0.750  1,234 tok/s  2.00 GiB",
        "step 50/50  loss 0.5000  accuracy 0.750  1,234 tok/s  2.00 GiB",
        "step 50/50  eval loss 0.2500",
    ]


def test_plain_lines_tell_the_time_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(metrics_module.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    with writer(tmp_path, progress=True, stream=stream, total_steps=100, resume_step=10) as logs:
        for step in range(11, 15):
            now[0] += 10.0
            logs.log(step, {"loss": 1.0, "mem/peak_rss_gib": 2.0})
    assert stream.getvalue().splitlines()[-1] == "step 14/100  loss 1.0000  2.00 GiB  left 0:14:20"  # 86 steps of 10 s


def test_a_terminal_gets_a_bar(tmp_path: Path) -> None:
    stream = Terminal()
    with writer(tmp_path, progress=True, stream=stream, resume_step=1) as logs:
        logs.log(2, {"loss": 0.5, "rewards/accuracies": 0.75})
        logs.log(2, {"loss": 0.25}, kind="eval")
    text = stream.getvalue()
    assert "loss 0.5000  accuracy 0.750" in text
    assert "2/4" in text
    assert "step 2: eval loss 0.2500" in text


def test_peak_memory_is_that_of_this_process_and_grows_with_it() -> None:
    before = peak_rss_bytes()
    block = bytearray(64 * 2**20)
    block[::4096] = b"x" * len(block[::4096])
    assert peak_rss_bytes() >= before  # never falls
    code = "from fastalign.train.metrics import peak_rss_bytes as p; a = p(); b = bytearray(200 * 2**20); print(p() - a)"
    grown = int(subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, check=True).stdout)
    assert 190 * 2**20 < grown < 215 * 2**20
    assert memory()["mem/peak_rss_gib"] == pytest.approx(peak_rss_bytes() / 2**30, rel=0.01)
