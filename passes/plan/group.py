"""Group what reads one value.

    q = linear(x, W_q)   k = linear(x, W_k)   z_q = linear(x, A_q)        Group(x, bases=(q, k), downs=(z_q,),
    q' = q + s·linear(z_q, B_q)                                                 accumulated=(q' onto q by z_q and B_q,))

A path is written inside its group when all of it depends on the group's read alone: its down-projection and the
projection it is added to are members, its scale is a number. It widens the group of the projection that it is added to
when its low-rank value z is there before that group is computed, and nothing wants the projection's value without it:

    o = linear(u, W_o)                                    Group(u, bases=(o,), downs=(),
    o' = o + s·linear(z, B)                                     widened=(o' onto o by z and B,))

With ``layout="ahead"`` the down-projections of a group run before its bases, so its own paths may widen it, too.

Any other path is written where its add stands.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import NamedTuple

import torch
from torch.fx import Node

from flora_fx.config import FuseConfig
from flora_fx.graph.program import Program
from flora_fx.ir import Decline, LowRankPath, Projection, Reason, Select
from flora_fx.passes.analysis.modes import Regions
from flora_fx.passes.analysis.operations import (
    CASTS,
    EQUALS,
    EXPANDS,
    RESHAPES,
    SIZES,
    UNSQUEEZES,
    dependencies,
    operation,
    readers,
)
from flora_fx.passes.analysis.projections import Projections
from flora_fx.passes.analysis.values import Values
from flora_fx.passes.context import Context

from .decide import Decisions, adapted_projection
from .quantized import alike, difference

__all__ = ["Group", "Grouping", "Placement", "form_groups"]

MOVABLE = EQUALS | RESHAPES | UNSQUEEZES | CASTS | EXPANDS | SIZES | {operator.getitem}
"""What a mask is made by: pure functions, which may be computed earlier."""


@dataclass(frozen=True, eq=False)
class Placement:
    """A path in a group: added to the output of one of its bases.

    Attributes:
        base: the projection whose output it is added to.
        path: the path.
        chain: the reshapes between the projection and the value that the path is added to, in graph order.
    """

    base: Projection
    path: LowRankPath
    chain: tuple[Node, ...]


@dataclass(frozen=True, eq=False)
class Group:
    """Projections that read one value.

    Attributes:
        reads: the value.
        bases, downs: the projections.
        accumulated: the paths that are GEMMs of their own, each from a down-projection of the group onto one of its
            bases.
        widened: the paths that are further columns, each from a value that is there before the group's bases.
    """

    reads: Node
    bases: tuple[Projection, ...]
    downs: tuple[Projection, ...]
    accumulated: tuple[Placement, ...] = ()
    widened: tuple[Placement, ...] = ()


@dataclass(frozen=True, eq=False)
class Grouping:
    """The groups, and the paths to write one by one."""

    groups: tuple[Group, ...]
    singles: tuple[LowRankPath, ...]


def form_groups(context: Context) -> Grouping:
    """Sort projections into groups and paths into groups or singles."""
    program, values, projections = context.program, context[Values], context[Projections]
    decisions, regions, config = context[Decisions], context[Regions], context.config
    order = {node: index for index, node in enumerate(program.graph.nodes)}
    ups = {path.up.node for path in decisions.paths}
    downs = {down.node: down for down in decisions.downs}
    buckets: dict[tuple[Node, int, torch.dtype, torch.device], list[Projection]] = defaultdict(list)
    for projection in projections:
        if projection.node not in ups:
            member = downs.get(projection.node, projection)
            key = (member.reads, regions[member.node], member.dtype, member.weight.tensor.device)
            buckets[key].append(member)
    groups: list[Group] = []
    home: dict[Node, int] = {}
    beside: set[int] = set()
    for (reads, *_), members in buckets.items():
        if any(m.node in downs for m in members) or (config.pack_base and len(members) > 1):
            context.declines.extend(m.obstacle for m in members if m.obstacle is not None)
            context.declines.extend(kept_out for m in members if (kept_out := _shared(m, decisions)) is not None)
        private = [m for m in members if m.obstacle is None and m.node not in decisions.shared]
        private.sort(key=lambda m: order[m.node])
        its_downs = tuple(m for m in private if m.node in downs)
        first, *rest = alike(program, [m for m in private if m.node not in downs])
        if its_downs:
            context.declines.extend(_apart(first, bases) for bases in rest)
            beside.update(range(len(groups) + 1, len(groups) + 1 + len(rest)))
        for bases, joined in ((first, its_downs), *((bases, ()) for bases in rest)):
            home.update((member.node, len(groups)) for member in (*bases, *joined))
            groups.append(Group(reads, tuple(bases), joined))
    placer = _Placer(program, values, decisions, groups, home, order, regions)
    groups, singles = placer.place(config)
    kept = tuple(
        group
        for index, group in enumerate(groups)
        if group.widened
        or (len((*group.bases, *group.downs)) > 1 and (group.downs or config.pack_base or index in beside))
    )
    packed = {down.node for group in kept if group.bases for down in group.downs}
    together = {down.node for group in kept if not group.bases for down in group.downs}
    others = {p.node: p for p in projections if p.node not in ups and p.node not in downs}
    for path in _without_company(decisions, packed):
        own = adapted_projection(values, others, path.onto)
        candidates = [own, *others.values()] if own else others.values()
        context.declines.append(_alone(path, candidates, decisions, regions, together=path.down.node in together))
    return Grouping(kept, tuple(singles))


class _Tip(NamedTuple):
    """Where the value of a base stands so far: its own node, or the last add that was written onto it."""

    group: int
    base: Projection
    node: Node
    chain: tuple[Node, ...]


class _Placer:
    """Decides where each path is written: inside a group, as columns of one, or where its add stands."""

    def __init__(
        self,
        program: Program,
        values: Values,
        decisions: Decisions,
        groups: list[Group],
        home: dict[Node, int],
        order: dict[Node, int],
        regions: dict[Node, int],
    ) -> None:
        self.program = program
        self.values = values
        self.decisions = decisions
        self.groups = groups
        self.home = home
        self.order = order
        self.regions = regions
        self.masked: dict[int, Select] = {}
        self.told: dict[Node, set[Hashable]] = defaultdict(set)
        for path in decisions.paths:
            self.told[path.down.node].add((path.select, path.scale, path.numbers))
        self.at = {base.node: _Tip(i, base, base.node, ()) for i, group in enumerate(groups) for base in group.bases}
        self.started: set[Node] = set()

    def place(self, config: FuseConfig) -> tuple[list[Group], list[LowRankPath]]:
        """The groups with their paths, and the paths that stand alone."""
        widen, ahead = config.write == "widened", config.layout == "ahead"
        inside: dict[int, list[Placement]] = defaultdict(list)
        columns: dict[int, list[Placement]] = defaultdict(list)
        singles: list[LowRankPath] = []
        for add, same in groupby(self.decisions.paths, key=lambda path: path.add):
            parts = tuple(same)
            tip = self.tip_under(parts[0].onto)
            if tip is not None and widen and self.may_widen(parts, tip, add, ahead=ahead):
                chosen = columns
            elif tip is not None and all(self.is_inside(part, tip) and self.may_gate(part, tip) for part in parts):
                chosen = inside
            else:
                singles.extend(parts)
                continue
            chosen[tip.group].extend(Placement(tip.base, part, tip.chain) for part in parts)
            self.started.add(tip.node)
            self.at[add] = tip._replace(node=add)
        placed = [
            replace(group, accumulated=tuple(inside[index]), widened=tuple(columns[index]))
            for index, group in enumerate(self.groups)
        ]
        return placed, singles

    def tip_under(self, onto: Node) -> _Tip | None:
        """The base that a value is the output of, if no other add has branched off from it."""
        chain: list[Node] = []
        node = onto
        while node not in self.at:
            operand = self.values.inner(node)
            if operand is None:
                return None
            if operation(node) in RESHAPES:
                chain.append(node)
            node = operand
        tip = self.at[node]
        if node in self.started or (node is not tip.base.node and len(readers(node)) != 1):
            return None
        return tip._replace(chain=(*tip.chain, *reversed(chain)))

    def is_inside(self, path: LowRankPath, tip: _Tip) -> bool:
        """Whether a path depends on what its group reads alone."""
        plain = not path.factors and path.low is path.down.node and path.up.node not in self.decisions.shared
        return plain and self.home.get(path.down.node) == tip.group

    def may_gate(self, path: LowRankPath, tip: _Tip) -> bool:
        """Whether a path's tokens can be selected where its group computes all low-rank values.

        All that a down-projection gives must be for one set of tokens, and all masks of a group of one shape. The mask
        must be there before the group, or be made of what is.
        """
        if path.select is None:
            return True
        group = self.groups[tip.group]
        first = self.masked.setdefault(tip.group, path.select)
        members = {member.node for member in (*group.bases, *group.downs)}
        start = min(self.order[node] for node in members)
        later = [node for node in dependencies(path.select.mask) if self.order[node] >= start]
        touched = self.values.effects.touched
        return (
            len(self.told[path.down.node]) == 1
            and bool(self.program.shape(path.select.mask))
            and self.program.same_shape(path.select.mask, first.mask)
            and all(operation(node) in MOVABLE and node not in touched for node in later)
            and len({self.regions[node] for node in (path.down.node, *later)}) == 1
        )

    def is_sole_way(self, base: Node, add: Node) -> bool:
        """Whether nothing reads a base's value but what leads to an add."""
        node = base
        while node is not add:
            found = readers(node)
            if len(found) != 1 or self.order[found[0]] > self.order[add]:
                return False
            node = found[0]
        return True

    def may_widen(self, paths: tuple[LowRankPath, ...], tip: _Tip, add: Node, *, ahead: bool) -> bool:
        """Whether paths may be further columns of a base's group; ``ahead``: those of its own down-projections, too.

        Columns are strided: what trains must not be stored so. Without shapes, all has to be seen to agree.
        """
        if tip.base.held is not None or not self.is_sole_way(tip.base.node, add):
            return False
        group = self.groups[tip.group]
        members = (*group.bases, *group.downs)
        start = min(self.order[member.node] for member in members)
        stored = [part.weight for part in (*members, *(path.up for path in paths))]
        stored += [member.bias for member in members if member.bias is not None]
        if any(weight.tensor.requires_grad for weight in stored):
            return False
        own = {path for path in paths if ahead and self.is_inside(path, tip)}
        return all(
            (path in own or (self.order[path.low] < start and self.home.get(path.down.node) != tip.group))
            and self.regions[path.low] == self.regions[path.add] == self.regions[tip.base.node]
            and path.up.node not in self.decisions.shared
            and path.up.dtype == tip.base.dtype
            and path.up.weight.tensor.device == tip.base.weight.tensor.device
            and not path.factors
            and path.up.bias is None
            and path.select is None
            and (path in own or self.program.value(path.low) is not None or self.is_flat(path, tip, group))
            for path in paths
        )

    def is_flat(self, path: LowRankPath, tip: _Tip, group: Group) -> bool:
        """Whether no reshape stands anywhere between a group's read and a path's add."""
        same = self.values.earliest
        direct = path.onto is tip.base.node and same(tip.base.operand) is same(group.reads)
        return direct and same(path.up.operand) is same(path.low)


