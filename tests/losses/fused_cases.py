"""Problems for the fused losses, on a CPU under Triton's interpreter and on a GPU: definitions and kernels on the same numbers."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from support import assert_close_to_gold

from fastalign.losses import fused_triton
from fastalign.losses.divergence import SCORES, alpha_divergence
from fastalign.losses.policy import POLICY_LOSSES, policy_loss
from fastalign.losses.preference import PREFERENCE_LOSSES
from fastalign.losses.reference_free import REFERENCE_FREE_LOSSES
from fastalign.losses.unpaired import UNPAIRED_LOSSES
from fastalign.segments import segment_mean, segment_sum

LENGTHS = (5, 0, 1, 1023, 1024, 1025, 2300, 3)  # empty, odd, and around the kernels' blocks
WITHOUT_KERNEL = {"aot", "aot_unpaired"}  # they sort the pairs of the whole step
PAIRED = sorted((PREFERENCE_LOSSES.keys() | REFERENCE_FREE_LOSSES.keys()) - WITHOUT_KERNEL)
FLOATS = ("logps", "old_logps", "advantages", "ref_logps", "entropy", "importance_weights")
PLAIN: dict[str, Any] = {}
OPTIONS = {  # of policy_loss: each term alone, then all of them
    "plain": (),
    "mask": ("mask",),
    "keep": ("mask", "keep"),
    "weights": ("importance_weights",),
    "k1": ("ref_logps", "k1"),
    "k2 uncorrected": ("ref_logps", "k2", "uncorrected"),
    "entropy": ("entropy",),
    "all": ("mask", "keep", "importance_weights", "ref_logps", "entropy", "entropy_mask"),
}


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that is not written is NaN."""

    def fill(make, *args, **options):
        made = make(*args, **options)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, partial(fill, getattr(torch, name)))


class Policy:
    """Log-probs of sampled tokens with everything that a policy loss may take; masked tokens hold NaN."""

    def __init__(self, device="cpu", seed=0) -> None:
        g, n = torch.Generator().manual_seed(seed), sum(LENGTHS)
        self.cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).int().to(device)
        noise = torch.randn(len(FLOATS), n, generator=g)
        logps = -2 * noise[0].abs()
        values = logps, logps + 0.3 * noise[1], noise[2], logps + 0.5 * noise[3], noise[4].abs(), noise[5].abs() + 0.2
        chance = torch.rand(3, n, generator=g)
        self.tensors = dict(zip(FLOATS, values)) | {"mask": chance[0] < 0.8, "keep": chance[1] < 0.7, "entropy_mask": chance[2] < 0.5}
        self.tensors["mask"][6:40] = False
        self.tensors = {name: x.to(device) for name, x in self.tensors.items()}

    def run(self, loss, name, chosen=OPTIONS["all"], dtype=torch.float32, **options):
        """(PolicyOutput, dL/dlogps, dL/dentropy or None) by a function."""
        floats = {k: self.tensors[k].to(dtype, copy=True) for k in FLOATS}
        if "mask" in chosen:
            floats = {k: x.masked_fill(~self.tensors["mask"], float("nan")) for k, x in floats.items()}
        leaves = {k: floats[k].requires_grad_() for k in ("logps", "entropy")}
        options |= {k: floats.get(k, self.tensors.get(k)) for k in chosen if k in self.tensors}
        options |= {"kl_coef": 0.3} if "ref_logps" in chosen else {}
        options |= {"kl": "k2" if "k2" in chosen else "k1" if "k1" in chosen else "k3", "kl_correction": "uncorrected" not in chosen}
        options |= {"entropy_coef": 0.02} if "entropy" in chosen else {}
        options |= {"length": 4096} if name == "dr_grpo" else {}
        advantages = options.pop("advantages", floats["advantages"])
        out = loss(name, leaves["logps"], floats["old_logps"], advantages.to(dtype), self.cu_seqlens, **options)
        return out, *torch.autograd.grad(out.loss, list(leaves.values()), allow_unused=True)


