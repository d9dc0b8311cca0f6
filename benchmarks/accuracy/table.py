"""Examples as tensors, an example a row, from which batches are taken by index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Table", "joined"]


@dataclass(frozen=True)
class Table:
    """Examples.

    Attributes:
        sequences: each [examples, length, ...], padded with zeros at the end to the longest example.
        whole: each [examples, ...], without a length.
        lengths: [examples], on the CPU.
    """

    sequences: tuple[Tensor, ...]
    whole: tuple[Tensor, ...]
    lengths: Tensor

    def __len__(self) -> int:
        return len(self.lengths)

    def to(self, device: str) -> Table:
        """The same on a device."""
        sequences, whole = (tuple(one.to(device) for one in many) for many in (self.sequences, self.whole))
        return replace(self, sequences=sequences, whole=whole)

    def rows(self, index: Tensor) -> tuple[Tensor, ...]:
        """Some examples, no longer than the longest of them: sequences [..., length, ...], then what has no length.

        Args:
            index: of examples, of any shape, on the CPU.

        >>> table = Table((torch.tensor([[1, 0, 0], [2, 3, 0], [4, 5, 6]]),), (), torch.tensor([1, 2, 3]))
        >>> table.rows(torch.tensor([1, 0]))
        (tensor([[2, 3],
                [1, 0]]),)
        """
        longest = int(self.lengths[index].max())
        there = index.to(self.sequences[0].device)
        return (*(one[:, :longest][there] for one in self.sequences), *(one[there] for one in self.whole))


def joined(tables: Sequence[Table]) -> Table:
    """The examples of several tables of one kind, one table after the other.

    >>> one, two = (Table((torch.ones(1, length),), (), torch.tensor([length])) for length in (1, 2))
    >>> joined([one, two]).sequences
    (tensor([[1., 0.],
            [1., 1.]]),)
    """
    longest = max(int(table.lengths.max()) for table in tables)
    sequences = zip(*(table.sequences for table in tables), strict=True)
    whole = zip(*(table.whole for table in tables), strict=True)
    return replace(
        tables[0],
        sequences=tuple(torch.cat([_padded(one, longest) for one in same]) for same in sequences),
        whole=tuple(torch.cat(same) for same in whole),
        lengths=torch.cat([table.lengths for table in tables]),
    )


def _padded(sequences: Tensor, length: int) -> Tensor:
    return F.pad(sequences, (0, 0) * (sequences.dim() - 2) + (0, length - sequences.shape[1]))
