"""Normalisers: values, invariance to the cut into micro-batches, masks."""

import pytest
import torch

from fastalign.losses.aggregate import count_sequences, count_tokens, fixed_length, sequence_mean, sequence_sum, token_mean

LENGTHS = (3, 0, 2, 4)  # one empty
CU = torch.tensor([0, *LENGTHS]).cumsum(0).int()
VALUES = torch.tensor([1.0, 2.0, 6.0, 5.0, 7.0, 1.0, 1.0, 3.0, 3.0])
MASK = torch.tensor([True, True, False, False, False, True, True, True, True])  # the third sequence is masked
EVERY = [
    (token_mean, lambda cu, mask: count_tokens(cu, mask), {}),
    (sequence_mean, lambda cu, mask: count_sequences(cu, mask), {}),
    (sequence_mean, lambda cu, mask: count_sequences(cu, mask, count_masked=True), {"count_masked": True}),
    (sequence_sum, lambda cu, mask: cu.numel() - 1, {}),
    (fixed_length, lambda cu, mask: cu.numel() - 1, {"length": 10}),
]


def test_values():
    assert token_mean(VALUES, CU).item() == pytest.approx(29 / 9)
    assert token_mean(VALUES, CU, MASK).item() == pytest.approx(11 / 6)
    assert sequence_mean(VALUES, CU).item() == pytest.approx((3 + 6 + 2) / 3)
    assert sequence_mean(VALUES, CU, MASK).item() == pytest.approx((1.5 + 2) / 2)
    assert sequence_mean(VALUES, CU, MASK, count_masked=True).item() == pytest.approx((1.5 + 2) / 4)
    assert sequence_sum(VALUES, CU, MASK).item() == pytest.approx((3 + 8) / 4)
    assert fixed_length(VALUES, CU, MASK, length=10).item() == pytest.approx((3 + 8) / 40)


@pytest.mark.parametrize(("aggregate", "count", "options"), EVERY)
def test_micro_batches_add_up(aggregate, count, options):
    """Under the step's denominator any cut gives the step's result, which is that of one batch that counts for itself."""
    values = VALUES.clone().requires_grad_()
    whole = aggregate(values, CU, MASK, **options)
    denominator, parts = count(CU, MASK), []
    for first, last in ((0, 1), (1, 3), (3, 4)):
        rows = slice(int(CU[first]), int(CU[last]))
        cu_seqlens = CU[first : last + 1] - CU[first]
        parts.append(aggregate(values[rows], cu_seqlens, MASK[rows], denominator=denominator, **options))
    torch.testing.assert_close(sum(parts), whole)
    torch.testing.assert_close(*(torch.autograd.grad(x, values, retain_graph=True)[0] for x in (sum(parts), whole)))


@pytest.mark.parametrize(("aggregate", "count", "options"), EVERY)
def test_gradcheck_and_masked_nan(aggregate, count, options):
    values = VALUES.double().masked_fill(~MASK, float("nan")).requires_grad_()
    (d,) = torch.autograd.grad(aggregate(values, CU, MASK, **options), values)
    assert d.isfinite().all() and not d[~MASK].any() and d[MASK].all()
    assert torch.autograd.gradcheck(lambda x: aggregate(x, CU, MASK, **options), VALUES.double().requires_grad_())


@pytest.mark.parametrize(("aggregate", "count", "options"), EVERY)
@pytest.mark.parametrize("n", [9, 0])
def test_nothing_counts(aggregate, count, options, n):
    """A zero that stays connected to the graph."""
    values, cu_seqlens = VALUES[:n].clone().requires_grad_(), CU if n else CU[:1]
    loss = aggregate(values, cu_seqlens, torch.zeros(n, dtype=torch.bool), **options)
    assert loss.item() == 0.0
    (d,) = torch.autograd.grad(loss, values)
    assert not d.any() and d.shape == values.shape


def test_denominator_may_be_a_tensor_or_below_one():
    assert token_mean(VALUES, CU, denominator=torch.tensor(2.0)).item() == token_mean(VALUES, CU, denominator=2.0).item() == 14.5
    assert token_mean(VALUES, CU, denominator=0.0).item() == 29.0
