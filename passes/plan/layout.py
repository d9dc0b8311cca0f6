"""Lay a group out: which rows of its pack belong to whom, and which up-projections go together.

    bases q, k, v; adapters on q and v with scale 2, none on k; block-diagonal

        rows      [ q | v | k | A_q | A_v ]         segments (q, v) and (k)
        block     B of segment 0 = [ B_q   0  ]     accumulated onto rows q and v by the columns A_q, A_v
                                   [  0   B_v ]

A segment is a run of bases that the same scales are written onto; with ``up="per_projection"`` it is one base, or
several that the same down-projections are written onto: their up-projections stand under each other, without zeros.

A path from a value z outside of the group stands beside the rows of its base, [ W_q | B_q ], and z beside the read. So
do the group's own paths where they widen it: then z is what the group's down-projections computed ahead.

Where paths are for some tokens alone, their down-projections come first, and their values are selected together, scaled
where their scales differ: what is zero in a token adds nothing to it, so all that is written onto one base is one GEMM.

    z' = where(mask, [z_1 | z_2 | …], 0)        q' = q + [z_1' | z_2' | …] @ [B_1 | B_2 | …]ᵀ
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate as running
from itertools import pairwise
from typing import NamedTuple

from torch.fx import Node

from flora_fx.config import FuseConfig
from flora_fx.ir import Factor, LowRankPath, Pack, Projection, Role, Select, Slice, Weight

from .group import Group, Placement

__all__ = [
    "Block",
    "Columns",
    "Gate",
    "HeldPacks",
    "Layout",
    "Scale",
    "bias_pack",
    "features_of",
    "held_packs",
    "lay_out",
    "offsets",
    "ranges",
    "rows_pack",
    "up_pack",
    "up_slice",
]


ALIGNED = 16
"""Elements; 64 bytes of float32."""


class Scale(NamedTuple):
    """What a GEMM's result is multiplied by, a constant and symbolic numbers; whether it multiplies gated values."""

    constant: float
    numbers: tuple[Factor, ...] = ()
    gated: bool = False


@dataclass(frozen=True)
class Gate:
    """The tokens that a down-projection's value is kept in, and what it is multiplied by there.

    Attributes:
        select: the tokens.
        rank: how many columns.
        factor: what they are multiplied by.
    """

    select: Select
    rank: int
    factor: float


@dataclass(frozen=True, eq=False)
class Block:
    """One accumulating GEMM: several paths onto one segment.

    Attributes:
        segment: the index of the segment.
        scale: the paths' common scale.
        columns: the range of down-projections (indices into the layout's) that it multiplies with.
        placements: the paths.
    """

    segment: int
    scale: Scale
    columns: tuple[int, int]
    placements: tuple[Placement, ...]


@dataclass(frozen=True, eq=False)
class Columns:
    """Columns beside those of the bases: up-projections of one value, with one scale.

    Attributes:
        low: the value that stands beside the group's read; or the range of the group's own down-projections (indices
            into the layout's) whose values stand there.
        scale: what it is multiplied by.
        rank: how many columns.
        placements: the paths, each with the first of its columns among these.
    """

    low: Node | tuple[int, int]
    scale: Scale
    rank: int
    placements: tuple[tuple[Placement, int], ...]


@dataclass(frozen=True, eq=False)
class Layout:
    """The order of a group's members, the blocks that accumulate, and what stands beside the bases.

    Attributes:
        segments: the bases.
        downs: the down-projections; first those that do not stand among the rows of the bases.
        apart: how many these are.
        blocks: what accumulates.
        columns: what stands beside the bases.
        gates: of the first of the down-projections whose columns the blocks count: those of paths for some tokens.
    """

    segments: tuple[tuple[Projection, ...], ...]
    downs: tuple[Projection, ...]
    apart: int
    blocks: tuple[Block, ...]
    columns: tuple[Columns, ...]
    gates: tuple[Gate, ...] = ()

    @property
    def bases(self) -> tuple[Projection, ...]:
        return tuple(base for segment in self.segments for base in segment)

    @property
    def downs_apart(self) -> tuple[Projection, ...]:
        """The down-projections in a pack of their own."""
        return self.downs[: self.apart]

    @property
    def downs_among(self) -> tuple[Projection, ...]:
        """The down-projections that stand among the rows of the bases, or with each other where there is no base."""
        return self.downs[self.apart :]

    @property
    def downs_of_blocks(self) -> tuple[Projection, ...]:
        """The down-projections whose columns the blocks count."""
        return self.downs_apart or self.downs


