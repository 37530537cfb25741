"""Steps on a GPU: the gradient of the CPU, and a host that never waits, so that it queues ahead of the device (`make gpu`)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import relative_error
from tiny import tiny_model

from fastalign.models.load import load_model
from fastalign.models.reference import CachedReference
from fastalign.objectives.dpo import DPO, DPOConfig
from fastalign.objectives.orpo import ORPO, ORPOConfig
from fastalign.objectives.sft import SFT, SFTConfig
from fastalign.train.step import run_step
from fastalign.types import Sample

PAIRS = [
    Sample(0, tuple(range(20, 90)), ((7, 8, 3, 1), (4, 1))),  # long enough to be shared
    Sample(1, (11,), ((6, 1), (13, 12, 2, 9, 1)), weight=0.25),
    Sample(2, (5, 9, 2), ((2,), (17, 1)), weight=2.0),
]
SINGLE = [Sample(s.index, s.prompt, s.completions[:1]) for s in PAIRS]
REFERENCE = torch.linspace(-9, -1, 6)
MADE: dict[str, tuple[Callable[[Any], Any], list[Sample]]] = {
    "sft": (lambda model: SFT(SFTConfig(output="run"), model), SINGLE),
    "dpo": (lambda model: DPO(DPOConfig(output="run"), model, CachedReference(PAIRS, REFERENCE)), PAIRS),
    "orpo": (lambda model: ORPO(ORPOConfig(output="run"), model), PAIRS),
}


def gradient(name: str, objective: Any, device: str) -> torch.Tensor:
    """All of it, as one vector."""
    samples = MADE[name][1]
    objective.model.zero_grad(set_to_none=True)
    run_step(objective, [samples[:2], samples[2:]], device=torch.device(device), share=True)
    return torch.cat([torch.zeros_like(p).view(-1) if p.grad is None else p.grad.view(-1) for p in objective.model.parameters()])


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: that a step there is right is unproven"),
            ],
        ),
    ],
)
def test_a_step_on_a_device(name: str, dtype: torch.dtype, bound: float, device: str) -> None:
    exact = load_model(tiny_model("qwen3", hidden_size=64), device="cpu").train()
    model = load_model(copy.deepcopy(exact).to(dtype), device=device).train()
    if dtype == torch.bfloat16:
        exact.load_state_dict({key: value.float() for key, value in model.state_dict().items()})
    there = MADE[name][0](model)  # measures the head, which waits
    want, found = gradient(name, MADE[name][0](exact), "cpu"), gradient(name, there, device)
    assert want.abs().max() > 0.1
    assert relative_error(found.float().cpu(), want) < bound
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            again = gradient(name, there, device)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(again, found)
