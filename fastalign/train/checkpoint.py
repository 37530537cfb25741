"""Checkpoints: folders of safetensors and JSON that appear whole or not at all, and from which a run continues bit for bit.

    checkpoints/step-000040/
        weights.safetensors      the trainable weights (of a LoRA run: the adapter)
        optimizer.safetensors    moments, step counts, float32 copies
        rng.safetensors          generator states of torch, CUDA, numpy and Python
        objective.safetensors    what else the algorithm changes as it trains (DPO: a reference that follows), if anything
        state.json               counters, options, fingerprints of the data and of the initial model; sizes and CRC-32 of the files

Of a run of several processes each writes its rows of every weight and of the optimizer's state, and its generators:
`weights-2-of-4.safetensors`. Any number of processes continues from either form, bit for bit in weights and optimizer.

A folder is written under a temporary name, synced, and renamed, so that a kill or a full disk at any moment leaves the last good one.
"""

from __future__ import annotations

import json
import random
import shutil
import zlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastalign.errors import CheckpointError, OutputError
from fastalign.models.divided_head import whole_shape
from fastalign.ranks import Ranks
from fastalign.train.folder import TEMPORARY, publish, writing

ALONE = Ranks()
_FORMAT = 1
_STATE = "state.json"


@dataclass
class Progress:
    """Counters of a run; together with the weights, the optimizer and the generators its whole state."""

    step: int = 0  # optimizer steps done, skipped ones included
    num_tokens: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    max_tokens: int | None = None  # per micro-batch, since the device ran out of memory; None: as the options say


@dataclass(frozen=True)
class Identity:
    """What a checkpoint belongs to: a run that differs in any of it must not continue from it."""

    algorithm: str
    options: dict[str, Any]  # those that change the result
    data: str  # fingerprint of the tokenized samples
    model: str  # fingerprint of the initial weights, without the adapter that is trained


def save(
    folder: Path,
    progress: Progress,
    identity: Identity,
    weights: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    objective: Mapping[str, Tensor] | None = None,
    *,
    keep: int,
    ranks: Ranks = ALONE,
) -> Path:
    """Write `folder/step-NNNNNN`, then delete all but the newest `keep` checkpoints. Raises OutputError, leaving the older ones whole.

    Of several `ranks` each gives its rows of the weights and of the optimizer's state; the first one writes the rest, and makes the
    checkpoint appear when all files are there. They must share a file system.
    """
    target = folder / f"step-{progress.step:06d}"
    temporary = folder / f"{TEMPORARY}{target.name}"
    with ranks.together(), writing(target):
        if ranks.is_first:
            folder.mkdir(exist_ok=True)
            temporary.mkdir()
    try:
        own: dict[str, Any] = {}
        with ranks.together(), writing(target):
            parts = {"weights": weights, "optimizer": optimizer, "rng": rng_state()}
            parts = {f"{name}{_suffix(ranks.index, ranks.size)}": tensors for name, tensors in parts.items()}
            if objective and ranks.is_first:
                parts["objective"] = objective
            for name, tensors in parts.items():
                file = temporary / f"{name}.safetensors"
                save_file({key: value.detach().contiguous() for key, value in tensors.items()}, file)
                own[file.name] = [file.stat().st_size, _crc(file)]
        files = {name: mark for written in ranks.gather(own) for name, mark in written.items()}
        with ranks.together(), writing(target):
            if ranks.is_first:
                if absent := [name for name in files if not (temporary / name).is_file()]:
                    raise OutputError(
                        f"{target}: {absent[0]}, which another rank wrote, is not there; give all hosts the same file system at {folder}"
                    )
                state = {
                    "format": _FORMAT,
                    "progress": asdict(progress),
                    "identity": asdict(identity),
                    "files": dict(sorted(files.items())),
                }
                (temporary / _STATE).write_text(json.dumps(state, indent=1))
                publish(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    with ranks.together(), writing(target):
        if ranks.is_first:
            for old in list_checkpoints(folder)[keep:]:
                shutil.rmtree(old)
    return target


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first, good or not."""
    found = [path for path in folder.glob("step-*") if path.name[5:].isdecimal()]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, so that it is neither read nor counted again; returns the new name."""
    target = path.with_name(f"{path.name}.damaged")
    with writing(target):
        if target.exists():
            shutil.rmtree(target)
        return path.rename(target)


def verify(path: Path) -> dict[str, Any]:
    """The contents of a checkpoint's state.json. Raises CheckpointError when any of its files is missing, cut short or altered."""
    try:
        state = json.loads((path / _STATE).read_text())
        files = state["files"]
        if state["format"] != _FORMAT:
            raise CheckpointError(f"{path}: written by another version of fastalign (format {state['format']}, this one reads {_FORMAT})")
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path / _STATE}: missing or damaged ({error})") from error
    for name, (size, crc) in files.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file}: missing")
        if file.stat().st_size != size:
            raise CheckpointError(f"{file}: truncated, {file.stat().st_size} of {size} bytes")
        if _crc(file) != crc:
            raise CheckpointError(f"{file}: damaged, its CRC-32 does not match")
    return state


@dataclass(frozen=True)
class Found:
    """A checkpoint that can be continued from."""

    path: Path
    state: dict[str, Any]  # its state.json
    damaged: dict[Path, str]  # newer checkpoints, and what is wrong with them


