"""Divergences against TRL: its generalised JSD of GKD, and its fused function."""

import pytest
import torch
from support import relative_error

from fastalign import linear_divergence, linear_divergence_outputs

gkd = pytest.importorskip("trl.experimental.gkd", reason="TRL is not installed: agreement of the divergences with it is unproven here")
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction  # noqa: E402

BETAS = {0.0: "forward_kl", 0.1: "jsd", 0.5: "jsd", 0.9: "jsd", 1.0: "reverse_kl"}


def heads():
    g = torch.Generator().manual_seed(0)
    shapes = (12, 16), (301, 16), (12, 24), (301, 24)
    hidden, weight, ref_hidden, ref_weight = (torch.randn(shape, generator=g, dtype=torch.float64) / shape[1] ** 0.25 for shape in shapes)
    return hidden.requires_grad_(), weight.requires_grad_(), ref_hidden, ref_weight


@pytest.mark.parametrize("named", [False, True], ids=["jsd", "kind"])
@pytest.mark.parametrize("beta", BETAS)
def test_equals_generalized_jsd_loss(beta, named):
    """beta weighs the teacher; 0 and 1 are the KLs, by kind or as the ends of jsd."""
    hidden, weight, ref_hidden, ref_weight = heads()
    mask = torch.arange(12) % 4 > 0
    labels = torch.where(mask, 1, -100).view(3, 4)
    logits = [(h @ w.T).view(3, 4, -1) for h, w in ((hidden, weight), (ref_hidden, ref_weight))]
    want = gkd.GKDTrainer.generalized_jsd_loss(*logits, labels=labels, beta=beta, temperature=0.7)
    options = {"kind": BETAS[beta] if named else "jsd", "beta": beta, "temperature": 0.7, "mask": mask}
    got = linear_divergence(hidden, weight, ref_hidden, ref_weight, **options).sum() / mask.sum()
    assert relative_error(got, want) < 1e-7  # TRL keeps beta in float32
    for a, b in zip(torch.autograd.grad(got, (hidden, weight)), torch.autograd.grad(want, (hidden, weight))):
        assert relative_error(a, b) < 1e-6


@pytest.mark.parametrize("beta", BETAS)
def test_equals_the_fused_function(beta):
    hidden, weight, ref_hidden, ref_weight = (x.detach().float().requires_grad_(x.requires_grad) for x in heads())
    bias, ref_bias = torch.randn(301), torch.randn(301)
    want, entropy = ChunkedDivergenceFunction.apply(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, beta, 1.3, 0.7, 5.0, 1.1, 9.0)
    student = {"bias": bias, "logit_scale": 0.7, "softcap": 5.0, "temperature": 1.3}
    teacher = {"ref_bias": ref_bias, "ref_logit_scale": 1.1, "ref_softcap": 9.0}
    options = {"kind": "jsd", "beta": beta, **student, **teacher}
    got = linear_divergence_outputs(hidden, weight, ref_hidden, ref_weight, outputs=("entropy",), **options)
    assert relative_error(got.divergence, want) < 1e-5 and relative_error(got.entropy, entropy) < 1e-5
    c = torch.randn(12)
    pairs = zip(torch.autograd.grad(got.divergence @ c, (hidden, weight)), torch.autograd.grad(want @ c, (hidden, weight)))
    assert all(relative_error(a, b) < 1e-5 for a, b in pairs)
