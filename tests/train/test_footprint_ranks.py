"""The memory of one of several processes: bytes of its weights, moments and gradients exactly, the highest moment against a measurement."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from holding import inputs
from test_distributed import HERE, torchrun
from tiny import tiny_model

from fastalign.models.config import LoraConfig
from fastalign.models.load import load_model
from fastalign.objectives.dpo import DPOConfig
from fastalign.ranks import ParallelConfig
from fastalign.train.footprint import footprint
from fastalign.train.footprint_ranks import _in_flight, footprint_of_rank, share_of, unpredicted, without_storage

CPU = torch.device("cpu")


def model(dtype: torch.dtype = torch.float32, lora: LoraConfig | None = None) -> Any:
    return load_model(tiny_model("llama", hidden_size=64, num_hidden_layers=3, vocab_size=325, dtype=dtype), lora=lora)


def sizes(found: Any) -> tuple[int, int, int]:
    """Elements in the layers, outside of them, and in the head."""
    layers = sum(p.numel() for p in found.model.layers.parameters())
    return layers, sum(p.numel() for p in found.parameters()) - layers, found.lm_head.weight.numel()


@pytest.mark.parametrize("processes", [2, 4])
def test_a_share_of_full_fine_tuning(processes: int) -> None:
    """The widths of this model are multiples of 4, but for the 325 rows of embedding and head, of which the first process has most."""
    single, half = model(), model(torch.bfloat16)
    inside, outside, head = sizes(single)
    rows = -(-325 // processes) * 64
    own = 2 * rows + 64 // processes  # embedding, head, norm
    found = share_of(single, DPOConfig(), processes, CPU)
    assert found.weights == 4 * (inside // processes + outside)
    assert (found.masters, found.moments) == (0, 8 * (inside // processes + own))
    assert (found.gradients, found.reduced) == (found.weights, 4 * own)
    assert found.layer == found.trained == found.reduction == 4 * inside // 3
    assert found.exchange == 4 * own * (2 * processes + 1)  # own rows, those of all, and gloo's copy of them

    wide = share_of(half, DPOConfig(), processes, CPU)
    assert wide.weights == 4 * inside // processes + 2 * outside
    assert (wide.masters, wide.moments) == (4 * own, found.moments)
    assert (wide.gradients, wide.reduced) == (4 * (inside // processes + outside), 4 * own)
    assert (wide.layer, wide.trained, wide.reduction) == (2 * inside // 3, 2 * inside // 3, 4 * inside // 3)

    narrow = DPOConfig(master_weights=False)
    assert share_of(half, narrow, processes, CPU).gradients == 2 * (inside // processes + outside)

    optimizer = share_of(half, DPOConfig(parallel=ParallelConfig("optimizer")), processes, CPU)
    assert (optimizer.weights, optimizer.gradients) == (2 * (inside + outside), 4 * (inside + outside))
    assert (optimizer.masters, optimizer.moments) == (4 * (inside // processes + own), 8 * (inside // processes + own))
    assert optimizer.layer == 0 and optimizer.reduced == optimizer.masters

    vocab = share_of(half, DPOConfig(parallel=ParallelConfig(head="vocab")), processes, CPU)
    assert vocab.weights == wide.weights - 2 * (head - rows) and vocab.head == 2 * (head - rows)
    assert (vocab.masters, vocab.gradients) == (wide.masters, wide.gradients - 4 * (head - rows))
    assert vocab.reduced == wide.reduced - 4 * rows


def test_what_is_in_flight_in_a_backward() -> None:
    """In layers, of which each is gathered, has a gradient and is reduced in float32: what is there besides their activations."""
    share = share_of(model(), DPOConfig(), 2, CPU)

    def layers(activations: float, temporaries: float = 0.0, device: torch.device = CPU) -> float:
        parts = {"activations": int(activations * share.layer), "temporaries of the backward": int(temporaries * share.layer)}
        found = _in_flight(share, parts, 1, 2, device)
        return sum(found.values()) / share.layer

    cuda = torch.device("cuda")
    assert layers(9) == 3 and layers(9, device=cuda) == 2  # it begins: this layer, the one before it, and gloo's copy of that
    assert layers(9, temporaries=0.5) == 2.5  # which has gone when the backward has temporaries
    assert layers(0) == 4  # the next one begins: the same, and what the last one reduced
    assert layers(0, device=cuda) == 4  # the next one ends: both layers, its gradient, and what the last one reduced
    assert layers(0, temporaries=1) == 4 and layers(0.75, temporaries=1) == pytest.approx(2.75, rel=1e-3)  # one ends, and is reduced


def test_an_adapter_and_replicas() -> None:
    adapted = model(lora=LoraConfig(r=4))
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in adapted.parameters())
    config = DPOConfig(parallel=ParallelConfig("optimizer", replicas=2))
    two = share_of(adapted, DPOConfig(parallel=ParallelConfig("optimizer")), 2, CPU)
    assert two == share_of(adapted, config, 4, CPU)
    assert (two.weights, two.moments, two.gradients, two.reduced) == (4 * whole, 4 * trained, 4 * trained, 2 * trained)
    full = share_of(adapted, DPOConfig(), 2, CPU)
    assert full.moments == two.moments and full.gradients == 2 * trained and full.trained == 4 * trained // 3


def test_one_process_and_a_model_without_storage() -> None:
    single = model()
    assert footprint_of_rank(single, DPOConfig(logits_budget=1 << 16), 1, tokens=256) == footprint(
        single, DPOConfig(logits_budget=1 << 16), tokens=256
    )
    empty = without_storage(single)
    assert all(p.device.type == "meta" for p in empty.parameters())
    found = footprint_of_rank(empty, DPOConfig(logits_budget=1 << 16), 4, tokens=2048)
    assert found == footprint_of_rank(single, DPOConfig(logits_budget=1 << 16), 4, tokens=2048)
    assert found.parts["gathered layers"] > 0 and found.peak < footprint(single, DPOConfig(logits_budget=1 << 16), tokens=2048).peak


def test_only_what_has_been_compared_is_predicted() -> None:
    for measured in (DPOConfig(), DPOConfig(lora=LoraConfig(r=4)), DPOConfig(parallel=ParallelConfig("optimizer"))):
        assert unpredicted(measured, 2, torch.device("cpu")) is None
    assert "cuda" in str(unpredicted(DPOConfig(), 2, torch.device("cuda")))  # nobody has measured it
    for config in (
        DPOConfig(parallel=ParallelConfig(head="vocab")),
        DPOConfig(parallel=ParallelConfig(replicas=2)),
        DPOConfig(reference="copy"),
    ):
        cpu = torch.device("cpu")
        assert unpredicted(config, 4, cpu) is not None and unpredicted(config, 1, cpu) is None


@pytest.mark.slow
@pytest.mark.parametrize("case", ["full", "half", "lora", "optimizer", "half optimizer", "lora optimizer"])
def test_the_prediction_is_that_of_a_measurement(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each case in processes of its own: what another run leaves behind would count. What is freed is given back (`torchrun`)."""
    for name, value in (("ARENA_MAX", 1), ("TRIM_THRESHOLD", 0), ("TOP_PAD", 0)):
        monkeypatch.setenv(f"MALLOC_{name}" + "_" * (name != "ARENA_MAX"), str(value))
    inputs(tmp_path, hidden=1024, layers=4, vocabulary=4096, pairs=16)
    done = torchrun(2, str(HERE / "holding.py"), str(tmp_path), case)
    assert done.returncode == 0, done.stderr[-4000:]
    for rank in range(2):
        found = json.loads((tmp_path / f"{case}-{rank}.json").read_text())
        parts = found["parts"]
        for part, held in (("weights", "weights"), ("optimizer state", "moments"), ("float32 copies of weights", "masters")):
            assert parts[part] == pytest.approx(found[held], rel=1e-3), part
        assert found["predicted"] == pytest.approx(found["measured"], rel=0.05)
