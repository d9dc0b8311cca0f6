"""From a transformers model with adapters to a fused ONNX directory, and back to tokens on ONNX Runtime.

    source -> tracing -> flora_fx.fuse -> lowering -> checking -> directory, manifest
    loading -> manifest, session -> decoder (cache, swapping) | seq2seq_decoder | encoder
    options -> rules, sampling, stopping: how the tokens of both are chosen; generation: what the model asks for

A causal LM goes by target "decoder" (decoder_tracing, rotary, parts, decoder_lowering, genai), or by the general one.

Only ``import flora_fx.export`` works with torch alone; each function asks for the extras that it needs.
"""

from __future__ import annotations

from .decoder import Decoder
from .encoder import Encoder
from .exporting import export_onnx
from .forms import DECODER_FORMS, ONNX_FORMS
from .generated import Generated, Streamer
from .loading import load
from .manifest import Manifest
from .options import GenerationOptions
from .result import ExportResult
from .sampling import Sampling
from .seq2seq_decoder import Seq2Seq

__all__ = [
    "DECODER_FORMS",
    "ONNX_FORMS",
    "Decoder",
    "Encoder",
    "ExportResult",
    "Generated",
    "GenerationOptions",
    "Manifest",
    "Sampling",
    "Seq2Seq",
    "Streamer",
    "export_onnx",
    "load",
]