def lay_out(group: Group, config: FuseConfig, *, stack: bool) -> Layout:
    """Order bases by the scales written onto them, downs by the block that reads them.

    Args:
        group: the group.
        config: the forms to write.
        stack: whether up-projections of one value may share a weight where each has its own otherwise.
    """
    by_base: dict[Projection, list[Placement]] = {base: [] for base in group.bases}
    for placement in group.accumulated:
        by_base[placement.base].append(placement)
    gated = [placement.path for placement in group.accumulated if placement.path.select is not None]
    common = len({_scale(path, config) for path in gated}) == 1
    scale_of = {p: _scale(p.path, config) if common else _scale_behind_gate(p.path, config) for p in group.accumulated}
    segments: dict[object, list[Projection]] = {}
    for base, placements in by_base.items():
        scales = tuple(dict.fromkeys(scale_of[p] for p in placements))
        low_values = tuple((p.path.down.node, scale_of[p]) for p in placements)
        together: object = scales if config.up == "block_diagonal" else low_values if stack else ()
        segments.setdefault(together or base, []).append(base)
    # Written segments first, so that what is accumulated onto is one range.
    ordered = sorted(segments.values(), key=lambda bases: not by_base[bases[0]])
    wanted: list[tuple[int, Scale, list[Placement]]] = []
    for index, bases in enumerate(ordered):
        for scale in dict.fromkeys(scale_of[p] for p in by_base[bases[0]]):
            same = [p for b in bases for p in by_base[b] if scale_of[p] == scale]
            wanted.extend((index, scale, cells) for cells in _one_per_cell(same))
    wanted.sort(key=lambda block: not block[1].gated)
    used = (p.path.down for _, _, placements in wanted for p in placements)
    widened = _own(group)
    scales_ahead = list(dict.fromkeys(sorted((_scale(p.path, config) for p in widened), key=lambda s: s.constant)))
    ahead = sorted(widened, key=lambda p: scales_ahead.index(_scale(p.path, config)))  # one range a scale
    own = tuple(_unique(used, (p.path.down for p in ahead)))
    downs = tuple(_unique(own, group.downs))
    quantized = any(base.held is not None for base in group.bases)  # no row of floating point fits under it
    apart = {
        "joined": 0,
        "beside": len(downs),
        "ahead": len(own) if len(group.bases) > 1 else len(downs),
    }["beside" if quantized else config.layout]
    position = {down.node: index for index, down in enumerate(downs)}
    blocks = []
    for index, scale, placements in wanted:
        # Two up-projections beside each other are strided, and a pack of them gives no gradients.
        trained = any(p.path.up.weight.tensor.requires_grad for p in placements)
        for run in _runs({position[p.path.down.node] for p in placements}, single=trained):
            inside = tuple(p for p in placements if run[0] <= position[p.path.down.node] < run[1])
            blocks.append(Block(index, scale, run, inside))
    columns = (*_columns_of_own(ahead, downs, config), *_columns_of_others(group, config))
    gates = _gates(downs, gated, config, common=common)
    return Layout(tuple(tuple(s) for s in ordered), downs, apart, tuple(blocks), columns, gates)


def _own(group: Group) -> list[Placement]:
    """The widenings from the group's own down-projections."""
    own = {down.node for down in group.downs}
    return [placement for placement in group.widened if placement.path.low in own]


