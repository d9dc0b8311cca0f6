"""Fuse low-rank adapters (LoRA and its relatives) into the projections they belong to.

What to use:

    torch.compile(model, backend="flora")       inference and training; nothing has to be imported
    flora_fx.backend.last_report()              what the backend fused, what it did not, and why

    flora_fx.capture(model, *inputs)            a model as a graph
    flora_fx.fuse(graph)                        a graph that computes the same with fewer GEMMs
    flora_fx.report(fused)                      what was fused, what was not, and why
    flora_fx.verify(graph, fused, *inputs)      how far the two differ, in float64

    flora_fx.MixedAdapters(model, names)        a model whose rows each have an adapter of their own

    flora_fx.checkpoint.load_model(base, lora)  a model and its adapter from safetensors
    flora_fx.export.export_onnx(model, folder)  a model and its adapter as a directory for ONNX Runtime
    flora_fx.export.load(folder)                generate with it, swap adapters
    flora_fx.adapters.FloraConfig               FFBA: adapters made to be fused, a method of PEFT

Nothing is merged: the weights stay live. All errors that are raised on purpose are a `FloraError`; each function's help
lists its own, and has an example.

>>> import torch, flora_fx
>>> class Lora(torch.nn.Module):
...     def __init__(self):
...         super().__init__()
...         self.w, self.a, self.b = (torch.nn.Linear(i, o, bias=False) for i, o in [(6, 5), (6, 2), (2, 5)])
...     def forward(self, x):
...         return self.w(x) + 0.5 * self.b(self.a(x))
>>> x = torch.randn(3, 6)
>>> graph = flora_fx.capture(Lora().requires_grad_(False), x)
>>> fused = flora_fx.fuse(graph)
>>> flora_fx.report(fused).fused
('b.weight',)
>>> flora_fx.verify(graph, fused, x).max_rel < 1e-12
True
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .checkout import find_folders_beside

if TYPE_CHECKING:
    from .capturing import capture
    from .config import FuseConfig
    from .errors import (
        AdapterError,
        CaptureError,
        CheckpointNotFoundError,
        ExportError,
        FloraError,
        MissingExtraError,
        TieError,
    )
    from .fusing import fuse, report
    from .ir import Decline, Pack, Reason, Role, Slice
    from .mixed.model import MixedAdapters
    from .reporting.fusion_report import FusionReport
    from .verifying import Verification, verify

__version__ = "0.1.0"

find_folders_beside()

__all__ = [
    "AdapterError",
    "CaptureError",
    "CheckpointNotFoundError",
    "Decline",
    "ExportError",
    "FloraError",
    "FuseConfig",
    "FusionReport",
    "MissingExtraError",
    "MixedAdapters",
    "Pack",
    "Reason",
    "Role",
    "Slice",
    "TieError",
    "Verification",
    "capture",
    "fuse",
    "report",
    "verify",
]

_HOMES = {
    "AdapterError": "errors",
    "CaptureError": "errors",
    "CheckpointNotFoundError": "errors",
    "Decline": "ir",
    "ExportError": "errors",
    "FloraError": "errors",
    "FuseConfig": "config",
    "FusionReport": "reporting.fusion_report",
    "MissingExtraError": "errors",
    "MixedAdapters": "mixed.model",
    "Pack": "ir",
    "Reason": "ir",
    "Role": "ir",
    "Slice": "ir",
    "TieError": "errors",
    "Verification": "verifying",
    "capture": "capturing",
    "fuse": "fusing",
    "report": "fusing",
    "verify": "verifying",
}
"""In which module each name is. That is imported when the name is first asked for: `flora-fx --help` needs no torch."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
