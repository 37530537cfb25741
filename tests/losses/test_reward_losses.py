"""Losses of reward models: closed forms, gradcheck, ties, edges."""

import itertools
import math

import pytest
import torch

from fastalign.losses import bradley_terry, plackett_luce


def scores(n, seed=0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, requires_grad=True)


def groups(*sizes):
    return torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32)


@pytest.mark.parametrize("options", [{}, {"margin": torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)}, {"center_coef": 0.1}])
def test_bradley_terry(options):
    c, r = scores(3), scores(3, seed=1)
    assert torch.autograd.gradcheck(lambda a, b: bradley_terry(a, b, **options), [c, r])
    margin, coef = options.get("margin", torch.zeros(3)), options.get("center_coef", 0.0)
    expected = [math.log1p(math.exp(-(a - b - m))) + coef * (a + b) ** 2 for a, b, m in zip(c.tolist(), r.tolist(), margin.tolist())]
    assert bradley_terry(c, r, **options).tolist() == pytest.approx(expected)


def test_plackett_luce_is_the_probability_of_the_ranking():
    """exp(-loss) of all rankings of a group adds up to 1, and each is the product of successive choices."""
    s = scores(4).detach()
    total = 0.0
    for ranking in itertools.permutations(range(4)):
        labels = torch.tensor([4.0 - ranking.index(i) for i in range(4)])
        probability = float((-plackett_luce(s, labels, groups(4))).exp())
        rest, by_hand = list(ranking), 1.0
        while rest:
            by_hand *= math.exp(s[rest[0]]) / sum(math.exp(s[i]) for i in rest)
            rest.pop(0)
        assert probability == pytest.approx(by_hand)
        total += probability
    assert total == pytest.approx(1.0)


def test_plackett_luce_of_two_is_bradley_terry_and_only_the_order_counts():
    s = scores(6)
    labels = torch.tensor([2.0, 1.0, -5.0, 7.0, 0.1, 0.0])
    expected = bradley_terry(s[[0, 3, 4]], s[[1, 2, 5]])
    torch.testing.assert_close(plackett_luce(s, labels, groups(2, 2, 2)), expected)


def test_ties_are_not_compared():
    s = scores(3)
    assert plackett_luce(s, torch.ones(3), groups(3)).tolist() == [0.0]
    assert torch.autograd.grad(plackett_luce(s, torch.ones(3), groups(3)).sum(), [s])[0].abs().max() == 0
    first = plackett_luce(s, torch.tensor([2.0, 2.0, 1.0]), groups(3))
    torch.testing.assert_close(first.sum(), bradley_terry(s[:2], s[2:].expand(2)).sum())


def test_groups_are_apart_and_may_be_empty_or_single():
    s, labels = scores(5), torch.tensor([1.0, 0.0, 3.0, 2.0, 1.0])
    together = plackett_luce(s, labels, groups(2, 0, 2, 1))
    assert together[1] == together[3] == 0
    torch.testing.assert_close(together[:1], plackett_luce(s[:2], labels[:2], groups(2)))
    torch.testing.assert_close(together[2:3], plackett_luce(s[2:4], labels[2:4], groups(2)))
    assert torch.autograd.gradcheck(lambda x: plackett_luce(x, labels, groups(2, 0, 2, 1)), [s])


@pytest.mark.parametrize("value", [0.0, 1e4, -1e4])
def test_gradients_are_finite_at_the_edges(value):
    s = torch.tensor([value, 0.0, -value, 1.0], requires_grad=True)
    for loss in (plackett_luce(s, torch.arange(4.0), groups(4)), bradley_terry(s[:2], s[2:], margin=1.0, center_coef=0.1)):
        assert loss.isfinite().all()
        assert torch.autograd.grad(loss.sum(), [s])[0].isfinite().all()


def test_errors():
    with pytest.raises(ValueError, match=r"scores and labels of one shape \(S,\), got \(3,\) and \(2,\)"):
        plackett_luce(torch.zeros(3), torch.zeros(2), groups(3))
    with pytest.raises(ValueError, match=r"one shape \(P,\), got \(2,\), \(2,\) and margin \(3,\)"):
        bradley_terry(torch.zeros(2), torch.zeros(2), margin=torch.zeros(3))