def _apart(first: Sequence[Projection], other: Sequence[Projection]) -> Decline:
    """Why quantized bases stand in a pack of their own beside other bases of the same read."""
    names = " and ".join(group[0].weight.name for group in (first, other) if group)
    why = "only one of them is quantized" if first[0].held is None else difference(first[0], other[0])
    return Decline(Reason.WEIGHT_NOT_DENSE, other[0].node.name, f"{names} read one value and stay apart: {why}")


def _shared(projection: Projection, decisions: Decisions) -> Decline | None:
    """Why a projection whose weight is not its own stays out of a pack; None if it need not, or for another reason."""
    how = decisions.shared.get(projection.node)
    if how is None or projection.obstacle is not None:
        return None
    detail = f"{how}, so the projection stays out of the pack of {projection.reads.name}"
    return Decline(Reason.WEIGHT_SHARED, projection.node.name, detail)


def _without_company(decisions: Decisions, joined: set[Node]) -> Iterable[LowRankPath]:
    """A path for each down-projection that is in no pack with a base, and not for a reason that is told already."""
    alone = {path.down.node: path for path in decisions.paths if path.down.node not in joined}
    return [path for node, path in alone.items() if node not in decisions.shared]


def _alone(
    path: LowRankPath,
    others: Iterable[Projection],
    decisions: Decisions,
    regions: dict[Node, int],
    *,
    together: bool,
) -> Decline:
    """Why a down-projection is in no pack with a base: what became of the projections that read the same.

    Args:
        path: which the down-projection is of.
        others: what is no down-projection; the base that the path adapts comes first.
        decisions: what is shared.
        regions: the mode of each node.
        together: whether it is in a pack of down-projections.
    """
    down = path.down
    name = down.weight.name
    own = f"{name} packs with other down-projections alone" if together else f"{name} stays a GEMM of its own"
    for other in others:
        if other.reads is not down.reads:
            continue
        company = f"{other.weight.name} reads what {name} reads"
        if (kept_out := other.obstacle or _shared(other, decisions)) is not None:
            detail = f"{company}, but stays out of the pack ({other.node.name}): {own}"
            return Decline(kept_out.reason, path.add.name, detail)
        if regions[other.node] != regions[down.node]:
            return Decline(Reason.OTHER_MODE, path.add.name, f"{company}, but in another mode: {own}")
        if other.dtype != down.dtype:
            return Decline(Reason.DTYPE_DIFFERS, path.add.name, f"{company}, but in another dtype: {own}")
    detail = f"no base that could share a pack reads what {name} reads ({down.reads.name}): {own}"
    return Decline(Reason.READS_ANOTHER_VALUE, path.add.name, detail)
