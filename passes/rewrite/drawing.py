"""What the report's picture shows of a group: see `flora_fx.reporting.sketch`."""

from __future__ import annotations

from collections.abc import Iterable

from flora_fx.passes.plan.group import Group, Placement
from flora_fx.passes.plan.layout import Layout
from flora_fx.passes.plan.names import Names
from flora_fx.reporting.sketch import Sketch, SketchPath

from .rows import GroupValues

__all__ = ["sketch_group"]


def sketch_group(group: Group, layout: Layout, values: GroupValues) -> Sketch:
    """Sketch a group as it was laid out and written."""
    bases, downs = layout.bases, layout.downs
    row = {base.node: index for index, base in enumerate(bases)}
    low = {down.node: index for index, down in enumerate(downs)}

    def drawn(placements: Iterable[Placement]) -> tuple[SketchPath, ...]:
        return tuple(
            SketchPath(row[p.base.node], low.get(p.path.down.node), p.path.up.weight.name, p.path.scale)
            for p in placements
        )

    return Sketch(
        Names.joined([member.weight.name for member in bases or downs]),
        group.reads.name,
        tuple((base.weight.name, base.out_features) for base in bases),
        tuple((down.weight.name, down.out_features) for down in downs),
        drawn(group.accumulated),
        drawn(group.widened),
        _gemms(group, layout, values),
        layout.apart,
    )


def _gemms(group: Group, layout: Layout, values: GroupValues) -> int:
    """How many GEMMs a group is now: packs and accumulations."""
    of_bases = len(layout.bases) if values.bases is None else 1
    of_downs = len(layout.downs) if values.low is None else int(not layout.bases or layout.apart > 0)
    together = values.bases is not None and values.low is not None
    return of_bases + of_downs + (len(layout.blocks) if together else len(group.accumulated))
