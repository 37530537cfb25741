"""A head divided over processes that have rows of their own gives the loss and the gradients of the whole head over all rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gloo import processes
from problems import DIFFERENTIABLE, Problem, make
from test_parallel import close, numbers, own_part, parts_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastalign
from fastalign import parallel_linear_loss

# What is particular, and how `make` builds it: (options of make, options of the call, groups of so many rows).
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "plain": ({}, {}, 0),
    "bias, LoRA, softcap, temperatures": ({"rich": True}, {}, 0),
    "frozen": ({"rich": True, "frozen": True}, {}, 0),
    "float64": ({"dtype": torch.float64, "rich": True}, {}, 0),
    "small tiles": ({"n": 150, "v": 509, "rich": True}, {"budget": 64 * 40 * 4}, 0),
    "rounds": ({"n": 600, "ignored": 7}, {"budget": 64 * 301 * 4}, 5),
    "groups without a target": ({"n": 40, "ignored": 2}, {"budget": 64 * 301 * 4}, 1),
    "torch": ({"rich": True}, {"impl": "torch"}, 0),
    "no row ignored": ({"ignored": 0}, {}, 0),
    "all rows ignored": ({"ignored": 1}, {}, 0),
    "five tokens": ({"v": 5}, {}, 0),
    "no rows": ({"n": 0, "ignored": 0}, {}, 0),
}


def rows_of(n: int, index: int, size: int, together: int = 0) -> slice:
    """As uneven as may be: nothing for the last process, and most for the first one."""
    unit = together or 1
    second = n // unit // 4 * unit if size > 1 else 0
    edges = [0, n - second, *[n] * (size - 1)]
    return slice(edges[index], edges[index + 1])


def own_rows(problem: Problem, rows: slice, columns: slice) -> dict[str, Any]:
    own = own_part(problem, columns.start, columns.stop)
    for name in ("hidden", "u"):
        if own[name] is not None:
            own[name] = own[name].detach()[rows].clone().requires_grad_(own[name].requires_grad)
    return own


def find(case: str, index: int, size: int) -> tuple[float, dict[str, Tensor]]:
    built, options, together = CASES[case]
    problem = make(**built)
    sizes = parts_of(len(problem.weight), size)
    columns = slice(sum(sizes[:index]), sum(sizes[: index + 1]))
    n = len(problem.target)
    rows = rows_of(n, index, size, together)
    own = own_rows(problem, rows, columns)
    temperature = problem.temperature[rows] if isinstance(problem.temperature, Tensor) else problem.temperature
    count = rows.stop - rows.start
    loss = parallel_linear_loss(
        own["hidden"], own["weight"], problem.target[rows],
        lambda out, at: problem.loss(out, slice(rows.start + at.start, rows.start + at.stop)),
        groups=[*range(0, count, together), count] if together else None, sizes=sizes if len(case) % 2 else None,
        bias=own["bias"], lora=None if own["u"] is None else (own["u"], own["b"]), outputs=DIFFERENTIABLE, temperature=temperature,
        logit_scale=problem.logit_scale, softcap=problem.softcap, **options,
    )  # fmt: skip
    leaves = {name: x for name, x in own.items() if x is not None and x.requires_grad}
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return float(loss), dict(zip(leaves, grads))


def all_cases(index: int, size: int) -> dict[str, tuple[float, dict[str, Any]]]:
    found = {case: find(case, index, size) for case in CASES}
    return {case: (loss, numbers(grads)) for case, (loss, grads) in found.items()}


@pytest.mark.parametrize("size", [2, 4])
def test_losses_and_gradients_are_those_of_the_whole_head(size: int, tmp_path: Path) -> None:
    results = processes(size, tmp_path, all_cases)
    for case, (built, options, _) in CASES.items():
        problem = make(**built)
        impl = {name: value for name, value in options.items() if name == "impl"}
        whole = fastalign.linear_loss(
            problem.hidden, problem.weight, problem.target, problem.loss, outputs=DIFFERENTIABLE, **problem.options, **impl
        )
        names = ["hidden", "weight", "bias", "u", "b"]
        given = [problem.hidden, problem.weight, problem.bias, *(problem.lora or (None, None))]
        leaves = {name: x for name, x in zip(names, given) if x is not None and x.requires_grad}
        expected = dict(zip(leaves, torch.autograd.grad(whole, list(leaves.values()))))
        eps = torch.finfo(problem.hidden.dtype).eps
        losses = [result[case][0] for result in results]
        assert sum(losses) == pytest.approx(whole.item(), rel=64 * eps, abs=256 * eps), case
        for name, value in expected.items():
            found = torch.cat([torch.from_numpy(result[case][1][name]) for result in results])
            assert close(found, value, 64 * eps), (case, name)
            if value.abs().sum():  # the comparison has power: a lost part, a zero and a scaled gradient would show
                assert not close(torch.zeros_like(value), value, 64 * eps) and not close(1.01 * value, value, 64 * eps)


class Largest(TorchDispatchMode):
    """The most elements of any result, and of any that has a row of logits as its last dimension."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns, self.elements, self.logits = columns, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
                if tensor.dim() == 2 and tensor.shape[1] == self.columns:
                    self.logits = max(self.logits, tensor.numel())
        return found


