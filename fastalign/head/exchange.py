"""What processes with parts of one head send each other: rows of hidden states, sums of their gradients, and words about them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Exchange:
    """A group of processes, each of which has some rows of the head's weight and some rows of the hidden states."""

    def __init__(self, group: Any, sizes: Sequence[int]) -> None:
        self.group, self.sizes = group, list(sizes)
        self.size, self.index = dist.get_world_size(group), dist.get_rank(group)
        self.first, self.vocabulary = sum(self.sizes[: self.index]), sum(self.sizes)

    @property
    def own(self) -> slice:
        """The rows of the weight that are here."""
        return slice(self.first, self.first + self.sizes[self.index])

    def words(self, value: Any) -> list[Any]:
        """The `value` of every process, in their order."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return found

    def gather(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """(sum of counts, ...): the rows of all processes in their order, `counts[i]` of process i."""
        longest = max(counts)
        sent = rows if len(rows) == longest else torch.cat([rows, rows.new_zeros(longest - len(rows), *rows.shape[1:])])
        received = rows.new_empty(self.size, longest, *rows.shape[1:])
        dist.all_gather_into_tensor(received.view(-1), sent.contiguous().view(-1), group=self.group)
        return torch.cat([part[:count] for part, count in zip(received, counts)])

    def sums(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """(own count, ...): of `rows` (sum of counts, ...), the sums over all processes of those that are of this one."""
        longest = max(counts)
        sent = rows.new_zeros(self.size, longest, *rows.shape[1:])
        for place, part in zip(sent, rows.split(list(counts))):
            place[: len(part)] = part
        received = rows.new_empty(longest, *rows.shape[1:])
        dist.reduce_scatter_tensor(received.view(-1), sent.view(-1), group=self.group)
        return received[: counts[self.index]]

    def turned(self, columns: Tensor, counts: Sequence[int]) -> Tensor:
        """(own count, V): from the own `columns` (sum of counts, v) of all rows, all columns of the own rows."""
        mine = counts[self.index]
        received = columns.new_empty(mine * self.vocabulary)
        sizes = [mine * width for width in self.sizes]
        dist.all_to_all_single(
            received, columns.contiguous().view(-1), sizes, [count * columns.shape[1] for count in counts], group=self.group
        )
        return torch.cat([part.view(mine, width) for part, width in zip(received.split(sizes), self.sizes)], dim=1)
