"""That the quantized weights of a graph are the source's, bit for bit, and that their operators compute with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flora_fx.errors import ExportError
from flora_fx.ir import Role
from flora_fx.quantized import QuantizedWeight
from flora_fx.reporting.fusion_report import FusionReport

from ..run.session import provider_name, usable_providers
from ..trace.capture import PREFIX
from ..trace.model import private_copy
from ..trace.quantized_base import QuantizedBase
from .quantized_bits import StoredWeight, stored_weights
from .quantized_probe import Probe, probe

__all__ = ["base_notes", "check_base", "exact_copy"]

_CODES = ".codes"
_DTYPES = {"FLOAT": torch.float32, "FLOAT16": torch.float16, "BFLOAT16": torch.bfloat16}


def exact_copy(model: nn.Module) -> nn.Module:
    """What an export is compared with: in float64, in which the weights are exact, too.

    In float32 where attention is the one that transformers calls eager. That adds the least number of its dtype to what
    is masked and takes the softmax in float32: of float64's least number -inf is left, and of a row that is masked as a
    whole, as that of padding is, NaN.
    """
    configs = (getattr(module, "config", None) for module in model.modules())
    eager = any(getattr(config, "_attn_implementation", None) == "eager" for config in configs)
    return private_copy(model, torch.float32 if eager else torch.float64)


def check_base(
    graphs: Sequence[Path], base: QuantizedBase, fusion: FusionReport, providers: Sequence[Any]
) -> dict[str, Any]:
    """Read a graph's quantized weights back, compare them with the source's, and try their operators.

    Args:
        graphs: the files.
        base: what was written.
        fusion: what was fused: which layers' codes stand in which pack.
        providers: see `usable_providers`.

    Returns:
        what `Manifest.base` holds.

    Raises:
        ExportError: a number differs, a layer is missing, or an operator computes something else.
    """
    usable = usable_providers(providers)
    packs = _packs(fusion)
    waiting = set(base.layers)
    operators: Counter[str] = Counter()
    probes: dict[Any, Probe] = {}
    for stored in (stored for graph in graphs for stored in stored_weights(graph)):
        rows = len(stored.values)
        parts = packs.get(stored.name) or [(stored.name, (0.0, 1.0))]
        for name, (start, stop) in parts:
            layer = name.removesuffix(_CODES)
            if layer not in base.layers:
                raise ExportError(f"the export holds codes {name}, which are no layer's; please report it")
            _compare(
                layer,
                base.layers[layer],
                stored,
                torch.from_numpy(stored.values[round(start * rows) : round(stop * rows)]),
            )
            waiting.discard(layer)
        operators[stored.operator] += 1
        if stored.operator != "MatMul":
            seen = _asked(stored, usable)
            key = replace(seen, name="", values=None)  # type: ignore[arg-type]
            if key not in probes:
                probes[key] = probe(seen, usable)
    if waiting:
        raise ExportError(f"the export lacks the weight of {min(waiting)}; please report it with the model's config")
    return {
        "forms": dict(base.forms),
        "activations": base.activations,
        "sources": dict(Counter(weight.source for weight in base.layers.values())),
        "operators": dict(operators),
        "bit_equal": len(base.layers),
        "probes": [asdict(found) for found in probes.values()],
    }


def base_notes(base: Mapping[str, Any]) -> list[str]:
    """What a reader should know of a quantized base.

    Args:
        base: what `check_base` returned.
    """
    sources = "; ".join(f"{count} × {source}" for source, count in base["sources"].items())
    written = ", ".join(f"{count} {operator}" for operator, count in base["operators"].items() if operator != "MatMul")
    how = {
        "keep": f"kept in the graph ({written})",
        "dequantize": "in few bits in the file, in full when it is loaded",
    }
    forms = " and ".join(f"{kind} {how[form]}" for kind, form in base["forms"].items())
    notes = [f"quantized base ({sources}): {forms}; read back, all weights are equal bit for bit"]
    if base["activations"] == "int8":
        notes.append("activations are rounded to int8 in front of each kept weight: the errors below are of that")
    return notes


def _packs(fusion: FusionReport) -> Mapping[str, list[tuple[str, tuple[float, float]]]]:
    """The layers whose codes stand in each pack, with the share of the rows that they begin and end at."""
    found = {}
    for pack in fusion.packs:
        pieces = [piece for piece in pack.slices if piece.role is Role.BASE and str(piece.source).endswith(_CODES)]
        if pieces:
            found[f"_flora.{pack.name}"] = [
                (str(piece.source).removeprefix(PREFIX), (piece.rows[0] / pack.shape[0], piece.rows[1] / pack.shape[0]))
                for piece in pieces
            ]
    return found


def _compare(layer: str, source: QuantizedWeight, stored: StoredWeight, values: Tensor) -> None:
    """In float32; of a weight that the graph dequantizes, rounded to what it multiplies with."""
    expected = source.dequantize(torch.float32)
    if stored.operator == "MatMul":
        expected = expected.to(_DTYPES[stored.dtype]).to(values.dtype)
    elif source.order is not None:  # the graph puts the columns of x in order
        expected = expected[:, source.order]
    if values.shape != expected.shape or not torch.equal(values, expected):
        differ = int((values != expected).sum()) if values.shape == expected.shape else expected.numel()
        raise ExportError(
            f"the weight of {layer} was written by {stored.operator} and read back as another one: {differ} of "
            f"{expected.numel()} numbers differ. Nothing was written; please report it with the model's config"
        )


def _asked(stored: StoredWeight, usable: Sequence[Any]) -> StoredWeight:
    """On a CPU, which has no bfloat16 kernels, the export is checked in float32; the operator is asked in that, too."""
    alone = [provider_name(provider) for provider in usable] == ["CPUExecutionProvider"]
    return replace(stored, dtype="FLOAT") if alone and stored.dtype == "BFLOAT16" else stored
