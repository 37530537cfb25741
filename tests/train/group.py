"""Runs of a group of processes: `python -m torch.distributed.run --nproc_per_node N tests/train/group.py FOLDER TASK...`

FOLDER is what `inputs` made. A task is a case, whose run goes to FOLDER/<processes>/<case>, or one of "whole: NAME: CASE", "stop: NAME:
CASE", "resume: NAME: CASE" and "copy: NAME: OTHER", for runs of five steps at FOLDER/runs/NAME, "measure: NAME: CASE" or "long: NAME:
CASE". The process of a test imports this file for the same runs by itself.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import fastalign.train.loop
from fastalign import train
from fastalign.data.config import DataConfig, PromptDataConfig, RankedDataConfig, SupervisedDataConfig, UnpairedDataConfig
from fastalign.errors import RankError
from fastalign.models.config import LoraConfig, ModelConfig
from fastalign.objectives.base import Copying, RunConfig
from fastalign.objectives.cpo import CPOConfig, SimPOConfig
from fastalign.objectives.distill import DistillConfig, TeacherConfig
from fastalign.objectives.dpo import DPOConfig
from fastalign.objectives.gkd import GKDConfig
from fastalign.objectives.grpo import GRPOConfig
from fastalign.objectives.kto import KTOConfig
from fastalign.objectives.online_dpo import OnlineDPOConfig
from fastalign.objectives.orpo import ORPOConfig
from fastalign.objectives.ppo import PPOConfig
from fastalign.objectives.reinforce_pp import ReinforcePPConfig
from fastalign.objectives.reward import RewardConfig
from fastalign.objectives.rloo import RLOOConfig
from fastalign.objectives.sft import SFTConfig
from fastalign.ranks import ParallelConfig
from fastalign.train.distributed import Divided

Make = Callable[[Path], tuple[type[RunConfig], dict[str, Any]]]
LORA = LoraConfig(r=4, targets=["all-linear", "lm_head"])
VOCABULARY, DEEP = 325, 24
REWARDS = """
def likes_o(completions, **columns):
    return [text.count("o") / max(1, len(text)) for text in completions]
