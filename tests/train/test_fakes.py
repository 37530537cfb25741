"""Tensors without storage: what they are said to hold is what torch's own mode says, however operators are looked up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import tiny_model
from torch._dynamo import config as dynamo
from torch._subclasses.fake_tensor import FakeTensorMode

from fastalign.models.config import LoraConfig, ModelConfig
from fastalign.models.load import prepare
from fastalign.objectives.dpo import DPOConfig
from fastalign.train import footprint as footprints
from fastalign.train.fakes import Fakes
from fastalign.train.footprint import moments


@pytest.mark.parametrize(
    ("family", "dtype", "options", "lora"),
    [
        ("qwen3", torch.float32, {}, None),
        ("gemma3", torch.bfloat16, {"gradient_checkpointing": True, "checkpoint_keep": "products"}, None),
        ("llama", torch.bfloat16, {"gradient_checkpointing": True}, LoraConfig(r=4)),
    ],
)
def test_as_torch_s_own(
    family: str, dtype: torch.dtype, options: dict[str, Any], lora: LoraConfig | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DPOConfig(model=ModelConfig(**options), logits_budget=1 << 16)
    model = prepare(tiny_model(family, dtype=dtype), config.model, lora)
    found = [moments(model, config, tokens=tokens) for tokens in (64, 256)]
    monkeypatch.setattr(footprints, "Fakes", FakeTensorMode)
    assert found == [moments(model, config, tokens=tokens) for tokens in (64, 256)]
    assert found[0].step["activations"] < found[1].step["activations"]


def test_a_key_tells_all_that_a_result_depends_on() -> None:
    with dynamo.patch(fake_tensor_cache_crosscheck_enabled=True), Fakes():  # torch looks at every result that was found by its key
        for _ in range(2):
            for dtype in (torch.float32, torch.bfloat16, torch.int64):
                x = torch.empty(6, 4, dtype=dtype)
                for y in (x, x.t(), x[1:], x[:, ::2], x.view(4, 6), x.unsqueeze(0), x.select(0, 1), x.expand(6, 4)):
                    results = (y.mul(2), y.mul(2.0), y.add(y, alpha=2), y.clone(), y.sum(0, keepdim=True), y.to(torch.float64))
                    assert [r.dtype for r in results[:2]] == [dtype, torch.result_type(torch.empty(1, dtype=dtype), 2.0)]
                    assert results[3].stride() == torch.empty_like(y).stride() and results[4].shape == (1, *y.shape[1:])
    x = Fakes().from_tensor(torch.zeros(6, 4))
    assert x[2:].t().untyped_storage()._cdata == x.untyped_storage()._cdata
    assert (x[2:].t().shape, x[2:].t().stride(), x[2:].storage_offset()) == ((4, 4), (1, 4), 8)
