"""Let another LoRA replace the one in a graph: its weights become inputs that need not be given."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from flora_fx.errors import ExportError
from flora_fx.ir import Role
from flora_fx.reporting.fusion_report import FusionReport

from ..lora.swappable import SwappablePart, SwappableWeight, check_swappable
from ..trace.capture import PREFIX

if TYPE_CHECKING:
    import onnx_ir

__all__ = ["make_swappable", "swappable_weights"]

_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<which>[AB])\.[^.]+\.weight")


def make_swappable(graph: onnx_ir.Model, fusion: FusionReport, model: nn.Module) -> tuple[SwappableWeight, ...]:
    """Let the LoRA in a graph be replaced; the graph is changed in place.

    Args:
        graph: as it was translated.
        fusion: of the program that it was translated from.
        model: the transformers model that was captured.

    Raises:
        ExportError: its LoRA is not fused completely.
    """
    adapter = check_swappable(model)
    if fusion.declines:
        raise ExportError(f"hot_swap needs an adapter that is fused completely; declined: {fusion.declines[0]}")
    weights = tuple(swappable_weights(graph, fusion))
    _check_scales(weights, fusion, model, adapter)
    for weight in weights:
        graph.graph.inputs.append(graph.graph.initializers[weight.name])
    return weights


def _check_scales(weights: tuple[SwappableWeight, ...], fusion: FusionReport, model: nn.Module, adapter: str) -> None:
    """Each B is stored with its scale: what comes later has another one."""
    factors = {str(piece.source): piece.factor for pack in fusion.packs for piece in pack.slices}
    for part in (part for weight in weights for part in weight.parts if part.which == "B"):
        layer: Any = model.get_submodule(part.module)
        factor = factors.get(f"{PREFIX}{part.module}.lora_B.{adapter}.weight", 1.0)
        if not math.isclose(factor, layer.scaling[adapter]):
            raise ExportError(
                f"hot_swap needs the scale of {part.module} in its B; let config.fold_scale be True, and the scaling a "
                "number instead of a tensor"
            )


def swappable_weights(graph: onnx_ir.Model, fusion: FusionReport) -> Iterator[SwappableWeight]:
    """Where the LoRA in a graph stands.

    Args:
        graph: as it was translated.
        fusion: of the program that it was translated from.

    Raises:
        ExportError: an adapter is no LoRA.
    """
    initializers = graph.graph.initializers
    places: dict[str, list[tuple[str, tuple[int, int], tuple[int, int]]]] = {}
    for pack in fusion.packs:
        pieces = [piece for piece in pack.slices if piece.role is not Role.BASE]
        if pieces and len(pack.shape) == 2:
            width = (0, pack.shape[1])
            places[f"_flora.{pack.name}"] = [
                (str(piece.source).removeprefix(PREFIX), piece.rows, piece.columns or width) for piece in pieces
            ]
    for name in initializers:
        if _LORA.fullmatch(plain := name.removesuffix(".T")):  # an A that stands alone
            sizes = [int(size) for size in initializers[name].shape or ()]
            out, wide = reversed(sizes) if name.endswith(".T") else sizes
            places[plain] = [(plain, (0, out), (0, wide))]
    for plain, pieces_of in places.items():
        transposed = f"{plain}.T" in initializers
        parts = []
        for source, rows, columns in pieces_of:
            match = _LORA.fullmatch(source)
            if match is None:
                raise ExportError(f"hot_swap needs a LoRA of PEFT; {source} belongs to another kind of adapter")
            parts.append(SwappablePart(match["module"], match["which"], rows, columns))
        yield SwappableWeight(f"{plain}.T" if transposed else plain, transposed, tuple(parts))
