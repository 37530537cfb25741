"""Random heads for the tests: one place that knows how to build one and how to score it three ways."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

import fastalign
from fastalign.head.reference import reference_logps
from fastalign.types import HeadOutput

ALL_OUTPUTS = HeadOutput._fields
DIFFERENTIABLE = ("logps", "entropy", "lse", "mean_logits")


@dataclass
class Problem:
    hidden: Tensor
    weight: Tensor
    target: Tensor
    coefficients: dict[str, Tensor]
    bias: Tensor | None = None
    lora: tuple[Tensor, Tensor] | None = None
    temperature: float | Tensor = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None

    @property
    def options(self) -> dict:
        names = ("bias", "lora", "temperature", "logit_scale", "softcap")
        return {name: getattr(self, name) for name in names}

    @property
    def leaves(self) -> list[Tensor]:
        given = [self.hidden, self.weight, self.bias, *(self.lora or ())]
        return [x for x in given if x is not None and x.requires_grad]

    def to(self, dtype: torch.dtype) -> Problem:
        """The same rounded numbers in another dtype, as fresh leaves."""

        def cast(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.detach().to(dtype).requires_grad_(x.requires_grad)

        temperature = self.temperature.to(dtype) if isinstance(self.temperature, Tensor) else self.temperature
        lora = None if self.lora is None else tuple(cast(x) for x in self.lora)
        return replace(self, hidden=cast(self.hidden), weight=cast(self.weight), bias=cast(self.bias), lora=lora, temperature=temperature)

    def loss(self, out: HeadOutput, rows: slice = slice(None)) -> Tensor:
        return sum((getattr(out, k) * c[rows].to(getattr(out, k).dtype)).sum() for k, c in self.coefficients.items())

    def reference(self) -> HeadOutput:
        return reference_logps(self.hidden, self.weight, self.target, **self.options)

    def plain_logits(self) -> Tensor:
        """In the working dtype throughout."""
        logits = self.hidden @ self.weight.T
        if self.lora is not None:
            logits = logits + self.lora[0] @ self.lora[1].T
        if self.bias is not None:
            logits = logits + self.bias
        logits = logits * self.logit_scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        t = self.temperature
        return logits / (t.to(logits.dtype).unsqueeze(1) if isinstance(t, Tensor) else t)

    def plain_gradients(self) -> list[Tensor]:
        """As a trainer without us computes them: logits in the working dtype."""
        logits = self.plain_logits()
        log_p = logits.log_softmax(-1)
        live = self.target >= 0
        out = HeadOutput(
            logps=log_p.gather(1, self.target.clamp(min=0).unsqueeze(1)).squeeze(1) * live,
            entropy=-(log_p.exp() * log_p).sum(-1) * live,
            lse=logits.logsumexp(-1) * live,
            mean_logits=logits.mean(-1) * live,
        )
        return list(torch.autograd.grad(self.loss(out), self.leaves))

    def gradients(self, **options) -> list[Tensor]:
        out = fastalign.linear_logps(self.hidden, self.weight, self.target, outputs=ALL_OUTPUTS, **self.options, **options)
        return list(torch.autograd.grad(self.loss(out), self.leaves))

    def slab_gradients(self, **options) -> list[Tensor]:
        loss = fastalign.linear_loss(
            self.hidden, self.weight, self.target, self.loss, outputs=tuple(self.coefficients), **self.options, **options
        )
        return list(torch.autograd.grad(loss, self.leaves))


def make(
    n: int = 37,
    v: int = 301,
    d: int = 16,
    *,
    dtype: torch.dtype = torch.float32,
    rich: bool = False,
    ignored: int = 5,
    frozen: bool = False,
    seed: int = 0,
    terms: tuple[str, ...] = DIFFERENTIABLE,
) -> Problem:
    """A head whose logits spread over a few nats; `rich` adds bias, LoRA, per-token temperature, logit scale and softcap."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0, grad: bool = True) -> Tensor:
        return (torch.randn(*shape, generator=g, dtype=torch.float64) * scale).to(dtype).requires_grad_(grad)

    target = torch.randint(0, v, (n,), generator=g)
    if ignored:
        target[::ignored] = -100
    coefficients = {name: torch.randn(n, generator=g, dtype=torch.float64) for name in terms}
    problem = Problem(normal(n, d), normal(v, d, scale=2 * d**-0.5, grad=not frozen), target, coefficients)
    if rich:
        problem.bias = normal(v, grad=not frozen)
        problem.lora = (normal(n, 4), normal(v, 4, scale=0.5, grad=not frozen))
        problem.temperature = torch.rand(n, generator=g) + 0.5
        problem.logit_scale, problem.softcap = 0.7, 6.0
    return problem
