"""The records that pass between the levels. No behaviour beyond shape bookkeeping, and no import but torch."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

IGNORE_INDEX = -100


class HeadOutput(NamedTuple):
    """Per-token statistics of softmax(logits), each of the shape of `target`; a field that was not asked for is None.

    Ignored rows are 0 (False) and have zero gradient. All float32 (float64 for float64 inputs), in nats.
    """

    logps: Tensor  # log p(target), differentiable
    entropy: Tensor | None = None  # -sum_v p_v log p_v, differentiable
    lse: Tensor | None = None  # log sum_v exp(logit_v), differentiable
    log_sum_sq_probs: Tensor | None = None  # log sum_v p_v^2, no gradient
    mean_logits: Tensor | None = None  # mean_v logit_v, differentiable
    is_top1: Tensor | None = None  # bool: no token is more probable than the target


class PreferenceLoss(NamedTuple):
    """Unreduced result of a preference loss, each (P,)."""

    loss: Tensor
    chosen_rewards: Tensor  # detached, beta * (log pi - log pi_ref) or the loss's own reward
    rejected_rewards: Tensor


class UnpairedLoss(NamedTuple):
    """Unreduced result of a loss on single completions, each (S,)."""

    loss: Tensor
    rewards: Tensor  # detached, beta * (log pi - log pi_ref)


@dataclass(frozen=True)
class Sample:
    """One tokenized training sample: a prompt and the completions that are scored after it.

    A preference pair has completions `(chosen, rejected)`. Sequences are `prompt + completion`; a completion ends with
    EOS unless it was truncated. `index` is the row of the data set, stable over shuffles and resumes.

    `skip` says how many of the prompt's first tokens each sequence leaves out; () is none. It differs between the
    sequences of a pair when each is cut from its start to the same length.

    `labels` holds one number per completion: 1 for a desirable and 0 for an undesirable one, or the scores of a ranking
    (higher is better); () is none. `margin` is by how much the first completion should win. `masks` says of every
    completion token whether it is scored (True); () is all of them.
    """

    index: int
    prompt: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]
    weight: float = 1.0
    skip: tuple[int, ...] = ()
    labels: tuple[float, ...] = ()
    margin: float = 0.0
    masks: tuple[tuple[bool, ...], ...] = ()

    @property
    def contexts(self) -> tuple[tuple[int, ...], ...]:
        """The part of the prompt before each completion."""
        if not self.skip:
            return (self.prompt,) * len(self.completions)
        return tuple(self.prompt[start:] for start in self.skip)

    @property
    def num_tokens(self) -> int:
        """Tokens that the sample occupies in a packed batch."""
        return len(self.prompt) * len(self.completions) - sum(self.skip) + sum(map(len, self.completions))

    @property
    def shared_context(self) -> tuple[int, ...] | None:
        """The prompt, when every completion continues the whole of it; None when they are cut differently."""
        return self.prompt if self.completions and not self.skip else None

    @property
    def scored(self) -> tuple[int, ...]:
        """Scored tokens of each sequence: those of its completion that `masks` keeps, without a first token that nothing precedes."""
        firsts = [int(not context) for context in self.contexts]
        if self.masks:
            return tuple(sum(mask[first:]) for mask, first in zip(self.masks, firsts))
        return tuple(max(0, len(c) - first) for c, first in zip(self.completions, firsts))

    @property
    def num_targets(self) -> int:
        """Tokens that are scored, over all sequences."""
        return sum(self.scored)


@dataclass(frozen=True)
class SharedPrompts:
    """Which pieces of a packed batch continue which: a sequence with a shared prompt is two pieces, the prompt's and its own.

    Queries of a piece see the keys of its prefix and its own. `key_rows` lays these keys end to end, piece by piece.
    """

    prefix: tuple[int, ...]  # (pieces,) the piece that each continues, an earlier one; -1: none
    ends: tuple[int, ...]  # (S,) the piece that ends each sequence
    cu_seqlens_k: Tensor  # (pieces+1,) int32
    max_seqlen_k: int
    key_rows: Tensor  # (K,) int64, rows of the batch
    key_order: Tensor  # (K,) int64, places in key_rows in turns that hold no row twice, the first one every row in order
    key_turns: tuple[int, ...]  # bounds of the turns in key_order

    def to(self, device: torch.device | str) -> SharedPrompts:
        """The same with every tensor on `device`."""
        return _moved(self, device)


@dataclass(frozen=True)
class PackedBatch:
    """Sequences laid end to end, without padding.

    Row i of the trunk's output predicts `target[i]`; `target` is IGNORE_INDEX before what is not scored (prompts, masked
    tokens) and on every last token. The `live` rows are those with a target, in order; only they need to reach the head.

    The rows come in pieces: sequences, or, where `shared` says so, prompts that several sequences begin with and what each
    of these goes on with.
    """

    input_ids: Tensor  # (N,) int64
    position_ids: Tensor  # (N,) int64, place in the sequence
    cu_seqlens: Tensor  # (pieces+1,) int32
    max_seqlen: int
    target: Tensor  # (N,) int64
    live: Tensor  # (L,) int64, rows with a target
    live_target: Tensor  # (L,) int64, target[live]
    live_cu_seqlens: Tensor  # (S+1,) int32, boundaries of the sequences in the live rows
    live_bounds: tuple[int, ...]  # live_cu_seqlens as integers on the host
    bounds: tuple[int, ...]  # cu_seqlens as integers on the host, the pieces' bounds
    index: tuple[int, ...]  # (B,) data-set row of each sample
    completions: tuple[int, ...]  # (B,) sequences of each sample, in order
    weight: Tensor  # (B,) float32
    margin: Tensor  # (B,) float32
    labels: Tensor | None = None  # (S,) float32, one number per sequence; None when the samples have no labels
    shared: SharedPrompts | None = None  # None: every piece is a sequence

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch with every tensor on `device`."""
        return _moved(self, device)

    def sequences(self) -> list[list[int]]:
        """The rows of each of the S sequences, in order, those of a shared prompt first."""
        pieces = [list(range(start, stop)) for start, stop in pairwise(self.bounds)]
        if self.shared is None:
            return pieces
        prefix = self.shared.prefix
        return [pieces[prefix[end]] + pieces[end] if prefix[end] >= 0 else pieces[end] for end in self.shared.ends]


def on_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """`tensor` on `device`. The host's goes to CUDA from pinned memory, or it would wait for what the device has still to do."""
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()  # kept by its allocator until the copy has ended
    return tensor.to(device, non_blocking=True)


Record = TypeVar("Record", PackedBatch, SharedPrompts)


def _moved(record: Record, device: torch.device | str) -> Record:
    moved: dict[str, Any] = {}
    for f in fields(record):
        value = getattr(record, f.name)
        if isinstance(value, Tensor):
            moved[f.name] = on_device(value, device)
        elif isinstance(value, SharedPrompts):
            moved[f.name] = value.to(device)
    return replace(record, **moved)
