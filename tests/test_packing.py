import random
import time
from typing import Any

import pytest
import torch

from fastalign import packing
from fastalign.errors import ConfigError
from fastalign.packing import batches, collate, pack, pack_samples, packed_tokens, per_sample, spared_tokens
from fastalign.ranks import Ranks
from fastalign.types import IGNORE_INDEX, Sample


def best_fit_decreasing(lengths: list[int], capacity: int) -> int:
    """Number of bins, by the textbook."""
    free: list[int] = []
    for length in sorted(lengths, reverse=True):
        fits = [room for room in free if room >= length]
        if fits:
            free.remove(min(fits))
            free.append(min(fits) - length)
        else:
            free.append(capacity - length)
    return len(free)


@pytest.mark.parametrize("seed", range(5))
def test_every_index_once_within_budget_and_as_few_bins_as_best_fit_decreasing(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [rng.randint(1, 60) for _ in range(200)]
    bins = pack(lengths, 100)
    assert sorted(i for b in bins for i in b) == list(range(200))
    assert max(sum(lengths[i] for i in b) for b in bins) <= 100
    assert len(bins) == best_fit_decreasing(lengths, 100)
    assert bins == pack(lengths, 100)


def test_edges() -> None:
    assert pack([], 10) == []
    assert pack([10], 10) == [[0]]
    assert pack([5, 5, 5, 5], 10) == [[0, 1], [2, 3]]
    assert pack([0, 10, 0], 10) == [[0, 1, 2]]


def test_a_sample_over_the_budget_is_named() -> None:
    with pytest.raises(ConfigError, match=r"sample 2 has 11 tokens, more than max_tokens=10: raise max_tokens to at least 11"):
        pack([3, 10, 11], 10)
    with pytest.raises(ConfigError, match="at least 1"):
        pack([], 0)


def test_a_large_data_set_is_packed_in_seconds() -> None:
    rng = random.Random(0)
    lengths = [rng.randint(1, 8192) for _ in range(100_000)]
    started = time.process_time()
    pack(lengths, 32768)
    assert time.process_time() - started < 5


PAIRS = [
    Sample(7, (1, 2, 3), ((4, 5), (6,)), weight=0.5),
    Sample(9, (), ((7, 8, 9), (5,))),  # no prompt: the first token is not scored, and a single token scores nothing
    Sample(2, (1, 2), ((3,), (4, 5)), skip=(0, 1)),
]


def test_collate_lays_sequences_end_to_end() -> None:
    batch = collate(PAIRS)
    assert batch.bounds == (0, 5, 9, 12, 13, 16, 19)
    assert batch.input_ids.tolist() == [1, 2, 3, 4, 5, 1, 2, 3, 6, 7, 8, 9, 5, 1, 2, 3, 2, 4, 5]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2, 0, 0, 1, 2, 0, 1, 2]
    none = IGNORE_INDEX
    assert batch.target.tolist() == [none, none, 4, 5, none, none, none, 6, none, 8, 9, none, none, none, 3, none, 4, 5, none]
    assert batch.live_bounds == (0, 2, 3, 5, 5, 6, 8)
    assert batch.max_seqlen == 5
    assert (batch.index, batch.completions, batch.weight.tolist()) == ((7, 9, 2), (2, 2, 2), [0.5, 1.0, 1.0])


def test_collate_is_consistent_with_its_own_fields_and_with_the_samples() -> None:
    batch = collate(PAIRS)
    assert torch.equal(batch.target[batch.live], batch.live_target)
    assert torch.equal((batch.target != IGNORE_INDEX).nonzero()[:, 0], batch.live)
    assert tuple(batch.cu_seqlens.tolist()) == batch.bounds
    assert tuple(batch.live_cu_seqlens.tolist()) == batch.live_bounds
    assert batch.live_cu_seqlens.diff().tolist() == [n for sample in PAIRS for n in sample.scored]
    assert len(batch.input_ids) == sum(sample.num_tokens for sample in PAIRS)
    assert batch.cu_seqlens.dtype == batch.live_cu_seqlens.dtype == torch.int32


def test_collate_of_nothing() -> None:
    batch = collate([])
    assert batch.input_ids.shape == batch.live.shape == batch.margin.shape == (0,)
    assert batch.bounds == (0,)
    assert batch.labels is None


