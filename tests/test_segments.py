import pytest
import torch

from fastalign.segments import segment_expand, segment_mean, segment_sum, shared_length_sum

LENGTHS = [0, 3, 0, 1, 5, 0]  # empty at both ends and between, one of one token
CU = torch.tensor([0, 0, 3, 3, 4, 9, 9], dtype=torch.int32)


def plain(values: torch.Tensor, mask: torch.Tensor, mean: bool) -> torch.Tensor:
    out = []
    for part, keep in zip(values.split(LENGTHS), mask.split(LENGTHS)):
        out.append(part[keep].mean() if mean and keep.any() else part[keep].sum())
    return torch.stack(out)


@pytest.mark.parametrize(("function", "mean"), [(segment_sum, False), (segment_mean, True)])
@pytest.mark.parametrize("masked", [False, True])
def test_values_and_gradient_equal_a_loop(function, mean: bool, masked: bool) -> None:
    torch.manual_seed(0)
    values = torch.randn(9, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([1, 0, 1, 0, 1, 1, 0, 1, 0]).bool() if masked else torch.ones(9).bool()
    upstream = torch.randn(6, dtype=torch.float64)
    want = plain(values, mask, mean)
    got = function(values, CU, mask if masked else None)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got @ upstream, values)[0], torch.autograd.grad(want @ upstream, values)[0])


@pytest.mark.parametrize("function", [segment_sum, segment_mean])
def test_masked_values_may_be_nan(function) -> None:
    values = torch.tensor([1.0, float("nan"), 3.0], requires_grad=True)
    out = function(values, torch.tensor([0, 2, 3], dtype=torch.int32), torch.tensor([True, False, True]))
    assert out.tolist() == [1.0, 3.0]
    assert torch.autograd.grad(out.sum(), values)[0].tolist() == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("function", [segment_sum, segment_mean])
def test_a_segment_with_nothing_to_count_is_zero_and_stays_in_the_graph(function) -> None:
    values = torch.tensor([float("inf"), 2.0], requires_grad=True)
    out = function(values, torch.tensor([0, 1, 1, 2], dtype=torch.int32), torch.tensor([False, False]))
    assert out.tolist() == [0.0, 0.0, 0.0]
    assert torch.autograd.grad(out.sum(), values)[0].tolist() == [0.0, 0.0]


def test_no_segments_and_no_values() -> None:
    assert segment_sum(torch.zeros(0), torch.tensor([0], dtype=torch.int32)).shape == (0,)
    assert segment_mean(torch.zeros(0), torch.tensor([0, 0], dtype=torch.int32)).tolist() == [0.0]


def test_half_precision_is_summed_in_float32() -> None:
    values = torch.full((4096,), 1.0, dtype=torch.bfloat16)  # a bfloat16 sum would stop at 256
    assert segment_sum(values, torch.tensor([0, 4096], dtype=torch.int32)).tolist() == [4096.0]


def test_the_same_bits_on_a_rerun() -> None:
    values = torch.randn(10_001)
    cu = torch.arange(0, 10_002, 73, dtype=torch.int32)
    assert torch.equal(segment_sum(values, cu), segment_sum(values, cu))


@pytest.mark.parametrize(
    ("values", "mask", "said"),
    [(torch.zeros(2, 2), None, "(2, 2)"), (torch.zeros(2), torch.ones(2), "float32"), (torch.zeros(2), torch.ones(3).bool(), "(3,)")],
)
def test_wrong_shapes_are_named(values: torch.Tensor, mask: torch.Tensor | None, said: str) -> None:
    with pytest.raises(ValueError, match=r"must be") as error:
        segment_sum(values, torch.tensor([0, 2], dtype=torch.int32), mask)
    assert said in str(error.value)


def test_expand_gives_each_token_its_segment_and_sums_the_gradient():
    values = torch.tensor([1.0, 2.0, 4.0, 8.0], requires_grad=True)
    cu_seqlens = torch.tensor([0, 2, 2, 3, 5], dtype=torch.int32)
    spread = segment_expand(values, cu_seqlens, 5)
    assert spread.tolist() == [1.0, 1.0, 4.0, 8.0, 8.0]
    (d,) = torch.autograd.grad((spread * torch.arange(1.0, 6.0)).sum(), values)
    assert d.tolist() == [3.0, 0.0, 3.0, 9.0]
    assert segment_expand(values[:0], cu_seqlens[:1], 0).shape == (0,)
    with pytest.raises(ValueError, match=r"one per segment of cu_seqlens \(S\+1,\): got \(3,\), \(5,\)"):
        segment_expand(values[:3], cu_seqlens, 5)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_shared_length_sum_equals_a_loop(alpha: float) -> None:
    """What goes beyond the shorter of a pair counts alpha."""
    values = torch.randn(9, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    cu_seqlens = torch.tensor([0, 0, 3, 5, 6, 8, 9], dtype=torch.int32)  # pairs of lengths (0, 3), (2, 1), (2, 1)
    weights = torch.tensor([alpha] * 3 + [1, alpha, 1] + [1, alpha, 1], dtype=torch.float64)
    found = shared_length_sum(values, cu_seqlens, alpha)
    torch.testing.assert_close(found, segment_sum(weights * values, cu_seqlens))
    torch.testing.assert_close(torch.autograd.grad(found.sum(), values)[0], weights)


def test_shared_length_sum_needs_pairs() -> None:
    with pytest.raises(ValueError, match=r"bounds of P pairs of segments: got \(4,\)"):
        shared_length_sum(torch.zeros(3), torch.tensor([0, 1, 2, 3], dtype=torch.int32), 0.5)
