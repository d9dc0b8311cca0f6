"""From a transformers model with adapters to a fused ONNX directory, and back to tokens on ONNX Runtime.

    trace/       from a model to a traced program
    rewrite/     programs, looked at and rewritten: before they are fused, and after
    translate/   from a fused program to an ONNX graph
    directory/   what lies on disk, and that it is whole
    check/       whether an export computes what its model computes
    run/         what runs it: sessions, their memory, decoders and encoders
    tokens/      how tokens are chosen, until a text ends
    lora/        LoRAs as PEFT saves them, and the weights that another LoRA may replace

`exporting` leads a model through them; `targets` says what differs between a decoder, a causal LM of plain operators,
an encoder-decoder and an encoder. A new way to export a model is a class in there.

Tensors of torch are on the CPU, whatever the session's device: what callers pass is put there first, and what runs
return comes there, but for what the next run needs. That stays where it is: `Logits`, values of ONNX Runtime (keys and
values, an encoder's states), and a `Buffer`'s memory, which the swappable weights of a LoRA are written to.

Only ``import flora_fx.export`` works with torch alone; each function asks for the extras that it needs.
"""

from __future__ import annotations

from .directory.manifest import Manifest
from .exporting import export_onnx
from .forms import DECODER_FORMS, ONNX_FORMS
from .lora.slots import Slot
from .result import ExportResult
from .run.conversation import Conversation
from .run.decoder import Decoder
from .run.encoder import Encoder
from .run.loading import load, load_decoder
from .run.seq2seq import Seq2Seq
from .tokens.generated import Generated, Streamer
from .tokens.options import GenerationOptions
from .tokens.sampling import Sampling
from .tokens.stream import TokenStream

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
    "Slot",
    "Streamer",
    "TokenStream",
    "export_onnx",
    "load",
    "load_decoder",
]
