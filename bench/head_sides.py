"""The sides of the head benchmark: fastalign's schedules and the peers, each called as its users call it, at its recommended settings.

A side is built for a problem and gives a function that does the task once, forward and backward, and returns what can be
checked. Its GEMMs count how often it forms logits, the gradient of hidden and the gradient of weight; each costs 2NVD.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import fastalign
from bench.head_problem import BETA, CLIP, KL_BETA, LIVE_SHARE, Problem


class Outcome(NamedTuple):
    """What a side computed; None where it has no such result. Gradients in the order of the problem's rows."""

    loss: Tensor | None = None
    logps: Tensor | None = None
    d_hidden: Tensor | LazyRows | None = None
    d_weight: Tensor | None = None


class Absent(Exception):
    """Why a side cannot run here."""


Run = Callable[[], Outcome]


@dataclass(frozen=True)
class Side:
    task: str
    name: str
    gemms: tuple[float, float, float]  # logits, d_hidden, d_weight
    build: Callable[[Problem], Run]
    ours: bool = False
    late: bool = False  # slow to compile: measured when everything else has been


TASKS: dict[str, str] = {
    "logps": "log-probs, no gradient",
    "frozen": "log-probs and the gradient of hidden (frozen head)",
    "trainable": "log-probs and both gradients",
    "zero_advantage": f"log-probs of all rows, both gradients; the loss of {1 - LIVE_SHARE:.0%} of the rows is zero",
    "cross_entropy": "mean cross-entropy, both gradients",
    "dpo": "DPO, the reference's log-probs included, both gradients",
    "grpo": "GRPO (DAPO mean, clip, k3 penalty; old and reference log-probs given), both gradients",
    "kto": "KTO, the reference's log-probs included, both gradients",
    "orpo": "ORPO, both gradients",
}
LOSSES: dict[str, Callable[[Problem], Callable[..., Tensor]]] = {
    "frozen": lambda p: p.weighted,
    "trainable": lambda p: p.weighted,
    "zero_advantage": lambda p: p.zero_advantage,
    "cross_entropy": lambda p: p.cross_entropy,
    "grpo": lambda p: p.grpo,
    "orpo": lambda p: p.orpo,
}
REFERENCED: dict[str, Callable[[Problem], Callable[..., Tensor]]] = {"dpo": lambda p: p.dpo, "kto": lambda p: p.kto}


def loss_of(task: str, problem: Problem, ref_logps: Tensor | None = None) -> Callable[[Tensor, slice], Tensor]:
    """The task's loss of log-probs and their rows."""
    if task not in REFERENCED:
        return LOSSES[task](problem)
    assert ref_logps is not None

    def loss(logps: Tensor, rows: slice) -> Tensor:
        return REFERENCED[task](problem)(logps, rows, ref_logps[rows].to(logps.dtype))

    return loss


def gold_loss(task: str, problem: Problem) -> Callable[[Tensor], Tensor]:
    """The task's loss of all log-probs in float64."""
    loss = loss_of(task, problem, problem.gold.reference() if task in REFERENCED else None)
    return lambda logps: loss(logps, slice(0, len(logps)))


def sides_of(task: str) -> list[Side]:
    """Every side of a task, fastalign first."""
    if task == "logps":
        ours = [Side(task, "fastalign, none", (1, 0, 0), partial(from_logps, task, ours_logps), ours=True)]
        return [*ours, *peers_from_logps(task, (1, 0, 0))]
    if task == "frozen":
        ours = [Side(task, "fastalign, frozen", (1, 1, 0), partial(from_logps, task, ours_logps), ours=True)]
        return [*ours, *peers_from_logps(task, (1, 1, 0), trl=(2, 1, 0))]
    if task == "trainable":
        slab = Side(task, "fastalign, slab", (1, 1, 1), partial(ours_slab, task), ours=True)
        keep = Side(task, "fastalign, keep", (1, 1, 1), partial(from_logps, task, partial(ours_logps, schedule="keep")), ours=True)
        again = partial(from_logps, task, partial(ours_logps, schedule="recompute"))
        recompute = Side(task, "fastalign, recompute", (2, 1, 1), again, ours=True)
        return [slab, keep, recompute, *peers_from_logps(task, (1, 1, 1))]
    if task == "zero_advantage":
        slab = Side(task, "fastalign, slab", (1, LIVE_SHARE, LIVE_SHARE), partial(ours_slab, task), ours=True)
        return [slab, *peers_from_logps(task, (1, 1, 1))]
    if task == "cross_entropy":
        return [
            Side(task, "fastalign, linear_cross_entropy", (1, 1, 1), ours_cross_entropy, ours=True),
            Side(task, "torch, F.cross_entropy", (1, 1, 1), plain_cross_entropy),
            Side(task, "torch, F.linear_cross_entropy", (1, 1, 1), torch_linear_cross_entropy),
            Side(task, "Liger, fused linear cross-entropy", (1, 1, 1), liger_cross_entropy),
            Side(task, "cut-cross-entropy", (2, 1, 1), cut_cross_entropy),
            Side(task, "torch.compile, F.cross_entropy", (1, 1, 1), partial(plain_cross_entropy, compiled=True), late=True),
        ]
    reference = task in REFERENCED
    liger = {"dpo": liger_dpo, "kto": liger_kto, "orpo": liger_orpo, "grpo": liger_grpo}[task]
    return [
        Side(task, f"fastalign, slab, {task}", (1 + reference, 1, 1), partial(ours_slab, task), ours=True),
        Side(task, f"Liger, {task}", (2 if task == "grpo" else 1 + reference, 1, 1), liger),
        Side(task, f"TRL, log-probs and {task}", (2 + reference, 1, 1), partial(trl_preference, task)),
    ]


