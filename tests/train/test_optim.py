"""The optimizer against Transformers' schedules and decay groups, and 16-bit weights against a float32 trajectory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import tiny_model
from torch import nn
from transformers import Trainer, get_scheduler

from fastalign.errors import CheckpointError, ConfigError
from fastalign.models.heads import head_spec
from fastalign.models.load import load_model
from fastalign.models.trunk import trunk
from fastalign.objectives.base import RunConfig
from fastalign.packing import collate
from fastalign.train.optim import Division, Optimizer, learning_rate
from fastalign.types import Sample


@pytest.mark.parametrize("warmup_ratio", [0.0, 0.25])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_schedule_is_that_of_transformers(schedule: str, warmup_ratio: float) -> None:
    steps = 13
    name = "constant_with_warmup" if schedule == "constant" else schedule
    adamw = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=0.5)
    theirs = get_scheduler(name, adamw, num_warmup_steps=-(-steps * warmup_ratio // 1), num_training_steps=steps)
    config = RunConfig(learning_rate=0.5, lr_schedule=schedule, warmup_ratio=warmup_ratio)
    rates = []
    for step in range(steps):
        assert learning_rate(step, steps, config) == pytest.approx(adamw.param_groups[0]["lr"], rel=1e-12)
        rates.append(adamw.param_groups[0]["lr"])
        adamw.step()
        theirs.step()
    assert max(rates) == 0.5
    assert (rates[0] == 0) == (warmup_ratio > 0)
    assert (rates[-1] < 0.2) == (schedule != "constant")


def test_decay_groups_are_those_of_transformers() -> None:
    model = tiny_model("qwen3", attention_bias=True)
    optimizer = Optimizer(model, RunConfig(weight_decay=0.1))
    names = {id(p): name for name, p in model.named_parameters()}
    decayed = {
        names[id(p)] for engine in optimizer.engines for group in engine.param_groups if group["weight_decay"] for p in group["params"]
    }
    assert decayed == set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    assert decayed != set(names.values())  # this model has biases and norms


def test_step_clips_and_follows_adamw() -> None:
    """One float64 AdamW update written out, on a gradient of norm 5 clipped to 1."""
    weight = nn.Parameter(torch.tensor([1.0, -2.0]))
    config = RunConfig(weight_decay=0.1, max_grad_norm=1.0, adam_beta1=0.8, adam_beta2=0.9)
    optimizer = Optimizer(_module(weight), config)
    optimizer.zero_grad()
    (weight * torch.tensor([3.0, 4.0])).sum().backward()
    norm = optimizer.grad_norm()
    assert norm.item() == pytest.approx(5.0)
    optimizer.step(0.01, norm)
    g = torch.tensor([0.6, 0.8], dtype=torch.float64)
    w = torch.tensor([1.0, -2.0], dtype=torch.float64) * (1 - 0.01 * 0.1)
    expected = w - 0.01 * (0.2 * g / (1 - 0.8)) / ((0.1 * g**2 / (1 - 0.9)).sqrt() + 1e-8)
    torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-6, atol=0)


def test_no_clipping_below_the_limit_or_without_one() -> None:
    for limit in (None, 10.0):
        weight = nn.Parameter(torch.tensor([1.0]))
        optimizer = Optimizer(_module(weight), RunConfig(max_grad_norm=limit))
        weight.sum().backward()
        optimizer.step(0.1, optimizer.grad_norm())
        assert weight.grad is not None
        assert weight.grad.item() == pytest.approx(1.0, rel=1e-6)


def test_master_weights_keep_small_updates() -> None:
    """Updates of 1e-4 on a bfloat16 weight of 1: lost one by one without the float32 copy, kept with it."""
    moved = {}
    for master_weights in (True, False):
        weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
        optimizer = Optimizer(_module(weight), RunConfig(master_weights=master_weights, max_grad_norm=None))
        for _ in range(100):
            optimizer.zero_grad()
            weight.sum().backward()
            optimizer.step(1e-4, optimizer.grad_norm())
        moved[master_weights] = 1 - weight.detach().float()
    assert weight.dtype == torch.bfloat16
    torch.testing.assert_close(moved[True], torch.full((4,), 0.01), rtol=0.2, atol=0)
    assert moved[False].eq(0).all()


def test_master_gradient_is_accumulated_in_float32() -> None:
    """1 + 256 gradients of 2^-9: bfloat16 would drop every one of the small ones."""
    weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimizer = Optimizer(_module(weight), RunConfig())
    for scale in [1.0] + [2.0**-9] * 256:
        (weight * scale).sum().backward()
    assert optimizer.grad_norm().item() == 1.5
    assert weight.grad is None
    assert weight.main_grad.dtype == torch.float32  # type: ignore[attr-defined]
    optimizer.zero_grad()
    assert optimizer.grad_norm().item() == 0


def test_sums_over_processes_are_freed_between_steps_and_buffers_are_not() -> None:
    class Half(Division):
        is_whole = False

        def rows(self, tensor: torch.Tensor, of: torch.Tensor | None = None) -> torch.Tensor:
            return tensor[: len(tensor) // 2]

        def parameter(self, weight: torch.nn.Parameter) -> torch.nn.Parameter:
            return torch.nn.Parameter(self.rows(weight.detach()))

        def reduce(self, weights: Any, updated: Any) -> None:
            for name, weight in weights.items():
                updated[name].grad = 2 * self.rows(getattr(weight, "main_grad", weight.grad))

    for dtype in (torch.float32, torch.bfloat16):
        model = torch.nn.Linear(4, 4, bias=False).to(dtype)
        optimizer = Optimizer(model, RunConfig(max_grad_norm=None), division=Half())
        optimizer.zero_grad()
        model(torch.ones(1, 4, dtype=dtype)).sum().backward()
        assert float(optimizer.grad_norm()) == pytest.approx(2 * 8**0.5)
        updated = optimizer.updated["weight"]
        assert updated.grad is not None
        optimizer.zero_grad()
        assert updated.grad is None
        if dtype == torch.bfloat16:
            assert model.weight.main_grad.shape == (4, 4) and not model.weight.main_grad.any()  # type: ignore[union-attr]


def test_head_gradient_buffer_survives_zero_grad() -> None:
    weight, other = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    optimizer = Optimizer(_module(weight, other), RunConfig(), head_weight=weight)
    optimizer.zero_grad()
    buffer = weight.grad
    assert buffer is not None
    (weight.sum() + other.sum()).backward()
    assert weight.grad is buffer
    assert buffer.sum() == 4
    optimizer.zero_grad()
    assert weight.grad is buffer
    assert buffer.sum() == 0
    assert other.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_continues_bit_for_bit(dtype: torch.dtype) -> None:
    def train(optimizer: Optimizer, weight: nn.Parameter, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            (weight * torch.linspace(0.1, 1 + step, 64).to(dtype)).square().sum().backward()
            optimizer.step(1e-3, optimizer.grad_norm())

    weight = nn.Parameter(torch.linspace(-1, 1, 64).to(dtype))
    optimizer = Optimizer(_module(weight), RunConfig(weight_decay=0.01))
    train(optimizer, weight, range(3))
    state = {name: value.clone() for name, value in optimizer.state().items()}
    middle = weight.detach().clone()
    train(optimizer, weight, range(3, 6))

    again = nn.Parameter(middle)
    other = Optimizer(_module(again), RunConfig(weight_decay=0.01))
    other.load_state(state)
    train(other, again, range(3, 6))
    assert torch.equal(again, weight)
    assert all(torch.equal(value, other.state()[name]) for name, value in optimizer.state().items())

    forgotten = nn.Parameter(middle.clone())
    train(Optimizer(_module(forgotten), RunConfig(weight_decay=0.01)), forgotten, range(3, 6))
    assert not torch.equal(forgotten, weight)  # the state matters, so the comparison above can fail


def test_state_of_another_model_is_refused() -> None:
    optimizer = Optimizer(_module(nn.Parameter(torch.ones(3))), RunConfig())
    with pytest.raises(CheckpointError, match=r"0/exp_avg fits no weight"):
        optimizer.load_state({"0/exp_avg": torch.zeros(4)})
    half = Optimizer(_module(nn.Parameter(torch.ones(3, dtype=torch.bfloat16))), RunConfig())
    with pytest.raises(CheckpointError, match=r"no float32 copy of 0"):
        half.load_state({})


def test_what_cannot_be_trained_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"float16 cannot be trained without loss scaling.*bfloat16"):
        Optimizer(_module(nn.Parameter(torch.ones(1, dtype=torch.float16))), RunConfig())
    with pytest.raises(ConfigError, match=r"no trainable weight.*lora.r"):
        Optimizer(_module(nn.Parameter(torch.ones(1), requires_grad=False)), RunConfig())


def test_nonfinite_gradients_are_named() -> None:
    good, bad = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = Optimizer(_module(good, bad), RunConfig())
    (good.sum() + bad.sum() * float("inf")).backward()
    assert optimizer.nonfinite_gradients() == ["1"]


def _module(*weights: nn.Parameter) -> nn.Module:
    return nn.ParameterList(weights)


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_adds_its_gradient_to_the_float32_buffer(tied: bool) -> None:
    """Two micro-batches through the head of a bfloat16 model: the accumulated gradient is float32 and equals the sum of the two."""
    samples = [Sample(i, (5, 6 + i), ((7, 8, 1), (9 + i, 1))) for i in range(2)]

    def gradient(plan: list[list[Sample]]) -> dict[str, torch.Tensor]:
        model = load_model(tiny_model("qwen3", dtype=torch.bfloat16, tie_word_embeddings=tied))
        head = head_spec(model)
        optimizer = Optimizer(model, RunConfig(), head_weight=head.weight)
        for members in plan:
            batch = collate(members)
            hidden = trunk(model, batch).hidden.index_select(0, batch.live)
            head.loss(hidden, batch.live_target, lambda out, rows: -out.logps.sum()).backward()
        assert head.weight.grad is None
        return {name: p.grad.clone() for name, p in optimizer.updated.items() if p.grad is not None}

    together, one, two = gradient([samples]), gradient([samples[:1]]), gradient([samples[1:]])
    apart = gradient([samples[:1], samples[1:]])
    for name, value in apart.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, one[name] + two[name], rtol=1e-6, atol=1e-6)
        assert (value - together[name]).norm() <= 0.03 * together[name].norm(), name
    name = "model.embed_tokens.weight" if tied else "lm_head.weight"
    assert together[name].bfloat16().float().ne(together[name]).any()  # it was not rounded to bfloat16 on its way
