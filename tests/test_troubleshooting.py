"""The page on trouble quotes messages, options and metrics that exist."""

from __future__ import annotations

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest

from fastalign import cli
from fastalign.train.options import options

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
TEXTS = {
    node.value
    for file in (ROOT / "fastalign").rglob("*.py")
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    if isinstance(node, ast.Constant) and isinstance(node.value, str)
}


def known_options() -> set[str]:
    classes = [getattr(import_module(module), name) for module, name in cli.ALGORITHMS.values()]
    return {"config", "help"}.union(*(options(kind) for kind in classes))


@pytest.mark.parametrize("message", re.findall(r'"([^"\n]+)"', PAGE))
def test_messages_are_those_of_the_code(message: str) -> None:
    assert any(message in text for text in TEXTS), f"nothing says {message!r}"


def test_options_and_metrics_exist() -> None:
    spans = re.findall(r"`([^`]+)`", PAGE)
    named = {found[1] for span in spans if (found := re.match(r"--([a-z_.A-Z]+)", span))}
    assert len(named) > 25
    assert not named - known_options()
    metrics = {span for span in spans if re.fullmatch(r"[a-z_]+/[a-z_/]+", span)} | {"skipped_steps", "frac_reward_zero_std"}
    assert len(metrics) >= 6
    for metric in metrics:
        assert any(metric in text for text in TEXTS), f"no metric is called {metric}"


def test_the_quotes_would_be_missed() -> None:
    assert not any("this message was never written" in text for text in TEXTS)
