"""Which values of a graph are ranges of a pack with low-rank products added, wherever they were taken apart."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from flora_fx.ir import Pack, Role
from flora_fx.reporting.fusion_report import FusionReport

from ..directory.operators import DOMAIN
from ..trace.capture import PREFIX

if TYPE_CHECKING:
    import onnx_ir

__all__ = ["SKIP_NORM", "Sum", "Sums", "attribute", "bias_place", "is_read", "readers_of_pack", "sizes", "split_edges"]

SKIP_NORM = "SkipSimplifiedLayerNormalization"
_MOST_BLOCKS, _MOST_PARTS = 16, 8
"""That an operator takes."""

_Block = tuple[int, int, int, int, int]
"""To columns begin..end of a pack come z's first..last times these rows of B, in its columns from ..."""


@dataclass(frozen=True, eq=False)
class Sum:
    """Ranges of ``p + z B``.

    Attributes:
        pack: p, what a GEMM gives.
        parts: start and width of each range, in order.
        up: B [rank, any]; None where nothing was added.
        low: z, where it is not in p.
        z_start: where z begins in p.
        blocks: where B's columns go; none overlap.
    """

    pack: onnx_ir.Value
    parts: tuple[tuple[int, int], ...]
    up: onnx_ir.Value | None = None
    low: onnx_ir.Value | None = None
    z_start: int = 0
    blocks: tuple[_Block, ...] = ()

    @property
    def adapted(self) -> bool:
        """Whether something was added."""
        return self.up is not None

    @property
    def width(self) -> int:
        """Of all parts."""
        return sum(width for _, width in self.parts)

    def ranges(self) -> list[int]:
        """The parts, as an attribute has them."""
        return list(itertools.chain.from_iterable(self.parts))

    def part(self, start: int, width: int) -> Sum:
        """Some of its columns; blocks that reach none of them are left out."""
        parts, at = [], 0
        for begin, size in self.parts:
            first, last = max(start, at), min(start + width, at + size)
            if first < last:
                parts.append((begin + first - at, last - first))
            at += size
        kept = tuple(
            block for block in self.blocks if any(block[0] < begin + size and begin < block[1] for begin, size in parts)
        )
        if not kept:
            return Sum(self.pack, tuple(parts))
        return replace(self, parts=tuple(parts), blocks=kept)

    def plus(self, product: _Product) -> Sum | None:
        """With columns of z B added to all of it; None where operators cannot have it."""
        if product.width != self.width or (self.adapted and (self.up, self.low) != (product.up, product.low)):
            return None
        if self.adapted and self.z_start != product.z_start:
            return None
        blocks, at = [*self.blocks], product.start
        for begin, size in self.parts:
            for first, last, top, bottom in product.blocks:  # columns of B
                left, right = max(first, at), min(last, at + size)
                if left < right:
                    blocks.append((begin + left - at, begin + right - at, top, bottom, left))
            at += size
        if any(one[0] < other[1] and other[0] < one[1] for one, other in itertools.combinations(blocks, 2)):
            return None
        if not blocks:
            return None
        return replace(self, up=product.up, low=product.low, z_start=product.z_start, blocks=tuple(sorted(blocks)))

    @staticmethod
    def joined(sums: Sequence[Sum]) -> Sum | None:
        """Several of one pack, one after the other."""
        if not sums or any(one.pack is not sums[0].pack for one in sums):
            return None
        adapted = [one for one in sums if one.adapted]
        first = adapted[0] if adapted else sums[0]
        if any((one.up, one.low, one.z_start) != (first.up, first.low, first.z_start) for one in adapted):
            return None
        parts = tuple(itertools.chain.from_iterable(one.parts for one in sums))
        blocks: set[_Block] = set()
        for one in adapted:
            blocks |= set(one.blocks)
        whole = replace(first, parts=parts, blocks=tuple(sorted(blocks)))
        if any(a[0] < b[1] and b[0] < a[1] for a, b in itertools.combinations(whole.blocks, 2)):
            return None
        plain = [one for one in sums if not one.adapted]
        touched = any(
            block[0] < start + width and start < block[1]
            for block in whole.blocks
            for one in plain
            for start, width in one.parts
        )
        return None if touched else whole  # a range with and the same without what was added

    @property
    def writable(self) -> bool:
        """Whether an operator takes so many parts and blocks."""
        return len(self.parts) <= _MOST_PARTS and len(self.blocks) <= _MOST_BLOCKS


