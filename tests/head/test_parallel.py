"""A head divided over processes gives what the whole head gives: outputs and gradients, for uneven parts and every option."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gloo import processes
from problems import ALL_OUTPUTS, Problem, make
from torch import Tensor

import fastalign
from fastalign import parallel_linear_logps

# What is particular, and how `make` builds it: (options of make, options of the call).
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "bias, LoRA, softcap, temperatures": ({"rich": True}, {}),
    "frozen": ({"rich": True, "frozen": True}, {}),
    "float64": ({"dtype": torch.float64, "rich": True}, {}),
    "small tiles": ({"n": 150, "v": 509, "rich": True}, {"budget": 64 * 40 * 4}),
    "torch": ({"rich": True}, {"impl": "torch"}),
    "no row ignored": ({"ignored": 0}, {"live_rows": 37}),
    "all rows ignored": ({"ignored": 1}, {}),
    "five tokens": ({"v": 5}, {}),
    "no rows": ({"n": 0, "ignored": 0}, {}),
}


def parts_of(v: int, size: int) -> list[int]:
    """As uneven as may be: one row for the last process."""
    rest = [(v - 1) // (size - 1)] * (size - 1)
    rest[0] += (v - 1) - sum(rest)
    return [*rest, 1]


def own_part(problem: Problem, first: int, last: int) -> dict[str, Any]:
    """The operands of a process, as leaves of its own."""

    def leaf(x: Tensor | None, cut: bool) -> Tensor | None:
        return None if x is None else (x[first:last] if cut else x).detach().clone().requires_grad_(x.requires_grad)

    u, b = problem.lora if problem.lora is not None else (None, None)
    return {
        "hidden": leaf(problem.hidden, False),
        "weight": leaf(problem.weight, True),
        "bias": leaf(problem.bias, True),
        "u": leaf(u, False),
        "b": leaf(b, True),
    }


def find(case: str, index: int, size: int, known: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs and gradients of one process."""
    built, options = CASES[case]
    problem = make(**built)
    sizes = parts_of(len(problem.weight), size)
    first = sum(sizes[:index])
    own = own_part(problem, first, first + sizes[index])
    out = parallel_linear_logps(
        own["hidden"], own["weight"], problem.target, bias=own["bias"], lora=None if own["u"] is None else (own["u"], own["b"]),
        sizes=sizes if known else None, outputs=ALL_OUTPUTS, temperature=problem.temperature, logit_scale=problem.logit_scale,
        softcap=problem.softcap, **options,
    )  # fmt: skip
    leaves = {name: x for name, x in own.items() if x is not None and x.requires_grad}
    grads = torch.autograd.grad(problem.loss(out), list(leaves.values()))
    return {name: x.detach() for name, x in out._asdict().items()}, dict(zip(leaves, grads))


def numbers(values: dict[str, Tensor]) -> dict[str, Any]:
    """Through the pipe as arrays: tensors would be shared memory that ends with its process."""
    return {name: value.numpy() for name, value in values.items()}


def all_cases(index: int, size: int) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    return {case: tuple(map(numbers, find(case, index, size, known=k % 2 == 0))) for k, case in enumerate(CASES)}  # type: ignore[misc]


@pytest.mark.parametrize("size", [2, 4])
def test_outputs_and_gradients_are_those_of_the_whole_head(size: int, tmp_path: Path) -> None:
    results = processes(size, tmp_path, all_cases)
    for case, (built, options) in CASES.items():
        problem = make(**built)
        whole = fastalign.linear_logps(problem.hidden, problem.weight, problem.target, outputs=ALL_OUTPUTS, **problem.options, **options)
        names = ["hidden", "weight", "bias", "u", "b"]
        given = [problem.hidden, problem.weight, problem.bias, *(problem.lora or (None, None))]
        leaves = {name: x for name, x in zip(names, given) if x is not None and x.requires_grad}
        expected = dict(zip(leaves, torch.autograd.grad(problem.loss(whole), list(leaves.values()))))
        eps = torch.finfo(problem.hidden.dtype).eps
        for out, grads in (result[case] for result in results):
            for name, value in whole._asdict().items():
                found = torch.from_numpy(out[name])
                assert found.dtype == value.dtype and found.shape == value.shape
                if name == "is_top1":
                    assert torch.equal(found, value)
                else:
                    assert close(found, value.detach(), 32 * eps), (case, name)
            assert grads.keys() == leaves.keys()
        for name, value in expected.items():
            parts = [torch.from_numpy(result[case][1][name]) for result in results]
            if name in ("hidden", "u"):
                assert all(torch.equal(part, parts[0]) for part in parts), (case, name)
                assert close(parts[0], value, 64 * eps), (case, name)
                if value.abs().sum():  # the comparison has power: a lost part, a zero and a scaled gradient would show
                    assert not close(torch.zeros_like(value), value, 64 * eps) and not close(1.01 * value, value, 64 * eps)
            else:
                assert close(torch.cat(parts), value, 64 * eps), (case, name)


