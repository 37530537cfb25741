"""Advantages: against loops in plain Python, TRL's formulas, edges."""

import math
import statistics

import pytest
import torch

from fastalign.advantages import gae, group_relative, leave_one_out, normalise_then_sum, whiten

LENGTHS = (5, 1, 0, 9, 2)
CU = torch.tensor([0, *LENGTHS]).cumsum(0).int()
N = sum(LENGTHS)
GROUPS = torch.tensor([0, 4, 4, 6, 7, 10])  # one empty, one of one
REWARDS = torch.tensor([1.0, 0.0, 3.0, 0.5, 0.1, 0.1, 5.0, float("nan"), 2.0, float("nan")])
NAN = float("nan")


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gae_by_loop(rewards, values, counted, gamma, lam):
    """One sequence, backwards in time, over counted tokens only."""
    advantages, following, value = [0.0] * len(rewards), 0.0, 0.0
    for t in reversed(range(len(rewards))):
        if counted[t]:
            following = rewards[t] + gamma * value - values[t] + gamma * lam * following
            advantages[t], value = following, values[t]
    return advantages


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (0.9, 0.0)])
@pytest.mark.parametrize("masked", [False, True])
def test_gae_is_the_recurrence(gamma, lam, masked):
    rewards, values = noise(2, N)
    mask = noise(N, seed=1) < 0.3 if masked else torch.ones(N, dtype=torch.bool)
    expected = []
    for first, last in zip(CU[:-1].tolist(), CU[1:].tolist()):
        expected += gae_by_loop(rewards[first:last].tolist(), values[first:last].tolist(), mask[first:last].tolist(), gamma, lam)
    expected = torch.tensor(expected, dtype=torch.float64)
    given = rewards.masked_fill(~mask, NAN), values.masked_fill(~mask, NAN)
    advantages, returns = gae(*given, CU, mask if masked else None, gamma=gamma, lam=lam)
    torch.testing.assert_close(advantages, expected)
    torch.testing.assert_close(returns, (expected + values).masked_fill(~mask, 0.0))
    assert mask.any() and (not masked or not mask.all())


def test_gae_of_one_reward_at_the_end():
    """lambda 1, gamma 1: the return of every token is the reward."""
    rewards = torch.zeros(4096)
    rewards[-1] = 2.0
    _, returns = gae(rewards, torch.rand(4096), torch.tensor([0, 4096]), lam=1.0)
    torch.testing.assert_close(returns, torch.full((4096,), 2.0))


def test_gae_of_nothing():
    for cu_seqlens in (torch.zeros(1, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)):
        advantages, returns = gae(torch.zeros(0), torch.zeros(0), cu_seqlens)
        assert advantages.shape == returns.shape == (0,)
    with pytest.raises(ValueError, match=r"must both be \(N,\), got \(3,\) and \(2,\)"):
        gae(torch.zeros(3), torch.zeros(2), CU)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_relative_is_the_formula(scale):
    got = group_relative(REWARDS.double(), GROUPS, scale=scale).tolist()
    groups = [[x for x in REWARDS.double()[a:b].tolist() if not math.isnan(x)] for a, b in zip(GROUPS[:-1].tolist(), GROUPS[1:].tolist())]
    centred = [x - statistics.mean(group) for group in groups for x in group]
    if scale == "group":
        spread = [statistics.stdev(group) if len(group) > 1 else 0.0 for group in groups for _ in group]
        centred = [x / (s + 1e-4) for x, s in zip(centred, spread)]
    elif scale == "batch":
        centred = [x / (statistics.stdev(x for group in groups for x in group) + 1e-4) for x in centred]
    scored = iter(centred)
    expected = [0.0 if math.isnan(x) else next(scored) for x in REWARDS.tolist()]
    assert got == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e8])
def test_equal_rewards_are_exactly_zero(value):
    """So that a group without a signal needs no gradient."""
    for size in (1, 3, 7, 8):
        rewards = torch.full((2 * size,), value)
        groups = torch.tensor([0, size, 2 * size])
        for scale in ("group", "batch", "none"):
            assert not group_relative(rewards, groups, scale=scale).any()
        assert not leave_one_out(rewards, groups).any()


def test_leave_one_out_is_the_formula():
    got = leave_one_out(REWARDS.double(), GROUPS).tolist()
    expected = [1 - 3.5 / 3, -4.5 / 3, 3 - 1.5 / 3, 0.5 - 4 / 3, 0, 0, 0, 0, 0, 0]
    assert got == pytest.approx(expected)


def test_normalise_then_sum_scales_each_function():
    rewards = torch.tensor([[0.0, 100.0], [1.0, 300.0], [NAN, NAN], [2.0, NAN]], dtype=torch.float64)
    groups = torch.tensor([0, 4])
    got = normalise_then_sum(rewards, torch.tensor([1.0, 0.5], dtype=torch.float64), groups)
    first = [x / (1 + 1e-4) for x in (-1.0, 0.0, 1.0)]
    second = [x / (math.sqrt(20000) + 1e-4) for x in (-100.0, 100.0)]
    total = [first[0] + 0.5 * second[0], first[1] + 0.5 * second[1], first[2]]
    mean, spread = statistics.mean(total), statistics.stdev(total) + 1e-4
    expected = [(total[0] - mean) / spread, (total[1] - mean) / spread, 0.0, (total[2] - mean) / spread]
    assert got.tolist() == pytest.approx(expected)


def test_whitening():
    values = noise(50) * 3 + 7
    mask = noise(50, seed=2) < 0.5
    white = whiten(values.masked_fill(~mask, NAN), mask)
    kept = white[mask]
    assert float(kept.mean()) == pytest.approx(0, abs=1e-12) and float(kept.std()) == pytest.approx(1)
    assert not white[~mask].any()
    scaled = whiten(values, mask, shift_mean=False)[mask]
    assert float(scaled.mean()) == pytest.approx(float(values[mask].mean())) and float(scaled.std()) == pytest.approx(1)


@pytest.mark.parametrize("counted", [0, 1, 5])
def test_whitening_without_spread(counted):
    mask = torch.arange(5) < counted
    white = whiten(torch.full((5,), 3.0), mask)
    assert white.isfinite().all() and not white.any()


def test_errors():
    with pytest.raises(ValueError, match="scale must be group, batch or none, got 'std'"):
        group_relative(REWARDS, GROUPS, scale="std")
    with pytest.raises(ValueError, match=r"rewards must be \(B,\), one per answer, got \(5, 2\)"):
        leave_one_out(REWARDS.view(5, 2), GROUPS)