"""


def inputs(folder: Path) -> None:
    """Models and data of all cases."""
    from tiny import save_tiny, write_every_format

    save_tiny(folder / "model", "qwen3", tie_word_embeddings=True)
    save_tiny(folder / "untied", "llama", vocab_size=VOCABULARY)  # rows that two and four ranks cannot have equally many of
    save_tiny(folder / "teacher", "llama", seed=1, hidden_size=48, vocab_size=VOCABULARY)
    save_tiny(folder / "deep", "llama", hidden_size=256, intermediate_size=1024, num_hidden_layers=DEEP, num_attention_heads=4)
    save_tiny(folder / "half", "llama", vocab_size=VOCABULARY, dtype=torch.bfloat16)
    write_every_format(folder)
    (folder / "rewards.py").write_text(REWARDS)


def _online(f: Path, **options: Any) -> dict[str, Any]:
    shared = {"rewards": [f"{f}/rewards.py:likes_o"], "batch_size": 3, "num_generations": 4, "max_completion_length": 8}
    return {"data": PromptDataConfig(path=str(f / "prompts.jsonl")), **shared, **options}


# Every algorithm, and of each what a division could get wrong. What all have in common is in `config`.
CASES: dict[str, Make] = {
    "sft": lambda f: (SFTConfig, {"data": SupervisedDataConfig(path=str(f / "completions.jsonl"), eval_fraction=0.2)}),
    "sft, fewer samples than ranks": lambda f: (
        SFTConfig,
        {"data": SupervisedDataConfig(path=str(f / "completions.jsonl")), "batch_size": 1, "model": ModelConfig(path=str(f / "untied"))},
    ),
    "sft, checkpointing": lambda f: (
        SFTConfig,
        {
            "data": SupervisedDataConfig(path=str(f / "completions.jsonl")),
            "model": ModelConfig(path=str(f / "untied"), gradient_checkpointing=True),
        },
    ),
    "reward": lambda f: (RewardConfig, {"data": RankedDataConfig(path=str(f / "pairs.jsonl"), eval_fraction=0.2), "lora": LoraConfig(r=4)}),
    "dpo": lambda f: (DPOConfig, {"data": DataConfig(path=str(f / "pairs.jsonl"), eval_fraction=0.2)}),
    "dpo, adapter": lambda f: (
        DPOConfig,
        {"data": DataConfig(path=str(f / "pairs.jsonl")), "lora": LORA, "model": ModelConfig(path=str(f / "untied"))},
    ),
    "dpo, ranks and a reference that follows": lambda f: (
        DPOConfig,
        {
            "data": DataConfig(path=str(f / "pairs.jsonl")),
            "loss_type": ["sigmoid", "aot"],
            "sync_ref_model": True,
            "ref_model_sync_steps": 1,
        },
    ),
    "distill": lambda f: (
        DistillConfig,
        {
            "data": SupervisedDataConfig(path=str(f / "completions.jsonl")),
            "teacher": TeacherConfig(path=str(f / "teacher")),
            "model": ModelConfig(path=str(f / "untied")),
        },
    ),
    "kto": lambda f: (KTOConfig, {"data": UnpairedDataConfig(path=str(f / "singles.jsonl"), eval_fraction=0.2), "lora": LORA}),
    "kto, cached": lambda f: (KTOConfig, {"data": UnpairedDataConfig(path=str(f / "singles.jsonl"))}),
    "dpo, half": lambda f: (
        DPOConfig,
        {"data": DataConfig(path=str(f / "pairs.jsonl")), "model": ModelConfig(path=str(f / "half")), "learning_rate": 1e-2},
    ),
    "sft, rounded": lambda f: (
        SFTConfig,
        {
            "data": SupervisedDataConfig(path=str(f / "completions.jsonl")),
            "model": ModelConfig(path=str(f / "half")),
            "master_weights": False,
            "stochastic_rounding": True,
        },
    ),
    "orpo": lambda f: (ORPOConfig, {"data": DataConfig(path=str(f / "pairs.jsonl"))}),
    "cpo": lambda f: (CPOConfig, {"data": DataConfig(path=str(f / "pairs.jsonl"))}),
    "simpo": lambda f: (SimPOConfig, {"data": DataConfig(path=str(f / "pairs.jsonl"))}),
    "grpo": lambda f: (
        GRPOConfig,
        _online(f, beta=0.1, steps_per_generation=2, entropy_coef=0.01, top_entropy_quantile=0.5, temperature=0.8, refill=1),
    ),
    "grpo, fewer prompts than ranks": lambda f: (GRPOConfig, _online(f, batch_size=1, seed=1)),
    "rloo": lambda f: (RLOOConfig, _online(f, beta=0.1, lora=LORA, top_k=20)),
    "reinforce_pp": lambda f: (ReinforcePPConfig, _online(f, beta=0.1)),
    "ppo": lambda f: (PPOConfig, _online(f, beta=0.1)),
    "ppo, adapter": lambda f: (PPOConfig, _online(f, beta=0.1, lora=LORA, critic="adapter")),
    "online_dpo": lambda f: (OnlineDPOConfig, _online(f)),
    "gkd": lambda f: (
        GKDConfig,
        {
            "data": SupervisedDataConfig(path=str(f / "completions.jsonl"), eval_fraction=0.2),
            "teacher": TeacherConfig(path=str(f / "teacher")),
            "model": ModelConfig(path=str(f / "untied")),
            "lmbda": 0.5,
            "max_completion_length": 8,
        },
    ),
}


def config(folder: Path, case: str, output: Path, **options: Any) -> RunConfig:
    """The run of a case; `case` may end with how it is divided, as in "dpo / optimizer", "dpo / full 2" or "dpo / vocab".

    With "vocab" the model is one whose head is not its embedding, for one process, too.
    """
    name, _, division = case.partition(" / ")
    make, own = CASES[name](folder)
    shared = {"batch_size": 7, "max_tokens": 128, "learning_rate": 1e-3, "max_steps": 2, "model": ModelConfig(path=str(folder / "model"))}
    made = make(output=str(output), **(shared | own | options))
    words = division.split()
    replicas, head = next((int(word) for word in words if word.isdigit()), 1), "vocab" if "vocab" in words else "whole"
    if head == "vocab" and made.model.path == str(folder / "model"):
        made.model.path = str(folder / "untied")
    if division and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        made.parallel = ParallelConfig("optimizer" if "optimizer" in words else "full", head, replicas)  # type: ignore[arg-type]
    return made


def quiet() -> None:
    """No report, no card: they have tests of their own."""
    fastalign.train.loop.write_report = lambda *_, **__: None  # type: ignore[assignment]
    fastalign.train.loop.write_card = lambda *_, **__: None  # type: ignore[assignment]
    logging.getLogger("fastalign").setLevel(logging.ERROR)


def place(folder: Path, case: str, processes: int) -> Path:
    return folder / str(processes) / case.replace(" / ", "-").replace(" ", "_")


def run(folder: Path, tasks: Sequence[str], processes: int) -> None:
    for task in tasks:
        what, *rest = task.split(": ")
        if not rest:
            train(config(folder, task, place(folder, task, processes)))
        elif what == "measure":
            measure(config(folder, rest[1], folder / "runs" / rest[0], max_steps=1, model=ModelConfig(path=str(folder / "deep"))))
        elif what == "long":
            train(config(folder, rest[1], folder / "runs" / rest[0], max_steps=100000, save_every=0))
        elif what == "copy":
            if current_index() == 0:
                shutil.copytree(folder / "runs" / rest[0], folder / "runs" / rest[1])
            if processes > 1:
                torch.distributed.barrier()
        else:
            name, case = rest
            made = config(folder, case, folder / "runs" / name, max_steps=5, save_every=3)
            callbacks = {"stop": [stop_after_three(processes)], "kill": [die], "fail": [fail]}.get(what, [])
            ends = train(replace(made, resume=what == "resume"), callbacks=callbacks)
            assert (ends.interrupted, ends.step) == (("SIGTERM", 3) if what == "stop" else (None, 5))


def current_index() -> int:
    return int(os.environ.get("RANK", "0"))


def stop_after_three(processes: int) -> Callable[[int, dict[str, float]], None]:
    """Asks the last of the processes, and it alone, to stop."""

    def stop(step: int, _: dict[str, float]) -> None:
        if step == 3 and current_index() == processes - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    return stop


def die(step: int, _: dict[str, float]) -> None:
    if step == 4 and current_index() == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def fail(step: int, _: dict[str, float]) -> None:
    if step == 4 and current_index() == 1:
        raise ZeroDivisionError("of a test")


def measure(made: RunConfig) -> None:
    """A run that writes how many bytes of its own (no pages of files) its process had more at the peak before its first step."""
    before, peak, done = private_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.003):
            peak[0] = max(peak[0], private_bytes())

    def first(run: Any) -> None:
        done.set()
        watcher.join()
        (run.folder.path / f"grown-{current_index()}").write_text(str(peak[0] - before))
        raise RankError("measured")

    watcher = threading.Thread(target=watch)
    with patched(first):
        watcher.start()
        with suppress(RankError):
            train(made)


@contextmanager
def patched(step: Callable[[Any], None]) -> Iterator[None]:
    before, fastalign.train.loop._Run._step = fastalign.train.loop._Run._step, step  # type: ignore[method-assign]
    try:
        yield
    finally:
        fastalign.train.loop._Run._step = before  # type: ignore[method-assign]


def private_bytes() -> int:
    resident, of_files = map(int, Path("/proc/self/statm").read_text().split()[1:3])
    return (resident - of_files) * os.sysconf("SC_PAGE_SIZE")


def keep_what_was_loaded() -> None:
    """Before its first step, let every run write its weights and its optimizer's state to <run>/loaded-<rank>.safetensors."""
    step = fastalign.train.loop._Run._step
    seen = weakref.WeakSet[Any]()  # by identity numbers a later run might be taken for one that is gone

    def first(run: Any) -> None:
        if run not in seen:
            seen.add(run)
            found = {name: run.weights.division.kept(p) for name, p in run.optimizer.named.items()} | run.optimizer.state()
            found = {name: tensor.detach().clone().contiguous() for name, tensor in found.items()}
            save_file(found, run.folder.path / f"loaded-{current_index()}.safetensors")
            if run.config.parallel.head == "vocab":
                check_head_is_divided(run)
        step(run)

    fastalign.train.loop._Run._step = first  # type: ignore[method-assign]


