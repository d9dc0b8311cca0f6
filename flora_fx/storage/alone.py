"""What is written or copied of a parameter that lies in a pack: the parameter alone.

    torch.save(A), pickle.dumps(A), deepcopy(A.detach())      A is a view of the pack [W; A]
    before   the storage of the pack: W is in the file, too
    after    the piece of it that is A's

A view keeps its storage, and torch writes and copies whole storages. So from the first pack on, pickling and copying of
`torch.Tensor` (which is what parameters and state dictionaries hand over to pickle) go through here, and what does not
lie in a pack goes on as it came. Nothing is stored twice: a piece of contiguous memory is handed over as a storage over
the same memory.
"""

from __future__ import annotations

import copy
import copyreg
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, UntypedStorage

from flora_fx.ir import Pack, Role

__all__ = ["write_alone"]

_MARK = "_flora_cells"
"""The attribute of a pack's storage that says whose its parts are; it lives as long as the memory."""


@dataclass(frozen=True)
class _Cell:
    """The place of one member: rows and columns of its pack."""

    rows: tuple[int, int]
    columns: tuple[int, int]
    base: bool

    def holds(self, tensor: Tensor, width: int) -> bool:
        """Whether a tensor that lies in the pack lies here."""
        row, column = divmod(int(tensor.storage_offset()), width)
        last_row, last_column = row, column
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            rows, columns = divmod((size - 1) * stride, width) if stride >= width else (0, (size - 1) * stride)
            last_row, last_column = last_row + rows, last_column + columns
        whole = self.columns == (0, width)  # then a row may go on in the next
        last_row, last_column = last_row + last_column // width * whole, 0 if whole else last_column
        rows_fit = self.rows[0] <= row and last_row < self.rows[1]
        return rows_fit and self.columns[0] <= column and last_column < self.columns[1]


@dataclass(frozen=True)
class _Cells:
    """Whose the parts of a pack are.

    Attributes:
        width: of the pack.
        itemsize: of its elements.
        cells: the places of its members.
        pieces: storages over parts of it that are in use; views of one part share one, also in a file.
    """

    width: int
    itemsize: int
    cells: tuple[_Cell, ...]
    pieces: WeakValueDictionary[tuple[int, int], UntypedStorage] = field(default_factory=WeakValueDictionary)


def write_alone(packed: Tensor, pack: Pack) -> None:
    """Let the members of a pack be written and copied without the rest of it.

    Args:
        packed: the packed weight.
        pack: what stands in it.
    """
    width = 1 if packed.dim() == 1 else packed.shape[1]
    cells = [_Cell(piece.rows, piece.columns or (0, width), piece.role is Role.BASE) for piece in pack.slices]
    setattr(packed.untyped_storage(), _MARK, _Cells(width, packed.itemsize, tuple(cells)))
    _watch()


@cache
def _watch() -> None:
    """Look at each tensor that this process pickles or copies from now on."""
    before: Callable[[Tensor], Any] = copyreg.dispatch_table.get(Tensor, _reduce)
    copyreg.pickle(Tensor, lambda tensor: before(_alone(tensor)))
    copy._deepcopy_dispatch[Tensor] = _deepcopy  # type: ignore[attr-defined]
    shallow = getattr(copy, "_copy_dispatch", {})
    shallow.setdefault(Tensor, _copy)


def _reduce(tensor: Tensor) -> Any:
    return tensor.__reduce_ex__(2)


def _deepcopy(tensor: Tensor, memo: dict[int, Any]) -> Any:
    alone = _alone(tensor) if tensor.is_leaf else tensor
    memo.setdefault(id(memo), []).append(alone)  # the memo knows it by its id, which must stay its own
    return alone.__deepcopy__(memo)


def _copy(tensor: Tensor) -> Any:
    """As `copy.copy` without any of this: it asks for what pickle is given, but a shallow copy stays a view."""
    function, arguments = tensor.__reduce_ex__(4)
    return function(*arguments)


@torch.no_grad()
def _alone(tensor: Tensor) -> Tensor:
    """The same values with a storage of their own, where a tensor is a view of a pack's member; else the tensor."""
    try:
        storage = tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return tensor  # sparse, say
    cells: _Cells | None = getattr(storage, _MARK, None)
    if cells is None or tensor.device.type == "meta" or tensor.itemsize != cells.itemsize or not tensor.numel():
        return tensor
    cell = next((cell for cell in cells.cells if cell.holds(tensor, cells.width)), None)
    if cell is None:
        return tensor
    if cell.columns == (0, cells.width) or cell.base:
        result = _over_its_memory(tensor, storage, cells, cell)
    else:
        result = tensor.detach().clone()  # columns between those of others: there is no such piece of memory
    if type(result) is not Tensor:
        return tensor  # under a mode that makes other tensors
    result.requires_grad_(tensor.requires_grad)
    result.grad = tensor.grad if tensor.is_leaf else None
    result.__dict__.update(tensor.__dict__)
    return result


def _over_its_memory(tensor: Tensor, storage: UntypedStorage, cells: _Cells, cell: _Cell) -> Tensor:
    first = cell.rows[0] * cells.width + cell.columns[0]
    last = (cell.rows[1] - 1) * cells.width + cell.columns[1]
    piece = cells.pieces.get((first, last))
    if piece is None:
        piece = storage[first * cells.itemsize : last * cells.itemsize]
        cells.pieces[first, last] = piece
    result = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return result.set_(piece, tensor.storage_offset() - first, tensor.shape, tensor.stride())