def test_masked_tokens_are_read_but_not_scored() -> None:
    on, off = True, False
    samples = [
        Sample(0, (1, 2), ((3, 4, 5, 6), (7, 8)), masks=((off, on, off, on), (on, on))),
        Sample(1, (), ((3, 4, 5), (6,)), masks=((on, off, on), (on,))),  # the first token has nothing before it
        Sample(2, (9, 8), ((3,), (4, 5)), skip=(2, 1), masks=((on,), (off, off))),
        Sample(3, (1,), ((2, 3),)),
    ]
    batch = collate(samples)
    none = IGNORE_INDEX
    expected = [none, none, 4, none, 6, none, none, 7, 8, none, none, 5, none, none, none, none, none, none, 2, 3, none]
    assert batch.target.tolist() == expected
    assert [sample.scored for sample in samples] == [(2, 2), (1, 0), (0, 0), (2,)]
    assert [sample.num_targets for sample in samples] == [4, 1, 0, 2]
    assert batch.live_cu_seqlens.diff().tolist() == [n for sample in samples for n in sample.scored]
    assert torch.equal(batch.target[batch.live], batch.live_target)
    assert torch.equal((batch.target != none).nonzero()[:, 0], batch.live)


def test_labels_and_margins_follow_their_sequences() -> None:
    batch = collate([Sample(0, (1,), ((2,), (3,), (4,)), labels=(3.0, 1.5, -2.0)), Sample(1, (1,), ((5,),), labels=(1.0,), margin=0.25)])
    assert batch.labels is not None
    assert (batch.labels.tolist(), batch.labels.dtype) == ([3.0, 1.5, -2.0, 1.0], torch.float32)
    assert (batch.margin.tolist(), batch.margin.dtype) == ([0.0, 0.25], torch.float32)
    assert collate(PAIRS).labels is None
    with pytest.raises(AssertionError, match="in every sample, or none in any"):
        collate([PAIRS[0], Sample(1, (1,), ((2,),), labels=(0.0,))])
    with pytest.raises(AssertionError, match="one entry per completion token"):
        collate([Sample(1, (1,), ((2, 3),), masks=((True,),))])


@pytest.fixture
def share_from_3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "SHARE_FROM", 3)


SHARING = [
    Sample(4, (1, 2, 3), ((4, 5), (6,))),
    Sample(5, (1, 2), ((3,), (4,))),  # too short to be shared
    Sample(6, (1, 2, 3), ((), (7, 8, 9))),  # the prompt of the first; a completion without a token
    Sample(7, (5, 6, 7, 8), ((1,), (2,)), skip=(0, 1)),  # cut differently, so nothing is shared
]


@pytest.mark.usefixtures("share_from_3")
def test_shared_prompts_are_there_once_and_end_in_every_sequence() -> None:
    batch, apart = collate(SHARING, share=True), collate(SHARING)
    assert batch.input_ids.tolist()[:16] == [1, 2, 3, 4, 5, 3, 6, 1, 2, 3, 1, 2, 4, 3, 3, 7]
    assert batch.position_ids.tolist()[:16] == [0, 1, 2, 3, 4, 2, 3, 0, 1, 2, 0, 1, 2, 2, 2, 3]
    assert batch.bounds == (0, 2, 5, 7, 10, 13, 14, 18, 23, 27)
    shared = batch.shared
    assert shared is not None
    assert shared.prefix == (-1, 0, 0, -1, -1, 0, 0, -1, -1)
    assert shared.ends == (1, 2, 3, 4, 5, 6, 7, 8)
    for name in ("live_target", "live_cu_seqlens", "index", "completions"):
        assert torch.equal(torch.as_tensor(getattr(batch, name)), torch.as_tensor(getattr(apart, name)))
    for ours, theirs in zip(batch.sequences(), apart.sequences(), strict=True):
        assert torch.equal(batch.input_ids[ours], apart.input_ids[theirs])
        assert torch.equal(batch.position_ids[ours], apart.position_ids[theirs])
    assert torch.equal(batch.target[batch.live], batch.live_target)
    assert torch.equal((batch.target != IGNORE_INDEX).nonzero()[:, 0], batch.live)
    assert len(apart.input_ids) - len(batch.input_ids) == spared_tokens(SHARING) == 6


