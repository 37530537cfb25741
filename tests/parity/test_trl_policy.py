"""`policy_loss` on packed tokens equals TRL 1.16's GRPOTrainer and RLOOTrainer on padded: loss, gradients, clip metrics (float64)."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl", reason="TRL is the oracle; without it the equality of the policy losses with TRL's is unproven")
from accelerate import Accelerator
from trl import GRPOTrainer, RLOOTrainer

from fastalign.losses.policy import POLICY_LOSSES, policy_loss
from fastalign.losses.weights import importance_weights, off_policy_mask, top_entropy_mask

LENGTHS = (7, 1, 0, 5, 3, 6)  # one empty; the fifth is masked by its tool mask
WIDTH, ACCUMULATION, PER_GENERATION, LONGEST = max(LENGTHS), 2, 4, 11
TRL_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo")
EXACT = {"rtol": 1e-11, "atol": 1e-13}


class Case:
    """One batch, padded for TRL and packed for us."""

    def __init__(self, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        shape = (len(LENGTHS), WIDTH)

        def noise(scale):
            return scale * torch.randn(shape, generator=g, dtype=torch.float64)

        self.logps = -3 * torch.rand(shape, generator=g, dtype=torch.float64)
        self.old, self.ref, self.sampling = self.logps + noise(0.4), self.logps + noise(0.5), self.logps + 0.2 + noise(0.4)
        self.entropy = 2 * torch.rand(shape, generator=g, dtype=torch.float64)
        self.advantages = torch.tensor([1.3, -0.7, 0.4, -1.1, 0.9, 0.0], dtype=torch.float64)
        self.completion = torch.arange(WIDTH)[None] < torch.tensor(LENGTHS)[:, None]
        tool = torch.rand(shape, generator=g) < 0.8
        tool[4] = False
        self.tool = tool
        self.cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).int()
        self.mask = self.pack(tool)

    def pack(self, padded):
        return padded[self.completion]

    def trl(self, trainer=GRPOTrainer, **options):
        """(loss, dL/dlogps, dL/dentropy, metrics) by TRL."""
        logps, entropy = self.logps.clone().requires_grad_(), self.entropy.clone().requires_grad_()
        ratio = options.pop("importance_sampling_ratio", None)
        args = {"delta": None, "use_bias_correction_kl": True, "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05}
        args |= {"vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0, "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0}
        args = SimpleNamespace(**args | options.pop("args", {}), steps_per_generation=PER_GENERATION)
        stub = SimpleNamespace(
            _get_per_token_logps_and_entropies=lambda *a, **k: (logps, entropy, None),
            args=args,
            accelerator=Accelerator(cpu=True),
            model=SimpleNamespace(training=True),
            aux_loss_enabled=False,
            current_gradient_accumulation_steps=ACCUMULATION,
            max_completion_length=LONGEST,
            _metrics={"train": defaultdict(list)},
            _entropy_bonus_enabled=options.get("entropy_coef", 0.0) != 0.0,
            use_adaptive_entropy=False,
            use_vllm=ratio is not None,
            vllm_importance_sampling_correction=True,
            get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
            get_gamma_weights=GRPOTrainer.get_gamma_weights,
            **{"top_entropy_quantile": 1.0, "off_policy_mask_threshold": None, "importance_sampling_level": "token", "beta": 0.0}
            | {"epsilon_low": 0.2, "epsilon_high": 0.2, "loss_type": "grpo"}
            | options,
        )
        stub.get_high_entropy_mask = lambda *a: GRPOTrainer.get_high_entropy_mask(stub, *a)
        no_prompt = torch.zeros(len(LENGTHS), 0, dtype=torch.int64)
        inputs = {
            "prompt_ids": no_prompt,
            "prompt_mask": no_prompt,
            "completion_ids": torch.zeros(len(LENGTHS), WIDTH, dtype=torch.int64),
            "completion_mask": self.completion.int(),
            "tool_mask": self.tool.int(),
            "advantages": self.advantages,
            "old_per_token_logps": self.old,
            "old_logps": (self.old * self.completion).sum(1),
            "ref_per_token_logps": self.ref,
            "num_items_in_batch": torch.tensor(23.0),
        }
        if ratio is not None:
            inputs |= {"importance_sampling_ratio": ratio, "sampling_per_token_logps": self.sampling}
        loss = trainer._compute_loss(stub, None, inputs)
        d_logps, d_entropy = torch.autograd.grad(loss, (logps, entropy), allow_unused=True)
        return loss.detach(), d_logps, d_entropy, stub._metrics["train"]

    def ours(self, name, clip=(0.2, 0.2), **options):
        logps, entropy = (self.pack(x).requires_grad_() for x in (self.logps, self.entropy))
        if "entropy_coef" in options:
            options["entropy"] = entropy
        out = policy_loss(
            name,
            logps,
            self.pack(self.old),
            self.advantages[:, None],
            self.cu_seqlens,
            mask=options.pop("mask", self.mask),
            denominator=self.denominator(name),
            **clipping(name, clip),
            **({"length": LONGEST} if name == "dr_grpo" else {}),
            **options,
        )
        return out, *torch.autograd.grad(out.loss, (logps, entropy), allow_unused=True)

    def denominator(self, name):
        """TRL's, which counts all sequences."""
        if name in ("dapo", "cispo", "vespo"):
            return 23.0 * ACCUMULATION / PER_GENERATION
        return (int(self.mask.sum()) if name == "bnpo" else len(LENGTHS)) * ACCUMULATION

    def check(self, theirs, ours) -> None:
        loss, d_logps, d_entropy, _ = theirs
        out, dl, de = ours
        assert d_logps.any(), "the case has no gradient to compare"
        torch.testing.assert_close(out.loss.detach(), loss, **EXACT)
        torch.testing.assert_close(dl, self.pack(d_logps), **EXACT)
        assert not d_logps[~self.completion].any()
        if d_entropy is not None:
            torch.testing.assert_close(de, self.pack(d_entropy), **EXACT)


