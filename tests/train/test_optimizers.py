"""Where AdamW holds its moments, and when it updates: the same bits, or bounded differences, in less memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import no_report, rows
from safetensors.torch import load_file
from tiny import preference_rows, save_tiny
from torch import nn

from fastalign import train
from fastalign.data.config import DataConfig
from fastalign.errors import CheckpointError, ConfigError, DeviceMemoryError, FastalignError
from fastalign.models.config import LoraConfig, ModelConfig
from fastalign.objectives import dpo
from fastalign.objectives.base import RunConfig
from fastalign.objectives.dpo import DPOConfig
from fastalign.train import blockwise
from fastalign.train.checkpoint import list_checkpoints
from fastalign.train.metrics import read_metrics
from fastalign.train.optim import Optimizer
from fastalign.train.rounding import generator_for, round_stochastically

STOCHASTIC = {"master_weights": False, "stochastic_rounding": True}
KINDS: dict[str, dict[str, Any]] = {
    "8bit": {"optimizer": "adamw_8bit"},
    "offload": {"optimizer": "adamw_offload"},
    "in backward": {"update_in_backward": True, "max_grad_norm": None},
    "stochastic": STOCHASTIC,
    "all": {"optimizer": "adamw_8bit", "update_in_backward": True, "max_grad_norm": None, **STOCHASTIC},
}


@pytest.fixture(autouse=True, scope="module")
def _no_report() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastalign.train.loop.write_report", no_report)
        yield


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny(folder / "model", "qwen3", tie_word_embeddings=True)  # two gradients into one buffer
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in preference_rows(16, seed=3)))
    return folder


def config(inputs: Path, output: Path, *, dtype: str = "float32", **options: Any) -> Any:
    base = {"batch_size": 4, "max_tokens": 256, "max_steps": 4, "learning_rate": 1e-3, "save_every": 0, "weight_decay": 0.1}
    model = ModelConfig(path=str(inputs / "model"), dtype=dtype)  # type: ignore[arg-type]
    return DPOConfig(model=model, data=DataConfig(path=str(inputs / "pairs.jsonl")), output=str(output), **(base | options))


def final(run: Path) -> dict[str, torch.Tensor]:
    return load_file(next((run / "final").glob("*.safetensors")))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def module(*weights: nn.Parameter) -> nn.Module:
    return nn.ParameterList(weights)


@pytest.mark.parametrize(
    ("options", "tokens"),
    [({}, 4096), ({"dtype": "bfloat16"}, 256), ({"lora": LoraConfig(r=4)}, 256)],
    ids=["one micro-batch", "several, bfloat16", "LoRA"],
)
def test_offloading_and_updating_in_the_backward_change_no_bit(options: dict[str, Any], tokens: int, inputs: Path, tmp_path: Path) -> None:
    runs = {}
    for name in ("plain", "in backward", "offload"):
        given = {"max_grad_norm": None, "max_tokens": tokens, **options, **KINDS.get(name, {})}
        runs[name] = train(config(inputs, tmp_path / name, **given)).output
    expected = final(runs["plain"])
    for name in ("in backward", "offload"):
        assert same(final(runs[name]), expected), name
        assert rows(runs[name]) == rows(runs["plain"]), name  # grad_norm among them


@pytest.mark.parametrize("kind", ["8bit", "offload", "all"])
def test_a_resumed_run_is_the_same_run(kind: str, inputs: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(step: int, metrics: dict[str, float]) -> None:
        if step == 3:
            raise Stop

    options = {"dtype": "bfloat16", "save_every": 2, **KINDS[kind]}
    whole = train(config(inputs, tmp_path / "whole", **options)).output
    with pytest.raises(Stop):
        train(config(inputs, tmp_path / "cut", **options), callbacks=[stop])
    resumed = train(config(inputs, tmp_path / "cut", resume=True, **options)).output
    assert same(final(resumed), final(whole))
    assert rows(resumed) == rows(whole)
    states = [load_file(list_checkpoints(run / "checkpoints")[0] / "optimizer.safetensors") for run in (resumed, whole)]
    assert same(*states)
    assert any(value.dtype == torch.uint8 for value in states[0].values()) == (kind in ("8bit", "all"))


def test_without_its_state_a_resumed_run_would_differ(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"dtype": "bfloat16", **KINDS["all"]}
    whole = train(config(inputs, tmp_path / "whole", **options)).output
    monkeypatch.setattr(blockwise.BlockwiseAdamW, "initial_state", _forgetful(blockwise.BlockwiseAdamW.initial_state))
    other = train(config(inputs, tmp_path / "other", **options)).output
    assert not same(final(other), final(whole))


def _forgetful(initial: Any) -> Any:
    def make(self: Any, p: torch.Tensor) -> Any:
        return initial(self, p) | {"step": torch.tensor(1.0)}

    return make


def test_eight_bits_learn_as_well_in_a_quarter_of_the_memory(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DPO's loss at each of 20 steps, which falls by 0.67; the two differed by at most 0.0002."""
    monkeypatch.setattr(blockwise, "SMALLEST", 256)  # all but the norms of this small model
    losses, bytes_held = {}, {}
    for name in ("adamw", "adamw_8bit"):
        run = train(config(inputs, tmp_path / name, optimizer=name, max_steps=20, batch_size=16, lr_schedule="constant")).output
        losses[name] = torch.tensor([row["loss"] for row in read_metrics(run / "metrics.jsonl") if "loss" in row])
        saved = load_file(list_checkpoints(run / "checkpoints")[0] / "optimizer.safetensors")
        bytes_held[name] = sum(value.nbytes for key, value in saved.items() if not key.endswith("/step"))
    fell = losses["adamw"][0] - losses["adamw"][-1]
    apart = (losses["adamw"] - losses["adamw_8bit"]).abs().max()
    assert fell > 0.5
    assert 0 < apart < 0.001
    assert bytes_held["adamw_8bit"] < 0.27 * bytes_held["adamw"]


