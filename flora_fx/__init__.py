"""flora_fx fuses low-rank adapters (LoRA and its relatives) into the base projections of torch.fx graphs.

fused = flora_fx.fuse(flora_fx.capture(peft_model, input_ids))
print(flora_fx.report(fused))
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