def _columns_of_own(
    placements: Sequence[Placement], downs: Sequence[Projection], config: FuseConfig
) -> Iterator[Columns]:
    position = {down.node: index for index, down in enumerate(downs)}
    edges = offsets(down.out_features for down in downs)
    for scale in dict.fromkeys(_scale(p.path, config) for p in placements):
        for cells in _one_per_cell([p for p in placements if _scale(p.path, config) == scale]):
            for run in _runs({position[p.path.down.node] for p in cells}):
                inside = [(p, position[p.path.down.node]) for p in cells]
                placed = tuple((p, edges[at] - edges[run[0]]) for p, at in inside if run[0] <= at < run[1])
                yield Columns(run, scale, edges[run[1]] - edges[run[0]], placed)


def _columns_of_others(group: Group, config: FuseConfig) -> Iterator[Columns]:
    own = _own(group)
    placements = [placement for placement in group.widened if placement not in own]
    for low, scale in dict.fromkeys((p.path.low, _scale(p.path, config)) for p in placements):
        same = [p for p in placements if p.path.low is low and _scale(p.path, config) == scale]
        for cells in _layers(same, lambda placement: placement.base.node):
            yield Columns(low, scale, cells[0].path.up.in_features, tuple((placement, 0) for placement in cells))


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
    rows = offsets(member.out_features for member in members)
    width = members[0].in_features
    edges = [width + offset for offset in offsets(beside.rank for beside in columns)]
    slices = tuple(
        Slice(
            member.weight.source,
            Role.BASE if index < len(bases) else Role.DOWN,
            (rows[index], rows[index + 1]),
            (0, width) if columns else None,
            transposed=member.weight.transposed,
            cast=member.cast_to is not None,
            label=member.weight.label,
        )
        for index, member in enumerate(members)
    )
    row_of = {member.node: row for member, row in zip(members, rows, strict=False)}
    beside_them = tuple(
        up_slice(placement.path, row_of[placement.base.node], edge + first, config)
        for beside, edge in zip(columns, edges, strict=False)
        for placement, first in beside.placements
    )
    height = rows[-1] if not (bases and downs) else -(-rows[-1] // ALIGNED) * ALIGNED
    first = members[0]
    return Pack(name, (height, edges[-1]), (*slices, *beside_them), first.reads.name, first.stored_like.source)


def bias_pack(name: str, weights: Pack, members: Sequence[Projection]) -> Pack | None:
    """The members' biases beside their `rows_pack`, zero where a member has none; None if none has."""
    slices = tuple(
        Slice(member.bias.source, piece.role, piece.rows, cast=piece.cast, label=member.bias.label)
        for piece, member in zip(weights.slices, members, strict=False)
        if member.bias is not None
    )
    return Pack(name, weights.shape[:1], slices, weights.reads, weights.like) if slices else None


class HeldPacks(NamedTuple):
    """The parts of several quantized weights, each part's under each other."""

    codes: Pack
    scales: Pack
    zeros: Pack | None
    bias: Pack | None


def held_packs(name: str, bases: Sequence[Projection]) -> HeldPacks:
    """The packs of quantized bases that are alike, see `flora_fx.passes.plan.quantized`.

    What a part has no bytes of is left out: zero points that all go without saying, biases that none has.
    """
    helds = [base.held for base in bases if base.held is not None]
    told, reads = f"{helds[0].bits} bits", bases[0].reads.name

    def stacked(ending: str, weights: Sequence[Weight]) -> Pack:
        edges = offsets(int(weight.tensor.shape[0]) for weight in weights)
        slices = tuple(
            Slice(weight.source, Role.BASE, rows, label=weight.label)
            for weight, rows in zip(weights, pairwise(edges), strict=True)
        )
        shape = (edges[-1], *(int(size) for size in weights[0].tensor.shape[1:]))
        return Pack(f"{name}{ending}", shape, slices, reads, weights[0].source, held=told)

    zeros = [held.zeros for held in helds if held.zeros is not None]
    edges = offsets(base.out_features for base in bases)
    biases = [(base.bias, rows) for base, rows in zip(bases, pairwise(edges), strict=True) if base.bias is not None]
    bias = None
    if biases:
        slices = tuple(Slice(weight.source, Role.BASE, rows, label=weight.label) for weight, rows in biases)
        bias = Pack(f"{name}_bias", (edges[-1],), slices, reads, biases[0][0].source)
    return HeldPacks(
        stacked("", [base.weight for base in bases]),
        stacked("_scales", [held.scales for held in helds]),
        stacked("_zeros", zeros) if zeros else None,
        bias,
    )


def up_pack(name: str, layout: Layout, block: Block, config: FuseConfig) -> Pack:
    """The up-projections of a block as one matrix [rows of the segment, columns of its downs]."""
    bases, downs = layout.segments[block.segment], layout.downs[slice(*block.columns)]
    rows, columns = offsets(b.out_features for b in bases), offsets(d.out_features for d in downs)
    row_of = {base.node: row for base, row in zip(bases, rows, strict=False)}
    column_of = {down.node: column for down, column in zip(downs, columns, strict=False)}
    slices = tuple(up_slice(p.path, row_of[p.base.node], column_of[p.path.down.node], config) for p in block.placements)
    first = block.placements[0].path.up
    return Pack(name, (rows[-1], columns[-1]), slices, ", ".join(d.node.name for d in downs), first.stored_like.source)


def up_slice(path: LowRankPath, row: int, column: int, config: FuseConfig) -> Slice:
    """The place of a path's up-projection, from a row and a column on."""
    return Slice(
        path.up.weight.source,
        Role.UP,
        (row, row + path.up.out_features),
        (column, column + path.up.in_features),
        path.up.weight.transposed,
        path.scale if config.fold_scale else 1.0,
        path.up.cast_to is not None,
        path.up.weight.label,
    )


def _scale(path: LowRankPath, config: FuseConfig) -> Scale:
    """The scale that is to be applied: no constant where it is folded into the weights."""
    return Scale(1.0 if config.fold_scale else path.scale, path.numbers, path.select is not None)


def _scale_behind_gate(path: LowRankPath, config: FuseConfig) -> Scale:
    """What is left of a scale where gates multiply by its constant."""
    scale = _scale(path, config)
    return scale._replace(constant=1.0) if scale.gated else scale


def _gates(
    downs: Sequence[Projection], paths: Iterable[LowRankPath], config: FuseConfig, *, common: bool
) -> tuple[Gate, ...]:
    """The gates of paths, in the order of their down-projections; ``common``: they leave scales alone."""
    by_down = {path.down.node: path for path in paths}
    found = [by_down[down.node] for down in downs if down.node in by_down]
    factors = (1.0 if common else _scale(path, config).constant for path in found)
    return tuple(
        Gate(path.select, path.down.out_features, factor)
        for path, factor in zip(found, factors, strict=True)
        if path.select is not None
    )


def _one_per_cell(placements: list[Placement]) -> list[list[Placement]]:
    """Two up-projections between the same base and down-projection cannot stand in one matrix."""
    return _layers(placements, lambda placement: (placement.base.node, placement.path.down.node))


def _layers(placements: list[Placement], cell: Callable[[Placement], Hashable]) -> list[list[Placement]]:
    """Paths in as few matrices as hold each cell once."""
    layers: list[list[Placement]] = []
    for placement in placements:
        layer = next((found for found in layers if cell(placement) not in map(cell, found)), None)
        if layer is None:
            layers.append(layer := [])
        layer.append(placement)
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


def features_of(members: Iterable[Projection]) -> int:
    """The output features of several projections together."""
    return sum(member.out_features for member in members)


def offsets(sizes: Iterable[int]) -> list[int]:
    """Running sums, the total last."""
    return list(running(sizes, initial=0))


def ranges(sizes: Iterable[int]) -> list[tuple[int, int]]:
    """The ranges that pieces of these sizes take up, one behind the other."""
    return list(pairwise(offsets(sizes)))
