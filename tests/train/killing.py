"""Kill training runs with SIGKILL, resume them, and say how the result differs from a run that was left alone.

    python tests/train/killing.py INPUTS WORK KILLS KIND...   # INPUTS: model/, pairs.jsonl, heldout.jsonl; prompts.jsonl, rewards.py

One process imports torch and forks a child per run, so that a kill costs milliseconds. In every child fsync is slow, as on
a real disk, and saving takes a good part of the time. Every other kind of kill is drawn from the whole run, start and end
included; the others strike inside a place: the writing of a checkpoint or of final/, and in online runs the generating of
answers, or a later step on answers that are there. Prints one JSON object.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import transformers.models.qwen3.modeling_qwen3  # noqa: F401 (here, once, before any fork)

import fastalign.rollout.engine
import fastalign.train.loop
from fastalign import train
from fastalign.data.config import DataConfig, PromptDataConfig
from fastalign.models.config import LoraConfig, ModelConfig
from fastalign.objectives.base import RunConfig
from fastalign.objectives.dpo import DPOConfig
from fastalign.objectives.grpo import GRPOConfig
from fastalign.train.metrics import read_metrics

FSYNC_SECONDS = 0.004
ATTEMPTS = 10  # to kill a run in a place
ANYWHERE, GENERATING, REUSING, SAVING = "anywhere", "generating", "reusing", "saving"
TARGETS = {"full": (ANYWHERE, SAVING), "lora": (ANYWHERE, SAVING)} | dict.fromkeys(
    ("grpo", "grpo-lora"), (ANYWHERE, GENERATING, REUSING, SAVING)
)


def config(kind: str, inputs: Path, output: Path, *, resume: bool) -> RunConfig:
    both: dict[str, Any] = {
        "model": ModelConfig(path=str(inputs / "model")),
        "lora": LoraConfig(r=4, dropout=0.2) if kind.endswith("lora") else LoraConfig(),
        "output": str(output),
        "resume": resume,
        "max_tokens": 256,
        "learning_rate": 1e-3,
        "warmup_ratio": 0.1,
        "eval_every": 4,
        "keep_checkpoints": 2,
    }
    if not kind.startswith("grpo"):
        data = DataConfig(path=str(inputs / "pairs.jsonl"), eval_path=str(inputs / "heldout.jsonl"))
        return DPOConfig(data=data, batch_size=4, epochs=3, save_every=2, **both)
    return GRPOConfig(
        data=PromptDataConfig(path=str(inputs / "prompts.jsonl"), eval_path=str(inputs / "prompts.jsonl")),
        rewards=[f"{inputs}/rewards.py:likes_o"],
        batch_size=2,
        num_generations=4,
        max_completion_length=8,
        steps_per_generation=2,  # four steps with the answers of a generation: every other checkpoint has to hold them
        num_iterations=2,
        refill=1,
        beta=0.1,
        completions_every=1,
        max_steps=16,
        save_every=3,
        **both,
    )


class Place:
    """Where a child is: in memory that it shares with its parent, and that outlives it."""

    NAMES = (ANYWHERE, GENERATING, REUSING, SAVING)

    def __init__(self) -> None:
        size = len(self.NAMES)
        shared = np.frombuffer(mmap.mmap(-1, 8 * (1 + 2 * size)))
        self.now, self.visits, self.seconds = shared[:1], shared[1 : 1 + size], shared[1 + size :]

    @property
    def name(self) -> str:
        return self.NAMES[int(self.now[0])]

    def within(self, name: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Call a function, and be in the place `name` until it returns."""
        at, started = self.NAMES.index(name), time.perf_counter()
        self.visits[at] += 1
        self.now[0] = at
        result = function(*args, **options)
        self.now[0] = 0
        self.seconds[at] += time.perf_counter() - started
        return result

    def watch(self) -> None:
        """In a child: let what generates, reuses and saves say so."""
        loop, engine = fastalign.train.loop, fastalign.rollout.engine
        step, finish = loop._Run._step, loop._Run._finish

        def watched(run: Any) -> None:
            later = run.progress.step % run.config.steps_per_draw
            self.within(REUSING, step, run) if later else step(run)

        loop._Run._step = watched
        loop._Run._finish = lambda run: self.within(SAVING, finish, run)
        loop.checkpoint.save = partial(self.within, SAVING, loop.checkpoint.save)
        engine.generate = partial(self.within, GENERATING, engine.generate)


