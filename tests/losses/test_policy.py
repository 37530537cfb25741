"""Policy losses: closed forms, gradcheck, invariance to packing and to the cut, edges. Equality with TRL is in tests/parity."""

import math

import pytest
import torch

from fastalign.losses.aggregate import count_sequences, count_tokens
from fastalign.losses.policy import POLICY_LOSSES, cispo, gspo, policy_loss, ppo_clip, reinforce, sapo, sequence_log_ratio, vespo
from fastalign.losses.weights import importance_weights, off_policy_mask, sampling_drift, top_entropy_mask
from fastalign.segments import segment_expand

LENGTHS = (4, 0, 3, 1)
CU = torch.tensor([0, *LENGTHS]).cumsum(0).int()
N = sum(LENGTHS)
TOKEN_LEVEL = [ppo_clip, cispo, sapo, reinforce]
NAMES = sorted(POLICY_LOSSES)
NAN = float("nan")


class Case:
    def __init__(self, seed=0, dtype=torch.float64):
        g = torch.Generator().manual_seed(seed)
        draw = torch.randn(6, N, generator=g, dtype=torch.float64).to(dtype)
        self.logps = -draw[0].abs() - 0.1
        self.old_logps, self.ref_logps = self.logps + 0.3 * draw[1], self.logps + 0.5 * draw[2]
        self.advantages = draw[3]
        self.entropy, self.importance_weights = draw[4].abs(), draw[5].abs() + 0.1
        self.mask = torch.arange(N) != 1
        self.keep = torch.arange(N) != 5
        self.old_logps[0], self.advantages[0] = self.logps[0] - 1, 1.0  # clipped above
        self.old_logps[5], self.advantages[5] = self.logps[5] + 1, -1.0  # and below

    def everything(self, *names):
        chosen = names or ("mask", "keep", "importance_weights", "ref_logps", "entropy")
        extra = {"kl_coef": 0.3} if "ref_logps" in chosen else {}
        return {name: getattr(self, name) for name in chosen} | extra | ({"entropy_coef": 0.2} if "entropy" in chosen else {})

    def loss(self, name, logps=None, **options):
        options |= {"length": 9} if name == "dr_grpo" else {}
        advantages = options.pop("advantages", self.advantages)
        return policy_loss(name, self.logps if logps is None else logps, self.old_logps, advantages, CU, **options)


def test_ppo_clip_by_hand():
    ratio = torch.tensor([0.5, 1.1, 1.5, 3.0])
    logps, zero = ratio.log(), torch.zeros(4)
    assert ppo_clip(logps, zero, torch.ones(4)).tolist() == pytest.approx([-0.5, -1.1, -1.2, -1.2])
    assert ppo_clip(logps, zero, -torch.ones(4)).tolist() == pytest.approx([0.8, 1.1, 1.5, 3.0])
    assert ppo_clip(logps, zero, -torch.ones(4), delta=2.0).tolist() == pytest.approx([0.8, 1.1, 1.5, 2.0])
    assert ppo_clip(logps, zero, torch.ones(4), clip_high=0.6).tolist() == pytest.approx([-0.5, -1.1, -1.5, -1.6])


def test_clipped_tokens_have_exactly_no_gradient():
    logps = torch.tensor([0.5, 1.1, 1.5, 3.0]).log().requires_grad_()
    for sign, live in ((1.0, [True, True, False, False]), (-1.0, [False, True, True, True])):
        (d,) = torch.autograd.grad(ppo_clip(logps, torch.zeros(4), torch.full((4,), sign)).sum(), logps)
        assert (d != 0).tolist() == live
        assert torch.allclose(d[live], -sign * logps.detach().exp()[live])


def test_on_policy_gradients_are_those_of_reinforce():
    """At ratio 1: -A for all but sapo and vespo of one token, whose gates are 1 there too."""
    case = Case()
    for loss in (ppo_clip, cispo, sapo, reinforce):
        logps = case.logps.clone().requires_grad_()
        (d,) = torch.autograd.grad(loss(logps, case.logps, case.advantages).sum(), logps)
        torch.testing.assert_close(d, -case.advantages)
    logps = case.logps.clone().requires_grad_()
    (d,) = torch.autograd.grad(vespo(logps, case.logps, case.advantages, CU).sum(), logps)
    torch.testing.assert_close(d, -case.advantages)


