"""The calls of verl and of cut-cross-entropy: against materialised logits, in value and in every gradient."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from fastalign.dropin import cce, verl


def problem(dtype=torch.float64):
    rng = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, generator=rng, dtype=dtype) for shape in ((3, 5, 7), (11, 7), (11,)))
    labels = torch.randint(11, (3, 5), generator=rng)
    labels[0, 2] = -100
    return [x.requires_grad_() for x in (hidden, weight, bias)], labels


def grads(value, leaves):
    return torch.autograd.grad(value, leaves, retain_graph=True)


def assert_close(mine, dense, leaves):
    torch.testing.assert_close(mine, dense, rtol=1e-6, atol=1e-6)
    for a, b in zip(grads(mine, leaves), grads(dense, leaves)):
        assert b.norm() > 1e-3
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_verl():
    (hidden, weight, _), labels = problem()
    logps, entropy = verl.linear_cross_entropy(hidden, weight, labels, 0.7)
    dense = (hidden @ weight.T / 0.7).log_softmax(-1)
    live = labels != -100
    target = dense.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * live
    upstream = torch.linspace(-1, 1, 15, dtype=torch.float64).view(3, 5)
    own = -(dense.exp() * dense).sum(-1) * live
    assert_close(
        (upstream * logps).sum() + (upstream**2 * entropy).sum(), (upstream * target).sum() + (upstream**2 * own).sum(), [hidden, weight]
    )
    assert logps[0, 2] == entropy[0, 2] == 0


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shift", [False, True, 2])
@pytest.mark.parametrize("return_lse", [False, True])
def test_cce(reduction, shift, return_lse):
    leaves, labels = problem()
    hidden, weight, bias = leaves
    step = int(shift)
    logits = 3.0 * torch.tanh((hidden @ weight.T + bias) / 3.0)
    logits, target = logits[:, : 5 - step].flatten(0, 1), labels[:, step:].flatten()
    dense = cross_entropy(logits, target, reduction=reduction)
    mine = cce.linear_cross_entropy(hidden, weight, labels, bias, softcap=3.0, reduction=reduction, shift=shift, return_lse=return_lse)
    if return_lse:
        mine, lse = mine
        assert_close(lse.square().sum(), (logits.logsumexp(-1) * (target != -100)).square().sum(), leaves)
    if reduction == "none":
        assert mine.shape == (3, 5 - step)
        assert_close(mine.square().sum(), dense.square().sum(), leaves)
    else:
        assert_close(mine, dense, leaves)


def test_autocast_multiplies_in_its_dtype():
    (hidden, weight, _), labels = problem(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = cce.linear_cross_entropy(hidden, weight, labels)
    exact = cce.linear_cross_entropy(hidden.bfloat16().float(), weight.bfloat16().float(), labels)
    torch.testing.assert_close(rounded, exact, rtol=1e-5, atol=1e-5)
    assert grads(rounded, [weight])[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "options", "message"),
    [
        (verl, {"reduction": "mean"}, "reduction must be 'none'"),
        (verl, {"dist_process_group": object()}, "pass the whole weight"),
        (cce, {"reduction": "max"}, "reduction must be 'mean', 'sum' or 'none'"),
        (cce, {"shift": 5}, "shift must be at least 0 and below the length"),
        (cce, {"shift": -1}, "shift must be at least 0"),
    ],
)
def test_what_is_refused(call, options, message):
    (hidden, weight, _), labels = problem()
    with pytest.raises(ValueError, match=message):
        call.linear_cross_entropy(hidden, weight, labels, **options)
