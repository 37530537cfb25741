"""The embedding's gradient in place equals autograd's, and needs no tensor of the vocabulary's size."""

from __future__ import annotations

import copy

import pytest
import torch
from families import ragged_batch, weights_of
from tiny import tiny_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastalign.models.embedding import accumulate_in_place
from fastalign.models.heads import head_spec
from fastalign.models.load import load_model
from fastalign.models.trunk import trunk

V, D = 50, 6
IDS = torch.tensor([[3, 7, 3, 1, 49, 7, 3]])


class Sizes(TorchDispatchMode):
    """The number of elements of every tensor that an operation makes anew."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view and not str(func).endswith("_.default"):
            self.largest = max(self.largest, out.numel())
        return out


def embedding(padding: int | None = None, dtype: torch.dtype = torch.float32) -> nn.Embedding:
    torch.manual_seed(0)
    return nn.Embedding(V, D, padding_idx=padding).to(dtype)


@pytest.mark.parametrize("padding", [None, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sum_over_tokens_goes_to_the_buffer(padding: int | None, dtype: torch.dtype) -> None:
    plain = embedding(padding, dtype)
    ours = copy.deepcopy(plain)
    assert accumulate_in_place(ours)
    name = "grad" if dtype == torch.float32 else "main_grad"
    buffer = torch.ones(V, D)
    setattr(ours.weight, name, buffer)
    upstream = torch.randn(2, *IDS.shape, D).to(dtype)
    for part in upstream:
        (ours(IDS) * part).sum().backward()
    want = torch.ones(V, D)
    for row, grads in zip(IDS[0], upstream[:, 0].transpose(0, 1)):
        want[row] += 0 if row == padding else grads.float().sum(0)
    torch.testing.assert_close(buffer, want)
    assert getattr(ours.weight, name) is buffer
    assert torch.equal(ours(IDS), plain(IDS))


def test_without_a_buffer_the_gradient_is_autograds_own() -> None:
    plain = embedding(7)
    ours = copy.deepcopy(plain)
    accumulate_in_place(ours)
    for module in (plain, ours):
        module(IDS).square().sum().backward()
    assert torch.equal(plain.weight.grad, ours.weight.grad)
    with torch.no_grad():
        assert not ours(IDS).requires_grad


def test_no_tensor_of_the_vocabularys_size_is_made() -> None:
    found = {}
    for in_place in (False, True):
        module = embedding()
        module.weight.grad = torch.zeros(V, D)
        if in_place:
            accumulate_in_place(module)
        with Sizes() as sizes:
            module(IDS).sum().backward()
        found[in_place] = sizes.largest
    assert found[False] >= V * D > found[True]


@pytest.mark.parametrize("tied", [False, True])
def test_a_models_gradients_are_the_same(tied: bool) -> None:
    batch, grads = ragged_batch(), []
    for in_place in (False, True):
        model = load_model(tiny_model("qwen3", tie_word_embeddings=tied, pad_token_id=9))
        head, module = head_spec(model), model.get_input_embeddings()
        if in_place:
            assert accumulate_in_place(module)
            for weight in (module.weight, head.weight):
                weight.grad = torch.zeros_like(weight)
        for _ in range(2):
            hidden = trunk(model, batch).hidden.index_select(0, batch.live)
            head.loss(hidden, batch.live_target, lambda out, rows: (out.logps * weights_of(batch)[rows]).sum()).backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert grads[0]["model.embed_tokens.weight"].abs().max() > 0.1
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-5, atol=1e-5)


def test_what_is_left_alone() -> None:
    class Scaled(nn.Embedding):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(ids)

    frozen = embedding()
    frozen.weight.requires_grad_(False)
    for module in (Scaled(V, D), nn.Linear(D, V), nn.Embedding(V, D, max_norm=1.0), nn.Embedding(V, D, sparse=True), frozen):
        assert not accumulate_in_place(module)
        assert not module._forward_hooks