def start(settings: RunConfig, log: Path, place: Place) -> int:
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
        place.watch()
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


def stop_within(pid: int, place: Place, name: str, visit: int, rng: random.Random, seconds: float) -> bool:
    """Halt a child at a random moment of its `visit`-th stay in a place that takes `seconds`, or of a later stay; False: at its end."""
    at = Place.NAMES.index(name)
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if place.visits[at] < visit or place.now[0] != at:
            time.sleep(0.0003)
            continue
        time.sleep(rng.random() * seconds)
        os.kill(pid, signal.SIGSTOP)
        os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        if place.now[0] == at:
            return True
        visit = int(place.visits[at]) + 1
        os.kill(pid, signal.SIGCONT)
    return False


def rows(run: Path) -> list[dict[str, Any]]:
    found = read_metrics(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else []
    return [{name: value for name, value in row.items() if not name.startswith(("perf/", "mem/"))} for row in found]


def answers(run: Path) -> str:
    """What an online run wrote down of its answers."""
    file = run / "completions.jsonl"
    return file.read_text(encoding="utf-8") if file.exists() else ""


def weights(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run / "final").glob("*.safetensors"))}


def main(inputs: Path, work: Path, kills: int, kinds: list[str]) -> dict[str, Any]:
    rng, log = random.Random(kills), work / "log"
    whole, seconds, calm = {}, {}, {}
    for kind in kinds:
        whole[kind], calm[kind] = work / f"whole-{kind}", Place()
        started = time.perf_counter()
        finish(start(config(kind, inputs, whole[kind], resume=False), log, calm[kind]), log)
        seconds[kind] = time.perf_counter() - started
    trials, targets = [], TARGETS[kinds[0]]
    for k in range(kills):
        kind, run = kinds[k // len(targets) % len(kinds)], work / f"run-{k}"
        target = targets[k % len(targets)]
        for _ in range(ATTEMPTS):
            place = Place()
            pid = start(config(kind, inputs, run, resume=False), log, place)
            if target == ANYWHERE:
                time.sleep(seconds[kind] * (k + rng.random()) / kills)
                break
            at = Place.NAMES.index(target)
            visits = int(calm[kind].visits[at])
            if stop_within(pid, place, target, rng.randint(1, visits), rng, calm[kind].seconds[at] / visits):
                break
            finish(pid, log)  # a busy machine let this process look too late, every time
            shutil.rmtree(run)
        else:
            raise SystemExit(f"{ATTEMPTS} runs ended before one could be halted while {target}")
        killed = kill(pid)
        trial: dict[str, Any] = {
            "kind": kind,
            "killed": killed,
            "target": target,
            "place": place.name,
            "rows": len(rows(run)),
            "half_written": sorted(path.name for path in run.rglob(".writing-*")),
            "checkpoints": sorted(path.name for path in run.glob("checkpoints/step-*")),
        }
        if k % 5 == 4:  # and once more while it is resuming
            pid = start(config(kind, inputs, run, resume=True), log, Place())
            time.sleep(seconds[kind] * rng.random())
            trial["killed_again"] = kill(pid)
        finish(start(config(kind, inputs, run, resume=True), log, Place()), log)
        trial["same_metrics"] = rows(run) == rows(whole[kind])
        trial["same_answers"] = answers(run) == answers(whole[kind])
        trial["same_weights"] = weights(run) == weights(whole[kind])
        trial["leftovers"] = sorted(path.name for path in run.rglob(".writing-*"))
        trials.append(trial)
    visits = {kind: dict(zip(Place.NAMES, map(int, place.visits))) for kind, place in calm.items()}
    return {"rows": len(rows(whole[kinds[0]])), "seconds": seconds, "visits": visits, "trials": trials}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])))