def quadratic(optimizer: Optimizer, weights: list[nn.Parameter], steps: range, rate: float = 1e-2) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss = sum((w.float() * (1 + step) - 0.3).square().sum() for w in weights)
        if optimizer.in_backward:
            optimizer.begin_update(rate, loss.detach())  # type: ignore[union-attr]
        loss.backward()  # type: ignore[union-attr]
        optimizer.step(rate, optimizer.grad_norm())


@pytest.mark.parametrize("options", [{"optimizer": "adamw_8bit"}, STOCHASTIC, {**STOCHASTIC, "optimizer": "adamw_8bit"}], ids=str)
def test_blocks_change_no_bit(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """5000 weights at a time, and 256: the last block of each is not full."""
    results = []
    for block in (1 << 22, 256):
        monkeypatch.setattr(blockwise, "BLOCK", block)
        weight = nn.Parameter(torch.linspace(-1, 1, 5000).view(50, 100).t().to(torch.bfloat16))  # not contiguous
        optimizer = Optimizer(module(weight), RunConfig(**options))
        quadratic(optimizer, [weight], range(3))
        results.append({"weight": weight.detach().clone(), **optimizer.state()})
    if "stochastic_rounding" in options:  # random bits are drawn block by block
        for result in results:
            del result["weight"]
            assert result  # the moments follow from the gradients, which follow from the weights
        results = [{k: v for k, v in result.items() if k.endswith("step")} for result in results]
    assert same(*results)


def test_float32_moments_in_blocks_are_those_of_adamw() -> None:
    start = torch.linspace(-1, 1, 600)
    one, other = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    options = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8}
    ours = blockwise.BlockwiseAdamW([{"params": [one], "names": ["w"], "weight_decay": 0.1}], bits=32, seed=None, **options)
    theirs = torch.optim.AdamW([other], weight_decay=0.1, fused=True, **options)  # type: ignore[arg-type]
    for step in range(3):
        for w, optimizer in ((one, ours), (other, theirs)):
            w.grad = (w.detach() * (step + 1)).sin()
            optimizer.step()
    assert torch.equal(one, other)
    assert (one - start).abs().max() > 0.01


def test_rounding_is_unbiased_and_goes_to_a_neighbour() -> None:
    values = torch.cat([torch.linspace(-3, 3, 61), torch.tensor([1e-30, -7e4, 2.0, 0.0])])
    draws = 40_000
    rounded = round_stochastically(values.repeat(draws), generator_for(torch.device("cpu"), 0, 1, "w")).float().view(draws, -1)
    nearest = values.bfloat16().float()
    below, above = rounded.min(0).values, rounded.max(0).values
    assert torch.equal(above[nearest == values], values[nearest == values])  # what is exact stays
    between = (nearest - values).abs() > 1e-4 * values.abs()  # those nearer to one are rarely the other
    assert (below[between] < values[between]).all() and (above[between] > values[between]).all()
    assert torch.equal(torch.nextafter(below[between].bfloat16(), torch.tensor(torch.inf).bfloat16()).float(), above[between])
    step = (above - below).double()
    error = (rounded.double().mean(0) - values.double()).abs()
    assert (error[between] / step[between]).max() < 5 * 0.5 / draws**0.5  # five standard errors of a coin
    assert (nearest[between] - values[between]).abs().div(step[between]).max() > 0.4  # rounding to the nearest would fail

    strange = torch.tensor([torch.inf, -torch.inf, torch.nan])
    kept = round_stochastically(strange, generator_for(torch.device("cpu"), 0)).float()
    assert torch.equal(kept, strange) or (torch.equal(kept[:2], strange[:2]) and kept[2].isnan())