def check_policy(case: Policy, name: str, chosen: tuple[str, ...], **options: Any) -> None:
    got, d_logps, d_entropy = case.run(fused_triton.policy_loss, name, chosen, **options)
    base, base_logps, base_entropy = case.run(policy_loss, name, chosen, **options)
    gold, gold_logps, gold_entropy = case.run(policy_loss, name, chosen, torch.float64, **options)
    assert d_logps.shape == gold_logps.shape and d_logps.dtype == torch.float32
    assert float((d_logps - gold_logps).abs().max()) <= 32 * torch.finfo(torch.float32).eps * float(gold_logps.abs().max()), "d_logps"
    per_token = name != "vespo" and options.get("level", POLICY_LOSSES[name].level) == "token"
    if per_token and not d_logps.is_cuda:  # an error of a sequence's sum is one of all its rows; a GPU's exp is good to 2 ulp
        assert_close_to_gold(d_logps, base_logps, gold_logps, "d_logps")
    assert torch.equal(d_logps == 0, base_logps == 0), "rows without a gradient"
    assert (d_entropy is None) == (gold_entropy is None)
    if d_entropy is not None:
        assert_close_to_gold(d_entropy, base_entropy, gold_entropy, "d_entropy")
    scale = float(case.tensors["logps"].abs().mean())  # of what is averaged; the mean itself may be near 0
    loss, truth = float(got.loss.detach()), float(gold.loss.detach())
    assert abs(loss - truth) <= 1e-5 * max(scale, abs(truth)), (loss, truth)
    for field in ("tokens", "clipped_low", "clipped_high"):
        assert torch.equal(getattr(got, field), getattr(base, field).float()), field
    torch.testing.assert_close(got.kl.double(), gold.kl.double(), rtol=1e-5, atol=1e-4)
    assert "ref_logps" not in chosen or got.kl.any()