@pytest.mark.usefixtures("share_from_3")
def test_keys_of_a_piece_are_those_of_its_prefix_and_its_own() -> None:
    batch = collate(SHARING, share=True)
    shared = batch.shared
    assert shared is not None
    parts = shared.key_rows.split(shared.cu_seqlens_k.diff().tolist())
    pieces = [list(range(a, b)) for a, b in zip(batch.bounds, batch.bounds[1:])]
    assert [part.tolist() for part in parts] == [(pieces[p] if p >= 0 else []) + own for p, own in zip(shared.prefix, pieces)]
    assert shared.max_seqlen_k == max(map(len, parts)) == 6
    assert sorted(shared.key_order.tolist()) == list(range(len(shared.key_rows)))
    turns = [shared.key_rows[shared.key_order[a:b]].tolist() for a, b in zip(shared.key_turns, shared.key_turns[1:])]
    assert turns[0] == list(range(len(batch.input_ids)))
    assert turns[1:] == [[0, 1]] * 4


@pytest.mark.usefixtures("share_from_3")
def test_nothing_is_shared_where_nothing_repeats() -> None:
    assert collate([SHARING[1], SHARING[3]], share=True).shared is None
    assert collate([Sample(0, (1, 2, 3, 4), ((5,),)), Sample(1, (1, 2, 3, 5), ((5,),))], share=True).shared is None
    assert collate(SHARING).shared is None
    assert collate([], share=True).shared is None


@pytest.mark.usefixtures("share_from_3")
@pytest.mark.parametrize("seed", range(5))
def test_bins_hold_every_sample_once_within_the_budget_and_prompts_together(seed: int) -> None:
    rng = random.Random(seed)
    prompts = [tuple(rng.randrange(9) for _ in range(rng.randint(0, 20))) for _ in range(6)]
    samples = [Sample(i, rng.choice(prompts), tuple((i,) * rng.randint(1, 12) for _ in range(rng.randint(1, 3)))) for i in range(60)]
    for budget in (110, 200, 4000):
        found = list(batches(samples, budget, share=True))
        assert [members for members, _ in found] == pack_samples(samples, budget, share=True)
        assert sorted(i for members, _ in found for i in members) == list(range(60))
        assert max(len(batch.input_ids) for _, batch in found) <= budget
        assert all(members == sorted(members) for members, _ in found)
        assert len(found) < len(pack_samples(samples, budget)) or budget == 4000
    ((members, batch),) = batches(samples, 4000, share=True)
    assert len(members) == 60 and len(set(batch.shared.prefix)) <= 7


@pytest.mark.usefixtures("share_from_3")
def test_a_sample_that_only_fits_with_its_prompt_shared() -> None:
    long = Sample(0, tuple(range(30)), ((1, 2), (3,)))
    assert (packed_tokens(long, share=True), packed_tokens(long, share=False)) == (34, 63)
    assert pack_samples([long], 34, share=True) == [[0]]
    with pytest.raises(ConfigError, match="sample 1 has 34 tokens, more than max_tokens=33"):
        pack_samples([SHARING[1], long, long], 33, share=True)
    with pytest.raises(ConfigError, match="sample 0 has 63 tokens, more than max_tokens=40"):
        pack_samples([long], 40)


@pytest.mark.parametrize("count", [1, 3, 4])
def test_all_ranks_score_equally_often(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank with fewer batches would leave the others waiting for its layers."""
    samples = [Sample(i, (1,), ((2,) * 9,)) for i in range(count)]
    calls: dict[int, int] = {}
    for index in range(2):

        class Rank(Ranks):
            size = 2

            def spread(self, count: int, work: Any) -> list[Any]:
                own = work(range(self.index, count, 2))
                assert len(own) == len(range(self.index, count, 2))
                return [own[0] if own else torch.zeros(1)] * count

        rank = Rank()
        rank.index = index
        monkeypatch.setattr("fastalign.packing.current", lambda rank=rank: rank)

        def score(batch: Any, index: int = index) -> torch.Tensor:
            calls[index] = calls.get(index, 0) + 1
            return torch.zeros(1)

        per_sample(samples, 10, score, rows=[1] * count)
    assert calls[0] == calls[1] == -(-count // 2)


def test_a_batch_goes_to_a_device_from_pinned_memory(monkeypatch):
    """From other memory the host would wait for the device at every micro-batch."""
    batch = collate([Sample(0, (1,) * 64, ((2, 3), (4,)))], share=True)
    pinned: list[torch.Tensor] = []
    moved: list[torch.Tensor] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor.clone())
        return pinned[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device, non_blocking: moved.append(tensor) or tensor)
    batch.to("cuda")
    assert batch.shared is not None
    assert len(pinned) == len(moved) == sum(isinstance(x, torch.Tensor) for x in [*vars(batch).values(), *vars(batch.shared).values()])
    assert all(a is b for a, b in zip(pinned, moved))
    batch.to("cpu")
    assert len(pinned) == len(moved) / 2