@dataclass(frozen=True, eq=False)
class _Product:
    """Some columns of z B.

    Attributes:
        up, low, z_start: see `Sum`.
        start, width: which columns.
        blocks: begin, end, first, last of what is not zero in B.
    """

    up: onnx_ir.Value
    low: onnx_ir.Value | None
    z_start: int
    start: int
    width: int
    blocks: tuple[tuple[int, int, int, int], ...]


class Sums:
    """By value.

    Args:
        model: the graph, before it is rewritten.
        fusion: of the program that it was translated from: it knows what is an up-projection.
    """

    def __init__(self, model: onnx_ir.Model, fusion: FusionReport) -> None:
        self._packs = {f"_flora.{pack.name}": pack for pack in fusion.packs if _is_up(pack)}
        self._alone = {name.removeprefix(PREFIX) for name in fusion.fused}
        self._known: dict[onnx_ir.Value, Sum] = {}
        for node in model.graph:
            for value, found in self._of(node):
                self._known[value] = found

    def __contains__(self, value: onnx_ir.Value) -> bool:
        return value in self._known

    def get(self, value: onnx_ir.Value | None) -> Sum | None:
        """What a value is, with or without anything added."""
        return None if value is None else self._known.get(value)

    def adapted(self, value: onnx_ir.Value) -> Sum | None:
        """What a value is, if a low-rank product was added."""
        found = self._known.get(value)
        return found if found is not None and found.adapted and found.writable else None

    def added(self, one: onnx_ir.Value | None, other: onnx_ir.Value | None) -> Sum | None:
        """What two values are together, if one of them is a low-rank product that the other one lacks."""
        for base, delta in ((one, other), (other, one)):
            total = self.get(base)
            if base is None or delta is None or total is None:
                continue
            product = self._product(delta, total.pack)
            if product is None or not _alike(base, delta):
                continue
            found = total.plus(product)
            if found is not None and found.writable:
                return found
        return None

    def _of(self, node: onnx_ir.Node) -> Iterable[tuple[onnx_ir.Value, Sum]]:
        if node.domain != "":
            return
        output = node.outputs[0]
        width = sizes(output)[-1] if sizes(output) else -1
        if node.op_type == "Split":
            whole = self.get(node.inputs[0])
            if whole is not None and (edges := split_edges(node)):
                for value, (start, stop) in zip(node.outputs, itertools.pairwise(edges), strict=True):
                    yield value, whole.part(start, stop - start)
        elif node.op_type == "Add" and (total := self.added(*node.inputs)) is not None:
            yield output, total
        elif width > 0 and (node.op_type == "MatMul" or _adds_bias(node)) and self._product(output, None) is None:
            yield output, Sum(output, ((0, width),))

    def _product(self, value: onnx_ir.Value, pack: onnx_ir.Value | None) -> _Product | None:
        """Columns of z B that a value is, where z may be in a pack."""
        node, start, width = value.producer(), 0, sizes(value)[-1] if sizes(value) else -1
        if node is not None and node.op_type == "Split" and node.domain == "" and (edges := split_edges(node)):
            start = edges[list(node.outputs).index(value)]
            node = None if node.inputs[0] is None else node.inputs[0].producer()
        if node is None or node.op_type != "MatMul" or node.domain != "":
            return None
        low, up = node.inputs
        if low is None or up is None or not up.is_initializer() or len(sizes(up)) != 2:
            return None
        blocks = self._blocks(up)
        if not blocks:
            return None
        inside = self.get(low)
        if inside is not None and not inside.adapted and inside.pack is pack and len(inside.parts) == 1:
            return _Product(up, None, inside.parts[0][0], start, width, blocks)
        return _Product(up, low, 0, start, width, blocks)

    def _blocks(self, up: onnx_ir.Value) -> tuple[tuple[int, int, int, int], ...]:
        """Where an up-projection is not zero, neighbours that read the same rows together; none if it is none."""
        rank, columns = sizes(up)
        name = str(up.name)
        if not name.endswith(".T"):
            return ()
        pack = self._packs.get(name.removesuffix(".T"))
        if pack is None:
            return ((0, columns, 0, rank),) if name.removesuffix(".T") in self._alone else ()
        edges = sorted({0, columns, *itertools.chain.from_iterable(piece.rows for piece in pack.slices)})
        blocks: list[tuple[int, int, int, int]] = []
        for begin, end in itertools.pairwise(edges):
            rows = [piece.columns or (0, rank) for piece in pack.slices if piece.rows[0] <= begin < piece.rows[1]]
            if not rows:
                continue
            first, last = min(row[0] for row in rows), max(row[1] for row in rows)
            if blocks and blocks[-1][1:] == (begin, first, last):
                begin = blocks.pop()[0]
            blocks.append((begin, end, first, last))
        return tuple(blocks)