def peers_from_logps(task: str, gemms: tuple[float, float, float], trl: tuple[float, float, float] | None = None) -> list[Side]:
    """Peers that give log-probs of single tokens, under the task's loss of them."""
    again = (gemms[0] + bool(gemms[1]), *gemms[1:])
    compiled = partial(from_logps, task, partial(plain_logps, compiled=True))
    return [
        Side(task, "torch, log_softmax and gather", gemms, partial(from_logps, task, plain_logps)),
        Side(task, "TRL, ChunkedLogProbFunction", trl or again, partial(from_logps, task, trl_logps)),
        Side(task, "torch.compile, log_softmax and gather", gemms, compiled, late=True),
    ]


# fastalign


def ours_logps(problem: Problem, schedule: str = "auto") -> Callable[[Tensor, Tensor], Tensor]:
    n = len(problem.target)
    return lambda hidden, weight: fastalign.linear_logps(hidden, weight, problem.target, live_rows=n, schedule=schedule).logps


def ours_slab(task: str, problem: Problem) -> Run:
    groups = {"dpo": problem.pair_bounds, "orpo": problem.pair_bounds, "kto": problem.sequence_bounds}.get(task)
    n = len(problem.target)
    active = (problem.sparse != 0).cpu() if task == "zero_advantage" else None

    def run() -> Outcome:
        reference: Tensor | None = None
        seen: list[Tensor] = []
        if task in REFERENCED:
            reference = fastalign.linear_logps(problem.ref_hidden, problem.weight.detach(), problem.target, live_rows=n).logps
        loss_fn = loss_of(task, problem, reference)

        def slab_loss(out: fastalign.HeadOutput, rows: slice) -> Tensor:
            seen.append(out.logps.detach())
            return loss_fn(out.logps, rows)

        loss = fastalign.linear_loss(problem.hidden, problem.weight, problem.target, slab_loss, groups=groups, live_rows=n, active=active)
        loss.backward()
        return Outcome(loss.detach(), torch.cat(seen), problem.hidden.grad, problem.weight.grad)

    return run


def ours_cross_entropy(problem: Problem) -> Run:
    n = len(problem.target)
    return _scalar(problem, lambda hidden, weight: fastalign.linear_cross_entropy(hidden, weight, problem.target, live_rows=n))


# torch


def plain_logps(problem: Problem, compiled: bool = False) -> Callable[[Tensor, Tensor], Tensor]:
    def logps(hidden: Tensor, weight: Tensor) -> Tensor:
        return (hidden @ weight.T).log_softmax(1).gather(1, problem.target[:, None])[:, 0]

    return torch.compile(logps, dynamic=False) if compiled else logps


def plain_cross_entropy(problem: Problem, compiled: bool = False) -> Run:
    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(hidden @ weight.T, problem.target)

    return _scalar(problem, torch.compile(loss, dynamic=False) if compiled else loss)


def torch_linear_cross_entropy(problem: Problem) -> Run:
    if not hasattr(F, "linear_cross_entropy"):
        raise Absent(f"torch {torch.__version__} has no F.linear_cross_entropy (2.13 or newer)")
    options = torch.nn.LinearCrossEntropyOptions()
    return _scalar(problem, lambda hidden, weight: F.linear_cross_entropy(hidden, weight, problem.target, options=options))


# peers


def trl_logps(problem: Problem) -> Callable[[Tensor, Tensor], Tensor]:
    _require("trl")
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as columns

    return lambda hidden, weight: ChunkedLogProbFunction.apply(hidden, weight, None, problem.target, 1.0, columns, None, 1.0, ())[0]


def trl_preference(task: str, problem: Problem) -> Run:
    logps = trl_logps(problem)

    def run() -> Outcome:
        reference = None
        if task in REFERENCED:
            with torch.no_grad():
                reference = logps(problem.ref_hidden, problem.weight)
        found = logps(problem.hidden, problem.weight)
        loss = loss_of(task, problem, reference)(found, slice(0, len(found)))
        loss.backward()
        return Outcome(loss.detach(), found.detach(), problem.hidden.grad, problem.weight.grad)

    return run


def liger_cross_entropy(problem: Problem) -> Run:
    _require("liger_kernel", cuda=problem.target)
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return _scalar(problem, lambda hidden, weight: loss(weight, hidden, problem.target))