def test_cispo_and_sapo_by_hand():
    ratio, a = torch.tensor([0.5, 8.0]), torch.tensor([1.0, -2.0])
    logps = torch.tensor([-1.0, -2.0])
    old = logps - ratio.log()
    assert cispo(logps, old, a).tolist() == pytest.approx([0.5, -20.0])
    gate = [4 / (1 + math.exp(0.5)), 4 / 1.05 / (1 + math.exp(-1.05 * 7))]
    assert sapo(logps, old, a).tolist() == pytest.approx([-gate[0], 2 * gate[1]])


def test_vespo_by_hand():
    logps, old = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-1.2, -1.9, -0.5])
    weight = math.exp(0.1)  # of the first two tokens
    phi = weight**2 * math.exp(3 * (1 - weight)), 1.0
    got = vespo(logps, old, torch.tensor([1.0, 1.0, -1.0]), torch.tensor([0, 2, 3]))
    assert got.tolist() == pytest.approx([phi[0], 2 * phi[0], -0.5])
    corrected = vespo(logps, old, torch.ones(3), torch.tensor([0, 2, 3]), importance_weights=torch.tensor([2.0, 0.5, 0.0]))
    tiny = 1e-16 * math.exp(3 * (1 - 1e-8))
    assert corrected.tolist() == pytest.approx([phi[0], 2 * phi[0], 0.5 * tiny])


def test_gspo_by_hand():
    """The ratio is the geometric mean over counted tokens, and its gradient is shared among them."""
    logps = torch.tensor([-1.0, -2.0, -3.0, -1.0], requires_grad=True)
    old, mask = torch.tensor([-1.3, -1.9, NAN, -3.0]), torch.tensor([True, True, False, True])
    cu_seqlens, a = torch.tensor([0, 3, 4]), torch.tensor([2.0, 2.0, 2.0, 1.0])
    loss = gspo(logps, old, a, cu_seqlens, mask, clip_high=1.0)
    s = math.exp(0.1)
    assert loss.tolist() == pytest.approx([-2 * s, -2 * s, -2 * s, -2.0])  # the second sequence is clipped at 2
    (d,) = torch.autograd.grad(loss[:2].mean(), logps)
    assert d.tolist() == pytest.approx([-s, -s, 0.0, 0.0])
    product = sequence_log_ratio(logps, old, cu_seqlens, mask, normalise=False)
    assert product.tolist() == pytest.approx([0.2, 0.2, 0.2, 2.0])


@pytest.mark.parametrize("loss", TOKEN_LEVEL)
def test_gradcheck_per_token(loss):
    """cispo's weight has no gradient, so its derivative is checked at a fixed ratio."""
    case = Case()
    fixed = {"log_ratio": case.logps - case.old_logps} if loss is cispo else {}
    assert torch.autograd.gradcheck(lambda x: loss(x, case.old_logps, case.advantages, **fixed), case.logps.requires_grad_())


@pytest.mark.parametrize("level", ["token", "sequence", "product"])
@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("cispo", "vespo")])  # whose weights have no gradient
def test_gradcheck_of_the_whole_loss(name, level):
    case = Case()
    options = case.everything()
    entropy = options.pop("entropy")

    def loss(logps, entropy):
        return case.loss(name, logps, level=level, entropy=entropy, **options).loss

    assert torch.autograd.gradcheck(loss, (case.logps.requires_grad_(), entropy.requires_grad_()))


@pytest.mark.parametrize("name", NAMES)
def test_only_logps_and_entropy_have_a_gradient(name):
    case = Case()
    leaves = [case.logps, case.entropy, case.old_logps, case.advantages, case.importance_weights, case.ref_logps]
    for x in leaves:
        x.requires_grad_()
    d = torch.autograd.grad(case.loss(name, **case.everything()).loss, leaves, allow_unused=True)
    assert d[0].any() and d[1].any() and all(x is None for x in d[2:])


@pytest.mark.parametrize("name", NAMES)
def test_masked_tokens_may_hold_nan(name):
    case = Case()
    options = case.everything()
    good = case.loss(name, case.logps.requires_grad_(), **options)
    (expected,) = torch.autograd.grad(good.loss, case.logps)
    other = Case()
    for x in (other.logps, other.old_logps, other.ref_logps, other.advantages, other.entropy, other.importance_weights):
        x[~case.mask] = NAN
    got = other.loss(name, other.logps.requires_grad_(), **other.everything())
    (d,) = torch.autograd.grad(got.loss, other.logps)
    torch.testing.assert_close((*got, d), (*good, expected))
    assert not d[~case.mask].any() and d[case.mask].any()


