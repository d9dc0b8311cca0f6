"""Lay a group out: which rows of its pack belong to whom, and which up-projections go together.

    bases q, k, v; adapters on q and v with scale 2, none on k; block-diagonal

        rows      [ q | v | k | A_q | A_v ]         segments (q, v) and (k)
        block     B of segment 0 = [ B_q   0  ]     accumulated onto rows q and v by the columns A_q, A_v
                                   [  0   B_v ]

A segment is a run of bases that the same scales are written onto; with ``up="per_projection"`` it is one base, or
several that the same down-projections are written onto: their up-projections stand under each other, without zeros.

A path from a value z outside of the group stands beside the rows of its base, [ W_q | B_q ], and z beside the read. So
do the group's own paths where they widen it: then z is what the group's down-projections computed ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch.fx import Node

from flora_fx.config import FuseConfig
from flora_fx.ir import Factor, LowRankPath, Pack, Projection, Role, Slice

from .group import Group, Write

__all__ = ["Block", "Columns", "Layout", "Scale", "bias_pack", "lay_out", "rows_pack", "up_pack", "up_slice"]


ALIGNED = 16
"""Elements; 64 bytes of float32."""


class Scale(NamedTuple):
    """What a GEMM's result is multiplied by: a constant, and symbolic numbers."""

    constant: float
    numbers: tuple[Factor, ...] = ()


@dataclass(frozen=True, eq=False)
class Block:
    """One accumulating GEMM: several paths onto one segment.

    Attributes:
        segment: the index of the segment.
        scale: the paths' common scale.
        columns: the range of down-projections (indices into the layout's) that it multiplies with.
        writes: the paths.
    """

    segment: int
    scale: Scale
    columns: tuple[int, int]
    writes: tuple[Write, ...]


@dataclass(frozen=True, eq=False)
class Columns:
    """Columns beside those of the bases: up-projections of one value, with one scale.

    Attributes:
        low: the value that stands beside the group's read; or the range of the group's own down-projections (indices
            into the layout's) whose values stand there.
        scale: what it is multiplied by.
        rank: how many columns.
        writes: the paths, each with the first of its columns among these.
    """

    low: Node | tuple[int, int]
    scale: Scale
    rank: int
    writes: tuple[tuple[Write, int], ...]


@dataclass(frozen=True, eq=False)
class Layout:
    """The order of a group's members, the blocks that accumulate, and what stands beside the bases.

    Attributes:
        segments: the bases.
        downs: the down-projections; first those that do not stand among the rows of the bases.
        apart: how many these are.
        blocks: what accumulates.
        columns: what stands beside the bases.
    """

    segments: tuple[tuple[Projection, ...], ...]
    downs: tuple[Projection, ...]
    apart: int
    blocks: tuple[Block, ...]
    columns: tuple[Columns, ...]

    @property
    def bases(self) -> tuple[Projection, ...]:
        return tuple(base for segment in self.segments for base in segment)