def test_updates_that_bfloat16_would_lose_add_up() -> None:
    """100 updates of 1e-4 on 4096 weights of 1: none is kept by rounding to the nearest, their mean is by rounding at random."""
    moved = {}
    for seed in (None, 0, 0, 1):
        weight = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
        options = {"master_weights": False, "max_grad_norm": None, "seed": seed or 0, "stochastic_rounding": seed is not None}
        optimizer = Optimizer(module(weight), RunConfig(**options))  # type: ignore[arg-type]
        for _ in range(100):
            optimizer.zero_grad()
            weight.sum().backward()
            optimizer.step(1e-4, optimizer.grad_norm())
        found = 1 - weight.detach().float()
        if seed in moved:
            assert torch.equal(found, moved[seed])  # a rerun
        moved[seed] = found
    assert moved[None].eq(0).all()
    assert moved[0].mean().item() == pytest.approx(0.01, rel=0.03)
    assert not torch.equal(moved[0], moved[1])


def test_bytes_that_are_held() -> None:
    """Of 64 x 1024 bfloat16 weights: what the optimizer has on the device, and its gradients."""
    size = 64 * 1024
    expected = {
        "plain": 4 + 8,
        "8bit": 4 + 2 + 8 / 256,
        "stochastic": 8,
        "all": 2 + 8 / 256,
    }
    for kind, each in expected.items():
        weight = nn.Parameter(torch.ones(64, 1024, dtype=torch.bfloat16))
        optimizer = Optimizer(module(weight), RunConfig(**KINDS.get(kind, {})))
        quadratic(optimizer, [weight], range(1))
        assert sum(value.nbytes for key, value in optimizer.state().items() if not key.endswith("/step")) == each * size, kind
        gradient = optimizer.holders["0"].grad
        if kind == "all":
            assert gradient is None and weight.grad is None
        else:
            assert gradient.dtype == (torch.bfloat16 if kind == "stochastic" else torch.float32)


