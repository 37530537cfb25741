"""Checkpoints that are cut short, damaged, foreign, or written onto a full disk."""

from __future__ import annotations

import json
import random
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fastalign.errors import CheckpointError, OutputError
from fastalign.train import checkpoint
from fastalign.train.checkpoint import Identity, Progress

IDENTITY = Identity("dpo", {"beta": 0.1, "data.columns": {}}, data="d1", model="m1")
WEIGHTS = {"w": torch.arange(6.0).view(2, 3), "h": torch.ones(3, dtype=torch.bfloat16)}
OPTIMIZER = {"w/exp_avg": torch.full((2, 3), 0.5), "w/step": torch.tensor(4.0)}


def save(folder: Path, step: int, *, keep: int = 9, scale: float = 1.0) -> Path:
    weights = {name: value * scale for name, value in WEIGHTS.items()}
    return checkpoint.save(folder, Progress(step, num_tokens=10 * step), IDENTITY, weights, OPTIMIZER, keep=keep)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_round_trip(tmp_path: Path) -> None:
    path = save(tmp_path / "checkpoints", 7)
    assert names(path) == ["optimizer.safetensors", "rng.safetensors", "state.json", "weights.safetensors"]  # no pickle
    state = checkpoint.verify(path)
    assert Progress(**state["progress"]) == Progress(7, num_tokens=70)
    checkpoint.check_identity(path, state, IDENTITY)
    model = nn.ParameterDict({name: torch.zeros_like(value) for name, value in WEIGHTS.items()})
    checkpoint.restore_weights(dict(model.named_parameters()), checkpoint.load_tensors(path, "weights"), path)
    assert all(torch.equal(model[name], value) for name, value in WEIGHTS.items())
    assert all(torch.equal(value, OPTIMIZER[name]) for name, value in checkpoint.load_tensors(path, "optimizer").items())


def test_generators_continue_where_they_were(tmp_path: Path) -> None:
    def draw() -> tuple[float, ...]:
        return random.gauss(0, 1), random.random(), np.random.standard_normal(), np.random.rand(), torch.rand(1).item()

    random.gauss(0, 1)  # leaves a cached second value behind, as does standard_normal
    np.random.standard_normal()
    path = save(tmp_path, 1)
    expected = draw()
    assert draw() != expected
    checkpoint.restore_rng(checkpoint.load_tensors(path, "rng"))
    assert draw() == expected


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "delete"])
def test_damage_is_named_and_the_previous_checkpoint_taken(tmp_path: Path, name: str, damage: str) -> None:
    save(tmp_path, 10)
    newest = save(tmp_path, 20)
    file = newest / name
    content = bytearray(file.read_bytes())
    if damage == "truncate":
        file.write_bytes(content[:-3])
    elif damage == "flip":
        content[0 if name == "state.json" else -1] ^= 1
        file.write_bytes(content)
    else:
        file.unlink()
    found = checkpoint.newest_good(tmp_path)
    assert found is not None
    assert (found.path.name, found.state["progress"]["step"]) == ("step-000010", 10)
    assert list(found.damaged) == [newest]
    assert str(file) in found.damaged[newest]
    if name != "state.json":
        assert {"truncate": "truncated, ", "flip": "CRC-32", "delete": "missing"}[damage] in found.damaged[newest]


def test_no_good_checkpoint_left_is_an_error_and_none_at_all_is_not(tmp_path: Path) -> None:
    assert checkpoint.newest_good(tmp_path / "absent") is None
    for step in (1, 2):
        (save(tmp_path, step) / "weights.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"(?s)step-000002.*truncated, 0 of.*step-000001.*No good checkpoint is left.*--overwrite"):
        checkpoint.newest_good(tmp_path)


def test_a_damaged_checkpoint_is_set_aside_once(tmp_path: Path) -> None:
    save(tmp_path, 1)
    checkpoint.set_aside(save(tmp_path, 2))
    checkpoint.set_aside(save(tmp_path, 2))
    assert names(tmp_path) == ["step-000001", "step-000002.damaged"]
    assert [p.name for p in checkpoint.list_checkpoints(tmp_path)] == ["step-000001"]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Identity("kto", IDENTITY.options, "d1", "m1"), r"of a run of dpo, not kto"),
        (Identity("dpo", {"beta": 0.2, "data.columns": {}}, "d1", "m1"), r"beta was 0.1 and is 0.2.*options of the run"),
        (Identity("dpo", IDENTITY.options, "d2", "m1"), r"of another data \(fingerprint d1, here d2\)"),
        (Identity("dpo", IDENTITY.options, "d1", "m2"), r"of another model \(fingerprint m1, here m2\)"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, other: Identity, message: str) -> None:
    path = save(tmp_path, 1)
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.check_identity(path, checkpoint.verify(path), other)
    assert str(path) in str(caught.value)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    saved = checkpoint.load_tensors(path, "weights")
    w, h = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(3))
    with pytest.raises(CheckpointError, match=r"another model: 1 weights exist on one side only, such as h"):
        checkpoint.restore_weights({"w": w}, saved, path)
    with pytest.raises(CheckpointError, match=r"another model: w is \(2, 3\) there and \(3,\) here"):
        checkpoint.restore_weights({"w": h, "h": h}, saved, path)


def test_old_checkpoints_go_only_after_the_new_one_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-000002", "step-000003"]
    seen = []
    monkeypatch.setattr(checkpoint, "publish", lambda *_: seen.append(names(tmp_path)))
    save(tmp_path, 4, keep=2)
    assert seen == [[".writing-step-000004", "step-000002", "step-000003"]]


def test_more_than_six_digits_still_sort_by_number(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000):
        save(tmp_path, step, keep=1)
    assert names(tmp_path) == ["step-1000000"]


def test_a_full_disk_is_named_and_the_last_checkpoint_stays(tmp_path: Path) -> None:
    """The limit on the file size is the kernel's own: no call is replaced."""
    good = save(tmp_path, 1)
    with file_size_limit(200), pytest.raises(OutputError, match=r"step-000002: cannot write \(.*File too large.*\); free space .*--resume"):
        save(tmp_path, 2)
    assert names(tmp_path) == ["step-000001"]
    checkpoint.verify(good)
    save(tmp_path, 2)
    assert names(tmp_path) == ["step-000001", "step-000002"]


def test_another_format_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(state | {"format": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        checkpoint.verify(path)


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
