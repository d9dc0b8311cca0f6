"""Operators of ``flora_ort`` whose rows choose among the LoRAs of slots.

    LoraAdd(p, B)      ->      LoraAdd(p, B, ids)      adapters: which of B's rows each slot has, by block

B holds the slots of a projection below each other. A row reads those of its own slot, and no others.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from flora_fx.errors import ExportError

from ..directory.operators import DOMAIN
from ..lora.stacking import SlotPlan
from ..lora.swappable import SwappableWeight
from .lora_sums import attribute, bias_place

if TYPE_CHECKING:
    import onnx_ir

__all__ = ["let_operators_choose"]

_MOST_EDGES = 256
"""That an operator takes."""


def let_operators_choose(
    model: onnx_ir.Model, weights: Sequence[SwappableWeight], plan: SlotPlan, ids: onnx_ir.Value
) -> None:
    """Give the ids to the operators that a graph has, if any; it is changed in place.

    Args:
        model: a decoder's graph.
        weights: where the LoRAs stand in it.
        plan: the slots.
        ids: the slot of each row [batch].

    Raises:
        ExportError: an operator does not have room for so many.
    """
    by_name = {weight.name: weight for weight in weights}
    for node in model.graph:
        if node.domain != DOMAIN or "blocks" not in node.attributes:
            continue
        up = node.inputs[1]
        assert up is not None
        edges: list[int] = []
        for begin, end, first, last, source in zip(*[iter(attribute(node, "blocks", ()))] * 5, strict=True):
            edges += _edges(by_name[str(up.name)], plan, (first, last), (source, source + end - begin))
        if len(edges) > _MOST_EDGES:
            raise ExportError(
                f"the operators of flora_ort have no room for {len(plan.slots)} adapters of the projections that "
                f"{node.name} reads; pass custom_ops=False"
            )
        _give(node, ids, edges)


def _edges(weight: SwappableWeight, plan: SlotPlan, rows: tuple[int, int], columns: tuple[int, int]) -> list[int]:
    """Where within some rows of B those of each slot begin, and those of the last one end."""
    found = {
        tuple(itertools.accumulate(plan.widths[part.module], initial=part.columns[0]))
        for part in weight.parts
        if part.which == "B" and part.rows[0] < columns[1] and columns[0] < part.rows[1]
    }
    if len(found) != 1 or (edges := [*found.pop()])[-1] != rows[1] or edges[0] != rows[0]:
        raise ExportError(f"the adapters in {weight.name} do not stand slot by slot; pass custom_ops=False")
    return edges


def _give(node: onnx_ir.Node, ids: onnx_ir.Value, edges: list[int]) -> None:
    import onnx_ir

    place = bias_place(node) + 2
    node.resize_inputs(place + 1)
    node.replace_input_with(place, ids)
    node.attributes.add(onnx_ir.AttrInt64s("adapters", edges))