def test_gradients_are_freed_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a chain of eight layers one gradient is there at a time; in float32 buffers those of several micro-batches all are."""
    layers = nn.Sequential(*(nn.Linear(16, 16, bias=False, dtype=torch.bfloat16) for _ in range(8)))
    optimizer = Optimizer(layers, RunConfig(update_in_backward=True, max_grad_norm=None))
    there: list[int] = []
    update = optimizer._update

    def counted(names: Any, *args: Any) -> None:
        there.append(sum((h.grad is not None) + (p.grad is not None) for h, p in _pairs(optimizer)))
        update(names, *args)

    monkeypatch.setattr(optimizer, "_update", counted)
    before = [p.detach().clone() for p in layers.parameters()]
    optimizer.zero_grad()
    loss = layers(torch.ones(2, 16, dtype=torch.bfloat16)).float().square().sum()
    optimizer.begin_update(1e-2, loss)
    loss.backward()
    assert there == [1] * 8
    assert all(h.grad is None and p.grad is None for h, p in _pairs(optimizer))
    assert all(not torch.equal(a, b) for a, b in zip(before, layers.parameters()))
    optimizer.zero_grad()
    layers(torch.ones(2, 16, dtype=torch.bfloat16)).float().square().sum().backward()  # not the last
    assert sum(h.grad is not None for h, _ in _pairs(optimizer)) == 8
    assert all(h.grad.dtype == torch.float32 for h, _ in _pairs(optimizer))


def _pairs(optimizer: Optimizer) -> list[tuple[Any, nn.Parameter]]:
    return [(optimizer.holders[name], p) for name, p in optimizer.named.items()]


@pytest.mark.parametrize("kind", ["in backward", "all"])
def test_after_a_gradient_that_is_not_finite_nothing_is_updated(kind: str) -> None:
    """Three layers; the gradient of the middle one is made infinite: the last is updated, the first is not, and the next step goes on."""
    layers = nn.Sequential(*(nn.Linear(64, 64, bias=False, dtype=torch.bfloat16) for _ in range(3)))
    optimizer = Optimizer(layers, RunConfig(**KINDS[kind]))
    bad = [True]
    layers[1].weight.register_hook(lambda grad: grad * float("inf") if bad[0] else grad)

    def backward() -> list[bool]:
        before = [p.detach().clone() for p in layers.parameters()]
        optimizer.zero_grad()
        loss = layers(torch.ones(2, 64, dtype=torch.bfloat16)).float().square().sum()
        optimizer.begin_update(1e-1, loss * float("nan") if bad[0] is None else loss)
        loss.backward()
        return [not torch.equal(a, b) for a, b in zip(before, layers.parameters())]

    assert backward() == [False, False, True]
    assert not optimizer.grad_norm().isfinite()
    assert optimizer.nonfinite_gradients() == ["1.weight"]
    assert optimizer.begun
    steps = {key: float(value) for key, value in optimizer.state().items() if key.endswith("/step")}
    assert steps["2.weight/step"] == 1
    assert steps.get("1.weight/step", 0) == steps.get("0.weight/step", 0) == 0
    bad[0] = False
    assert backward() == [True, True, True]
    assert optimizer.nonfinite_gradients() == []
    bad[0] = None  # type: ignore[call-overload]
    assert backward() == [False, False, False]  # the loss was known to be NaN


def test_running_out_of_memory_after_an_update_ends_the_run(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trunk = dpo.trunk

    class Full(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, hidden: torch.Tensor) -> torch.Tensor:
            return hidden.clone()

        @staticmethod
        def backward(ctx: Any, *upstream: torch.Tensor) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def failing(model: Any, batch: Any) -> Any:
        layer = model.model.layers[0]
        hook = layer.register_forward_hook(lambda m, args, out: Full.apply(out)) if torch.is_grad_enabled() else None
        out = trunk(model, batch)
        if hook:
            hook.remove()
        return out

    monkeypatch.setattr(dpo, "trunk", failing)
    with pytest.raises(DeviceMemoryError, match=r"step 1: .* after update_in_backward had changed weights.*--max_tokens than 4096"):
        train(config(inputs, tmp_path / "run", max_tokens=4096, **KINDS["in backward"]))


def test_states_of_other_weights_are_refused() -> None:
    weight = nn.Parameter(torch.ones(64, 128))
    optimizer = Optimizer(module(weight), RunConfig(optimizer="adamw_8bit"))
    quadratic(optimizer, [weight], range(1))
    state = optimizer.state()
    with pytest.raises(CheckpointError, match=r"0/exp_avg_scale fits no weight"):
        optimizer.load_state({**state, "0/exp_avg_scale": torch.ones(31)})
    optimizer.load_state(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "adam"}, "optimizer must be one of adamw, adamw_8bit, adamw_offload"),
        ({"update_in_backward": True}, r"norm of the whole gradient.*--max_grad_norm null"),
        ({"stochastic_rounding": True}, r"stochastic_rounding must be left at False, which counts only with master_weights false"),
        ({**STOCHASTIC, "optimizer": "adamw_offload"}, r"stochastic_rounding must be left at False.*without adamw_offload"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, Any], message: str, inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        config(inputs, tmp_path / "run", **options).validate()


def test_stochastic_rounding_needs_a_weight_to_round(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(FastalignError, match=r"no trained weight is bfloat16; set --model\.dtype bfloat16"):
        train(config(inputs, tmp_path / "run", **STOCHASTIC))


@pytest.mark.parametrize("rows", [1, 5, 12])
def test_a_part_of_a_weight_is_rounded_as_it_is_in_the_whole(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "BLOCK", 17)  # no block begins where a row does
    generator = torch.Generator().manual_seed(0)
    start, grads = torch.randn(12, 7, generator=generator).bfloat16(), torch.randn(3, 12, 7, generator=generator).bfloat16()

    def updated(first: int, last: int, place: int | None = None) -> torch.Tensor:
        weight = torch.nn.Parameter(start[first:last].clone())
        group = {"params": [weight], "names": ["w"], "places": [(first * 7 if place is None else place, 84)]}
        optimizer = blockwise.BlockwiseAdamW([group], bits=32, seed=3, lr=1e-3, betas=(0.9, 0.999), eps=1e-8)
        for grad in grads:
            weight.grad = grad[first:last].clone()
            optimizer.step()
        return weight.detach()

    whole = updated(0, 12)
    assert torch.equal(torch.cat([updated(first, min(12, first + rows)) for first in range(0, 12, rows)]), whole)
    assert not torch.equal(updated(5, 10, place=0), whole[5:10])  # the place counts
