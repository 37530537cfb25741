"""The registered ops: torch.library's own checks, and callers under torch.compile."""

import pytest
import torch
from problems import ALL_OUTPUTS, make

from fastalign import linear_cross_entropy, linear_logps
from fastalign.head.ops import linear_logps_op


@pytest.mark.parametrize("schedule", ["none", "frozen", "keep", "recompute"])
@pytest.mark.parametrize("rich", [False, True], ids=["plain", "rich"])
def test_opcheck(schedule, rich):
    p = make(n=9, v=23, d=6, rich=rich, frozen=schedule == "frozen")
    u, b = p.lora or (None, None)
    grads = "logps,entropy"
    if schedule == "none":
        p.hidden, p.weight = p.hidden.detach(), p.weight.detach()
        u, b, p.bias, grads = None, None, None, ""
    per_token = p.temperature if isinstance(p.temperature, torch.Tensor) else None
    scalars = (1.0, p.logit_scale, p.softcap, -100, "entropy,logps", grads, schedule, None, "auto")
    torch.library.opcheck(linear_logps_op, (p.hidden, p.weight, p.target, p.bias, u, b, per_token, *scalars))


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_a_compiled_caller_has_one_graph_and_equal_results(frozen):
    p = make(frozen=frozen, rich=True)

    def loss(hidden, weight, u, b, target):
        out = linear_logps(hidden * 2, weight, target, **dict(p.options, lora=(u, b)), outputs=ALL_OUTPUTS)
        return p.loss(out)

    arguments = (p.hidden, p.weight, *p.lora, p.target)
    want = torch.autograd.grad(loss(*arguments), [x for x in p.leaves if x is not p.bias])
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*arguments), [x for x in p.leaves if x is not p.bias])
    for a, b in zip(got, want):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6 * float(b.abs().max())) and b.any()


def test_compiled_cross_entropy_with_a_changing_number_of_rows():
    compiled = torch.compile(linear_cross_entropy, fullgraph=True)
    for n in (12, 13, 20):
        p = make(n=n)
        want = torch.autograd.grad(linear_cross_entropy(p.hidden, p.weight, p.target), p.leaves)
        got = torch.autograd.grad(compiled(p.hidden, p.weight, p.target), p.leaves)
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(got, want))
