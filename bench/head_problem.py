"""What the head benchmark computes: random heads, the losses over their log-probs, and both in float64.

A head has N rows in sequences of equal length that follow one another; sequences 2k and 2k+1 are the chosen and the rejected
one of pair k. Logits have standard deviation 3. Every loss is a function of the log-probs of some rows, with denominators of
all rows, so that the parts of a loss over slabs add up to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

SEQUENCES = 8
LONGEST = 1024  # tokens of a sequence; more rows make more sequences
LOGIT_SPREAD = 3.0
LIVE_SHARE = 0.4  # of the rows of `zero_advantage`
BETA, KL_BETA, CLIP = 0.1, 0.04, 0.2
SAMPLE = 64  # rows of hidden, and rows of weight, whose gradients are compared with float64


@dataclass
class Problem:
    """A head and the inputs of every task. Shapes (N, D), (V, D), (N,)."""

    hidden: Tensor  # gradient
    weight: Tensor  # gradient
    target: Tensor
    ref_hidden: Tensor  # hidden states of the reference policy, which shares the head
    coefficients: Tensor  # of `trainable`, float32
    sparse: Tensor  # of `zero_advantage`: 0 outside some groups of rows
    advantages: Tensor  # (N,) float32, one value per sequence
    length: int  # tokens of a sequence
    old_logps: Tensor = field(init=False)
    ref_logps: Tensor = field(init=False)  # of sampled tokens, as GRPO has them
    gold: Gold = field(init=False)

    @classmethod
    def random(cls, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Problem:
        n, v, d = shape
        g = torch.Generator(device).manual_seed(0)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=g, device=device)

        hidden = normal(n, d)
        coefficients = -(0.5 + torch.rand(n, generator=g, device=device)) / n
        length = min(LONGEST, n // SEQUENCES)
        groups = torch.arange(n, device=device) * 20 // n  # 20 groups of rows that follow one another
        problem = cls(
            hidden=hidden.to(dtype, copy=True).requires_grad_(),
            weight=normal(v, d).mul_(LOGIT_SPREAD * d**-0.5).to(dtype).requires_grad_(),
            target=torch.randint(v, (n,), generator=g, device=device),
            ref_hidden=(hidden + 0.02 * normal(n, d)).to(dtype),
            coefficients=coefficients,
            sparse=coefficients * (groups % 5 < 5 * LIVE_SHARE),
            advantages=normal(n // length).repeat_interleave(length),
            length=length,
        )
        problem.gold = Gold(problem)
        problem.old_logps, problem.ref_logps = (problem.gold.logps.float() + 0.1 * normal(n) for _ in range(2))
        return problem

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.hidden.shape[0], *self.weight.shape

    @property
    def pair_bounds(self) -> list[int]:
        return list(range(0, self.shape[0] + 1, 2 * self.length))

    @property
    def sequence_bounds(self) -> list[int]:
        return list(range(0, self.shape[0] + 1, self.length))

    def forget_gradients(self) -> None:
        self.hidden.grad = self.weight.grad = None

    # The losses: of the log-probs (R,) of the rows `rows`.

    def weighted(self, logps: Tensor, rows: slice) -> Tensor:
        return (logps * self.coefficients[rows].to(logps.dtype)).sum()

    def zero_advantage(self, logps: Tensor, rows: slice) -> Tensor:
        return (logps * self.sparse[rows].to(logps.dtype)).sum()

    def cross_entropy(self, logps: Tensor, rows: slice) -> Tensor:
        return -logps.sum() / self.shape[0]

    def dpo(self, logps: Tensor, rows: slice, ref_logps: Tensor) -> Tensor:
        """Rafailov 2023, eq. 7."""
        ratio = (logps - ref_logps).view(-1, 2, self.length).sum(2)
        return -logsigmoid(BETA * (ratio[:, 0] - ratio[:, 1])).sum() / (len(self.pair_bounds) - 1)

    def kto(self, logps: Tensor, rows: slice, ref_logps: Tensor) -> Tensor:
        """Ethayarajh 2024, eq. 7, with a KL estimate of 0; chosen sequences are the desirable ones."""
        ratio = (logps - ref_logps).view(-1, self.length).sum(1)
        sign = 1 - 2 * (torch.arange(len(ratio), device=logps.device) % 2)
        return (1 - torch.sigmoid(BETA * ratio * sign)).sum() / (len(self.sequence_bounds) - 1)

    def orpo(self, logps: Tensor, rows: slice) -> Tensor:
        """Hong 2024, eq. 6 and 7."""
        mean = logps.view(-1, 2, self.length).mean(2)
        log_odds = mean - torch.log1p(-mean.exp())
        pairs = len(self.pair_bounds) - 1
        return -(mean[:, 0].sum() + BETA * logsigmoid(log_odds[:, 0] - log_odds[:, 1]).sum()) / pairs

    def grpo(self, logps: Tensor, rows: slice) -> Tensor:
        """Shao 2024, eq. 3 and 4, averaged over all tokens (Yu 2025)."""
        a, old, ref = (x[rows].to(logps.dtype) for x in (self.advantages, self.old_logps, self.ref_logps))
        ratio, gap = (logps - old).exp(), ref - logps
        gain = torch.minimum(ratio * a, ratio.clamp(1 - CLIP, 1 + CLIP) * a)
        return (KL_BETA * (gap.exp() - gap - 1) - gain).sum() / self.shape[0]


class Gold:
    """Log-probs and sampled gradients in float64 of the rounded inputs."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        n, v, _ = problem.shape
        device = problem.target.device
        self.rows = torch.linspace(0, n - 1, min(n, SAMPLE), device=device).long()
        anywhere = torch.linspace(0, v - 1, min(v, SAMPLE) // 2, device=device).long()
        self.words = torch.cat([problem.target[self.rows[::2]], anywhere]).unique()
        self.logps, self.lse, self.largest_logit = self._score(problem.hidden)
        self.ref_logps: Tensor | None = None

    def reference(self) -> Tensor:
        """(N,) log-probs of the reference policy."""
        if self.ref_logps is None:
            self.ref_logps = self._score(self.problem.ref_hidden)[0]
        return self.ref_logps

    @torch.no_grad()
    def _score(self, hidden: Tensor) -> tuple[Tensor, Tensor, float]:
        weight, largest = self.problem.weight.double(), 0.0
        logps, lse = [], []
        step = max(1, (1 << 28 if hidden.device.type == "cpu" else 1 << 31) // (8 * len(weight)))
        for some, target in zip(hidden.split(step), self.problem.target.split(step)):
            logits = some.double() @ weight.T
            largest = max(largest, float(logits.max()), -float(logits.min()))
            hit = logits.gather(1, target[:, None])[:, 0]
            lse.append(logits.logsumexp(1))
            logps.append(hit - lse[-1])
        return torch.cat(logps), torch.cat(lse), largest

    def loss(self, loss: Callable[[Tensor], Tensor]) -> tuple[float, Tensor]:
        """The loss of the exact log-probs, and its derivative by each (N,)."""
        leaf = self.logps.clone().requires_grad_()
        value = loss(leaf)
        (slope,) = torch.autograd.grad(value, leaf)
        return float(value.detach()), slope

    @torch.no_grad()
    def d_hidden(self, slope: Tensor) -> Tensor:
        """d loss / d hidden of the sampled rows."""
        weight, rows = self.problem.weight.double(), self.rows
        p = (self.problem.hidden[rows].double() @ weight.T - self.lse[rows, None]).exp()
        return slope[rows, None] * (weight[self.problem.target[rows]] - p @ weight)

    @torch.no_grad()
    def d_weight(self, slope: Tensor) -> Tensor:
        """d loss / d weight of the sampled words."""
        hidden = self.problem.hidden.double()
        p = (hidden @ self.problem.weight[self.words].double().T - self.lse[:, None]).exp()
        hit = (self.problem.target[:, None] == self.words).double()
        return (slope[:, None] * (hit - p)).T @ hidden
