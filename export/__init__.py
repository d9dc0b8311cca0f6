"""From a transformers model with adapters to a fused ONNX directory, and back to tokens on ONNX Runtime.

    source -> tracing -> flora_fx.fuse -> lowering -> checking -> directory, manifest
    loading -> manifest, cuda_graph -> decoder (text_cache, cache, memory, swapping), conversation -> session, buffer
            -> seq2seq_decoder | encoder -> session
    options -> rules, sampling, stopping, ending: how the tokens of both are chosen; generation: what the model asks for

A causal LM goes by target "decoder" (decoder_tracing, rotary, parts, decoder_lowering, genai), or by the general one.

Tensors of torch are on the CPU, whatever the session's device: what callers pass is put there first, and what runs
return comes there, but for what the next run needs. That stays where it is: `Logits`, values of ONNX Runtime (keys and
values, an encoder's states), and a `Buffer`'s memory, which the live weights of a LoRA are written to.

Only ``import flora_fx.export`` works with torch alone; each function asks for the extras that it needs.
"""

from __future__ import annotations

from .conversation import Conversation
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
from .stream import TokenStream

__all__ = [
    "DECODER_FORMS",
    "ONNX_FORMS",
    "Conversation",
    "Decoder",
    "Encoder",
    "ExportResult",
    "Generated",
    "GenerationOptions",
    "Manifest",
    "Sampling",
    "Seq2Seq",
    "Streamer",
    "TokenStream",
    "export_onnx",
    "load",
]
