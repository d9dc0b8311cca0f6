"""A token of one shape with its base in few bits, beside the same with plain weights; and what the weights take."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flora_fx.export import export_onnx, load
from flora_fx.measuring.method import compare
from flora_fx.measuring.sessions import session_options
from flora_fx.quantized.nearest import quantize_linears
from flora_fx.quantized.weight import Kind

from ..accuracy.methods import LORA, adapted
from ..contenders.models import make_model
from ..contenders.settings import SHAPES, Settings
from ..measure.isolated import Progress

__all__ = ["REFERENCE", "WAYS", "decode", "sizes"]

Way = tuple[Kind | None, int, bool, torch.dtype, dict[str, Any]]
REFERENCE = "float32, no adapter"
_PLAIN: dict[str, Any] = {}
WAYS: dict[str, Way] = {
    REFERENCE: (None, 0, False, torch.float32, _PLAIN),
    "float32, LoRA live": (None, 0, True, torch.float32, _PLAIN),
    "float16, LoRA live": (None, 0, True, torch.float16, _PLAIN),
    "4 bits kept, no adapter": ("affine", 32, False, torch.float32, {"base": "keep"}),
    "4 bits kept, LoRA live": ("affine", 32, True, torch.float32, {"base": "keep"}),
    "4 bits kept, int8 activations, LoRA live": (
        "affine",
        32,
        True,
        torch.float32,
        {"base": "keep", "activations": "int8"},
    ),
    "4 bits dequantized at load, LoRA live": ("affine", 32, True, torch.float32, {"base": "dequantize"}),
    "NF4 dequantized at load, LoRA live": ("nf4", 64, True, torch.float32, {"base": "dequantize"}),
    "NF4 kept, LoRA live": ("nf4", 64, True, torch.float32, {"base": "keep"}),
}
"""Kind and block of the weights, whether there is an adapter, the export's dtype and options, by what the table says.

One that is merged in float is the first row; one that is merged and put into 4 bits again is "4 bits kept, no adapter".
"""


def decode(settings: Settings, *, prompt: int, rounds: int, progress: Progress) -> list[dict[str, Any]]:
    """Time one token a round of a stream of each; the streams' caches grow alike.

    Args:
        settings: shape, depth, rank, threads.
        prompt: tokens that the streams begin with.
        rounds: tokens.
        progress: called with the steps done and in all.

    Returns:
        rows with ``way``, ``bytes`` of the file of weights, ``error`` (of the logits to PyTorch, over the largest), and
        the fields of a `Timing`.
    """
    warm_up, steps = 3, len(WAYS) + rounds
    tokens = torch.arange(prompt)[None] % 997
    rows: list[dict[str, Any]] = []
    streams: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="flora-quantized-") as place:
        for number, (name, way) in enumerate(WAYS.items()):
            result = export_onnx(_model(settings, way), Path(place, str(number)), dtype=way[3], **way[4])
            runner: Any = load(result.directory, session_options=session_options(settings.threads))
            stream = runner.stream(tokens, max_new_tokens=rounds + warm_up + 1, eos_token_id=[])
            next(stream)  # the prompt
            streams[name] = stream
            rows.append({"way": name, "bytes": result.files["model.onnx.data"], "error": result.max_rel_error})
            progress(number + 1, steps)
        calls: Mapping[str, Callable[[], Tensor]] = {name: partial(next, stream) for name, stream in streams.items()}
        timings = compare(
            calls,
            reference=REFERENCE,
            rounds=rounds,
            warm_up=warm_up,
            progress=lambda done, _: progress(len(WAYS) + done, steps),
        )
    return [{**row, **vars(timings[row["way"]])} for row in rows]


def _model(settings: Settings, way: Way) -> nn.Module:
    kind, block, live, _, _ = way
    model = make_model(settings, "base")
    if kind is not None:
        model = quantize_linears(model, kind, block=block)
    return _with_lora(model, settings) if live else model


def _with_lora(model: nn.Module, settings: Settings) -> nn.Module:
    torch.manual_seed(1)
    found: nn.Module = adapted(model, LORA, settings.rank, "CAUSAL_LM").eval()
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0, 0.02)
    return found


def sizes(settings: Settings, progress: Progress) -> list[dict[str, Any]]:
    """What the linear layers of one decoder layer of a shape take in a file, in float16 and in few bits.

    Args:
        settings: whose shape is measured, with one layer and few tokens.
        progress: called with the exports done and in all.

    Returns:
        rows with ``way`` and ``bytes`` of the linear layers' weights as they were written, with the adapter's (A and B)
        in ``adapter``.
    """
    one = replace(settings, layers=1)
    rows = []
    ways: dict[str, tuple[Kind | None, int]] = {
        "float16": (None, 0),
        "4 bits, groups of 128": ("affine", 128),
        "4 bits, groups of 32": ("affine", 32),
        "NF4, blocks of 64": ("nf4", 64),
    }
    for done, (name, (kind, block)) in enumerate(ways.items()):
        model = _small(one)
        if kind is not None:
            _round_scales(quantize_linears(model, kind, block=block))
        with tempfile.TemporaryDirectory(prefix="flora-quantized-") as place:
            export_onnx(_with_lora(model, one), Path(place, "out"), dtype=torch.float16, hot_swap=True)
            base, adapter = _held(Path(place, "out", "model.onnx"))
        rows.append({"way": name, "bytes": base, "adapter": adapter})
        progress(done + 1, len(ways))
    return rows


def _small(settings: Settings) -> nn.Module:
    """The shape with few tokens and positions, whose tables are no linear layer's."""
    import transformers

    shape = {**SHAPES[settings.shape], "num_hidden_layers": 1, "vocab_size": 64, "max_position_embeddings": 64}
    shape |= {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**shape))
    return model.half().eval()


def _round_scales(model: nn.Module) -> None:
    """Scales that float16 holds, as quantizers of float16 models write them."""
    for layer in model.modules():
        if getattr(layer, "kind", "") == "affine":
            layer.scales = layer.scales.half()


def _held(graph: Path) -> tuple[int, int]:
    """Bytes of the linear layers' weights in a graph, and of the adapter's."""
    import onnx

    proto = onnx.load(str(graph), load_external_data=False).graph
    inputs = {value.name for value in proto.input}
    held = {tensor.name: _bytes(tensor) for tensor in proto.initializer}
    adapter = sum(size for name, size in held.items() if name in inputs)
    others = sum(
        size
        for name, size in held.items()
        if name not in inputs and ("proj" in name or "_flora." in name or name.endswith((".codes", ".scales")))
    )
    return others, adapter


def _bytes(tensor: Any) -> int:
    return math.prod(tensor.dims) * {1: 4, 2: 1, 10: 2}.get(tensor.data_type, 8)
