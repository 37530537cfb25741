"""Online runs of a tiny model: what they need, how they are read, and the check that a resumed run is the same run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tiny import save_tiny
from torch import Tensor

from fastalign.data.config import PromptDataConfig
from fastalign.models.config import ModelConfig
from fastalign.objectives.online import OnlineConfig

PROMPTS = ("old river", "why?", "a green lamp holds the letter", "stone")
REWARDS = """
def likes_o(completions, **columns):
    return [c.count("o") / max(1, len(c)) for c in completions]

def longer(completions, **columns):
    return [len(c) for c in completions]

def nothing(completions, **columns):
    return [None] * len(completions)
"""


def write_place(folder: Path, *, prompts: Sequence[str] = PROMPTS, rewards: str = REWARDS) -> Path:
    """`folder` with a model, rows of prompts whose weights are 1 and 2 in turn, and rewards.py."""
    save_tiny(folder / "model")
    rows = [{"prompt": prompt, "weight": 1 + i % 2} for i, prompt in enumerate(prompts)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rewards.py").write_text(rewards)
    return folder


def online_config(place: Path, kind: type[OnlineConfig], *, reward: str = "likes_o", **options: Any) -> Any:
    """A run of `kind` in `place`, at a rate at which a few steps of a tiny model show."""
    given: dict[str, Any] = {
        "model": ModelConfig(path=str(place / "model"), dtype="float32"),
        "data": PromptDataConfig(path=str(place / "prompts.jsonl")),
        "rewards": [f"{place}/rewards.py:{reward}"],
        "output": str(place / "run"),
        "learning_rate": 1e-2,
        "lr_schedule": "constant",
    }
    return kind(**given | options)


def move(model: Any, seed: int, size: float = 0.03) -> None:
    """Every trained weight; a critic's, which is 0 at first, further."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                weight.add_((0.3 if "value_head" in name else size) * torch.randn(weight.shape, generator=rng))


def same(gradient: Tensor, other: Tensor) -> bool:
    """To 1e-5 of the largest entry: small ones are sums of large ones that cancel."""
    return float((gradient - other).abs().max()) <= 1e-5 * float(other.abs().max())


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """Its rows of metrics without those that are never the same twice."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith(("perf/", "mem/"))} for row in rows]


def shown_by(run: Path) -> list[dict[str, Any]]:
    """What is in its completions.jsonl."""
    return [json.loads(line) for line in (run / "completions.jsonl").read_text().splitlines()]


def assert_learned(rows: Sequence[dict[str, Any]], factor: float) -> None:
    """The rewards of the last four steps are `factor` times those of the first four."""
    rewards = [row["reward"] for row in rows]
    assert sum(rewards[-4:]) > factor * sum(rewards[:4])


def assert_resumes(whole: Path, steps: Iterable[int], resume: Callable[[Path], Any], files: Sequence[str] = ()) -> None:
    """Cut back to its checkpoint after each of `steps` and resumed, the run ends as it did.

    That is: with the same metrics, the same answers shown, and the same tensors in `files` and in the model or adapter of final/.
    """
    (weights,) = (whole / "final").glob("*model.safetensors")
    files = [*files, f"final/{weights.name}"]
    for step in steps:
        again = whole.parent / f"{whole.name}-again{step}"
        shutil.copytree(whole, again)
        for file in files:
            (again / file).unlink()
        shutil.rmtree(again / "final")
        for checkpoint in (again / "checkpoints").iterdir():
            if int(checkpoint.name[5:]) > step:
                shutil.rmtree(checkpoint)
        resume(again)
        assert metrics_of(again) == metrics_of(whole)
        assert shown_by(again) == shown_by(whole)
        for file in files:
            ours, theirs = load_file(again / file), load_file(whole / file)
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs), file