def newest_good(folder: Path) -> Found | None:
    """The newest undamaged checkpoint; None when there is no checkpoint at all.

    Raises CheckpointError when there are checkpoints and all are damaged.
    """
    damaged: dict[Path, str] = {}
    for path in list_checkpoints(folder):
        try:
            return Found(path, verify(path), damaged)
        except CheckpointError as error:
            damaged[path] = str(error)
    if damaged:
        raise CheckpointError(
            f"{'; '.join(damaged.values())}. No good checkpoint is left: start again with --overwrite, or put back a copy"
        )
    return None


def check_identity(path: Path, state: dict[str, Any], identity: Identity) -> None:
    """Raise CheckpointError, naming what differs, unless the checkpoint was written by this very run."""
    own = json.loads(json.dumps(asdict(identity)))
    other = state["identity"]
    if other["algorithm"] != own["algorithm"]:
        raise CheckpointError(
            f"{path}: of a run of {other['algorithm']}, not {own['algorithm']}; resume with that command, or choose another --output"
        )
    names = sorted({*own["options"], *other["options"]})
    if changed := [n for n in names if own["options"].get(n) != other["options"].get(n)]:
        shown = ", ".join(f"{n} was {other['options'].get(n)!r} and is {own['options'].get(n)!r}" for n in changed)
        raise CheckpointError(
            f"{path}: of a run with other options ({shown}); resume with the options of the run, or choose another --output"
        )
    for what, remedy in {"model": "the model that the run began with", "data": "the data that the run began with"}.items():
        if other[what] != own[what]:
            raise CheckpointError(f"{path}: of another {what} (fingerprint {other[what]}, here {own[what]}); resume with {remedy}")


def load_tensors(path: Path, name: str, part: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
    """The tensors of one name of a checkpoint, on the CPU, put together from the files of all ranks; of each its `part`, if given."""
    file = path / f"{name}.safetensors"
    try:
        if file.is_file() or not (size := processes_of(path)):
            found = load_file(file)
            return {key: _kept(tensor, part) for key, tensor in found.items()}
        with ExitStack() as stack:
            files = [f"{path / name}{_suffix(index, size)}.safetensors" for index in range(size)]
            shards = [stack.enter_context(safe_open(shard, framework="pt")) for shard in files]
            homes: dict[str, list[Any]] = {}
            for shard in shards:
                for key in shard.keys():  # noqa: SIM118 (not a dict)
                    homes.setdefault(key, []).append(shard)
            return {key: _kept(_joined([shard.get_tensor(key) for shard in homes[key]]), part) for key in homes}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error})") from error


def processes_of(path: Path) -> int:
    """How many ranks wrote a checkpoint; 0 for a process that was alone."""
    found = next(path.glob("weights-1-of-*.safetensors"), None)
    return int(found.stem.rsplit("-", 1)[1]) if found else 0


def _suffix(index: int, size: int) -> str:
    return f"-{index + 1}-of-{size}" if size > 1 else ""


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if parts[0].ndim else parts[0]


def _kept(tensor: Tensor, part: Callable[[Tensor], Tensor] | None) -> Tensor:
    return tensor if part is None or not tensor.ndim else part(tensor).clone()


def restore_weights(
    weights: Mapping[str, nn.Parameter],
    saved: Mapping[str, Tensor],
    path: Path,
    copy: Callable[[Tensor, Tensor], Any] = Tensor.copy_,
) -> None:
    """Copy saved values into the trainable weights by `copy`; CheckpointError when names or shapes differ."""
    if weights.keys() != saved.keys():
        names = sorted(weights.keys() ^ saved.keys())
        raise CheckpointError(f"{path}: of another model: {len(names)} weights exist on one side only, such as {names[0]}")
    with torch.no_grad():
        for name, value in saved.items():
            if (shape := whole_shape(weights[name])) != value.shape:
                raise CheckpointError(f"{path}: of another model: {name} is {tuple(value.shape)} there and {tuple(shape)} here")
            copy(weights[name], value)


def load_rng(path: Path, index: int) -> dict[str, Tensor]:
    """What rank `index` of the run had in its generators; of a process that was alone, its own."""
    return load_tensors(path, f"rng{_suffix(index, processes_of(path))}")


def restore_rng(saved: Mapping[str, Tensor]) -> None:
    """Put every generator into the saved state."""
    torch.set_rng_state(saved["torch"])
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"cuda.{i}" in saved:
            torch.cuda.set_rng_state(saved[f"cuda.{i}"], i)
    key = saved["numpy.key"].numpy().astype(np.uint32)
    position, has_gauss = saved["numpy.position"].tolist()
    np.random.set_state(("MT19937", key, position, has_gauss, float(saved["numpy.gauss"])))
    gauss = float(saved["python.gauss"])
    random.setstate((3, tuple(saved["python"].tolist()), None if gauss != gauss else gauss))


def rng_state() -> dict[str, Tensor]:
    """The states of all generators, as `restore_rng` takes them."""
    _, key, position, has_gauss, cached = np.random.get_state()
    _, python, gauss = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy.key": torch.from_numpy(np.asarray(key).astype(np.int64)),
        "numpy.position": torch.tensor([position, has_gauss]),
        "numpy.gauss": torch.tensor(cached, dtype=torch.float64),
        "python": torch.tensor(python),
        "python.gauss": torch.tensor(float("nan") if gauss is None else gauss, dtype=torch.float64),
    }
    if torch.cuda.is_available():
        state |= {f"cuda.{i}": torch.cuda.get_rng_state(i) for i in range(torch.cuda.device_count())}
    return state


def _crc(file: Path) -> int:
    crc = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return crc