@pytest.mark.parametrize("name", NAMES)
def test_the_step_does_not_depend_on_its_cut(name):
    case = Case()
    sequences = POLICY_LOSSES[name].aggregate.__name__ != "token_mean"
    count = count_sequences(CU, case.mask) if sequences else count_tokens(CU, case.mask)
    options = case.everything() | {"denominator": count} | ({"length": 9} if name == "dr_grpo" else {})
    whole = policy_loss(name, case.logps.requires_grad_(), case.old_logps, case.advantages, CU, **options)
    parts = []
    for first, last in ((0, 1), (1, 2), (2, 4)):
        rows = slice(int(CU[first]), int(CU[last]))
        cut = {k: v[rows] if isinstance(v, torch.Tensor) and v.shape == (N,) else v for k, v in options.items()}
        given = (x[rows] for x in (case.logps, case.old_logps, case.advantages))
        parts.append(policy_loss(name, *given, CU[first : last + 1] - CU[first], **cut))
    torch.testing.assert_close(sum(p.loss for p in parts), whole.loss)
    torch.testing.assert_close(*(torch.autograd.grad(x, case.logps, retain_graph=True) for x in (sum(p.loss for p in parts), whole.loss)))
    for field in ("tokens", "clipped_low", "clipped_high", "kl"):
        torch.testing.assert_close(torch.cat([getattr(p, field) for p in parts]), getattr(whole, field))
    if POLICY_LOSSES[name].token_loss is ppo_clip and POLICY_LOSSES[name].level == "token":
        assert whole.clipped_high.sum() >= 1 and whole.clipped_low.sum() >= 1


@pytest.mark.parametrize("name", NAMES)
def test_advantages_per_sequence(name):
    case = Case()
    given = torch.tensor([[1.0], [5.0], [-0.5], [0.25]], dtype=torch.float64)
    spread = segment_expand(given[:, 0], CU, N)
    assert case.loss(name, advantages=given).loss == case.loss(name, advantages=spread).loss
    with pytest.raises(ValueError, match=r"\(8,\), one per token, or \(4, 1\), one per sequence: got \(4,\)"):
        case.loss(name, advantages=given[:, 0])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n", [N, 0])
def test_nothing_counts(name, n):
    case = Case()
    logps = case.logps[:n].detach().requires_grad_()
    extra = {"length": 9} if name == "dr_grpo" else {}
    given = (logps, case.old_logps[:n], case.advantages[:n], CU if n else CU[:1])
    out = policy_loss(name, *given, mask=torch.zeros(n, dtype=torch.bool), ref_logps=case.ref_logps[:n], kl_coef=1.0, **extra)
    assert out.loss.item() == 0.0 and out.tokens.sum() == 0
    (d,) = torch.autograd.grad(out.loss, logps)
    assert d.shape == (n,) and not d.any()


@pytest.mark.parametrize("level", ["token", "sequence", "product"])
@pytest.mark.parametrize("name", NAMES)
def test_finite_at_the_edges(name, level):
    """Ratios beyond the range of float32, log-probs of exactly 0, advantages of 0 and of both signs."""
    logps = torch.tensor([0.0, 0.0, -200.0, -200.0, 0.0, -200.0, -1e-30, -1.0], requires_grad=True)
    old = torch.tensor([0.0, -200.0, 0.0, 0.0, -200.0, 0.0, 0.0, -1.0])
    for a in (0.0, 1.0, -1.0):
        extra = {"length": 9} if name == "dr_grpo" else {}
        out = policy_loss(name, logps, old, torch.full((8,), a), CU, level=level, ref_logps=old, kl_coef=0.1, **extra)
        (d,) = torch.autograd.grad(out.loss, logps)
        assert out.loss.isfinite() and d.isfinite().all(), (a, out.loss, d)


