"""From a transformers model with adapters to a fused ONNX directory, and back to tokens on ONNX Runtime.

    source -> tracing (attention) -> flora_fx.fuse -> lowering -> checking (widening) -> directory, manifest
    loading -> manifest, session -> decoder (sampling) | encoder

Only ``import flora_fx.export`` works with torch alone; each function asks for the extras that it needs.
"""

from __future__ import annotations

from .decoder import Decoder, Streamer
from .encoder import Encoder
from .exporting import ONNX_FORMS, export_onnx
from .loading import load
from .manifest import Manifest
from .result import ExportResult
from .sampling import Sampling

__all__ = [
    "ONNX_FORMS",
    "Decoder",
    "Encoder",
    "ExportResult",
    "Manifest",
    "Sampling",
    "Streamer",
    "export_onnx",
    "load",
]
