"""The training runs of a round: which algorithm, on what, from which version, with whose options."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from fastalign.errors import ConfigError
from fastalign.objectives.base import RunConfig
from fastalign.serve.loop.config import OnlineConfig
from fastalign.train.config import from_mapping
from fastalign.train.folder import MARK

# Of an adapter that nobody gives options for.
DEFAULTS: dict[str, Any] = {"learning_rate": 5e-5, "lora.r": 16}

CLASSES = {
    "kto": ("fastalign.objectives.kto", "KTOConfig"),
    "dpo": ("fastalign.objectives.dpo", "DPOConfig"),
    "grpo": ("fastalign.objectives.grpo", "GRPOConfig"),
    "reward": ("fastalign.objectives.reward", "RewardConfig"),
}

HEAVIEST = 10.0  # weight of a label, when there are few of its kind

# What the loop decides.
OURS = ("output", "resume", "overwrite", "model.path", "data.path", "data.eval_path", "lora.adapter", "lora.reference", "rewards")


def run_config(
    online: OnlineConfig,
    algorithm: str,
    *,
    output: Path,
    data: Path,
    base: str,
    adapter: str | None = None,
    rewards: str | None = None,
    labels: tuple[int, int] | None = None,
) -> RunConfig:
    """The run in `output`, which is continued if it has begun. Raises ConfigError for options that the loop decides, or that are none.

    adapter    the version to train further; None: a new adapter on the model in `base`
    rewards    folder of the reward model, of GRPO
    labels     how many rows are good and bad, of KTO, which are balanced unless the options say how they weigh
    """
    section = "reward" if algorithm == "reward" else "train"
    given = dict(_dotted(getattr(online, section)))
    for name in given:
        if name in OURS:
            raise ConfigError(f"{section}: {name} is for the loop to decide; leave it out")
    options = DEFAULTS | {"seed": online.seed} | given
    if labels is not None and not {"desirable_weight", "undesirable_weight"} & set(given):
        options |= balanced(*labels)
    if adapter is not None and algorithm != "reward":  # whose shape is what it is
        options = {name: value for name, value in options.items() if not name.startswith("lora.")}
        options |= {"lora.adapter": adapter, "lora.reference": "base" if online.reference == "fixed" else "start"}
    options |= {"model.path": base, "data.path": str(data), "output": str(output), "resume": (output / MARK).is_file()}
    if rewards is not None:
        options["rewards"] = [rewards]
    module, name = CLASSES[algorithm]
    config: RunConfig = from_mapping(options, getattr(import_module(module), name), section)
    try:
        config.validate()
    except ConfigError as error:
        raise ConfigError(f"{section}: {error}") from error
    return config


def balanced(good: int, bad: int) -> dict[str, float]:
    """Weights by which good rows count 1 to 4/3 times what bad ones do, as KTO recommends, as far as `HEAVIEST` allows.

    >>> balanced(25, 100), balanced(110, 100), balanced(400, 100), balanced(1, 100), balanced(0, 100)
    ({'desirable_weight': 4.0}, {}, {'undesirable_weight': 3.0}, {'desirable_weight': 10.0}, {})
    """
    if not good or not bad:
        return {}
    if good < bad:
        return {"desirable_weight": min(HEAVIEST, bad / good)}
    return {"undesirable_weight": min(HEAVIEST, 0.75 * good / bad)} if good > 4 / 3 * bad else {}


def check_options(online: OnlineConfig, base: str) -> None:
    """Raise ConfigError for options of `train` or `reward` that some run of the loop would refuse."""
    objective = online.collect.objective
    algorithms = ["reward", "grpo"] if online.reward_model else ["kto", "dpo"] if objective == "auto" else [objective]
    for algorithm in algorithms:
        rewards = "reward_model" if algorithm == "grpo" else None
        run_config(online, algorithm, output=Path("run"), data=Path("train.jsonl"), base=base, rewards=rewards)


def _dotted(options: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in options.items():
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