def check_head_is_divided(run: Any) -> None:
    """No weight, gradient or statistic of more rows than this process's share of the head, in the model or in a copy of it."""
    share = -(-VOCABULARY // (run.ranks.size // run.config.parallel.replicas))
    assert len(run.head_weight) <= share
    tensors = [run.head_weight, run.head_weight.grad, getattr(run.head_weight, "main_grad", None)]
    tensors += [value for name, value in run.optimizer.state().items() if name.startswith("lm_head.weight/")]
    copies = run.objective.copies if isinstance(run.objective, Copying) else []
    tensors += [copy.get_output_embeddings().weight for copy in copies]
    assert all(len(tensor) <= share for tensor in tensors if tensor is not None and tensor.ndim)


def idle_more() -> None:
    """Let every process whose layers others wait for run one bin more for nothing: nothing may come of it, in any algorithm."""
    idle = Divided.idle

    def more(weights: Divided, bins: Any, index: int) -> Any:
        shortest = min((members for own in bins for members in own), key=len)
        return [*idle(weights, bins, index), *([shortest] if weights.in_step else [])]

    Divided.idle = more  # type: ignore[method-assign]


def main() -> None:
    torch.distributed.init_process_group("gloo")  # once for all runs
    quiet()
    keep_what_was_loaded()
    idle_more()
    run(Path(sys.argv[1]), sys.argv[2:], int(os.environ["WORLD_SIZE"]))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