def lay_out(group: Group, config: FuseConfig, *, stack: bool) -> Layout:
    """Order bases by the scales written onto them, downs by the block that reads them.

    Args:
        group: the group.
        config: the forms to write.
        stack: whether up-projections of one value may share a weight where each has its own otherwise.
    """
    by_base: dict[Projection, list[Write]] = {base: [] for base in group.bases}
    for write in group.writes:
        by_base[write.base].append(write)
    segments: dict[object, list[Projection]] = {}
    for base, writes in by_base.items():
        scales = tuple(dict.fromkeys(_scale(w, config) for w in writes))
        sources = tuple((w.path.down.node, _scale(w, config)) for w in writes)
        together: object = scales if config.up == "block_diagonal" else sources if stack else ()
        segments.setdefault(together or base, []).append(base)
    # Written segments first, so that what is accumulated onto is one range.
    ordered = sorted(segments.values(), key=lambda bases: not by_base[bases[0]])
    wanted: list[tuple[int, Scale, list[Write]]] = []
    for index, bases in enumerate(ordered):
        for scale in dict.fromkeys(_scale(w, config) for w in by_base[bases[0]]):
            same = [w for b in bases for w in by_base[b] if _scale(w, config) == scale]
            wanted.extend((index, scale, cells) for cells in _one_per_cell(same))
    used = (w.path.down for _, _, writes in wanted for w in writes)
    own_writes = _own(group)
    ranges = list(dict.fromkeys(sorted((_scale(w, config) for w in own_writes), key=lambda scale: scale.constant)))
    ahead = sorted(own_writes, key=lambda w: ranges.index(_scale(w, config)))  # one range a scale
    own = tuple(_unique(used, (w.path.down for w in ahead)))
    downs = tuple(_unique(own, group.downs))
    apart = {
        "joined": 0,
        "beside": len(downs),
        "ahead": len(own) if len(group.bases) > 1 else len(downs),
    }[config.layout]
    position = {down.node: index for index, down in enumerate(downs)}
    blocks = []
    for index, scale, writes in wanted:
        # Two up-projections beside each other are strided, and a pack of them gives no gradients.
        trained = any(w.path.up.weight.tensor.requires_grad for w in writes)
        for run in _runs({position[w.path.down.node] for w in writes}, single=trained):
            inside = tuple(w for w in writes if run[0] <= position[w.path.down.node] < run[1])
            blocks.append(Block(index, scale, run, inside))
    columns = (*_columns_of_own(ahead, downs, config), *_columns_of_others(group, config))
    return Layout(tuple(tuple(s) for s in ordered), downs, apart, tuple(blocks), columns)


def _own(group: Group) -> list[Write]:
    """The widenings from the group's own down-projections."""
    own = {down.node for down in group.downs}
    return [write for write in group.widenings if write.path.low in own]


def _columns_of_own(writes: Sequence[Write], downs: Sequence[Projection], config: FuseConfig) -> Iterator[Columns]:
    position = {down.node: index for index, down in enumerate(downs)}
    edges = _offsets(down.out_features for down in downs)
    for scale in dict.fromkeys(_scale(w, config) for w in writes):
        for cells in _one_per_cell([w for w in writes if _scale(w, config) == scale]):
            for run in _runs({position[w.path.down.node] for w in cells}):
                inside = [(w, position[w.path.down.node]) for w in cells]
                placed = tuple((w, edges[at] - edges[run[0]]) for w, at in inside if run[0] <= at < run[1])
                yield Columns(run, scale, edges[run[1]] - edges[run[0]], placed)


def _columns_of_others(group: Group, config: FuseConfig) -> Iterator[Columns]:
    own = _own(group)
    writes = [write for write in group.widenings if write not in own]
    for low, scale in dict.fromkeys((w.path.low, _scale(w, config)) for w in writes):
        same = [w for w in writes if w.path.low is low and _scale(w, config) == scale]
        for cells in _layers(same, lambda write: write.base.node):
            yield Columns(low, scale, cells[0].path.up.in_features, tuple((write, 0) for write in cells))


