"""What a report of a fused FFBA model has to say: GEMMs, derived from the equations; what was fused and widened."""

from __future__ import annotations

from torch import nn

from flora_fx import FusionReport, Reason
from flora_fx.ir import Pack, Role

from .reference import (
    LAYERS,
)

FIRST = (3, 2)
"""How many projections read the input of a Llama block: q, k, v; gate, up."""


def gemms(
    place: str,
    *,
    layers: int = LAYERS,
    layout: str = "joined",
    widened: bool = True,
    stacked: bool = True,
) -> int:
    """The GEMMs of a fused Llama, counted from the equations.

    Args:
        place: a key of `PLACES`.
        layers: how many there are.
        layout: of `FuseConfig`. Ahead, an A joins the projections that read the same only where these are several and
            its B's wait for something else than it.
        widened: whether a B becomes columns of the projection that it writes onto where its z is there before.
        stacked: whether B's of one z that is computed with their projections are one GEMM.
    """
    ahead = layout == "ahead" and stacked
    joined, onto = (2 if layout == "beside" else 1), (0 if widened else 1)
    inside, alone = (2 if ahead else joined), (1 if layout == "joined" else 2)
    total = 1  # the head
    blocks = FIRST * layers
    for index, first in enumerate(blocks):
        together = 0 if ahead and widened else 1 if stacked else first
        match place:
            case "block":
                total += joined + 1 + onto
            case "forward":
                total += inside + together + 1
            case "shared":
                total += inside + together + 1 + onto
            case "backward":  # nothing joins the first projections, and nothing A
                total += first + 1 + 1 + onto
            case "cross":
                written, read = index > 0, index < len(blocks) - 1
                if written and widened:
                    total += 1
                else:
                    total += 2 * first if written else first
                total += alone if read else 1
    return total


def ups_of(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters() if ".flora_B." in name}


def assert_all_fused(report: FusionReport, model: nn.Module, place: str = "block") -> None:
    """Every up-projection, and nothing declined but what reads a block's input before its norm."""
    assert set(report.fused) == ups_of(model)
    assert len(report.fused) == len(ups_of(model)) > 0
    found = [decline.reason for decline in report.declines]
    assert found == [Reason.READS_ANOTHER_VALUE] * (len(report.fused) if place == "backward" else 0)


def widened(report: FusionReport) -> list[Pack]:
    """Packs in which an up-projection stands beside a base."""
    return [pack for pack in report.packs if {Role.BASE, Role.UP} <= {piece.role for piece in pack.slices}]
