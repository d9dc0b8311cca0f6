"""What was fused, what was declined and why: for readers, for programs, and as a picture."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, overload

from flora_fx.ir import Decline, Pack, Role

from .notebook import Picture, as_html
from .sketch import Sketch, draw

__all__ = ["FusionReport", "combined"]


@dataclass(frozen=True)
class FusionReport:
    """The result of one `flora_fx.fuse`.

    Attributes:
        packs: the packed weights, with their slices.
        fused: the adapters that were fused, by the names of their up-projections' weights.
        declines: what was refused, or fused only in part: reason, node, detail.
        ops_before, ops_after: operations in the graph, by kind: ``gemm``, ``elementwise``, ``other``.
        seconds: time per pass.
        sketches: what `draw` draws.
        unrolled: the highest rank of an up-projection that was written as a product and a sum; 0 for none.
    """

    packs: tuple[Pack, ...]
    fused: tuple[str, ...]
    declines: tuple[Decline, ...]
    ops_before: Mapping[str, int]
    ops_after: Mapping[str, int]
    seconds: Mapping[str, float]
    sketches: tuple[Sketch, ...]
    unrolled: int

    def __repr__(self) -> str:
        return f"FusionReport({self.summary})"

    def _repr_html_(self) -> str:
        return as_html(str(self), self._repr_svg_())

    def _repr_svg_(self) -> str:
        return draw(self.sketches, _pattern)

    @property
    def summary(self) -> str:
        """How many adapters were fused and declined, and what became of the GEMMs: half a line."""
        gemms = f"{self.ops_before['gemm']} GEMMs before, {self.ops_after['gemm']} after"
        return f"{_count(self.fused, 'adapter')} fused, {len(self.declines)} declined, {gemms}"

    def __str__(self) -> str:
        total = sum(self.seconds.values())
        lines = [
            f"flora_fx: {_count(self.fused, 'adapter')} fused, {len(self.declines)} declined, {total * 1e3:.0f} ms"
        ]
        lines += ["", "operations    before   after"]
        lines += [f"  {kind:<12}{self.ops_before[kind]:>6}{self.ops_after[kind]:>8}" for kind in self.ops_before]
        if self.packs:
            rows = [(_pattern(pack.name), _members(pack), _shape(pack.shape)) for pack in self.packs]
            counts = Counter(rows)
            width, middle = max(len(name) for name, *_ in rows), max(len(members) for _, members, _ in rows)
            lines += ["", f"{'pack':<{width + 8}}{'slices':<{middle + 2}}shape"]
            lines += [
                f"  {name:<{width}} {'×' + str(count):>4} {members:<{middle}}  {shape}"
                for (name, members, shape), count in counts.items()
            ]
        if any(pack.held for pack in self.packs):
            lines += ["", "quantized bases have no row in floating point: the A's beside them are packs of their own"]
        if self.declines:
            lines += ["", "declined (node: reason: detail)"]
            alike = Counter((_pattern(d.node), d.reason, _pattern(d.detail)) for d in self.declines)
            lines += [f"  {node} ×{n}: {reason.value}: {detail}" for (node, reason, detail), n in alike.items()]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as `to_json` writes it."""
        return {
            "fused": list(self.fused),
            "packs": [
                {
                    "name": pack.name,
                    "shape": list(pack.shape),
                    "reads": pack.reads,
                    "slices": [{**asdict(piece), "role": piece.role.value} for piece in pack.slices],
                }
                for pack in self.packs
            ],
            "declines": [{"reason": d.reason.name, "node": d.node, "detail": d.detail} for d in self.declines],
            "ops_before": dict(self.ops_before),
            "ops_after": dict(self.ops_after),
            "seconds": dict(self.seconds),
            "unrolled": self.unrolled,
        }

    @property
    def inductor_options(self) -> dict[str, Any]:
        """What Inductor has to be told to make every unrolled sum a part of the kernel that reads it, for inference.

        For ``torch.compile(fused, options=report.inductor_options)``, and for AOTInductor's ``inductor_configs``; the
        backend gives it by itself. Without it a sum of more than 7 products is a loop inside of a kernel, which keeps
        the kernel from being joined with a normalization.
        """
        return {"unroll_reductions_threshold": self.unrolled + 1} if self.unrolled else {}

    def to_json(self) -> str:
        """The report as JSON: fused, packs (with slices), declines, ops_before, ops_after, seconds, unrolled."""
        return json.dumps(self.to_dict(), indent=2)

    @overload
    def draw(self) -> Picture: ...
    @overload
    def draw(self, path: str | Path) -> Path: ...
    def draw(self, path: str | Path | None = None) -> Picture | Path:
        """An SVG of the graph around the packs, before and after; layers that look alike are drawn once.

        Args:
            path: of the file to write; none is written by default.

        Returns:
            the path written; without one the picture, which a notebook shows.

        Raises:
            OSError: the file cannot be written.
        """
        picture = Picture(self._repr_svg_())
        if path is None:
            return picture
        target = Path(path)
        target.write_text(str(picture), encoding="utf-8")
        return target


def combined(reports: Sequence[FusionReport]) -> FusionReport:
    """One report of several graphs that were fused as one program."""

    def total(counts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        each = list(counts)
        return {kind: sum(count[kind] for count in each) for kind in each[0]}

    return FusionReport(
        packs=tuple(pack for report in reports for pack in report.packs),
        fused=tuple(name for report in reports for name in report.fused),
        declines=tuple(decline for report in reports for decline in report.declines),
        ops_before=total(report.ops_before for report in reports),
        ops_after=total(report.ops_after for report in reports),
        seconds=total(report.seconds for report in reports),
        sketches=tuple(sketch for report in reports for sketch in report.sketches),
        unrolled=max(report.unrolled for report in reports),
    )


def _pattern(name: str) -> str:
    """A name with its layer numbers left out, so that layers that look alike are one line.

    >>> _pattern("layers_12_mlp_gate_up"), _pattern("model.layers.3.mlp")
    ('layers_*_mlp_gate_up', 'model.layers.*.mlp')
    """
    return re.sub(r"(?<=[._])\d+(?=[._]|$)|(?<=_)\d+(?=\b)", "*", name)


def _count(items: Iterable[object], noun: str) -> str:
    number = len(list(items))
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _members(pack: Pack) -> str:
    roles = Counter(piece.role for piece in pack.slices)
    told = " + ".join(f"{roles[role]} {role.value}" for role in Role if roles[role])
    return f"{told}, {pack.held}" if pack.held else told


def _shape(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))
