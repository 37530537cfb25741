"""The turns of a service and a training beside it: never both, requests first, and training in the end."""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable

import pytest

from fastalign.errors import ConfigError
from fastalign.serve.turns import Turns


def started(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def asked_during_training(turns: Turns, inside: Callable[[], None]) -> list[str]:
    """Who had a turn when a request came in the middle of one of training, which then does `inside`, and trains once more."""
    seen: list[str] = []

    def request() -> None:
        with turns.serving():
            seen.append("answer")

    with turns.training():
        waiting = started(request)
        until(lambda: turns._asking)
        seen.append("train")
        inside()
        seen.append("train")
    with turns.training():
        seen.append("train again")
    waiting.join(20)
    return seen


def test_a_request_waits_for_the_turn_in_progress_and_for_no_other_one():
    turns = Turns(patience=60)
    assert asked_during_training(turns, lambda: None) == ["train", "train", "answer", "train again"]
    assert asked_during_training(turns, turns.pause) == ["train", "answer", "train", "train again"]  # between two micro-batches

    def nested() -> None:
        with turns.training():
            turns.pause()

    assert asked_during_training(turns, nested) == ["train", "answer", "train", "train again"]


def test_training_that_waits_for_somebody_else_has_no_turn():
    """Answers come as they like, and an error of what was waited for is told inside of a turn, which ends as others do."""
    turns, seen = Turns(patience=60), []

    def request() -> None:
        with turns.serving():
            seen.append("answer")

    def failing() -> None:
        with turns.training(), turns.training(), turns.aside():
            assert not turns.trains
            for _ in range(3):
                started(request).join(20)
            with turns.training():  # what is waited for may itself run a model
                assert turns.trains
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        failing()
    assert seen == ["answer"] * 3 and turns._trainer is None
    with turns.aside():  # where nobody trains nothing happens
        started(request).join(20)
    assert asked_during_training(turns, lambda: None) == ["train", "train", "answer", "train again"]


@pytest.mark.parametrize(("patience", "expected"), [(60, "AAAAAATTT"), (0, "ATATATAAA")])
def test_requests_go_first_unless_training_has_waited_long_enough(patience: float, expected: str):
    """Six turns of the service, one right after the other, and three of training, which asks during the first of those."""
    turns, seen = Turns(patience), []

    def train() -> None:
        for _ in range(3):
            with turns.training():
                until(lambda: turns._asking or seen.count("A") == 6)
                seen.append("T")

    trainer = None
    for k in range(6):
        with turns.serving(lambda k=k: k < 5):
            trainer = trainer or started(train)
            if seen.count("T") < 3:
                until(lambda: turns._since is not None)
            seen.append("A")
    trainer.join(20)
    assert "".join(seen) == expected


def test_training_waits_no_longer_than_its_patience_for_a_turn_that_never_comes():
    """As of requests that were cancelled before they were answered."""
    turns = Turns(patience=0.2)
    with turns.serving(lambda: True):
        pass
    begun = time.monotonic()
    with turns.training():
        assert 0.2 <= time.monotonic() - begun < 30
    with turns.serving():
        pass
    turns.patience, begun = 60.0, time.monotonic()
    with turns.training():
        assert time.monotonic() - begun < 30


def test_a_long_turn_of_the_service_does_not_stop_its_answers_when_training_is_due():
    """A model is read for a minute, and training would have its turn: answers go on beside the reading, then training."""
    turns, seen = Turns(patience=0), []

    def train() -> None:
        with turns.training():
            seen.append("train")

    def answer() -> None:
        with turns.serving():
            seen.append("answer")

    with turns.serving():
        trainer = started(train)
        until(lambda: turns._since is not None)
        for _ in range(3):
            started(answer).join(20)
    trainer.join(20)
    assert seen == ["answer"] * 3 + ["train"]


def test_never_both_at_a_time_and_all_come_to_an_end():
    turns, inside, overlaps, counts = Turns(patience=0.002), {"serve": 0, "train": 0}, [], {"serve": 0, "train": 0}

    def work(kind: str, seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(60):
            with turns.serving(lambda: rng.random() < 0.5) if kind == "serve" else turns.training():
                inside[kind] += 1
                time.sleep(rng.random() / 2000)
                if kind == "train" and rng.random() < 0.5:
                    inside[kind] -= 1
                    turns.pause()
                    inside[kind] += 1
                overlaps.append(inside["serve"] * inside["train"] or inside["train"] > 1)
                inside[kind] -= 1
                counts[kind] += 1

    threads = [started(lambda k=k, kind=kind: work(kind, k)) for k, kind in enumerate(("serve", "train", "serve", "train"))]
    for thread in threads:
        thread.join(30)
    assert counts == {"serve": 120, "train": 120} and not any(overlaps) and len(overlaps) == 240


def test_mistakes_are_told():
    for patience in (-1.0, math.inf, math.nan):
        with pytest.raises(ConfigError, match="patience must be 0 seconds or more and finite"):
            Turns(patience)
    turns = Turns()
    turns.pause()
    with turns.training(), pytest.raises(AssertionError, match="would wait for itself"), turns.serving():
        pass
    with pytest.raises(RuntimeError, match="mine"), turns.training():
        raise RuntimeError("mine")
    with turns.serving():  # the turn of an error ends, too
        pass
