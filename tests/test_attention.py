from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface

from fastalign import attention
from fastalign.errors import ModelError
from fastalign.packing import collate
from fastalign.types import PackedBatch, Sample

LENGTHS = [7, 1, 20, 13]
BATCH = collate([Sample(i, (1,), ((2,) * (n - 1),)) for i, n in enumerate(LENGTHS)])
SHARED = collate(  # as many tokens: a prompt of 17 for three sequences of 1, 5 and 12 more tokens, and two sequences of their own
    [Sample(0, (3,) * 18, ((), (2,) * 4)), Sample(1, (4,), ((2,) * 2,)), Sample(2, (3,) * 18, ((5,) * 11,)), Sample(3, (6,), ((2,) * 2,))],
    share=True,
)


def packed(batch: PackedBatch = BATCH) -> dict:
    return attention.attention_kwargs(batch)


def visible(batch: PackedBatch) -> torch.Tensor:
    """(N, N) how far behind each row another one is in one of its sequences; huge where it is in none."""
    distance = torch.full((len(batch.input_ids),) * 2, 10**6)
    for rows in batch.sequences():
        for i, row in enumerate(rows):
            distance[row, rows[: i + 1]] = torch.arange(i, -1, -1)
    return distance


def dense(q, k, v, scaling=None, window=None, softcap=None, sinks=None, batch=BATCH) -> torch.Tensor:
    """One masked attention over all packed tokens; (1, H, N, d) -> (1, N, H, d)."""
    n, groups = q.shape[2], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(2, 3) * (scaling or q.shape[-1] ** -0.5)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    allowed = visible(batch) < (window or n)
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
@pytest.mark.parametrize("batch", [BATCH, SHARED], ids=["separate", "shared prompt"])
def test_values_and_gradients_equal_one_masked_attention(
    options: dict, block: int, batch: PackedBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "WINDOW_BLOCK", block)
    q, k, v = tensors()
    names = {"sliding_window": "window", "s_aux": "sinks"}
    want = dense(q, k, v, **{names.get(key, key): value for key, value in options.items()}, batch=batch)
    got, weights = attention.attention_forward(SimpleNamespace(), q, k, v, None, **options, **packed(batch))
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


def test_gathered_keys_are_those_of_each_piece_and_their_gradient_adds_up() -> None:
    shared = SHARED.shared
    assert shared is not None and max(shared.key_turns) == len(shared.key_rows)
    _, k, _ = tensors()
    rows = k[0].transpose(0, 1)
    got = attention._GatherKeys.apply(rows, shared)
    segments = packed(SHARED)["segments"]
    want = torch.cat(segments.with_prefix(k), dim=2)[0].transpose(0, 1)
    assert torch.equal(got, want)
    upstream = torch.randn(got.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (a,), (b,) = (torch.autograd.grad((x * upstream).sum(), k) for x in (got, want))
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)  # ours adds up in float32


