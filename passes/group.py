"""Group what reads one value.

    q = linear(x, W_q)   k = linear(x, W_k)   z_q = linear(x, A_q)        Group(x, bases=(q, k), downs=(z_q,),
    q' = q + s·linear(z_q, B_q)                                                 writes=(q' onto q by z_q and B_q,))

A path is written inside its group when all of it depends on the group's read alone: its down-projection and the
projection it is added to are members, its scale is a number. Any other path is written where its add stands.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from torch.fx import Node

from flora_fx.config import FuseConfig
from flora_fx.ir import Decline, LowRankPath, Projection, Reason
from flora_fx.program import Program

from .decide import Decisions
from .modes import find_regions
from .paths import live_users
from .values import RESHAPES, Values, operation

__all__ = ["Group", "Grouping", "Write", "group"]


@dataclass(frozen=True, eq=False)
class Write:
    """A path that is written inside a group: onto the output of one of its bases.

    Attributes:
        base: the projection whose output it is added to.
        path: the path.
        chain: the nodes between the projection and the add's target (reshapes, no-ops, earlier adds), in graph order.
    """

    base: Projection
    path: LowRankPath
    chain: tuple[Node, ...]


@dataclass(frozen=True, eq=False)
class Group:
    """Projections that read one value."""

    reads: Node
    bases: tuple[Projection, ...]
    downs: tuple[Projection, ...]
    writes: tuple[Write, ...]


@dataclass(frozen=True, eq=False)
class Grouping:
    """The groups, the paths to write one by one, and what could not join its group."""

    groups: tuple[Group, ...]
    singles: tuple[LowRankPath, ...]
    declines: tuple[Decline, ...]


def group(
    program: Program,
    values: Values,
    projections: tuple[Projection, ...],
    decisions: Decisions,
    config: FuseConfig,
) -> Grouping:
    """Sort projections into groups and paths into groups or singles."""
    order = {node: index for index, node in enumerate(program.graph.nodes)}
    ups = {path.up.node for path in decisions.paths}
    downs = {down.node: down for down in decisions.downs}
    regions = find_regions(program.graph)
    buckets: dict[tuple[Node, int, torch.dtype, torch.device], list[Projection]] = defaultdict(list)
    for projection in projections:
        if projection.node not in ups:
            member = downs.get(projection.node, projection)
            key = (member.reads, regions[member.node], member.dtype, member.weight.tensor.device)
            buckets[key].append(member)
    declines: list[Decline] = []
    groups: list[Group] = []
    home: dict[Node, int] = {}
    for (reads, *_), members in buckets.items():
        adapted = any(m.node in downs for m in members)
        if not adapted and not config.pack_base:
            continue
        free = [m for m in members if m.obstacle is None]
        private = [m for m in free if m.node not in decisions.shared]
        declines.extend(m.obstacle for m in members if m.obstacle is not None)
        declines.extend(_shared(m) for m in free if m.node in decisions.shared)
        private.sort(key=lambda m: order[m.node])
        if len(private) < 2:
            continue
        for member in private:
            home[member.node] = len(groups)
        bases = tuple(m for m in private if m.node not in downs)
        groups.append(Group(reads, bases, tuple(m for m in private if m.node in downs), ()))
    writes, singles = _place(values, decisions, groups, home)
    declines.extend(_strangers(decisions.paths, groups, home))
    return Grouping(
        tuple(Group(g.reads, g.bases, g.downs, tuple(writes[i])) for i, g in enumerate(groups)),
        tuple(singles),
        tuple(declines),
    )


class _Tip(NamedTuple):
    """Where the value of a base stands so far: its own node, or the last add that was written onto it."""

    group: int
    base: Projection
    node: Node
    chain: tuple[Node, ...]


def _place(
    values: Values, decisions: Decisions, groups: list[Group], home: dict[Node, int]
) -> tuple[dict[int, list[Write]], list[LowRankPath]]:
    tips = {b.node: _Tip(i, b, b.node, ()) for i, g in enumerate(groups) for b in g.bases}
    at: dict[Node, _Tip] = dict(tips)
    started: set[Node] = set()
    writes: dict[int, list[Write]] = defaultdict(list)
    singles: list[LowRankPath] = []
    for add, same in groupby(decisions.paths, key=lambda path: path.write):
        parts = tuple(same)
        tip = _tip_under(values, parts[0].target, at, started)
        outside = tip is None or any(
            part.factors or part.up.node in decisions.shared or home.get(part.down.node) != tip.group for part in parts
        )
        if tip is None or outside:
            singles.extend(parts)
            continue
        writes[tip.group].extend(Write(tip.base, part, tip.chain) for part in parts)
        started.add(tip.node)
        at[add] = tip._replace(node=add)
    return writes, singles


def _tip_under(values: Values, target: Node, at: dict[Node, _Tip], started: set[Node]) -> _Tip | None:
    """The base that a target is the output of, if no other add has branched off from it."""
    chain: list[Node] = []
    node = target
    while node not in at:
        operand = values.transparent(node)
        if operand is None:
            return None
        if operation(node) in RESHAPES:
            chain.append(node)
        node = operand
    tip = at[node]
    if node in started or (node is not tip.base.node and len(live_users(node)) != 1):
        return None
    return tip._replace(chain=(*tip.chain, *reversed(chain)))


def _shared(projection: Projection) -> Decline:
    detail = f"{projection.weight.name} is also used elsewhere, so it stays out of the pack of {projection.reads.name}"
    return Decline(Reason.WEIGHT_SHARED, projection.node.name, detail)


def _strangers(paths: tuple[LowRankPath, ...], groups: list[Group], home: dict[Node, int]) -> list[Decline]:
    """Down-projections that no base shares its read with: their paths are written, with a GEMM of their own."""
    declines = {}
    for path in paths:
        index = home.get(path.down.node)
        if index is None or not groups[index].bases:
            detail = (
                f"no projection shares what {path.down.weight.name} reads ({path.down.reads.name}): it stays a GEMM "
                "of its own, its up-projection accumulates"
            )
            declines[path.down.node] = Decline(Reason.READS_ANOTHER_VALUE, path.write.name, detail)
    return list(declines.values())
