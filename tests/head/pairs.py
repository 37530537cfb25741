"""Random pairs of heads, a student and a teacher of another width, and their divergences three ways."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from problems import Problem, make
from torch import Tensor

import fastalign
from fastalign import DivergenceOutput
from fastalign.head.reference import reference_divergence

TERMS = ("divergence", "logps", "entropy", "lse")
KINDS = ("forward_kl", "reverse_kl", "jsd")
BETA = 0.3


@dataclass
class Pair:
    student: Problem  # its coefficients weigh the outputs, the divergence among them
    teacher: Problem
    kind: str = "forward_kl"
    beta: float = BETA

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        return self.student.hidden, self.student.weight, self.teacher.hidden, self.teacher.weight

    @property
    def options(self) -> dict:
        ref = {f"ref_{name}": value for name, value in self.teacher.options.items() if name != "temperature"}
        return {**self.student.options, **ref, "target": self.student.target, "kind": self.kind, "beta": self.beta}

    @property
    def outputs(self) -> tuple[str, ...]:
        return tuple(name for name in self.student.coefficients if name != "divergence")

    @property
    def leaves(self) -> list[Tensor]:
        return self.student.leaves

    def to(self, dtype: torch.dtype) -> Pair:
        return replace(self, student=self.student.to(dtype), teacher=self.teacher.to(dtype))

    def score(self, **options) -> DivergenceOutput:
        return fastalign.linear_divergence_outputs(*self.arguments, **self.options, outputs=self.outputs, **options)

    def gradients(self, **options) -> list[Tensor]:
        return list(torch.autograd.grad(self.student.loss(self.score(**options)), self.leaves))

    def slab_gradients(self, **options) -> list[Tensor]:
        loss = fastalign.linear_divergence_loss(*self.arguments, self.student.loss, outputs=self.outputs, **self.options, **options)
        return list(torch.autograd.grad(loss, self.leaves))

    def plain_gradients(self) -> list[Tensor]:
        """As a trainer without us computes them: logits in the working dtype."""
        p, q = (side.plain_logits().log_softmax(-1) for side in (self.student, self.teacher))
        live = self.student.target >= 0
        out = DivergenceOutput(
            divergence=reference_divergence(p, q.detach(), self.kind, self.beta) * live,
            logps=p.gather(1, self.student.target.clamp(min=0).unsqueeze(1)).squeeze(1) * live,
            entropy=-(p.exp() * p).sum(-1) * live,
            lse=self.student.plain_logits().logsumexp(-1) * live,
        )
        return list(torch.autograd.grad(self.student.loss(out), self.leaves))


def pair(kind: str = "forward_kl", *, d2: int = 24, terms: tuple[str, ...] = TERMS, seed: int = 0, **options) -> Pair:
    """A student as `problems.make` builds it, and a teacher over the same rows and vocabulary with `d2` hidden units."""
    student = make(terms=terms, seed=seed, **options)
    teacher = make(**{**options, "d": d2}, terms=(), seed=seed + 1)
    teacher.temperature = student.temperature
    return Pair(student, teacher, kind)
