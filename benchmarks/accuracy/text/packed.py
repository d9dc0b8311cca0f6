"""Texts of unequal length in rows of one length: no text sees another, and little of a row is empty."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..table import Table

__all__ = ["PackedTable", "placed"]


@dataclass(frozen=True)
class PackedTable(Table):
    """Examples that share rows where there is room; a model is told whose each place of a row is."""

    def rows(self, index: Tensor) -> tuple[Tensor, ...]:
        """Some examples: sequences [..., rows, length, ...], whose each place is [..., rows, length], then the rest.

        Args:
            index: of examples [..., examples], on the CPU. An example's number is its place in the last dimension.

        >>> table = PackedTable((torch.tensor([[1, 0, 0], [2, 3, 0], [4, 5, 6]]),), (), torch.tensor([1, 2, 3]))
        >>> table.rows(torch.tensor([0, 2, 1]))
        (tensor([[4, 5, 6],
                [2, 3, 1]]), tensor([[1, 1, 1],
                [2, 2, 0]]))
        """
        lanes = index.reshape(-1, index.shape[-1])
        owner, place = placed(self.lengths[lanes])
        example = lanes.gather(1, owner.clamp(min=0).flatten(1)).view_as(owner)
        shape = (*index.shape[:-1], *owner.shape[1:])
        device = self.sequences[0].device
        owner, place, example = (one.view(shape).to(device) for one in (owner, place, example))
        there = index.to(device)
        return (*(one[example, place] for one in self.sequences), owner, *(one[there] for one in self.whole))


def placed(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Whose each place of a row is, -1 where it is empty, and which of its owner's: each [lanes, rows, length].

    The longest text first, each into the first row with room for it; rows are as long as the longest text.

    Args:
        lengths: of texts [lanes, texts], at least 1.

    >>> owner, place = placed(torch.tensor([[1, 3, 1], [2, 2, 2]]))
    >>> owner
    tensor([[[ 1,  1,  1],
             [ 0,  2, -1],
             [-1, -1, -1]],
    <BLANKLINE>
            [[ 0,  0, -1],
             [ 1,  1, -1],
             [ 2,  2, -1]]])
    >>> place[0]
    tensor([[0, 1, 2],
            [0, 0, 0],
            [0, 0, 0]])
    """
    length = int(lengths.max())
    lanes = [_fitted(own, length) for own in lengths.tolist()]
    rows = max(map(len, lanes))
    whole = [[row + [_EMPTY] * (length - len(row)) for row in [*lane, *[[]] * (rows - len(lane))]] for lane in lanes]
    owner, place = torch.tensor(whole).unbind(-1)
    return owner, place


Filled = list[tuple[int, int]]
"""A row's places from its beginning: whose each is, and which of its owner's."""

_EMPTY = (-1, 0)


def _fitted(lengths: list[int], length: int) -> list[Filled]:
    rows: list[Filled] = []
    for text in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        row = next((row for row in rows if len(row) + lengths[text] <= length), None)
        if row is None:
            rows.append(row := [])
        row += ((text, place) for place in range(lengths[text]))
    return rows
