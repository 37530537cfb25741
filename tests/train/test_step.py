"""Which samples a step takes, and the lengths it refuses."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from fastalign.errors import ConfigError, DataError
from fastalign.train.step import Order, check_lengths, check_vocabulary, to_floats
from fastalign.types import Sample


def test_every_epoch_takes_each_sample_once_in_its_own_order() -> None:
    order = Order(num_samples=10, batch_size=4, seed=3, epochs=2)
    assert order.total_steps == 6
    steps = [order.samples_of(step) for step in range(6)]
    assert [len(s) for s in steps] == [4, 4, 2, 4, 4, 2]
    first, second = ([i for s in steps[k : k + 3] for i in s] for k in (0, 3))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert first != list(range(10))
    assert [i for s in range(3) for i in Order(10, 4, 4, 2).samples_of(s)] != first  # another seed


def test_order_is_a_pure_function_of_the_step() -> None:
    """Asked backwards, and in another process with another hash seed, it says the same."""
    order = Order(num_samples=50, batch_size=7, seed=0, epochs=3)
    forwards = [order.samples_of(step) for step in range(order.total_steps)]
    assert [order.samples_of(step) for step in reversed(range(order.total_steps))] == forwards[::-1]
    code = "from fastalign.train.step import Order; print(Order(50, 7, 0, 3).samples_of(9))"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | {"PYTHONHASHSEED": "1"}
    )
    assert found.stdout.strip() == str(forwards[9])


@pytest.mark.parametrize(
    ("epochs", "max_steps", "total"),
    [(1.0, None, 3), (0.5, None, 2), (2.5, None, 8), (1.0, 100, 100)],
)
def test_total_steps(epochs: float, max_steps: int | None, total: int) -> None:
    assert Order(10, 4, 0, epochs, max_steps).total_steps == total


def test_a_sample_beyond_max_tokens_is_named_with_the_remedy() -> None:
    samples = [Sample(index=i, prompt=(1,) * i, completions=((2, 3), (4,))) for i in range(4)]
    check_lengths(samples, 9)
    with pytest.raises(ConfigError, match=r"max_tokens 8 .* \(row 3, 9 tokens .*\); set --max_tokens 9 or more"):
        check_lengths(samples, 8)


def test_a_token_beyond_the_head_is_named() -> None:
    with pytest.raises(DataError, match=r"row 3: token id 4 is beyond the model's vocabulary of 4"):
        check_vocabulary([Sample(3, (), ((1, 2), (4,)))], 4)


def test_to_floats_keeps_names() -> None:
    assert to_floats({"a": torch.tensor(1.5), "b": torch.tensor(2, dtype=torch.int64)}) == {"a": 1.5, "b": 2.0}
    assert to_floats({}) == {}
