"""Weights of an exported LoRA that another one may replace: initializers that are inputs of the graph as well.

ONNX Runtime neither folds nor pre-packs an initializer that may be overridden. Who does not override it
(onnxruntime-genai, say) gets the adapter that was exported.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from flora_fx.errors import ExportError
from flora_fx.ir import Role
from flora_fx.reporting.fusion_report import FusionReport

from ..trace.capture import PREFIX
from .reading import check_settings

if TYPE_CHECKING:
    import onnx_ir

__all__ = ["LivePart", "LiveWeight", "check_swappable", "make_live"]

_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<which>[AB])\.[^.]+\.weight")


@dataclass(frozen=True)
class LivePart:
    """Where one matrix of a LoRA stands in a weight [out, in].

    Attributes:
        module: the layer that it adapts, as the transformers model names it.
        which: ``"A"`` [rank, in] or ``"B"`` [out, rank]; B with its scale.
        rows, columns: ranges.
    """

    module: str
    which: str
    rows: tuple[int, int]
    columns: tuple[int, int]


@dataclass(frozen=True)
class LiveWeight:
    """An overridable initializer.

    Attributes:
        name: of the initializer, and of the input.
        transposed: stored as [in, out].
        parts: the matrices that may be replaced; all else in it stays.
    """

    name: str
    transposed: bool
    parts: tuple[LivePart, ...]

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> LiveWeight:
        """From the JSON of `dataclasses.asdict`."""
        parts = (
            LivePart(part["module"], part["which"], tuple(part["rows"]), tuple(part["columns"]))
            for part in content["parts"]
        )
        return cls(content["name"], content["transposed"], tuple(parts))


def check_swappable(model: nn.Module) -> str:
    """The name of a model's LoRA.

    Args:
        model: a transformers model with PEFT's layers in it.

    Raises:
        ExportError: it has no active adapter, or several.
        AdapterError: it has another adapter than a LoRA of linear layers.
    """
    peft: Any = sys.modules.get("peft")  # who has an adapter has imported it
    layers = [m for m in model.modules() if peft is not None and isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer)]
    active = sorted({name for layer in layers if not layer.disable_adapters for name in layer.active_adapters})
    if len(active) != 1:
        has = f"it has {', '.join(active)}" if active else "it has none"
        raise ExportError(f"hot_swap needs a model with one active LoRA of PEFT; {has}")
    (adapter,) = active
    configs: Any = model.peft_config
    check_settings(configs[adapter].to_dict(), f"the model's adapter {adapter!r}")
    return adapter


def make_live(graph: onnx_ir.Model, fusion: FusionReport, model: nn.Module) -> tuple[LiveWeight, ...]:
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
    weights = tuple(_live_weights(graph, fusion))
    _check_scales(weights, fusion, model, adapter)
    for weight in weights:
        graph.graph.inputs.append(graph.graph.initializers[weight.name])
    return weights


def _check_scales(weights: tuple[LiveWeight, ...], fusion: FusionReport, model: nn.Module, adapter: str) -> None:
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


def _live_weights(graph: onnx_ir.Model, fusion: FusionReport) -> Iterator[LiveWeight]:
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
            parts.append(LivePart(match["module"], match["which"], rows, columns))
        yield LiveWeight(f"{plain}.T" if transposed else plain, transposed, tuple(parts))
