"""Let a rotary embedding read nothing shifted: a compiler joins what reads a value where it is written, and only that.

before                              after
q = y + s·B z                       q = y + s·B z
r = cat(-q[h:], q[:h])              r = sign · (ỹ + s·B̃ z)
q' = q·cos + r·sin                  q' = q·cos + r·sin

ỹ and B̃ have the halves of each head swapped: shifted reads of what is in memory anyway. Bitwise the same: a swap and a
sign commute with the rounding of a sum.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from flora_fx.program import Program

from .mutation import Effects
from .values import RESHAPES, Values, operation

__all__ = ["Rotation", "Unrolled", "find_rotations", "write_rotations"]

aten = torch.ops.aten

CATS = {torch.cat, torch.concat, aten.cat.default}
NEGATIONS = {operator.neg, torch.neg, aten.neg.default, "neg"}
SPLITS = {
    torch.chunk,
    torch.split,
    torch.functional.split,
    aten.chunk.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    "chunk",
    "split",
}
MOVES = {torch.transpose, torch.permute, aten.transpose.int, aten.permute.default, "transpose", "permute"}


@dataclass(frozen=True)
class Unrolled:
    """``node = y + scale · z @ upᵀ``, written as a product and a sum."""

    node: Node
    y: Node
    z: Node
    up: Node
    scale: float


@dataclass(frozen=True)
class Rotation:
    """Halves of each head that a node swaps, with a sign each.

    Attributes:
        node: the ``cat``.
        sum: what it reads, through views alone.
        heads: the reshape whose value is [..., heads, head_dim].
        moves: the transpositions between that and the ``cat``, in order; the last dimension stays.
        start, half: features ``start .. start + 2·half`` of each head take part.
        signs: of the first and of the second half of the result.
    """

    node: Node
    sum: Unrolled
    heads: Node
    moves: tuple[Node, ...]
    start: int
    half: int
    signs: tuple[int, int]


def find_rotations(program: Program, values: Values, effects: Effects, sums: Sequence[Unrolled]) -> Iterator[Rotation]:
    """The rotations of what was written as a product and a sum."""
    known = {unrolled.node: unrolled for unrolled in sums}
    for node in program.graph.nodes:
        if operation(node) in CATS and not effects.touched & {node}:
            found = _rotation(node, program, values, effects, known)
            if found is not None:
                yield found


def _rotation(
    node: Node, program: Program, values: Values, effects: Effects, known: dict[Node, Unrolled]
) -> Rotation | None:
    pieces, dim = node.args[0], node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    rank = _rank(program, node)
    if not isinstance(pieces, tuple | list) or len(pieces) != 2 or rank is None or dim not in (-1, rank - 1):
        return None
    signs, spans = [], []
    for piece in pieces:
        negative = operation(piece) in NEGATIONS
        span = _span(program, piece.all_input_nodes[0] if negative else piece)
        if span is None:
            return None
        signs.append(-1 if negative else 1)
        spans.append(span)
    (whole, middle, end), (same, start, middle_too) = spans
    if whole is not same or middle != middle_too or end - middle != middle - start:
        return None
    moves: list[Node] = []
    value = whole
    offset = 0
    while value not in known and operation(value) not in RESHAPES:
        if value in effects.touched:
            return None
        if (inner := values.no_op(value)) is not None:
            value = inner
        elif operation(value) in MOVES and _keeps_last(program, value):
            moves.append(value)
            value = value.all_input_nodes[0]
        elif (cut := _span(program, value)) is not None:
            value, first, _ = cut
            offset += first
        else:
            return None
    heads = value
    while value not in known:
        if value in effects.touched:
            return None
        inner = values.no_op(value) or (value.all_input_nodes[0] if operation(value) in RESHAPES else None)
        if inner is None:
            return None
        value = inner
    size, features = program.value(heads).shape, program.value(value).shape[-1]
    if len(size) < 3 or not _all_int(size[-2:], features) or size[-2] * size[-1] != features:
        return None
    return Rotation(
        node, known[value], heads, tuple(reversed(moves)), offset + start, middle - start, (signs[0], signs[1])
    )


def write_rotations(program: Program, rotations: Sequence[Rotation]) -> list[Node]:
    """Write them; the nodes that nothing should read any more."""
    for rotation in rotations:
        program.origin = rotation.node
        with program.graph.inserting_before(rotation.node):
            rotation.node.replace_all_uses_with(_written(program, rotation))
    return [rotation.node for rotation in rotations]


def _written(program: Program, rotation: Rotation) -> Node:
    unrolled, half = rotation.sum, rotation.half
    *leading, heads, width = program.sizes(rotation.heads)
    rank = program.value(unrolled.z).shape[-1]

    def swapped(value: Node, sizes: list[int | Node], dim: int) -> Node:
        """A value in these sizes, with the halves of one dimension swapped."""
        value = program.call(program.ops.reshape, value, sizes)
        if 2 * half != width:
            value = program.call(aten.slice.Tensor, value, dim, rotation.start, rotation.start + 2 * half)
        before, after = sizes[:dim], sizes[dim + 1 :]
        value = program.call(program.ops.reshape, value, [*before, 2, half, *after])
        value = program.call(aten.flip.default, value, [dim])
        return program.call(program.ops.reshape, value, [*before, 2 * half, *after])

    y = swapped(unrolled.y, [*leading, heads, width], len(leading) + 1)
    up = swapped(unrolled.up, [heads, width, rank], 1)
    z = program.call(program.ops.reshape, unrolled.z, [*leading, 1, 1, rank])
    value = program.product_and_sum(y, z, up, unrolled.scale)
    value = _signed(program, value, rotation)
    for move in rotation.moves:
        operand = move.all_input_nodes[0]
        value = program.graph.node_copy(move, lambda n, a=operand, b=value: b if n is a else n)  # type: ignore[misc]
        program.annotate(value)
    return value


def _signed(program: Program, value: Node, rotation: Rotation) -> Node:
    first, second = rotation.signs
    negative = program.call(aten.neg.default, value)
    if first == second:
        return value if first > 0 else negative
    device = program.value(value).device
    place = program.call(aten.arange.default, 2 * rotation.half, device=device)
    in_first = program.call(aten.lt.Scalar, place, rotation.half)
    return program.call(aten.where.self, in_first, *((value, negative) if first > 0 else (negative, value)))


def _rank(program: Program, node: Node) -> int | None:
    value = program.value(node)
    return value.dim() if isinstance(value, Tensor) else None


def _all_int(sizes: Sequence[Any], *more: Any) -> bool:
    return all(isinstance(size, int) for size in (*sizes, *more))


def _span(program: Program, node: Node) -> tuple[Node, int, int] | None:
    """(x, start, stop) of a slice ``x[..., start:stop]`` or of a part of a split of the last dimension."""
    if not node.all_input_nodes or (rank := _rank(program, node)) is None:
        return None
    kind, operand = operation(node), node.all_input_nodes[0]
    if kind is operator.getitem and operation(operand) in SPLITS:
        return _part(program, operand, node.args[1])
    whole = program.value(operand)
    if not isinstance(whole, Tensor) or whole.dim() != rank or not isinstance(whole.shape[-1], int):
        return None
    if kind is aten.slice.Tensor:
        _, dim, *edges = (*node.args, *(None, None, None))[:4] if len(node.args) < 4 else node.args[:4]
        step = node.args[4] if len(node.args) > 4 else 1
        if dim not in (-1, rank - 1) or node.kwargs:
            return None
        taken = slice(*edges, step)
    elif kind is operator.getitem and isinstance(node.args[1], tuple) and len(node.args[1]) > 1:
        *others, taken = node.args[1]
        if not (others == [Ellipsis] or (len(others) == rank - 1 and all(one == slice(None) for one in others))):
            return None
    else:
        return None
    if not isinstance(taken, slice) or not all(
        edge is None or isinstance(edge, int) for edge in (taken.start, taken.stop, taken.step)
    ):
        return None
    start, stop, step = taken.indices(whole.shape[-1])
    return (operand, start, stop) if step == 1 and stop > start else None


def _part(program: Program, split: Node, index: Any) -> tuple[Node, int, int] | None:
    operand, parts = split.all_input_nodes[0], program.value(split)
    whole = program.value(operand)
    if not isinstance(index, int) or not isinstance(parts, tuple | list) or not isinstance(whole, Tensor):
        return None
    sizes = [part.shape[-1] for part in parts]
    if not _all_int(sizes, whole.shape[-1]) or sum(sizes) != whole.shape[-1]:
        return None  # of another dimension
    start = sum(sizes[: index % len(sizes)])
    return operand, start, start + sizes[index]


def _keeps_last(program: Program, move: Node) -> bool:
    """Whether a transposition leaves the last dimension where it is."""
    rank = _rank(program, move)
    assert rank is not None
    dims = move.args[1] if len(move.args) == 2 and isinstance(move.args[1], tuple | list) else move.args[1:]
    if move.kwargs or not all(isinstance(dim, int) for dim in dims):
        return False
    places = [dim % rank for dim in dims]  # type: ignore[operator]
    return places[-1] == rank - 1 if len(places) == rank > 2 else rank - 1 not in places
