"""flora_fx fuses low-rank adapters (LoRA and its relatives) into the base projections of torch.fx graphs.

fused = flora_fx.fuse(flora_fx.capture(peft_model, input_ids))
print(flora_fx.report(fused))
"""

from __future__ import annotations

from .capturing import capture
from .checkout import find_folders_beside
from .config import FuseConfig
from .errors import AdapterError, CaptureError, ExportError, FloraError, MissingExtraError, TieError
from .fusing import fuse, report
from .ir import Decline, Pack, Reason, Role, Slice
from .reporting.fusion_report import FusionReport
from .verifying import Verification, verify

__version__ = "0.1.0"

find_folders_beside()

__all__ = [
    "AdapterError",
    "CaptureError",
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