def rows_pack(
    name: str,
    bases: Sequence[Projection],
    downs: Sequence[Projection],
    columns: Sequence[Columns],
    config: FuseConfig,
) -> Pack:
    """``[W; A]``: the members' weights as rows of one matrix; with columns, ``[W, B; A, 0]``.

    With A's ranks the rows are filled up to a multiple of `ALIGNED`: a GEMM is slower where rows of its output begin
    anywhere (3097 and 3142 features cost 8% more than 3104 and 3152; AMD EPYC, 2 cores, float32, torch 2.13).
    """
    members = (*bases, *downs)
    rows = _offsets(member.out_features for member in members)
    width = members[0].in_features
    edges = [width + offset for offset in _offsets(beside.rank for beside in columns)]
    slices = tuple(
        Slice(
            member.weight.source,
            Role.BASE if index < len(bases) else Role.DOWN,
            (rows[index], rows[index + 1]),
            (0, width) if columns else None,
            transposed=member.weight.transposed,
            cast=member.like is not None,
            label=member.weight.label,
        )
        for index, member in enumerate(members)
    )
    row_of = {member.node: row for member, row in zip(members, rows, strict=False)}
    beside_them = tuple(
        up_slice(write.path, row_of[write.base.node], edge + first, config)
        for beside, edge in zip(columns, edges, strict=False)
        for write, first in beside.writes
    )
    like = members[0].like or members[0].weight
    height = rows[-1] if not (bases and downs) else -(-rows[-1] // ALIGNED) * ALIGNED
    return Pack(name, (height, edges[-1]), (*slices, *beside_them), members[0].reads.name, like.source)


def bias_pack(name: str, weights: Pack, members: Sequence[Projection]) -> Pack | None:
    """The members' biases beside their `rows_pack`, zero where a member has none; None if none has."""
    slices = tuple(
        Slice(member.bias.source, piece.role, piece.rows, cast=piece.cast, label=member.bias.label)
        for piece, member in zip(weights.slices, members, strict=False)
        if member.bias is not None
    )
    return Pack(name, weights.shape[:1], slices, weights.reads, weights.like) if slices else None


def up_pack(name: str, layout: Layout, block: Block, config: FuseConfig) -> Pack:
    """The up-projections of a block as one matrix [rows of the segment, columns of its downs]."""
    bases, downs = layout.segments[block.segment], layout.downs[slice(*block.columns)]
    rows, columns = _offsets(b.out_features for b in bases), _offsets(d.out_features for d in downs)
    row_of = {base.node: row for base, row in zip(bases, rows, strict=False)}
    column_of = {down.node: column for down, column in zip(downs, columns, strict=False)}
    slices = tuple(up_slice(w.path, row_of[w.base.node], column_of[w.path.down.node], config) for w in block.writes)
    like = block.writes[0].path.up.like or block.writes[0].path.up.weight
    return Pack(name, (rows[-1], columns[-1]), slices, ", ".join(d.node.name for d in downs), like.source)


def up_slice(path: LowRankPath, row: int, column: int, config: FuseConfig) -> Slice:
    """The place of a path's up-projection, from a row and a column on."""
    return Slice(
        path.up.weight.source,
        Role.UP,
        (row, row + path.up.out_features),
        (column, column + path.up.in_features),
        path.up.weight.transposed,
        path.scale if config.fold_scale else 1.0,
        path.up.like is not None,
        path.up.weight.label,
    )


def _scale(write: Write, config: FuseConfig) -> Scale:
    """The scale that is to be applied: no constant where it is folded into the weights."""
    return Scale(1.0 if config.fold_scale else write.path.scale, write.path.numbers)


def _one_per_cell(writes: list[Write]) -> list[list[Write]]:
    """Two up-projections between the same base and down-projection cannot stand in one matrix."""
    return _layers(writes, lambda write: (write.base.node, write.path.down.node))


def _layers(writes: list[Write], cell: Callable[[Write], Hashable]) -> list[list[Write]]:
    """Writes in as few matrices as hold each cell once."""
    layers: list[list[Write]] = []
    for write in writes:
        layer = next((found for found in layers if cell(write) not in map(cell, found)), None)
        if layer is None:
            layers.append(layer := [])
        layer.append(write)
    return layers


def _unique(first: Iterable[Projection], rest: Iterable[Projection]) -> Iterable[Projection]:
    return {down.node: down for down in (*first, *rest)}.values()


def _runs(positions: set[int], *, single: bool = False) -> list[tuple[int, int]]:
    """Contiguous ranges that cover a set of positions; ``single``: one for each."""
    runs: list[tuple[int, int]] = []
    for position in sorted(positions):
        if runs and runs[-1][1] == position and not single:
            runs[-1] = (runs[-1][0], position + 1)
        else:
            runs.append((position, position + 1))
    return runs


def _offsets(sizes: Iterable[int]) -> list[int]:
    """Running sums, the total last."""
    offsets = [0]
    for size in sizes:
        offsets.append(offsets[-1] + size)
    return offsets
