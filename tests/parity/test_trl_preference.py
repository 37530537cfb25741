"""The preference and unpaired losses equal what TRL 1.16's own trainers compute, gradients too, over every option, in float64.

Where TRL's number is wrong, or ours differs on purpose, a test shows both.
"""

from __future__ import annotations

import math
from collections import defaultdict
from functools import partial
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl", reason="TRL is the oracle; without it the equality of the preference losses with TRL's is unproven")
from accelerate import Accelerator
from trl import DPOTrainer, KTOTrainer
from trl.experimental.cpo.cpo_trainer import CPOTrainer
from trl.experimental.orpo.orpo_trainer import ORPOTrainer
from trl.trainer.utils import FusedCausalLMOutput

from fastalign.losses import PREFERENCE_LOSSES, UNPAIRED_LOSSES, alphapo, cpo, dpo, hinge, ipo, orpo, simpo
from fastalign.losses.divergence import SCORES
from fastalign.losses.preference import discopop
from fastalign.losses.reference_free import log_odds_ratio
from fastalign.losses.unpaired import mismatched_kl
from fastalign.segments import segment_mean, segment_sum, shared_length_sum

LENGTHS = (5, 3, 7, 1, 4, 2, 6, 6)  # completion tokens: four chosen, then four rejected, as TRL lays them out
WIDTH = 2 + max(LENGTHS)  # a prompt of two tokens
PAIRS = len(LENGTHS) // 2
ORDER = [i for p in range(PAIRS) for i in (p, p + PAIRS)]  # ours: chosen and rejected in turn
CU_SEQLENS = torch.tensor([0, *(LENGTHS[i] for i in ORDER)]).cumsum(0).int()
CLOSE = {"rtol": 1e-9, "atol": 1e-11}
SCORED = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop")
ACCELERATOR = Accelerator(cpu=True)


class Case:
    """One batch of pairs, padded for TRL and packed for us."""

    def __init__(self, scale: float = 1.0) -> None:
        g = torch.Generator().manual_seed(0)
        shape = (len(LENGTHS), WIDTH - 1)
        self.logps = -3 * torch.rand(shape, generator=g, dtype=torch.float64)
        self.sq = -2 * torch.rand(shape, generator=g, dtype=torch.float64)
        position = torch.arange(WIDTH)[None]
        self.completion = (position >= 2) & (position < 2 + torch.tensor(LENGTHS)[:, None])
        self.mask = self.completion[:, 1:]
        self.ref_tokens = self.logps + scale * torch.randn(shape, generator=g, dtype=torch.float64)
        self.ref = (self.ref_tokens * self.mask).sum(1)

    def packed(self, values: torch.Tensor) -> torch.Tensor:
        return torch.cat([values[i][self.mask[i]] for i in ORDER])

    def trl(self, types, weights=None, ref=None, **options):
        """(loss, dL/dlogps, metrics) by DPOTrainer."""
        logps = self.logps.clone().requires_grad_()
        output = FusedCausalLMOutput(
            log_probs=logps * self.mask, log_sum_sq_probs=self.sq, entropy=self.sq, mean_logits=self.sq, is_top1=torch.zeros_like(self.mask)
        )
        stub = SimpleNamespace(
            **{
                "model": SimpleNamespace(training=True), "accelerator": ACCELERATOR, "loss_types": types, "beta": 0.3,
                "loss_weights": weights or [1.0] * len(types), "label_smoothing": 0.0, "f_divergence_type": "reverse_kl",
                "f_alpha_divergence_coef": 0.5, "ld_alpha": None, "use_weighting": False, "precompute_ref_logps": True,
                "aux_loss_enabled": False, "args": SimpleNamespace(discopop_tau=options.pop("discopop_tau", 0.05)),
                "_metrics": {"train": defaultdict(list)}, "_total_train_tokens": 0, "_tp_size": 1,
            }
            | options
        )  # fmt: skip
        ref = self.ref if ref is None else ref
        inputs = {
            "input_ids": torch.zeros(self.completion.shape, dtype=torch.int64), "attention_mask": torch.ones_like(self.completion),
            "completion_mask": self.completion.long(), "ref_chosen_logps": ref[:PAIRS], "ref_rejected_logps": ref[PAIRS:],
        }  # fmt: skip
        loss = DPOTrainer._compute_loss(stub, lambda **_: output, inputs, False)
        return loss, torch.autograd.grad(loss, logps)[0], {name: values[-1] for name, values in stub._metrics["train"].items()}

    def ours(self, loss_of_sums, ref=None):
        """(loss, dL/dlogps in TRL's layout) of a function of the packed log-probs and the reference's sums in our order."""
        logps = self.logps.clone().requires_grad_()
        loss = loss_of_sums(self.packed(logps), (self.ref if ref is None else ref)[ORDER])
        return loss, torch.autograd.grad(loss, logps)[0]


