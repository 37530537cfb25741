"""Kill training runs with SIGKILL, resume them, and say how the result differs from a run that was left alone.

    python tests/train/killing.py INPUTS WORK KILLS     # INPUTS: model/, pairs.jsonl, heldout.jsonl

One process imports torch and forks a child per run, so that a kill costs milliseconds. In every child fsync is slow, as on
a real disk, and saving takes a good part of the time. Kills alternate between a moment drawn from the whole run, start and end
included, and a moment drawn from the writing of a checkpoint or of final/. Prints one JSON object.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import fastalign.train.loop  # here, once, before any fork
from fastalign import train
from fastalign.data.config import DataConfig
from fastalign.models.config import LoraConfig, ModelConfig
from fastalign.objectives.dpo import DPOConfig
from fastalign.train.metrics import read_metrics

FSYNC_SECONDS = 0.004
KINDS = ("full", "lora")


def config(kind: str, inputs: Path, output: Path, *, resume: bool) -> DPOConfig:
    return DPOConfig(
        model=ModelConfig(path=str(inputs / "model")),
        data=DataConfig(path=str(inputs / "pairs.jsonl"), eval_path=str(inputs / "heldout.jsonl")),
        lora=LoraConfig(r=4, dropout=0.2) if kind == "lora" else LoraConfig(),
        output=str(output),
        resume=resume,
        batch_size=4,
        max_tokens=256,
        epochs=3,
        learning_rate=1e-3,
        warmup_ratio=0.1,
        save_every=2,
        eval_every=4,
        keep_checkpoints=2,
    )


def start(settings: DPOConfig, log: Path) -> int:
    """Fork a child that trains; returns its process id."""
    if pid := os.fork():
        return pid
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        fastalign.train.loop.write_report = no_report
        fsync = os.fsync
        os.fsync = lambda file: (time.sleep(FSYNC_SECONDS), fsync(file))[1]
        train(settings)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def no_report(run: Path) -> Path:
    """Curves take longer than all the rest of so short a run, and are drawn from metrics.jsonl alone."""
    return run


def finish(pid: int, log: Path) -> None:
    _, status = os.waitpid(pid, 0)
    if status:
        raise SystemExit(f"a run ended with status {status}:\n{log.read_text()}")


def kill(pid: int) -> bool:
    """SIGKILL a child; False when it had already ended."""
    done, _ = os.waitpid(pid, os.WNOHANG)
    if done:
        return False
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return True


def wait_for_saving(run: Path, pid: int, count: int) -> None:
    """Return at the `count`-th time that something is being written under a temporary name, or when the child ends."""
    was = False
    while count:
        saving = any(run.glob(".writing-*")) or any(run.glob("checkpoints/.writing-*"))
        count -= saving and not was
        was = saving
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return
        time.sleep(0.0005)


def rows(run: Path) -> list[dict[str, Any]]:
    found = read_metrics(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else []
    return [{name: value for name, value in row.items() if not name.startswith(("perf/", "mem/"))} for row in found]


def weights(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run / "final").glob("*.safetensors"))}


def main(inputs: Path, work: Path, kills: int) -> dict[str, Any]:
    rng = random.Random(kills)
    whole, seconds = {}, {}
    for kind in KINDS:
        whole[kind] = work / f"whole-{kind}"
        started = time.perf_counter()
        finish(start(config(kind, inputs, whole[kind], resume=False), work / "log"), work / "log")
        seconds[kind] = time.perf_counter() - started
    saves = len([row for row in rows(whole["full"]) if "loss" in row]) // 2 + 1
    trials = []
    for k in range(kills):
        kind, run = KINDS[k // 2 % 2], work / f"run-{k}"
        during_saving = k % 2 == 1
        pid = start(config(kind, inputs, run, resume=False), work / "log")
        if during_saving:
            wait_for_saving(run, pid, rng.randint(1, saves))
            time.sleep(rng.random() * 8 * FSYNC_SECONDS)
        else:
            time.sleep(seconds[kind] * (k + rng.random()) / kills)
        killed = kill(pid)
        trial: dict[str, Any] = {
            "kind": kind,
            "killed": killed,
            "rows": len(rows(run)),
            "half_written": sorted(path.name for path in run.rglob(".writing-*")),
            "checkpoints": sorted(path.name for path in run.glob("checkpoints/step-*")),
        }
        if k % 5 == 4:  # and once more while it is resuming
            pid = start(config(kind, inputs, run, resume=True), work / "log")
            time.sleep(seconds[kind] * rng.random())
            trial["killed_again"] = kill(pid)
        finish(start(config(kind, inputs, run, resume=True), work / "log"), work / "log")
        trial["same_metrics"] = rows(run) == rows(whole[kind])
        trial["same_weights"] = weights(run) == weights(whole[kind])
        trial["leftovers"] = sorted(path.name for path in run.rglob(".writing-*"))
        trials.append(trial)
    return {"rows": len(rows(whole["full"])), "seconds": seconds, "trials": trials}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))))
