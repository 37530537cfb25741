"""The paper index: a row for every loss and algorithm, each with a command line that our parser takes and our config accepts."""

from __future__ import annotations

import re
import shlex
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from fastalign import cli
from fastalign.losses import POLICY_LOSSES, PREFERENCE_LOSSES, REFERENCE_FREE_LOSSES, UNPAIRED_LOSSES
from fastalign.losses.policy import KL_ESTIMATES
from fastalign.train.config import parse

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/papers.md").read_text(encoding="utf-8")
LINES = re.findall(r"`(fastalign [a-z_]+(?: [^`]*)?)`", PAGE)


def config_of(line: str) -> Any:
    _, command, *words = shlex.split(line)
    module, name = cli.ALGORITHMS[command]
    config = parse(words, getattr(import_module(module), name))
    config.model.path, config.data.path, config.output = "model", "data.jsonl", "run"
    config.validate()
    return config


@pytest.mark.parametrize("line", LINES)
def test_every_line_of_the_page_is_a_run(line: str) -> None:
    config_of(line)


def test_every_loss_and_algorithm_has_a_line() -> None:
    assert len(LINES) == len(set(LINES)) > 40
    run = [(shlex.split(line)[1], config_of(line)) for line in LINES]
    assert {command for command, _ in run} == set(cli.ALGORITHMS)
    of = {command: {getattr(config, "loss_type", "") for name, config in run if name == command} for command in cli.ALGORITHMS}
    assert set(PREFERENCE_LOSSES) <= of["dpo"]
    assert set(UNPAIRED_LOSSES) <= of["kto"]
    assert set(POLICY_LOSSES) - {"rloo", "reinforce"} <= of["grpo"]
    assert '`fastalign.losses.policy_loss("reinforce", ...)`' in PAGE
    assert set(REFERENCE_FREE_LOSSES) <= {"orpo", "cpo", *of["simpo"]}
    assert of["reward"] == {"bradley_terry", "plackett_luce"} and of["sft"] == {"nll", "dft"}
    assert all(f"k{i}" in PAGE for i in range(1, 1 + len(KL_ESTIMATES)))


def test_the_papers_are_those_that_the_code_cites() -> None:
    cited = set()
    for file in (ROOT / "fastalign").rglob("*.py"):
        cited |= set(re.findall(r"arXiv:(\d{4}\.\d{5})", file.read_text(encoding="utf-8")))
    listed = set(re.findall(r"arXiv:(\d{4}\.\d{5})", PAGE))
    assert listed <= cited, "a paper that no line of code names"
    losses = set()
    for file in [
        *(ROOT / "fastalign/losses").glob("*.py"),
        ROOT / "fastalign/advantages.py",
        *(ROOT / "fastalign/objectives").glob("*.py"),
    ]:
        losses |= set(re.findall(r"arXiv:(\d{4}\.\d{5})", file.read_text(encoding="utf-8")))
    assert losses <= listed, "a paper of a loss that the page does not list"
