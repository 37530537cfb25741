"""`fused_loss` in two processes, under DDP and FSDP2, and with a compiled trunk: the loss and gradients of the dense model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny import tiny_model

from fastalign.dropin.transformers import fused_loss

PROCESSES = 2
HOW = ["ddp", "ddp, checkpointing", "fsdp", "fsdp, tied", "fsdp, head alone", "fsdp, head alone, checkpointing"]


def batch(rank: int) -> dict[str, torch.Tensor]:
    """Different lengths of labels on each process."""
    ids = torch.randint(5, 300, (2, 9), generator=torch.Generator().manual_seed(rank))
    labels = ids.clone()
    labels[:, : 2 + 3 * rank] = -100
    return {"input_ids": ids, "labels": labels}


def model_of(tied: bool, checkpointing: bool = False) -> Any:
    model = tiny_model("llama", tie_word_embeddings=tied).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def step(model: Any, *batches: dict[str, torch.Tensor]) -> tuple[list[float], dict[str, torch.Tensor]]:
    losses = []
    for inputs in batches:
        loss = model(**inputs, use_cache=False).loss
        (loss / len(batches)).backward()
        losses.append(float(loss.detach()))
    return losses, {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}


def assert_same(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, expected in wanted.items():
        assert expected.norm() > 1e-4, name
        torch.testing.assert_close(got[name], expected, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=PROCESSES)
    try:
        for how in HOW:
            check(rank, how)
    finally:
        dist.destroy_process_group()


def check(rank: int, how: str) -> None:
    losses, wanted = step(model_of("tied" in how), batch(0), batch(1))  # DDP and FSDP2 average gradients over processes
    model = model_of("tied" in how, checkpointing="checkpointing" in how)
    fused = fused_loss(model)
    parallel = shard(model, how) if "fsdp" in how else torch.nn.parallel.DistributedDataParallel(model)
    (loss,), grads = step(parallel, batch(rank))
    assert fused.calls == 1
    assert loss == pytest.approx(losses[rank], rel=1e-5), how
    assert_same({f"{how}: {name}": g.full_tensor() if "fsdp" in how else g for name, g in grads.items()},
                {f"{how}: {name}": g for name, g in wanted.items()})  # fmt: skip


def shard(model: Any, how: str) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (PROCESSES,))
    units = [*model.model.layers, *([model.lm_head] if "head alone" in how else [])]
    for unit in units:
        fully_shard(unit, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def test_two_processes(tmp_path: Any) -> None:
    mp.spawn(worker, args=(str(tmp_path),), nprocs=PROCESSES)


@pytest.mark.parametrize("compiled", ["trunk", "model"])
def test_compiled(compiled: str) -> None:
    """The trunk by itself, or the forward around it that stops before the head."""
    _, wanted = step(model_of(False), batch(0))
    model = model_of(False)
    with fused_loss(model) as fused:
        if compiled == "trunk":
            model.model.forward = torch.compile(model.model.forward, backend="aot_eager")
            run = model
        else:
            run = torch.compile(model, backend="aot_eager")
        _, grads = step(run, batch(0))
    assert fused.calls == 1
    assert_same({name.removeprefix("_orig_mod."): g for name, g in grads.items()}, wanted)