def mean_of(name, *, ld_alpha=None, **options):
    """The mean over pairs of a loss, as a function of packed log-probs."""

    def loss(logps, ref):
        sums = segment_sum(logps, CU_SEQLENS) if ld_alpha is None else shared_length_sum(logps, CU_SEQLENS, ld_alpha)
        lengths = CU_SEQLENS.diff()
        known = {"chosen_lengths": lengths[0::2], "rejected_lengths": lengths[1::2]} if name in ("ipo", "sigmoid_norm") else {}
        return PREFERENCE_LOSSES[name](sums[0::2], sums[1::2], ref[0::2], ref[1::2], beta=0.3, **known, **options).loss.mean()

    return loss


def assert_equal(found, expected, name=""):
    close = {"rtol": 1e-6, "atol": 1e-7} if name == "exo_pair" else CLOSE  # TRL takes the logarithms of its epsilon in float32
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b.to(a.dtype), **close)


OPTIONS = [
    *((name, {}, {}) for name in sorted(PREFERENCE_LOSSES) if name != "exo_pair"),
    *((name, {"label_smoothing": 0.15}, {"label_smoothing": 0.15}) for name in ("robust", "exo_pair", "aot", "aot_unpaired")),
    ("discopop", {"discopop_tau": 0.4}, {"tau": 0.4}),
]


@pytest.mark.parametrize(("name", "theirs", "own"), OPTIONS)
def test_every_loss_and_its_options(name, theirs, own):
    case = Case()
    loss, grad, _ = case.trl([name], **theirs)
    assert grad.abs().max() > 1e-4
    assert_equal(case.ours(mean_of(name, **own)), (loss, grad), name)


@pytest.mark.parametrize("name", SCORED)
@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence"])
def test_every_loss_with_a_divergence(name, divergence):
    case, smoothing = Case(0.5), {"label_smoothing": 0.1} if name == "exo_pair" else {}
    loss, grad, _ = case.trl([name], f_divergence_type=divergence, **smoothing)
    assert_equal(case.ours(mean_of(name, score=SCORES[divergence], **smoothing)), (loss, grad), name)


@pytest.mark.parametrize("alpha", [-0.5, 0.5, 1.0, 1.5])
def test_alpha_divergence(alpha):
    """TRL forms this one in float32 whatever comes in, so the comparison is in float32."""
    case = Case(0.5)
    case.logps, case.sq, case.ref = case.logps.float(), case.sq.float(), case.ref.float()
    loss, grad, _ = case.trl(["sigmoid"], f_divergence_type="alpha_divergence", f_alpha_divergence_coef=alpha)
    found = case.ours(mean_of("sigmoid", score=partial(SCORES["alpha_divergence"], alpha=alpha)))
    for a, b in zip(found, (loss, grad)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "nca_pair"])
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_length_desensitised(name, alpha):
    case = Case()
    ref = torch.empty_like(case.ref)
    ref[ORDER] = shared_length_sum(case.packed(case.ref_tokens), CU_SEQLENS, alpha)
    loss, grad, metrics = case.trl([name], ld_alpha=alpha, ref=ref)
    assert_equal(case.ours(mean_of(name, ld_alpha=alpha), ref), (loss, grad))
    if alpha < 1:
        plain = segment_sum(case.packed(case.logps), CU_SEQLENS)[0::2].mean()
        assert abs(metrics["logps/chosen"] - plain) > 0.1, "no completion is longer than its partner"