class Sequences:
    """Packed log-probs, reference sums and weights: of pairs, or of single completions."""

    def __init__(self, device="cpu", seed=0, drift=2.0) -> None:
        g = torch.Generator().manual_seed(seed)
        self.cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).int().to(device)
        self.logps = -0.4 * torch.rand(sum(LENGTHS), generator=g)
        sums = segment_sum(self.logps, self.cu_seqlens.cpu())
        self.ref_logps = (sums + drift * torch.randn(len(LENGTHS), generator=g)).to(device)
        self.weight = (torch.rand(len(LENGTHS), generator=g) + 0.5).to(device)
        self.desirable = (torch.rand(len(LENGTHS), generator=g) < 0.5).to(device)
        self.logps = self.logps.to(device)

    def fused(self, name, **options):
        logps = self.logps.clone().requires_grad_()
        if name in UNPAIRED_LOSSES:
            given = (logps, self.cu_seqlens, self.ref_logps, self.desirable)
            out = fused_triton.unpaired_loss(name, *given, weight=self.weight, denominator=5, **options)
        else:
            ref = None if name in REFERENCE_FREE_LOSSES else self.ref_logps
            weight = self.weight[: len(LENGTHS) // 2]
            out = fused_triton.preference_loss(name, logps, self.cu_seqlens, ref, weight=weight, denominator=5, **options)
        return out.loss, *torch.autograd.grad(out.loss, logps), out[1:]

    def defined(self, name, **options):
        """By the definition in float64. orpo's in float32: the odds of an empty completion are 1 / eps."""
        dtype = torch.float32 if name == "orpo" else torch.float64
        logps = self.logps.to(dtype).requires_grad_()
        sums = segment_sum(logps, self.cu_seqlens)
        ref, weight = self.ref_logps.to(dtype), self.weight.to(dtype)
        if name in UNPAIRED_LOSSES:
            extra = (options.pop("kl", 0.0),) if name == "kto" else ()
            out = UNPAIRED_LOSSES[name](sums, ref, self.desirable, *extra, **options)
            statistics = (out.loss, out.rewards, sums)
        else:
            weight = weight[: len(LENGTHS) // 2]
            if name in REFERENCE_FREE_LOSSES:
                x = sums if name == "cpo" else segment_mean(logps, self.cu_seqlens)
                out = REFERENCE_FREE_LOSSES[name](x[0::2], x[1::2], **options)
            else:
                lengths = self.cu_seqlens.diff()
                if name in ("ipo", "sigmoid_norm"):
                    options |= {"chosen_lengths": lengths[0::2], "rejected_lengths": lengths[1::2]}
                out = PREFERENCE_LOSSES[name](sums[0::2], sums[1::2], ref[0::2], ref[1::2], **options)
            statistics = (*out, sums[0::2], sums[1::2])
        loss = (out.loss * weight).sum() / 5
        return loss, *torch.autograd.grad(loss, logps, retain_graph=True), statistics


def check_sequences(case: Sequences, name: str, **options: Any) -> None:
    """The sums of thousands of tokens dominate the error, so the definition in float32 is given a few times its own."""
    loss, d_logps, statistics = case.fused(name, **options)
    gold_loss, gold, gold_statistics = case.defined(name, **options)
    torch.testing.assert_close(loss.double(), gold_loss.double(), rtol=2e-5, atol=2e-5)
    assert gold.any() and d_logps.isfinite().all()
    assert float((d_logps - gold).abs().max()) <= 2e-4 * float(gold.abs().max())
    for x, y in zip(statistics, gold_statistics, strict=True):
        assert not x.requires_grad
        torch.testing.assert_close(x.double(), y.detach().double(), rtol=1e-5, atol=1e-4)


def check_extremes(name: str, level: str, device: str) -> None:
    """Log-probs of 0, ratios beyond the range of float32 and a penalty on them; the corrected one cancels, and is only finite."""
    logps = torch.tensor([0.0, 0.0, -200.0, -200.0, 0.0, -20.0, -1e-30, -1.0], device=device)
    old = torch.tensor([0.0, -200.0, 0.0, 0.0, -30.0, 0.0, 0.0, -1.0], device=device)
    cu_seqlens = torch.tensor([0, 4, 4, 7, 8], device=device)
    for advantage in (0.0, 1.0, -1.0):
        for corrected in (False, True):
            options = {"level": level, "ref_logps": old, "kl_coef": 0.1, "kl_correction": corrected}
            options |= {"length": 9} if name == "dr_grpo" else {}
            results = []
            for loss in (fused_triton.policy_loss, policy_loss):
                x = logps.clone().requires_grad_()
                out = loss(name, x, old, torch.full_like(x, advantage), cu_seqlens, **options)
                results.append((out.loss.detach(), *torch.autograd.grad(out.loss, x)))
            assert all(x.isfinite().all() for x in results[0])
            if not corrected:
                torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def check_nan_is_not_hidden(device: str) -> None:
    for name in POLICY_LOSSES:
        one = torch.ones(1, device=device)
        extra = {"length": 9} if name == "dr_grpo" else {}
        out = fused_triton.policy_loss(name, float("nan") * one, one, one, torch.tensor([0, 1], device=device), **extra)
        assert out.loss.isnan(), name
    for name in [*PAIRED, "kto"]:
        case = Sequences(device)
        case.logps[0] = float("nan")
        assert case.fused(name)[0].isnan(), name


SEQUENCE_CASES = [
    *((name, PLAIN) for name in PAIRED),
    *(("sigmoid", {"score": score}) for score in SCORES.values()),
    ("ipo", {"score": partial(alpha_divergence, alpha=0.3), "beta": 0.4}),
    ("hinge", {"score": partial(alpha_divergence, alpha=1.0)}),
    ("sigmoid", {"label_smoothing": 0.2, "beta": 0.5}),
    ("robust", {"label_smoothing": 0.2}),
    ("exo_pair", {"label_smoothing": 0.1}),
    ("discopop", {"tau": 0.4, "beta": 0.2}),
    ("simpo", {"gamma": 0.3, "label_smoothing": 0.1}),
    ("alphapo", {"alpha": 0.0}),
    ("alphapo", {"alpha": -0.5}),
    ("kto", PLAIN),
    ("kto", {"kl": 0.7, "desirable_weight": 1.3, "undesirable_weight": 0.6, "beta": 0.3}),
    ("apo_zero_unpaired", {"desirable_weight": 0.5}),
]
SEQUENCE_IDS = [f"{name}{''.join('-' + key for key in options)}" for name, options in SEQUENCE_CASES]
LEVELS = [(name, level) for name in POLICY_LOSSES for level in ("token", "sequence", "product")]