def sizes(value: onnx_ir.Value) -> list[int]:
    """Of a value's dimensions, -1 where dynamic; none of an unknown shape."""
    return [size if isinstance(size, int) else -1 for size in value.shape or ()]


def readers_of_pack(value: onnx_ir.Value) -> list[onnx_ir.Node]:
    """The operators of ``flora_ort`` that a value is the pack of; none where it is read in any other way."""
    uses = list(value.uses())
    ours = [use for use in uses if use.node.domain == DOMAIN and "blocks" in use.node.attributes and use.idx == 0]
    if value.is_graph_output() or len(ours) != len(uses):
        return []
    return [use.node for use in uses]


def bias_place(node: onnx_ir.Node) -> int:
    """Which input of an operator of ``flora_ort`` is a bias over all columns of its pack."""
    return 4 if node.op_type == "LoraSkipRMSNorm" else 2


def attribute(node: onnx_ir.Node, name: str, default: Any) -> Any:
    """The value of an attribute."""
    found = node.attributes.get(name)
    return default if found is None else found.value


def is_read(value: onnx_ir.Value) -> bool:
    """Whether anyone reads a value."""
    return value.is_graph_output() or any(True for _ in value.uses())


def split_edges(split: onnx_ir.Node) -> list[int]:
    """Where the parts of a split of the last dimension begin and end; none where that is not known."""
    whole = split.inputs[0]
    if whole is None or whole.shape is None or attribute(split, "axis", 0) not in (-1, len(whole.shape) - 1):
        return []
    parts = [sizes(value)[-1] if sizes(value) else -1 for value in split.outputs]
    if any(part < 1 for part in parts) or sum(parts) != sizes(whole)[-1]:
        return []
    return [*itertools.accumulate(parts, initial=0)]


def _is_up(pack: Pack) -> bool:
    return len(pack.shape) == 2 and all(piece.role is Role.UP for piece in pack.slices)


def _adds_bias(node: onnx_ir.Node) -> bool:
    if node.op_type != "Add" or None in node.inputs:
        return False
    for product, bias in (node.inputs, node.inputs[::-1]):
        made = None if product is None else product.producer()
        if made is not None and made.op_type == "MatMul" and bias is not None and bias.is_initializer():
            return len(sizes(bias)) == 1
    return False


def _alike(base: onnx_ir.Value, delta: onnx_ir.Value) -> bool:
    """Whether an addition broadcasts nothing."""
    one, other = base.shape, delta.shape
    return one is not None and other is not None and len(one) == len(other)