def test_likelihood_weights_and_several_losses():
    """Two losses with weights and WPO: the weights are products of both completions' aligned probabilities."""
    case = Case()
    loss, grad, _ = case.trl(["sigmoid", "bco_pair"], [0.8, 0.3], use_weighting=True)

    def ours(logps, ref):
        aligned = segment_mean(logps.detach() - case.packed(case.sq), CU_SEQLENS)
        weight = (aligned[0::2] + aligned[1::2]).exp()
        sums = segment_sum(logps, CU_SEQLENS)
        four = (sums[0::2], sums[1::2], ref[0::2], ref[1::2])
        losses = 0.8 * PREFERENCE_LOSSES["sigmoid"](*four, beta=0.3).loss + 0.3 * PREFERENCE_LOSSES["bco_pair"](*four, beta=0.3).loss
        return (losses * weight).mean()

    assert_equal(case.ours(ours), (loss, grad))


def test_likelihood_weights_of_the_likelihood():
    """WPO together with the loss "sft", which ours takes (every pair's likelihood by its own weight), stops TRL."""
    with pytest.raises(RuntimeError, match="single memory location"):
        Case().trl(["sft"], use_weighting=True)


def test_cdpo_is_back():
    """TRL 1.16 takes label_smoothing for sigmoid and ignores it; its 0.24 and the paper's code do not."""
    case = Case()
    plain, _, _ = case.trl(["sigmoid"])
    ignored, _, _ = case.trl(["sigmoid"], label_smoothing=0.2)
    ours, _ = case.ours(mean_of("sigmoid", label_smoothing=0.2))
    assert ignored == plain
    assert abs(ours - plain) > 0.01
    sums = [segment_sum(case.packed(case.logps), CU_SEQLENS), case.ref[ORDER]]
    z = 0.3 * ((sums[0] - sums[1])[0::2] - (sums[0] - sums[1])[1::2])
    torch.testing.assert_close(ours, (torch.log1p(torch.exp(-z)) + 0.2 * z).mean())  # -(1-e) ls(z) - e ls(-z) = softplus(-z) + e z


def test_discopop_and_forward_kl_where_trl_overflows():
    """Both in float32: at beta gap -200 TRL's discopop is NaN, ours 200; at a log-ratio of -100 TRL's forward KL has no gradient left."""
    case = Case()
    case.logps, case.sq = case.logps.float(), case.sq.float()
    far = torch.cat([torch.full((PAIRS,), 1e3), torch.zeros(PAIRS)])
    theirs, _, _ = case.trl(["discopop"], ref=far)
    assert theirs.isnan()
    four = [torch.tensor([x]) for x in (-200.0, 0.0, 0.0, 0.0)]
    assert float(discopop(*four, beta=1.0).loss) == pytest.approx(200.0)
    theirs, grad, _ = case.trl(["sigmoid"], f_divergence_type="forward_kl", ref=far)
    assert theirs.isinf()
    assert not grad.isfinite().all()
    c = torch.tensor([-1000.0], requires_grad=True)
    loss = dpo(c, *four[1:], score=SCORES["forward_kl"]).loss
    assert loss.isfinite()
    assert torch.autograd.grad(loss.sum(), [c])[0].isfinite()


def unpaired_case(classes):
    g = torch.Generator().manual_seed(1)
    n = len(classes)
    return (*(-20 * torch.rand(n, generator=g, dtype=torch.float64) for _ in range(2)), torch.tensor(classes),
            *(-20 * torch.rand(n, generator=g, dtype=torch.float64) for _ in range(2)))  # fmt: skip


@pytest.mark.parametrize("name", sorted(UNPAIRED_LOSSES))
@pytest.mark.parametrize("classes", [[True, False, True, False, False], [True] * 4, [False] * 4])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_unpaired_losses(name, classes, sign):
    logps, ref, desirable, kl_logps, kl_ref = unpaired_case(classes)
    kl_logps, kl_ref = (kl_logps, kl_ref) if sign * (kl_logps - kl_ref).mean() > 0 else (kl_ref, kl_logps)  # clamped at 0, or not
    weights = {"desirable_weight": 1.3, "undesirable_weight": 0.6}
    theirs = logps.clone().requires_grad_()
    tokens = theirs[:, None]
    output = FusedCausalLMOutput(log_probs=tokens, entropy=tokens, mean_logits=tokens)
    stub = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=ACCELERATOR, beta=0.2, loss_type=name, calculate_KL=name == "kto",
        precompute_ref_logps=True, aux_loss_enabled=False, _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1,
        _compute_kl_logps=lambda *_: kl_logps, **weights,
    )  # fmt: skip
    n = len(classes)
    inputs = {
        "input_ids": torch.zeros(n, 2, dtype=torch.int64), "attention_mask": torch.ones(n, 2), "label": desirable, "ref_logps": ref,
        "completion_mask": torch.tensor([[0, 1]] * n), "ref_KL_logps": kl_ref,
    }  # fmt: skip
    loss = KTOTrainer._compute_loss(stub, lambda **_: output, inputs, False)
    own = logps.clone().requires_grad_()
    kl = mismatched_kl(kl_logps, kl_ref)
    found = UNPAIRED_LOSSES[name](own, ref, desirable, *([kl] if name == "kto" else []), beta=0.2, **weights).loss.mean()
    assert_equal((found, torch.autograd.grad(found, own)[0]), (loss, torch.autograd.grad(loss, theirs)[0]))
    if name == "kto":
        assert stub._metrics["train"]["kl"][-1] == pytest.approx(kl.item())
        assert (kl > 0) == (sign > 0)