V, D, N, BUDGET = 4096, 8, 1500, 64 * 512 * 4


def measured(index: int, size: int) -> tuple[int, int, int]:
    problem = make(n=N, v=V, d=D)
    own = own_rows(problem, slice(index * N // size, (index + 1) * N // size), slice(index * V // size, (index + 1) * V // size))
    target = problem.target[index * N // size : (index + 1) * N // size]
    seen, rounds = Largest(V // size), []
    with seen:
        loss = parallel_linear_loss(
            own["hidden"], own["weight"], target, lambda out, rows: rounds.append(rows) or -out.logps.sum(), sizes=[V // size] * size,
            budget=BUDGET, impl="torch",
        )  # fmt: skip
        loss.backward()
    return seen.elements, seen.logits, len(rounds)


def test_no_process_holds_the_whole_weight_or_more_logits_than_the_budget(tmp_path: Path) -> None:
    for elements, logits, rounds in processes(2, tmp_path, measured):
        assert elements < V * D  # the weight, and N x V / 2 logits are 94 times that
        assert logits * 4 <= BUDGET and rounds > 1


def buffered(index: int, size: int) -> dict[str, Any]:
    """The gradient of the weight added to a buffer, at rows that alone have a coefficient."""
    problem = make(rich=True, terms=("logps",))
    sizes, rows = [160, 141], rows_of(37, index, 2)
    own = own_rows(problem, rows, slice(sum(sizes[:index]), sum(sizes[: index + 1])))
    active = torch.zeros(37, dtype=torch.bool)
    active[[1, 2, 8, 33]] = True
    buffer = torch.ones_like(own["weight"])
    coefficients = (problem.coefficients["logps"] * active)[rows]
    loss = parallel_linear_loss(
        own["hidden"], own["weight"], problem.target[rows], lambda out, at: (out.logps * coefficients[at]).sum(), d_weight=buffer,
        bias=own["bias"], lora=(own["u"], own["b"]), active=active[rows], temperature=problem.temperature[rows],
        logit_scale=problem.logit_scale, softcap=problem.softcap,
    )  # fmt: skip
    said = ""
    try:
        (2 * loss).backward(retain_graph=True)
    except RuntimeError as error:
        said = str(error)
    loss.backward()
    assert own["weight"].grad is None and said.startswith("parallel_linear_loss needs an incoming gradient of 1, got 2.0")
    return numbers({"buffer": buffer, "hidden": own["hidden"].grad})


def test_a_buffer_takes_the_gradient_of_the_weight_and_idle_rows_cost_nothing(tmp_path: Path) -> None:
    results = processes(2, tmp_path, buffered)
    problem = make(rich=True, terms=("logps",))
    keep = torch.zeros(37, dtype=torch.bool)
    keep[[1, 2, 8, 33]] = True
    out = fastalign.linear_logps(problem.hidden, problem.weight, problem.target, **problem.options)
    d_hidden, d_weight = torch.autograd.grad((out.logps * problem.coefficients["logps"] * keep).sum(), [problem.hidden, problem.weight])
    buffer = torch.cat([torch.from_numpy(result["buffer"]) for result in results])
    assert close(buffer - 1, d_weight, 1e-5) and d_weight.abs().max() > 0.1
    assert close(torch.cat([torch.from_numpy(result["hidden"]) for result in results]), d_hidden, 1e-5)


def unlike(index: int, size: int) -> str:
    problem = make()
    weight = problem.weight[: 150 + index]
    try:
        parallel_linear_loss(problem.hidden, weight, problem.target % 300, lambda out, rows: out.logps.sum(), temperature=1.0 + index)
    except ValueError as error:
        return str(error)
    return ""


def test_options_that_differ_between_processes_are_named(tmp_path: Path) -> None:
    first, second = processes(2, tmp_path, unlike)
    assert "process 1 of the group calls the head with other options" in first and "temperature=2.0" in first
    assert "process 0 of the group calls the head with other options" in second
