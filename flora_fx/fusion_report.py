from __future__ import annotations
from dataclasses import dataclass
from typing import Any
from .ir import *
@dataclass(frozen=True)
class FusionReport:
    packs: Any; fused: Any; declines: Any; ops_before: Any; ops_after: Any; seconds: Any; pictures: Any