def reference_free_pair():
    g = torch.Generator().manual_seed(2)
    return [(-2 * torch.rand(6, generator=g) - 0.05).requires_grad_() for _ in range(2)]


CPO_CASES = [
    ("sigmoid", {}, lambda c, r: cpo(c, r, beta=0.4)),
    ("sigmoid", {"label_smoothing": 0.1}, lambda c, r: cpo(c, r, beta=0.4, label_smoothing=0.1)),
    ("hinge", {}, lambda c, r: hinge(c, r, c.detach() * 0, r.detach() * 0, beta=0.4)),
    ("ipo", {}, lambda c, r: ipo(c, r, c.detach() * 0, r.detach() * 0, beta=0.4)),
    ("simpo", {"simpo_gamma": 0.7}, lambda c, r: simpo(c, r, beta=0.4, gamma=0.7)),
    ("simpo", {"label_smoothing": 0.1, "simpo_gamma": 0.7}, lambda c, r: simpo(c, r, beta=0.4, gamma=0.7, label_smoothing=0.1)),
    ("simpo", {"alpha": 0.25, "simpo_gamma": 0.7}, lambda c, r: alphapo(c, r, beta=0.4, gamma=0.7, alpha=0.25)),
    ("simpo", {"alpha": -0.5, "simpo_gamma": 0.7}, lambda c, r: alphapo(c, r, beta=0.4, gamma=0.7, alpha=-0.5)),
]


@pytest.mark.parametrize(("loss_type", "options", "ours"), CPO_CASES)
def test_cpo_simpo_and_alphapo(loss_type, options, ours):
    pair = reference_free_pair()
    stub = SimpleNamespace(
        **{"alpha": 0.0, "beta": 0.4, "loss_type": loss_type, "simpo_gamma": 0.5, "label_smoothing": 0.0, "accelerator": ACCELERATOR}
        | options
    )
    theirs, found = CPOTrainer.cpo_loss(stub, *pair), ours(*pair)
    for a, b in zip(found, theirs):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for a, b in zip(torch.autograd.grad(found.loss.sum(), pair), torch.autograd.grad(theirs[0].sum(), pair)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_orpo():
    pair = reference_free_pair()
    stub = SimpleNamespace(beta=0.4, accelerator=ACCELERATOR)
    losses, chosen, rejected, ratio, log_odds = ORPOTrainer.odds_ratio_loss(stub, *pair)
    found = orpo(*pair, beta=0.4)
    for a, b in zip(found, (-losses, chosen, rejected)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(log_odds_ratio(*pair).mean(), log_odds, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(-found.loss.mean() / 0.4, ratio, rtol=1e-5, atol=1e-6)
    for a, b in zip(torch.autograd.grad(found.loss.sum(), pair), torch.autograd.grad(-losses.sum(), pair)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_orpo_at_log_prob_zero():
    """An answer that the model is sure of: TRL's gradient is NaN for both sides, ours the limit for the other one."""
    pair = [torch.zeros(1, requires_grad=True), torch.full((1,), -2.0, requires_grad=True)]
    losses = ORPOTrainer.odds_ratio_loss(SimpleNamespace(beta=1.0, accelerator=ACCELERATOR), pair[1], pair[0])[0]
    assert torch.autograd.grad(-losses.sum(), pair)[0].isnan().all()
    ours = torch.autograd.grad(orpo(pair[1], pair[0], beta=1.0).loss.sum(), pair)
    assert float(ours[1]) == pytest.approx(-1 / (1 - math.exp(-2)), rel=1e-4)
    assert ours[0].isfinite().all()
