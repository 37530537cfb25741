"""The gradient of a step does not depend on how its samples are cut into micro-batches, packed or ordered."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import tiny_model
from torch import Tensor

from fastalign import packing
from fastalign.models.config import LoraConfig
from fastalign.models.load import load_model
from fastalign.objectives.cpo import CPO, CPOConfig, SimPOConfig
from fastalign.objectives.dpo import DPO, DPOConfig
from fastalign.objectives.kto import KTO, KTOConfig
from fastalign.objectives.orpo import ORPO, ORPOConfig
from fastalign.packing import collate
from fastalign.train.step import micro_batches, run_step
from fastalign.types import PackedBatch, Sample

TOLERANCE = 1e-5  # of the gradient's largest entry, and of its norm


class FixedReference:
    """Reference log-probs that depend on nothing but the sample."""

    def logps(self, batch: PackedBatch) -> Tensor:
        return torch.tensor([-7.0 - (3 * i + k) % 5 for i, count in zip(batch.index, batch.completions) for k in range(count)])


def pairs(n: int = 8) -> list[Sample]:
    rng = random.Random(0)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        return tuple(rng.randrange(1, 300) for _ in range(rng.randint(low, high)))

    return [Sample(i, tokens(1, 12), (tokens(1, 14), tokens(1, 14)), weight=rng.choice((0.5, 1.0, 2.0))) for i in range(n)]


def singles() -> list[Sample]:
    """The same with one completion each, desirable or not."""
    return [replace(s, completions=s.completions[:1], labels=(float(s.index % 3 != 1),)) for s in pairs()]


def cut(samples: list[Sample], size: int) -> list[list[Sample]]:
    return [samples[i : i + size] for i in range(0, len(samples), size)]


def shuffled(samples: list[Sample], seed: int) -> list[Sample]:
    return random.Random(seed).sample(samples, len(samples))


def plans(samples: list[Sample]) -> dict[str, list[list[Sample]]]:
    return {
        "8x1": cut(samples, 1),
        "4x2": cut(samples, 2),
        "2x4": cut(samples, 4),
        "one pack, another order": [shuffled(samples, 1)],
        "one pack, reversed": [samples[::-1]],
        "unequal": [samples[:1], samples[1:3], samples[3:]],
        "shuffled 3+5": [shuffled(samples, 2)[:3], shuffled(samples, 2)[3:]],
        "by 60 tokens": micro_batches(samples, 60),
        "by 90 tokens": micro_batches(shuffled(samples, 3), 90),
    }


CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "tied": {"model": {"tie_word_embeddings": True}},
    "ipo": {"config": {"loss_type": "ipo"}},
    "ranks of the step": {"config": {"loss_type": ["aot", "aot_unpaired"], "beta": 0.3, "max_tokens": 100}},
    "anchored, weighted, desensitised": {"config": {"rpo_alpha": 0.3, "use_weighting": True, "ld_alpha": 0.5, "beta": 0.3}, "scale": 1e-6},
    "kto": {"objective": KTO, "config": {"max_tokens": 100}},
    "kto without kl": {"objective": KTO, "config": {"loss_type": "apo_zero_unpaired"}},
    "orpo": {"objective": ORPO, "config": {}},
    "orpo, prompts too": {"objective": ORPO, "config": {"nll_scope": "all", "logits_budget": 40 * 320 * 4}},
    "cpo": {"objective": CPO, "config": {}},
    "simpo": {"objective": CPO, "config": {"loss_type": "alphapo", "alpha": 0.25, "cpo_alpha": 0.1}},
    "small head budget": {"config": {"logits_budget": 40 * 320 * 4}},  # a few rows of logits at a time
    "gradient checkpointing": {"load": {"gradient_checkpointing": True}},
    "lora": {"lora": LoraConfig(r=4)},
    "lora with head": {"lora": LoraConfig(r=4, targets=["q_proj", "down_proj", "lm_head"])},
}


def objective_of(case: str, model: Any) -> Any:
    kind, options = CASES[case].get("objective", DPO), {"output": "run", **CASES[case].get("config", {})}
    if kind is KTO:
        data: Any = SimpleNamespace(samples=singles(), eval_samples=[], fingerprint="")
        return KTO(KTOConfig(**options), model, data, FixedReference(), Path("run"))
    if kind is ORPO:
        return ORPO(ORPOConfig(**options), model)
    if kind is CPO:
        return CPO((SimPOConfig if case == "simpo" else CPOConfig)(**options), model)
    return DPO(DPOConfig(**options), model, FixedReference())


def gradient(case: str, plan: list[list[Sample]], *, share: bool = False) -> tuple[Tensor, dict[str, float]]:
    options = CASES[case]
    model = load_model(tiny_model("qwen3", **options.get("model", {})), lora=options.get("lora"), **options.get("load", {}))
    with torch.no_grad():  # a fresh adapter has B = 0, and then no gradient reaches A
        for seed, (name, p) in enumerate(model.named_parameters()):
            if "lora_" in name:
                p.copy_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
    model.train()
    objective = objective_of(case, model)
    sums, denominators = run_step(objective, plan, device=torch.device("cpu"), share=share)
    grads = [p.grad.flatten() for p in model.parameters() if p.requires_grad and p.grad is not None]
    assert len(grads) == sum(p.requires_grad for p in model.parameters())
    return torch.cat(grads), objective.metrics({name: value.item() for name, value in sums.items()}, denominators)


@pytest.mark.parametrize("case", CASES)
def test_gradient_and_metrics_do_not_depend_on_the_cut(case: str) -> None:
    samples = singles() if CASES[case].get("objective") is KTO else pairs()
    expected, metrics = gradient(case, [samples])
    assert expected.abs().max() > CASES[case].get("scale", 1e-3)
    for name, plan in plans(samples).items():
        assert sorted(s.index for members in plan for s in members) == list(range(8))
        found, found_metrics = gradient(case, plan)
        difference = (found - expected).double()
        assert difference.abs().max() <= TOLERANCE * expected.abs().max(), name
        assert difference.norm() <= TOLERANCE * expected.double().norm(), name
        assert found_metrics == pytest.approx(metrics, rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("case", CASES)
def test_gradient_and_metrics_do_not_depend_on_whether_prompts_are_shared(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    single = CASES[case].get("objective") is KTO
    samples = singles() if single else pairs()
    samples = [replace(sample, prompt=samples[i // 3].prompt) for i, sample in enumerate(samples)]  # three of each
    expected, metrics = gradient(case, [samples])
    monkeypatch.setattr(packing, "SHARE_FROM", 2)
    for plan in ([samples], cut(samples, 2), micro_batches(samples, 40, share=True)):
        assert any(collate(members, share=True).shared for members in plan)
        found, found_metrics = gradient(case, plan, share=True)
        difference = (found - expected).double()
        assert difference.abs().max() <= TOLERANCE * expected.abs().max()
        assert difference.norm() <= TOLERANCE * expected.double().norm()
        assert found_metrics == pytest.approx(metrics, rel=1e-5, abs=1e-6)


def test_the_tolerance_would_notice_a_mean_of_means() -> None:
    """Denominators per micro-batch, averaged over unequal micro-batches, are what goes wrong elsewhere; so is a lost pair."""
    expected, _ = gradient("full", [pairs()])
    plan = plans(pairs())["unequal"]
    mean_of_means = torch.stack([gradient("full", [members])[0] for members in plan]).mean(0)
    lost_pair, _ = gradient("full", [pairs()[:7]])
    for wrong in (mean_of_means, lost_pair):
        assert (wrong - expected).abs().max() > 100 * TOLERANCE * expected.abs().max()


def test_micro_batches_hold_every_sample_within_the_budget() -> None:
    samples = pairs(40)
    plan = micro_batches(samples, 64)
    assert sorted(s.index for members in plan for s in members) == list(range(40))
    assert max(sum(s.num_tokens for s in members) for members in plan) <= 64
    assert len(plan) < 40
