from types import SimpleNamespace

import pytest
import torch
from transformers import AttentionInterface

from fastalign import attention
from fastalign.errors import ModelError
from fastalign.packing import collate
from fastalign.types import Sample

LENGTHS = [7, 1, 20, 13]


def packed() -> dict:
    return attention.attention_kwargs(collate([Sample(i, (1,), ((2,) * (n - 1),)) for i, n in enumerate(LENGTHS)]))


def dense(q, k, v, scaling=None, window=None, softcap=None, sinks=None) -> torch.Tensor:
    """One masked attention over all packed tokens; (1, H, N, d) -> (1, N, H, d)."""
    n, groups = q.shape[2], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(2, 3) * (scaling or q.shape[-1] ** -0.5)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    segment = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    i, j = torch.arange(n)[:, None], torch.arange(n)[None]
    allowed = (segment[:, None] == segment[None]) & (j <= i) & (i - j < (window or n))
    scores = scores.masked_fill(~allowed, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(1, -1, n, 1)], -1)
    probs = scores.softmax(-1)[..., :n]
    return (probs @ v).transpose(1, 2)


def tensors(heads: int = 4, kv_heads: int = 2, d: int = 8, d_v: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    n = sum(LENGTHS)
    shapes = [(1, heads, n, d), (1, kv_heads, n, d), (1, kv_heads, n, d_v)]
    return [(2 * torch.randn(s, generator=generator, dtype=torch.float64)).requires_grad_() for s in shapes]


OPTIONS = {
    "plain": {},
    "scaled": {"scaling": 0.7},
    "window 1": {"sliding_window": 1},
    "window 6, below and above the lengths": {"sliding_window": 6},
    "window as long as the longest": {"sliding_window": 20},
    "softcap": {"softcap": 2.0},
    "softcap and window": {"softcap": 2.0, "sliding_window": 6, "scaling": 0.3},
    "sinks": {"s_aux": torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)},
    "sinks and window": {"s_aux": torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64), "sliding_window": 6},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("block", [3, 64])
def test_values_and_gradients_equal_one_masked_attention(options: dict, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "WINDOW_BLOCK", block)
    q, k, v = tensors()
    names = {"sliding_window": "window", "s_aux": "sinks"}
    want = dense(q, k, v, **{names.get(key, key): value for key, value in options.items()})
    got, weights = attention.attention_forward(SimpleNamespace(), q, k, v, None, **options, **packed())
    assert weights is None
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    upstream = torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for a, b in zip(torch.autograd.grad((got * upstream).sum(), (q, k, v)), torch.autograd.grad((want * upstream).sum(), (q, k, v))):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("heads", "kv_heads", "d_v"), [(4, 4, 8), (6, 1, 8), (4, 2, 6)], ids=["one to one", "one key head", "d_v < d"])
def test_head_layouts(heads: int, kv_heads: int, d_v: int) -> None:
    q, k, v = tensors(heads, kv_heads, d_v=d_v)
    torch.testing.assert_close(attention.attention_forward(SimpleNamespace(), q, k, v, None, **packed())[0], dense(q, k, v))


def test_a_sequence_does_not_see_its_neighbours() -> None:
    q, k, v = tensors()
    before = attention.attention_forward(SimpleNamespace(), q, k, v, None, **packed())[0]
    other = [x.detach().clone() for x in (q, k, v)]
    for x in other:
        x[:, :, 8:28] = float("nan")  # the third sequence
    after = attention.attention_forward(SimpleNamespace(), *other, None, **packed())[0]
    outside = torch.ones(sum(LENGTHS), dtype=torch.bool)
    outside[8:28] = False
    assert torch.equal(before[:, outside], after[:, outside])
    assert after[:, ~outside].isnan().all()


def test_what_would_not_be_exact_is_refused() -> None:
    q, k, v = tensors()
    call = attention.attention_forward
    with pytest.raises(ModelError, match=r"without sequence boundaries.*drops keyword arguments"):
        call(SimpleNamespace(), q, k, v, None)
    with pytest.raises(ModelError, match="attention mask"):
        call(SimpleNamespace(), q, k, v, torch.ones(1), **packed())
    with pytest.raises(ModelError, match="position bias"):
        call(SimpleNamespace(), q, k, v, None, position_bias=torch.ones(1), **packed())
    with pytest.raises(ModelError, match="both directions"):
        call(SimpleNamespace(is_causal=False), q, k, v, None, **packed())
    with pytest.raises(ModelError, match="cache"):
        call(SimpleNamespace(), q, k[:, :, :5], v[:, :, :5], None, **packed())


def test_dropout_acts_and_is_off_by_default() -> None:
    q, k, v = tensors()
    calls = [attention.attention_forward(SimpleNamespace(), q, k, v, None, dropout=p, **packed())[0] for p in (0.0, 0.0, 0.5)]
    assert torch.equal(calls[0], calls[1])
    assert not torch.equal(calls[0], calls[2])


def test_register_twice() -> None:
    attention.register()
    attention.register()
    assert AttentionInterface()[attention.NAME] is attention.attention_forward