class Determinism(TorchDispatchMode):
    """Whether deterministic algorithms were on, by the name of each operator."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, bool] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[func.name()] = torch.are_deterministic_algorithms_enabled()
        return func(*args, **(kwargs or {}))


def of_torch(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, k, is_causal=True)


def varlen(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    bounds = torch.zeros(3, dtype=torch.int32, device="meta")
    q, k = (x[0].transpose(0, 1) for x in (q, k))
    return pytest.importorskip("torch.nn.attention.varlen").varlen_attn(q, k, k, bounds, bounds, 20, 20)


@pytest.mark.parametrize(("attend", "device", "name"), [(of_torch, "cpu", "attention"), (varlen, "meta", "_varlen_attn_backward")])
def test_the_backward_of_a_fused_kernel_adds_up_in_a_fixed_order(attend, device: str, name: str) -> None:
    """A switch of the process is on while that backward is launched, and then as it was."""
    q, k = (torch.ones(1, 2, 20, 8, device=device, requires_grad=True) for _ in range(2))
    found = []
    for fixed in (False, True):
        out = attend(q, k)
        with Determinism() as watched:
            ((attention.fixed_order(out) if fixed else out) * 2).sum().backward()
        found.append({name in operator and "backward" in operator: on for operator, on in watched.seen.items()})
    assert found == [{True: False, False: False}, {True: True, False: False}]
    assert not torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory


class NoMemory(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "attention" in func.name() and "backward" in func.name():
            raise torch.OutOfMemoryError("no memory")
        return func(*args, **(kwargs or {}))


def test_a_backward_that_failed_leaves_nothing_switched_behind_it() -> None:
    q, k = (torch.ones(1, 2, 20, 8, requires_grad=True) for _ in range(2))
    with pytest.raises(torch.OutOfMemoryError), NoMemory():
        attention.fixed_order(of_torch(q, k)).sum().backward()
    attention.fixed_order(of_torch(q, k)).sum().backward()  # the step is repeated
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_varlen_kernel_is_taken_for_the_heads_that_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "find_torch_varlen", lambda: True)
    monkeypatch.setattr(attention, "find_flash_attn", lambda: False)
    asked = [(128, 128, None), (256, 256, None), (512, 512, None), (192, 128, None), (36, 36, None), (128, 128, 30.0)]
    assert [attention._choose_kernel(*heads) is not None for heads in asked] == [True, True, False, False, False, False]
    monkeypatch.setattr(attention, "find_flash_attn", lambda: True)  # pads, and has a softcap
    assert [attention._choose_kernel(*heads) is not None for heads in asked] == [True, True, False, False, True, True]


@pytest.mark.parametrize("says_grouped", [False, True], ids=["torch 2.11", "torch 2.12"])
def test_grouped_heads_are_named_where_torch_asks(says_grouped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("torch.nn.attention.varlen")
    seen: list[dict] = []

    def varlen_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)):
        seen.append({"scale": scale, "window_size": window_size})
        return query

    def varlen_2_12(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
        seen.append({"scale": scale, "window_size": window_size, "enable_gqa": enable_gqa})
        return query

    monkeypatch.setattr(module, "varlen_attn", varlen_2_12 if says_grouped else varlen_2_11)
    attention._varlen_options.cache_clear()
    attention.find_torch_varlen.cache_clear()
    try:
        assert attention.find_torch_varlen()
        q, k, v = (x[0].transpose(0, 1) for x in tensors())
        attention._torch_varlen(q, k, v, BATCH.cu_seqlens, BATCH.cu_seqlens, 20, 20, 0.0, 0.7, 6, None)
    finally:
        attention._varlen_options.cache_clear()
        attention.find_torch_varlen.cache_clear()
    assert seen == [{"scale": 0.7, "window_size": (5, 0)} | ({"enable_gqa": True} if says_grouped else {})]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: varlen kernels are unproven here, shared prompts or not")
@pytest.mark.parametrize("options", [{}, {"sliding_window": 6}], ids=["plain", "window"])
@pytest.mark.parametrize("batch", [BATCH, SHARED], ids=["separate", "shared prompt"])
@pytest.mark.parametrize("kernel", ["_flash_attn", "_torch_varlen"])
def test_varlen_kernels_equal_one_masked_attention(kernel: str, options: dict, batch: PackedBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    there = attention.find_flash_attn() if kernel == "_flash_attn" else attention.find_torch_varlen()
    if not there:
        pytest.skip(f"{kernel} is not installed: that it is exact is unproven here")
    monkeypatch.setattr(attention, "_varlen_kernel", lambda *_: getattr(attention, kernel))
    exact = [x.detach().bfloat16() for x in tensors(d=64, d_v=64)]
    want_in = [x.double().requires_grad_() for x in exact]
    got_in = [x.cuda().requires_grad_() for x in exact]
    want = dense(*want_in, window=options.get("sliding_window"), batch=batch)
    upstream = torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).bfloat16()
    found = []
    for _ in range(2):
        out = attention.attention_forward(SimpleNamespace(), *got_in, None, **options, **packed(batch.to("cuda")))[0]
        found.append([out, *torch.autograd.grad(out, got_in, upstream.cuda())])
    assert all(torch.equal(a, b) for a, b in zip(*found))
    for a, b in zip(found[0], [want, *torch.autograd.grad(want, want_in, upstream.double())]):
        assert b.abs().max() > 0.1
        torch.testing.assert_close(a.double().cpu(), b, rtol=2e-2, atol=2e-2 * b.abs().max().item())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: that gradients have the same bits again is unproven here")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gradients_of_long_sequences_have_the_same_bits_again(dtype: torch.dtype) -> None:
    """Of so many blocks of keys that some would add to a query's gradient at the same time."""
    batch = collate([Sample(i, (1,), ((2,) * (n - 1),)) for i, n in enumerate([6000, 2192])]).to("cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(1, heads, 8192, 64) for heads in (8, 2, 2)]
    q, k, v = (torch.randn(s, generator=generator, device="cuda", dtype=dtype).requires_grad_() for s in shapes)
    upstream = torch.randn(1, 8192, 8, 64, generator=generator, device="cuda", dtype=dtype)
    first, *others = (
        torch.autograd.grad(attention.attention_forward(SimpleNamespace(), q, k, v, None, **packed(batch))[0], (q, k, v), upstream)
        for _ in range(4)
    )
    assert all(x.any() for x in first)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other))