def clipping(name, clip):
    return {"clip_high": clip[1]} if name == "cispo" else {} if name in ("sapo", "vespo") else dict(zip(("clip_low", "clip_high"), clip))


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("name", TRL_TYPES)
def test_loss_gradient_and_metrics(name, level, beta):
    case = Case()
    high = 1.2 if name == "cispo" else 0.28
    theirs = case.trl(loss_type=name, importance_sampling_level=level, beta=beta, epsilon_high=high)
    ours = case.ours(name, (0.2, high), level=level, **({"ref_logps": case.pack(case.ref), "kl_coef": beta} if beta else {}))
    case.check(theirs, ours)

    out, metrics = ours[0], theirs[3]
    mean = out.tokens.sum()
    if beta:
        assert float(out.kl.sum() / mean) == pytest.approx(metrics["kl"][0], rel=1e-6)
    if level == "token" and name == "cispo":
        assert float(out.clipped_high.sum() / mean) == pytest.approx(metrics["cispo_clip_ratio"][0]) and metrics["cispo_clip_ratio"][0] > 0
    elif level == "token" and name not in ("sapo", "vespo"):
        low, high = out.clipped_low.sum() / mean, out.clipped_high.sum() / mean
        assert float(low) == pytest.approx(metrics["clip_ratio/low_mean"][0]) and low > 0
        assert float(high) == pytest.approx(metrics["clip_ratio/high_mean"][0]) and high > 0
        assert float(low + high) == pytest.approx(metrics["clip_ratio/region_mean"][0])
        assert float((out.clipped_high / out.tokens).nan_to_num(0).max()) == pytest.approx(metrics["clip_ratio/high_max"][0])


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("name", ["grpo", "dapo", "luspo"])
def test_delta_and_uncorrected_kl(name, level):
    case = Case(1)
    args = {"delta": 1.3, "use_bias_correction_kl": False}
    theirs = case.trl(loss_type=name, importance_sampling_level=level, beta=0.2, args=args)
    case.check(theirs, case.ours(name, level=level, delta=1.3, kl_coef=0.2, ref_logps=case.pack(case.ref), kl_correction=False))
    without = case.ours(name, level=level, kl_coef=0.2, ref_logps=case.pack(case.ref), kl_correction=False)
    assert level == "sequence" or not torch.equal(without[1], case.pack(theirs[1])), "delta has no effect on this case"


@pytest.mark.parametrize(
    ("name", "mode"),
    [(n, m) for n in TRL_TYPES for m in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
     if n != "vespo" or m.startswith("token")],  # TRL refuses vespo with weights per sequence
)  # fmt: skip
def test_masks_weights_and_entropy_bonus(name, mode):
    """Off-policy sequence mask, top-entropy mask, importance weights of the sampler (one unknown), KL and entropy bonus at once."""
    case = Case(2)
    case.sampling[0, 1] = float("nan")
    packed = {"old_logps": case.pack(case.old), "sampling_logps": case.pack(case.sampling)}
    weights = importance_weights(**packed, cu_seqlens=case.cu_seqlens, mask=case.mask, mode=mode, clip_min=0.5, clip_max=1.8)
    theirs_weights = trl_weights(case, mode, 0.5, 1.8)
    torch.testing.assert_close(weights, case.pack(theirs_weights.expand(case.old.shape)), **EXACT)
    assert weights.unique().numel() > 2

    advantages = case.pack(case.advantages[:, None].expand(case.old.shape))
    keep = off_policy_mask(case.pack(case.logps), packed["sampling_logps"], advantages, case.cu_seqlens, case.mask, threshold=0.05)
    high = top_entropy_mask(case.pack(case.entropy), case.mask, quantile=0.6)
    assert not keep.all() and keep.any() and 0 < int(high.sum()) < int(case.mask.sum())
    coefficient = 0.1 / float(high.sum()) / ACCUMULATION
    ours = case.ours(name, keep=keep & high, importance_weights=weights, ref_logps=case.pack(case.ref), kl_coef=0.2,
                     entropy_coef=coefficient, entropy_mask=high)  # fmt: skip
    case.check(
        case.trl(
            loss_type=name,
            importance_sampling_level=POLICY_LOSSES[name].level,
            beta=0.2,
            importance_sampling_ratio=theirs_weights,
            off_policy_mask_threshold=0.05,
            top_entropy_quantile=0.6,
            entropy_coef=0.1,
        ),
        ours,
    )


def trl_weights(case, mode, low, high):
    """The weights that TRL prepares in `_generate_and_score_completions`, which cannot be called alone."""
    difference = ((case.old - case.sampling) * (case.completion & case.tool)).nan_to_num(nan=0.0)
    ratio = (difference.sum(-1, keepdim=True) if mode.startswith("sequence") else difference).exp()
    return ratio.clamp(low, high) if mode.endswith("truncate") else ratio.masked_fill((ratio < low) | (ratio > high), 0.0)


def test_rloo():
    """TRL's sequence ratio has no tool mask, and an empty sequence adds the constant -A / S to its loss."""
    case = Case(3)
    case.advantages[2] = 0.0
    theirs = case.trl(RLOOTrainer)
    case.tool[:] = True
    scale = torch.tensor(ACCUMULATION)  # TRL leaves it to the Trainer
    out, d_logps, _ = case.ours("rloo", mask=None)
    torch.testing.assert_close(out.loss * scale, theirs[0], **EXACT)
    torch.testing.assert_close(d_logps * scale, case.pack(theirs[1]), **EXACT)
    assert theirs[1].any()
