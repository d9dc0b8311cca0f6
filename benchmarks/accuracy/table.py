"""Examples as tensors, an example a row, from which batches are taken by index."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Table"]


@dataclass(frozen=True)
class Table:
    """Examples of one task and split.

    Attributes:
        sequences: each [examples, length, ...], padded at the end to the longest example.
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
        sequences, whole = (
            tuple(tensor.to(device) for tensor in tensors) for tensors in (self.sequences, self.whole)
        )
        return Table(sequences, whole, self.lengths)

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
        where = index.to(self.lengths.device if not self.sequences else self.sequences[0].device)
        return (*(tensor[:, :longest][where] for tensor in self.sequences), *(tensor[where] for tensor in self.whole))
