"""The fused losses under Triton's interpreter, on a CPU: run by `test_fused` in a process of its own.

By hand: TRITON_INTERPRET=1 python -m pytest tests/losses/interpreted_fused.py
"""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: the fused losses are unproven here")
from fused_cases import (
    LEVELS,
    OPTIONS,
    PAIRED,
    SEQUENCE_CASES,
    SEQUENCE_IDS,
    Policy,
    Sequences,
    check_extremes,
    check_nan_is_not_hidden,
    check_policy,
    check_sequences,
)
from fused_cases import poisoned as poisoned

from fastalign.losses import fused_triton
from fastalign.losses.policy import POLICY_LOSSES
from fastalign.losses.reference_free import orpo

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize(("name", "level"), LEVELS)
def test_policy_with_every_term(name, level):
    check_policy(Policy(), name, OPTIONS["all"], level=level)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("terms", [t for t in OPTIONS if t != "all"])
def test_policy_term_by_term(terms, level):
    check_policy(Policy(seed=1), "dapo", OPTIONS[terms], level=level)


@pytest.mark.parametrize("name", ["dapo", "vespo", "gspo"])
def test_advantages_per_sequence_and_options(name):
    case = Policy()
    advantages = torch.linspace(-1.5, 2.0, case.cu_seqlens.numel() - 1)[:, None]
    options = {} if name == "vespo" else {"clip_low": 0.1, "clip_high": 0.28, "delta": 1.5}
    check_policy(case, name, OPTIONS["mask"], advantages=advantages, **options)


@pytest.mark.parametrize("name", ["dapo", "grpo", "luspo"])
def test_denominators_and_coefficients_on_the_device(name):
    case = Policy()
    want = case.run(fused_triton.policy_loss, name, denominator=900.0)
    entropy = {"denominator": torch.tensor(900), "entropy_coef": torch.tensor(0.02)}

    def loss(*args, **options):
        return fused_triton.policy_loss(*args, **options | entropy)

    got = case.run(loss, name)
    for x, y in zip((got[0].loss, *got[1:]), (want[0].loss, *want[1:])):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("name", POLICY_LOSSES)
@pytest.mark.parametrize("level", ["token", "sequence", "product"])
def test_policy_at_the_edges(name, level):
    check_extremes(name, level, "cpu")


def nothing(n, sequences):
    return torch.zeros(n, requires_grad=True), torch.full((sequences + 1,), n, dtype=torch.int32).mul(torch.arange(sequences + 1) > 0)


@pytest.mark.parametrize(("n", "sequences"), [(0, 0), (0, 4), (3, 2)])
def test_nothing_counts(n, sequences):
    """A zero that stays connected to the graph: no tokens, no sequences, all masked."""
    logps, cu_seqlens = nothing(n, sequences)
    for name in POLICY_LOSSES:
        extra = {"length": 9} if name == "dr_grpo" else {}
        mask = torch.zeros(n, dtype=torch.bool)
        out = fused_triton.policy_loss(name, logps, torch.zeros(n), torch.ones(n), cu_seqlens.int(), mask=mask, **extra)
        (d,) = torch.autograd.grad(out.loss, logps)
        assert out.loss.item() == 0 and d.shape == (n,) and not d.any() and not out.tokens.any()


@pytest.mark.parametrize("sequences", [0, 4])
def test_pairs_without_tokens(sequences):
    logps, cu_seqlens = nothing(0, sequences)
    out = fused_triton.preference_loss("sigmoid", logps, cu_seqlens.int(), torch.zeros(sequences))
    assert float(out.loss) == pytest.approx(0.693147 if sequences else 0.0)
    assert torch.autograd.grad(out.loss, logps)[0].shape == (0,)
    alone = fused_triton.unpaired_loss("kto", logps, cu_seqlens.int(), torch.zeros(sequences), torch.ones(sequences) > 0)
    assert float(alone.loss) == (0.5 if sequences else 0.0)


@pytest.mark.parametrize(("name", "options"), SEQUENCE_CASES, ids=SEQUENCE_IDS)
def test_sequence_losses(name, options):
    check_sequences(Sequences(), name, **options)


@pytest.mark.parametrize("name", [*PAIRED, "kto"])
def test_sequence_losses_far_from_the_reference(name):
    case = Sequences(drift=3000.0)
    loss, d_logps, statistics = case.fused(name)
    gold, gold_d, _ = case.defined(name)
    assert loss.isfinite() and d_logps.isfinite().all() and all(x.isfinite().all() for x in statistics)
    torch.testing.assert_close(loss.double(), gold.double(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(d_logps.double(), gold_d.double(), rtol=2e-3, atol=1e-7)


def test_kl_on_the_device():
    case = Sequences()
    for x, y in zip(case.fused("kto", kl=torch.tensor([0.7]))[:2], case.fused("kto", kl=0.7)[:2]):
        assert torch.equal(x, y)


@pytest.mark.parametrize("value", [0.0, -1e-8, -1e-3, -0.7, -30.0])
def test_certain_tokens_have_finite_odds(value):
    """A mean log-prob of exactly 0: orpo's odds are infinite."""
    logps = torch.tensor([value, value, -0.1, -0.3], requires_grad=True)
    out = fused_triton.preference_loss("orpo", logps, torch.tensor([0, 2, 4]))
    want = orpo(logps[:2].mean()[None], logps[2:].mean()[None])
    torch.testing.assert_close(out.loss, want.loss.mean())
    torch.testing.assert_close(*(torch.autograd.grad(x, logps)[0] for x in (out.loss, want.loss.mean())))


@pytest.mark.parametrize("kind", ["policy", "preference"])
def test_upstream_gradient_second_backward_and_strides(kind):
    wide = (-torch.rand(8, 3)).requires_grad_()
    logps, cu_seqlens = wide[:, 1], torch.tensor([0, 3, 8])
    if kind == "policy":
        out = fused_triton.policy_loss("dapo", logps, torch.zeros(8), torch.linspace(-1, 1, 8), cu_seqlens)
    else:
        out = fused_triton.preference_loss("sigmoid", logps, cu_seqlens, torch.zeros(2))
    (one,) = torch.autograd.grad(out.loss, wide, retain_graph=True)
    (again,) = torch.autograd.grad(out.loss, wide, retain_graph=True)
    (three,) = torch.autograd.grad(out.loss, wide, torch.tensor(3.0))
    assert torch.equal(one, again) and one[:, 1].any() and not one[:, [0, 2]].any()
    torch.testing.assert_close(three, 3 * one)


def test_nan_is_not_hidden():
    check_nan_is_not_hidden("cpu")
