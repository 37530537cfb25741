"""Every loss of sequences, through the head down to hidden states and head weight, against numerical gradients in float64."""

from functools import partial

import pytest
import torch

from fastalign import linear_logps
from fastalign.losses import PREFERENCE_LOSSES, REFERENCE_FREE_LOSSES, UNPAIRED_LOSSES, bradley_terry, dft, nll, plackett_luce
from fastalign.losses.divergence import SCORES
from fastalign.segments import segment_mean, segment_sum, shared_length_sum

CU_SEQLENS = torch.tensor([0, 2, 3, 5, 9], dtype=torch.int32)  # two pairs
TARGET = torch.tensor([1, 0, 4, 2, 2, 3, 1, 0, 4])
LENGTHS = {"chosen_lengths": CU_SEQLENS.diff()[0::2], "rejected_lengths": CU_SEQLENS.diff()[1::2]}
REF = torch.tensor([-2.0, -2.5, -3.0, -6.0], dtype=torch.float64)
PER_TOKEN = ("ipo", "sigmoid_norm")


def check(loss_of_logps) -> None:
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 3, generator=g, dtype=torch.float64, requires_grad=True) for n in (9, 5))

    def loss(hidden, weight):
        return loss_of_logps(linear_logps(hidden, weight, TARGET).logps)

    assert torch.autograd.gradcheck(loss, [hidden, weight])
    assert all(d.abs().max() > 1e-4 for d in torch.autograd.grad(loss(hidden, weight).sum(), [hidden, weight]))


def preference(name, logps, total=segment_sum, **options):
    sums = total(logps, CU_SEQLENS)
    options |= LENGTHS if name in PER_TOKEN else {}
    return PREFERENCE_LOSSES[name](sums[0::2], sums[1::2], REF[0::2], REF[1::2], beta=0.4, **options).loss


@pytest.mark.parametrize("name", sorted(PREFERENCE_LOSSES))
def test_preference_losses(name):
    check(partial(preference, name))


@pytest.mark.parametrize("divergence", sorted(SCORES))
def test_divergences(divergence):
    check(partial(preference, "sigmoid", score=SCORES[divergence]))


def test_length_desensitised():
    check(partial(preference, "sigmoid", total=partial(shared_length_sum, alpha=0.3)))


@pytest.mark.parametrize("name", sorted(REFERENCE_FREE_LOSSES))
def test_reference_free_losses(name):
    def loss(logps):
        scores = (segment_sum if name == "cpo" else segment_mean)(logps, CU_SEQLENS)
        return REFERENCE_FREE_LOSSES[name](scores[0::2], scores[1::2], beta=0.7).loss

    check(loss)


@pytest.mark.parametrize("name", sorted(UNPAIRED_LOSSES))
def test_unpaired_losses(name):
    desirable, kl = torch.tensor([True, False, False, True]), [0.7] if name == "kto" else []
    check(lambda logps: UNPAIRED_LOSSES[name](segment_sum(logps, CU_SEQLENS), REF, desirable, *kl, undesirable_weight=1.5).loss)


def test_supervised_losses():
    """dft holds its weights still: their numerical gradient is that of -p log p only where they are put back by hand."""
    check(nll)
    g = torch.Generator().manual_seed(0)
    logps = (-torch.rand(5, generator=g, dtype=torch.float64)).requires_grad_()
    assert torch.allclose(torch.autograd.grad(dft(logps).sum(), [logps])[0], -logps.exp())


def test_reward_losses():
    """On scores that are log-probs here; a score head is one more linear layer."""
    check(lambda logps: bradley_terry(logps[:4], logps[4:8], margin=torch.full((4,), 0.3), center_coef=0.1))
    check(lambda logps: plackett_luce(logps, torch.tensor([3.0, 1.0, 2.0, 2.0, 5.0, 1.0, 4.0, 2.0, 3.0]), CU_SEQLENS))