def close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    if not expected.numel():
        return found.shape == expected.shape
    return bool(found.isfinite().all()) and float((found - expected).abs().max()) <= tolerance * max(1e-30, float(expected.abs().max()))


def mistakes(index: int, size: int) -> list[str]:
    problem = make()
    found = []
    changes = ({"sizes": [301]}, {"sizes": [140, 161]}, {"sizes": [150, 0]}, {"target": problem.target + 301})
    for change in changes:
        operands = {"hidden": problem.hidden, "weight": problem.weight[:150], "target": problem.target} | change
        try:
            parallel_linear_logps(**operands)
            found.append("")
        except ValueError as error:
            found.append(str(error))
    return found


def test_mistakes_are_named(tmp_path: Path) -> None:
    number, rows, empty, target = processes(2, tmp_path, mistakes)[1]
    assert number == "sizes must name the rows of each of the 2 processes, 150 for process 1; got [301]"
    assert rows == "sizes must name the rows of each of the 2 processes, 150 for process 1; got [140, 161]"
    assert empty == "every process of the group needs a row of the weight at least, got [150, 0]; use a smaller group"
    assert "is outside the vocabulary of weight, 0..299" in target


def buffered(index: int, size: int) -> dict[str, Any]:
    """The gradient of the weight added to a buffer, at rows that alone have a coefficient, twice."""
    problem = make(rich=True, terms=("logps",))
    sizes = [160, 141]
    first = sum(sizes[:index])
    own = own_part(problem, first, first + sizes[index])
    active = torch.zeros(37, dtype=torch.bool)
    active[[1, 2, 8]] = True
    buffer = torch.ones_like(own["weight"])
    found = []
    for _ in range(2):
        out = parallel_linear_logps(
            own["hidden"], own["weight"], problem.target, bias=own["bias"], lora=(own["u"], own["b"]), d_weight=buffer, active=active,
            temperature=problem.temperature, logit_scale=problem.logit_scale, softcap=problem.softcap,
        )  # fmt: skip
        (out.logps * problem.coefficients["logps"] * active).sum().backward()
        found.append(out.logps.detach())
    assert own["weight"].grad is None and torch.equal(found[0], found[1])
    return numbers({"buffer": buffer, "hidden": own["hidden"].grad})


def test_a_buffer_takes_the_gradient_of_the_weight_and_idle_rows_cost_nothing(tmp_path: Path) -> None:
    results = processes(2, tmp_path, buffered)
    problem = make(rich=True, terms=("logps",))
    problem.coefficients["logps"] = problem.coefficients["logps"].clone()
    keep = torch.zeros(37, dtype=torch.bool)
    keep[[1, 2, 8]] = True
    out = fastalign.linear_logps(problem.hidden, problem.weight, problem.target, **problem.options)
    d_hidden, d_weight = torch.autograd.grad((out.logps * problem.coefficients["logps"] * keep).sum(), [problem.hidden, problem.weight])
    assert d_weight.abs().max() > 0.1
    buffer = torch.cat([torch.from_numpy(result["buffer"]) for result in results])
    assert close(buffer - 1, 2 * d_weight, 1e-5)
    assert close(torch.from_numpy(results[0]["hidden"]), 2 * d_hidden, 1e-5)
