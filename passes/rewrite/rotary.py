"""Write rotary embeddings without shifted reads: a compiler joins a sum only with what reads it element by element.

before                                          after
q = y + s·B z                                   q = y + s·B z
r = cat(-q[h:], q[:h])                          r = sign · (ỹ + s·B̃ z)
    or stack(-q[1::2], q[::2]).flatten()
q' = q·cos + r·sin                              q' = q·cos + r·sin

ỹ and B̃ have the halves of each head, or the neighbours in it, swapped: shifted reads of what is in memory anyway.
Nothing is rounded otherwise: a swap and a sign commute with each product and with the rounding of the sum.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from flora_fx.graph.examples import same_sizes
from flora_fx.graph.program import Program
from flora_fx.passes.analysis.mutation import Effects
from flora_fx.passes.analysis.operations import CASTS, RESHAPES, operation
from flora_fx.passes.analysis.values import Values
from flora_fx.passes.context import Context
from flora_fx.passes.plan.forms import Forms

from .written import Unrolled, Written

__all__ = ["Rotation", "Rotations", "find_rotations", "rewrite_rotations"]

aten = torch.ops.aten

CATS = {torch.cat, torch.concat, aten.cat.default}
STACKS = {torch.stack, aten.stack.default}
FLATTENS = {torch.flatten, aten.flatten.using_ints, "flatten"}
NEGATIONS = {operator.neg, torch.neg, aten.neg.default, "neg"}
SPLITS = {
    torch.chunk,
    torch.split,
    torch.functional.split,
    torch.split_with_sizes,
    aten.chunk.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    "chunk",
    "split",
}
MOVES = {torch.transpose, torch.permute, aten.transpose.int, aten.permute.default, "transpose", "permute"}


@dataclass(frozen=True)
class Rotation:
    """A swap of halves of each head, or of neighbours in it, with a sign each.

    Attributes:
        node: the ``cat``, or what flattens the ``stack``.
        sum: what it reads, through views alone.
        features: those of the sum that are read, from the first to before the last.
        heads: the reshape of these whose value is [..., heads, head_dim].
        moves: the transpositions and casts between that and the node, in order; the last dimension stays.
        start, half: features ``start .. start + 2·half`` of each head take part.
        signs: of the first and of the second half, or neighbour, of the result.
        neighbours: whether neighbours are swapped.
    """

    node: Node
    sum: Unrolled
    features: tuple[int, int]
    heads: Node
    moves: tuple[Node, ...]
    start: int
    half: int
    signs: tuple[int, int]
    neighbours: bool


class Rotations(tuple[Rotation, ...]):
    """The rotations that were written."""


def rewrite_rotations(context: Context) -> Rotations:
    """Write the rotations of what was written as a product and a sum; not where that trains."""
    if context[Forms].trains:
        return Rotations()
    program, unrolled = context.program, context[Written].unrolled
    rotations = Rotations(find_rotations(program, context[Values], context[Effects], unrolled))
    for rotation in rotations:
        program.build.origin = rotation.node
        with program.graph.inserting_before(rotation.node):
            rotation.node.replace_all_uses_with(_write(program, rotation))
    return rotations


def find_rotations(program: Program, values: Values, effects: Effects, sums: Sequence[Unrolled]) -> Iterator[Rotation]:
    """The rotations of what was written as a product and a sum."""
    known = {unrolled.node: unrolled for unrolled in sums}
    for node in program.graph.nodes:
        swap = _swap(node, program)
        if swap is not None and effects.touched.isdisjoint(swap.nodes):
            found = _rotation(node, swap, program, values, effects, known)
            if found is not None:
                yield found


@dataclass(frozen=True)
class _Swap:
    """What is swapped, by which nodes: see `Rotation`."""

    nodes: tuple[Node, ...]
    value: Node
    start: int
    half: int
    signs: tuple[int, int]
    neighbours: bool


def _swap(node: Node, program: Program) -> _Swap | None:
    """The swap that a node ends, of whatever value."""
    joined, neighbours = node, False
    if (operation(node) in FLATTENS or operation(node) in RESHAPES) and node.all_input_nodes:
        joined, neighbours = node.all_input_nodes[0], True
        before, after = program.value(joined), program.value(node)
        if not isinstance(before, Tensor) or not isinstance(after, Tensor):
            return None
        if before.dim() != after.dim() + 1 or not same_sizes(before.shape[:-2], after.shape[:-1]):
            return None
    if operation(joined) not in (STACKS if neighbours else CATS):
        return None
    pieces, dim = joined.args[0], joined.kwargs.get("dim", joined.args[1] if len(joined.args) > 1 else 0)
    rank = _rank(program, joined)
    if not isinstance(pieces, tuple | list) or rank is None or dim not in (-1, rank - 1):
        return None
    joins = [piece for piece in pieces if isinstance(piece, Node)]
    negative = [operation(piece) in NEGATIONS for piece in joins]
    parts = [piece.all_input_nodes[0] if minus else piece for piece, minus in zip(joins, negative, strict=True)]
    cuts = [cut for part in parts if (cut := _cut(program, part)) is not None]
    if len(pieces) != 2 or len(cuts) != 2:
        return None
    (value, taken), (same, others) = cuts
    start, end = min(taken[0], others[0]), max(taken[-1], others[-1]) + 1
    half = (end - start) // 2
    first = range(start, end, 2) if neighbours else range(start, start + half)
    second = range(start + 1, end, 2) if neighbours else range(start + half, end)
    if value is not same or (taken, others) != (second, first) or len(first) != len(second):
        return None
    if neighbours and program.value(node).shape[-1] != end - start:
        return None
    signs = (-1 if negative[0] else 1, -1 if negative[1] else 1)
    return _Swap((node, joined, *joins, *parts), value, start, half, signs, neighbours)


def _rotation(
    node: Node, swap: _Swap, program: Program, values: Values, effects: Effects, known: dict[Node, Unrolled]
) -> Rotation | None:
    """The rotation by a swap, if what it swaps is one of the sums, seen through views alone."""
    moves: list[Node] = []
    value = swap.value
    offset = 0
    while value not in known and operation(value) not in RESHAPES:
        if value in effects.touched:
            return None
        if (inner := values.no_op(value)) is not None:
            value = inner
        elif _is_cast(value) or (operation(value) in MOVES and _keeps_last(program, value)):
            moves.append(value)
            value = value.all_input_nodes[0]
        elif (cut := _span(program, value)) is not None:
            value, first, _ = cut
            offset += first
        else:
            return None
    heads = value
    features: tuple[int, int] | None = None
    while value not in known:
        if value in effects.touched:
            return None
        if (inner := values.no_op(value)) is not None:
            value = inner
        elif operation(value) in RESHAPES and (value is heads or values.inner(value) is not None):
            value = value.all_input_nodes[0]
        elif features is None and (cut := _span(program, value)) is not None:
            value, features = cut[0], cut[1:]
        else:
            return None
    shape, whole = program.shape(heads), program.shape(value)
    if shape is None or whole is None or len(shape) < 3:
        return None
    first, last = features or (0, whole[-1])
    if not _all_int(shape[-2:], last) or shape[-2] * shape[-1] != last - first:
        return None
    picks, tokens = program.shape(known[value].up), program.shape(known[value].y)
    if picks is None or tokens is None or (len(picks) > 2 and not same_sizes(shape[:-2], tokens[:-1])):
        return None  # a matrix for each token, and tokens in other groups
    place = (offset + swap.start, swap.half, swap.signs, swap.neighbours)
    return Rotation(node, known[value], (first, last), heads, tuple(reversed(moves)), *place)


def _write(program: Program, rotation: Rotation) -> Node:
    build, unrolled, half = program.build, rotation.sum, rotation.half
    *leading, heads, width = build.sizes(rotation.heads)
    rank = unrolled.rank

    def swapped(value: Node, across: int, sizes: list[int | Node], dim: int) -> Node:
        """The features of a value in these sizes, with halves or neighbours in one dimension swapped."""
        first, last = rotation.features
        if last - first != program.value(value).shape[across]:
            value = build.call(aten.slice.Tensor, value, across, first, last)
        value = build.call(build.ops.reshape, value, sizes)
        if 2 * half != width:
            value = build.call(aten.slice.Tensor, value, dim, rotation.start, rotation.start + 2 * half)
        before, after = sizes[:dim], sizes[dim + 1 :]
        pairs = (half, 2) if rotation.neighbours else (2, half)
        value = build.call(build.ops.reshape, value, [*before, *pairs, *after])
        value = build.call(aten.flip.default, value, [dim + rotation.neighbours])
        return build.call(build.ops.reshape, value, [*before, 2 * half, *after])

    y = swapped(unrolled.y, -1, [*leading, heads, width], len(leading) + 1)
    *tokens, _, _ = build.sizes(unrolled.up)
    up = swapped(unrolled.up, len(tokens), [*tokens, heads, width, rank], len(tokens) + 1)
    z = build.call(build.ops.reshape, unrolled.z, [*leading, 1, 1, rank])
    value = build.product_and_sum(y, z, up, unrolled.scale)
    value = _signed(program, value, rotation)
    for move in rotation.moves:
        operand = move.all_input_nodes[0]
        value = program.graph.node_copy(move, lambda n, a=operand, b=value: b if n is a else n)  # type: ignore[misc]
        build.annotate(value)
    return value


def _signed(program: Program, value: Node, rotation: Rotation) -> Node:
    build = program.build
    first, second = rotation.signs
    if first == second == 1:
        return value
    negative = build.call(aten.neg.default, value)
    if first == second:
        return negative
    device = program.value(value).device
    place = build.call(aten.arange.default, 2 * rotation.half, device=device)
    if rotation.neighbours:
        in_first = build.call(aten.eq.Scalar, build.call(aten.remainder.Scalar, place, 2), 0)
    else:
        in_first = build.call(aten.lt.Scalar, place, rotation.half)
    return build.call(aten.where.self, in_first, *((value, negative) if first > 0 else (negative, value)))


def _rank(program: Program, node: Node) -> int | None:
    value = program.value(node)
    return value.dim() if isinstance(value, Tensor) else None


def _all_int(sizes: Iterable[Any], *more: Any) -> bool:
    return all(isinstance(size, int) for size in (*sizes, *more))


def _span(program: Program, node: Node) -> tuple[Node, int, int] | None:
    """(x, start, stop) of a slice ``x[..., start:stop]`` or of a part of a split of the last dimension."""
    cut = _cut(program, node)
    return (cut[0], cut[1].start, cut[1].stop) if cut is not None and cut[1].step == 1 else None


def _cut(program: Program, node: Node) -> tuple[Node, range] | None:
    """x and the features that are taken by ``x[..., start:stop:step]``, or by a part of a split."""
    if not node.all_input_nodes or (rank := _rank(program, node)) is None:
        return None
    kind, operand = operation(node), node.all_input_nodes[0]
    if kind is operator.getitem and operation(operand) in SPLITS:
        return _part(program, operand, node.args[1])
    whole = program.value(operand)
    if not isinstance(whole, Tensor) or whole.dim() != rank or not isinstance(whole.shape[-1], int):
        return None
    edges: list[Any]
    if kind is aten.slice.Tensor:
        given = [*node.args[1:], *(0, None, None, 1)[len(node.args) - 1 :]]
        if given[0] not in (-1, rank - 1) or node.kwargs:
            return None
        edges = given[1:]
    elif kind is operator.getitem and isinstance(node.args[1], tuple) and len(node.args[1]) > 1:
        *others, last = node.args[1]
        before = others == [Ellipsis] or (len(others) == rank - 1 and all(one == slice(None) for one in others))
        if not before or not isinstance(last, slice):
            return None
        edges = [last.start, last.stop, last.step]
    else:
        return None
    if not _all_int(edge for edge in edges if edge is not None):
        return None
    features = range(*slice(*edges).indices(whole.shape[-1]))
    return (operand, features) if features else None


def _part(program: Program, split: Node, index: Any) -> tuple[Node, range] | None:
    operand, parts = split.all_input_nodes[0], program.value(split)
    whole = program.value(operand)
    if not isinstance(index, int) or not isinstance(parts, tuple | list) or not isinstance(whole, Tensor):
        return None
    sizes = [part.shape[-1] for part in parts]
    if not _all_int(sizes, whole.shape[-1]) or sum(sizes) != whole.shape[-1]:
        return None  # of another dimension
    start = sum(sizes[: index % len(sizes)])
    return operand, range(start, start + sizes[index])


def _is_cast(node: Node) -> bool:
    return operation(node) in CASTS and len(node.all_input_nodes) == 1


def _keeps_last(program: Program, move: Node) -> bool:
    """Whether a transposition leaves the last dimension where it is."""
    rank = _rank(program, move)
    assert rank is not None
    given = move.args[1] if len(move.args) == 2 and isinstance(move.args[1], tuple | list) else move.args[1:]
    places = [dim % rank for dim in given if isinstance(dim, int)]
    if move.kwargs or len(places) != len(given):
        return False
    return places[-1] == rank - 1 if len(places) == rank > 2 else rank - 1 not in places