def cut_cross_entropy(problem: Problem) -> Run:
    _require("cut_cross_entropy", cuda=problem.target)
    from cut_cross_entropy import linear_cross_entropy

    return _scalar(problem, lambda hidden, weight: linear_cross_entropy(hidden, weight, problem.target))


def liger_dpo(problem: Problem) -> Run:
    losses = _liger_losses()
    stacked = Stacked(problem)
    loss = losses.LigerFusedLinearDPOLoss(beta=BETA)
    return stacked.run(lambda x, y, ref: loss(problem.weight, x, y, ref_input=ref, ref_weight=problem.weight.detach())[0])


def liger_orpo(problem: Problem) -> Run:
    losses = _liger_losses()
    stacked = Stacked(problem)
    loss = losses.LigerFusedLinearORPOLoss(beta=BETA)
    return stacked.run(lambda x, y, ref: loss(problem.weight, x, y)[0])


def liger_kto(problem: Problem) -> Run:
    losses = _liger_losses()
    stacked = Stacked(problem)
    loss = losses.LigerFusedLinearKTOLoss(beta=BETA, use_ref_model=True)
    desirable = torch.arange(stacked.sequences, device=problem.target.device) < stacked.sequences // 2
    kl = torch.zeros((), device=problem.target.device)

    def kto(x: Tensor, y: Tensor, ref: Tensor) -> Tensor:
        head = problem.weight.detach()
        return loss(x, problem.weight, y, preference_labels=desirable, ref_input=ref, ref_weight=head, kl=kl)[0]

    return stacked.run(kto)


def liger_grpo(problem: Problem) -> Run:
    losses = _liger_losses()
    loss = losses.LigerFusedLinearGRPOLoss(beta=KL_BETA, epsilon_low=CLIP, epsilon_high=CLIP, loss_type="dapo")
    sequences = problem.shape[0] // problem.length

    def rows(x: Tensor) -> Tensor:
        return x.view(sequences, problem.length, *x.shape[1:])

    mask, advantages = torch.ones_like(rows(problem.target)), problem.advantages[:: problem.length].contiguous()
    given: dict[str, Any] = {"ref_per_token_logps": rows(problem.ref_logps), "old_per_token_logps": rows(problem.old_logps)}

    def grpo(hidden: Tensor, weight: Tensor) -> Tensor:
        return loss(rows(hidden), weight, rows(problem.target), mask, advantages, **given)[0]

    return _scalar(problem, grpo)


class Stacked:
    """A problem's sequences as Liger takes them, (S, T, D): every chosen sequence, then every rejected one."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        n, _, d = problem.shape
        self.sequences = n // problem.length
        order = torch.arange(n, device=problem.target.device).view(-1, 2, problem.length).transpose(0, 1).reshape(-1)
        self.place = order.argsort()
        shape = (self.sequences, problem.length)
        self.hidden = problem.hidden.detach()[order].view(*shape, d).requires_grad_()
        self.ref_hidden = problem.ref_hidden[order].view(*shape, d)
        self.target = problem.target[order].view(shape)

    def run(self, loss_fn: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Run:
        def run() -> Outcome:
            self.hidden.grad = None
            loss = loss_fn(self.hidden, self.target, self.ref_hidden)
            loss.backward()
            assert self.hidden.grad is not None
            return Outcome(loss.detach(), None, LazyRows(self.hidden.grad, self.place), self.problem.weight.grad)

        return run


class LazyRows:
    """A stacked gradient that is put in the problem's order only where it is read."""

    def __init__(self, stacked: Tensor, place: Tensor) -> None:
        self.rows, self.place = stacked.view(-1, stacked.shape[-1]), place

    def __getitem__(self, rows: Tensor) -> Tensor:
        return self.rows[self.place[rows]]


def _liger_losses() -> Any:
    _require("liger_kernel")
    from liger_kernel import chunked_loss

    return chunked_loss


def _require(package: str, cuda: Tensor | None = None) -> None:
    if find_spec(package) is None:
        raise Absent("not installed")
    if cuda is not None and cuda.device.type != "cuda":
        raise Absent("runs on CUDA only")


# what the sides share


def from_logps(task: str, make: Callable[[Problem], Callable[[Tensor, Tensor], Tensor]], problem: Problem) -> Run:
    """A side that returns log-probs, under the task's loss."""
    logps = make(problem)

    def run() -> Outcome:
        if task == "logps":
            with torch.no_grad():
                return Outcome(logps=logps(problem.hidden, problem.weight))
        weight = problem.weight.detach() if task == "frozen" else problem.weight
        found = logps(problem.hidden, weight)
        loss = loss_of(task, problem)(found.float(), slice(0, len(found)))
        loss.backward()
        return Outcome(loss.detach(), found.detach(), problem.hidden.grad, problem.weight.grad)

    return run


def _scalar(problem: Problem, loss_fn: Callable[[Tensor, Tensor], Tensor]) -> Run:
    def run() -> Outcome:
        loss = loss_fn(problem.hidden, problem.weight)
        loss.backward()
        return Outcome(loss.detach(), None, problem.hidden.grad, problem.weight.grad)

    return run