def test_errors():
    case = Case()
    with pytest.raises(ValueError, match="no policy loss is called 'ppo'; there are grpo, bnpo,"):
        case.loss("ppo")
    with pytest.raises(ValueError, match="level must be token, sequence or product, got 'word'"):
        case.loss("grpo", level="word")
    with pytest.raises(ValueError, match="belongs to dr_grpo and to no other loss: got None for dr_grpo"):
        policy_loss("dr_grpo", case.logps, case.old_logps, case.advantages, CU)
    with pytest.raises(ValueError, match=r"ref_logps must be \(8,\), one per token, got \(3,\)"):
        case.loss("grpo", ref_logps=torch.zeros(3))
    with pytest.raises(ValueError, match=r"keep must be bool \(True counts\), got torch.float64"):
        case.loss("grpo", keep=case.logps)
    with pytest.raises(ValueError, match=r"logps must be \(N,\) and cu_seqlens \(S\+1,\), got \(1, 8\)"):
        case.loss("grpo", case.logps[None])
    with pytest.raises(ValueError, match="no KL estimate is called 'k4'; there are k1, k2, k3"):
        case.loss("grpo", ref_logps=case.ref_logps, kl="k4")
    with pytest.raises(ValueError, match="mode must be token_truncate"):
        importance_weights(case.logps, case.old_logps, CU, mode="clip")
    with pytest.raises(ValueError, match=r"quantile is a share of the tokens, in \(0, 1\], got 0"):
        top_entropy_mask(case.entropy, quantile=0)


def test_drift_from_the_sampler_counts_what_is_known():
    old, drawn = torch.tensor([-1.0, -2.0, -3.0, -4.0]), torch.tensor([-1.5, float("nan"), -2.0, float("nan")])
    cu_seqlens, mask = torch.tensor([0, 2, 3, 4]), torch.tensor([True, True, True, False])
    for given in (None, mask):
        drift = {name: float(x) for name, x in sampling_drift(old, drawn, cu_seqlens, given, mode="token_mask").items()}
        assert drift == pytest.approx(
            {
                "sampling_tokens": 2,
                "sampling_difference": 1.5,
                "max_sampling_difference": 1.0,
                "sampling_ratios": 2,
                "sampling_ratio": math.exp(0.5) + math.exp(-1),
                "min_sampling_ratio": math.exp(-1),
                "max_sampling_ratio": math.exp(0.5),
            }
        )
    drift = sampling_drift(old[:3], torch.tensor([-1.5, -2.5, -2.0]), cu_seqlens[:3], mode="sequence_mask")
    assert float(drift["max_sampling_ratio"]) == pytest.approx(math.e) and float(drift["sampling_ratios"]) == 2
    nothing = sampling_drift(old, drawn, cu_seqlens, torch.zeros(4, dtype=torch.bool))
    assert float(nothing["sampling_tokens"]) == float(nothing["max_sampling_ratio"]) == 0 and float(nothing["min_sampling_ratio"]) > 1e30


def test_importance_weights_by_hand():
    old, sampler = torch.tensor([-1.0, -1.0, -1.0, -1.0]), torch.tensor([-1.0, -3.0, NAN, -0.5])
    given, two = (old, sampler, torch.tensor([0, 3, 4])), math.exp(2)
    assert importance_weights(*given, mode="token_truncate", clip_min=0.9).tolist() == pytest.approx([1, 3, 1, 0.9])
    assert importance_weights(*given, mode="token_mask", clip_min=0.9).tolist() == pytest.approx([1, 0, 1, 0])
    none = {"clip_min": None, "clip_max": None}
    assert importance_weights(*given, mode="sequence_truncate", **none).tolist() == pytest.approx([two, two, two, math.exp(-0.5)])
    assert importance_weights(*given).tolist() == pytest.approx([0, 0, 0, math.exp(-0.5)])
    mask = torch.tensor([True, False, True, True])
    assert importance_weights(*given, mask).tolist() == pytest.approx([1, 1, 1, math.exp(-0.5)])


def test_off_policy_mask_by_hand():
    logps, sampler = torch.tensor([-3.0, -1.0, -3.0, -3.0]), torch.tensor([-1.0, -1.0, NAN, -1.0])
    a, cu_seqlens = torch.tensor([-1.0, -1.0, -1.0, 1.0]), torch.tensor([0, 3, 4])
    assert off_policy_mask(logps, sampler, a, cu_seqlens, threshold=0.6).tolist() == [False, False, False, True]
    assert off_policy_mask(logps, sampler, a, cu_seqlens, threshold=0.7).tolist() == [True] * 4
    mask = torch.tensor([True, False, True, True])
    assert off_policy_mask(logps, sampler, a, cu_seqlens, mask, threshold=0.7).tolist() == [False, False, False, True]


def test_top_entropy_mask_of_nothing():
    assert top_entropy_mask(torch.zeros(0), quantile=0.5).shape == (0,)
    assert not top_entropy_mask(torch.ones(3), torch.zeros(3, dtype=torch.bool), quantile=0.5).any()
