"""Exported graphs as contenders: each in a plain ONNX Runtime session, bound the same way."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flora_fx.errors import ExportError, FloraError, require
from flora_fx.export.session import Session

from .onnx_exports import PREFILL, PROVIDERS, decode_graph
from .settings import Settings
from .step import empty_cache

__all__ = ["OnnxContender", "onnx_contenders"]

_Cache = dict[tuple[int, str], Any]
"""``onnxruntime.OrtValue`` by layer and by ``key`` or ``value``."""


def onnx_contenders(settings: Settings, graphs: Mapping[str, Path | str]) -> dict[str, OnnxContender | str]:
    """Load what `write_graphs` wrote.

    Args:
        settings: what the graphs were written for.
        graphs: by name, a folder, or why there is none.

    Returns:
        by the same names: what runs it, or why nothing does (ONNX Runtime cannot load it, or there is no graph).

    Raises:
        MissingExtraError: onnxruntime is not installed.
    """
    require("onnxruntime", "onnx")
    loaded: dict[str, OnnxContender | str] = {}
    for name, graph in graphs.items():
        try:
            loaded[name] = graph if isinstance(graph, str) else OnnxContender(settings, graph)
        except FloraError as error:
            loaded[name] = str(error)
    return loaded


class OnnxContender:
    """One exported model with its growing cache; see `Contender`.

    Tokens, keys, values and logits stay on the device: the present of one step is the past of the next one.

    Args:
        settings: threads, device, shape of the cache.
        directory: a folder of `write_graphs`.

    Raises:
        ExportError: ONNX Runtime cannot load the graph on the device.
    """

    compiled = False

    def __init__(self, settings: Settings, directory: Path) -> None:
        prefill = directory / PREFILL
        self._decode = _Graph(settings, decode_graph(directory))
        self._prefill = _Graph(settings, prefill) if prefill.exists() else self._decode
        self._empty = _empty(settings)
        self._past: _Cache = {}
        self._length = 0

    def prefill(self, prompt: Tensor) -> Tensor:
        """Start a new sequence: tokens [batch, prompt] -> logits [batch, vocabulary]."""
        self._past, self._length = self._empty, 0
        return self._step(self._prefill, prompt)

    def decode(self, token: Tensor) -> Tensor:
        """Go on by one token: [batch, 1] -> logits [batch, vocabulary]."""
        return self._step(self._decode, token)

    def _step(self, graph: _Graph, tokens: Tensor) -> Tensor:
        self._length += tokens.shape[1]
        logits, self._past = graph(tokens, self._length, self._past)
        return logits[:, -1]


def _empty(settings: Settings) -> _Cache:
    values = iter(empty_cache(settings, 0))
    return {(layer, kind): _value(next(values)) for layer in range(settings.depth) for kind in ("key", "value")}


class _Graph:
    """One session, whoever exported it: inputs are found by their names."""

    def __init__(self, settings: Settings, path: Path) -> None:
        ort = require("onnxruntime", "onnx")
        options = ort.SessionOptions()
        options.intra_op_num_threads = settings.threads
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3
        # Threads wait actively within a run, as by default, and not after it: that would slow down who comes next
        # (seen on 2 cores: three sessions and a torch function in turns all took twice as long as alone).
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self._session = Session(path, providers=[PROVIDERS[settings.device]], session_options=options)
        if self._session.device != settings.device:
            raise ExportError(f"ONNX Runtime runs {path} on {self._session.device}, not on {settings.device}")
        self._past = {name: slot for name in self._session.inputs if (slot := _slot(name))}
        self._present = {name: slot for name in self._session.outputs if (slot := _slot(name))}

    def __call__(self, tokens: Tensor, length: int, past: _Cache) -> tuple[Tensor, _Cache]:
        """Tokens and what was before -> logits [batch, new, vocabulary] and what is after, ``length`` tokens."""
        batch, new = tokens.shape
        plain = {
            "input_ids": tokens,
            "attention_mask": tokens.new_ones(batch, length),
            "position_ids": torch.arange(length - new, length, device=tokens.device).repeat(batch, 1),
        }
        inputs = {name: _value(tensor) for name, tensor in plain.items() if name in self._session.inputs}
        inputs |= {name: past[slot] for name, slot in self._past.items()}
        if tokens.is_cuda:
            torch.cuda.current_stream().synchronize()  # ONNX Runtime has a stream of its own
        outputs = self._session.run(inputs, keep=self._session.outputs)
        present = {slot: outputs[name] for name, slot in self._present.items()}
        return torch.utils.dlpack.from_dlpack(outputs["logits"]), present


def _slot(name: str) -> tuple[int, str] | None:
    """Layer and ``key`` or ``value`` in ``past_key_values.3.key`` as in ``output.past_key_values.layers.3.keys``."""
    found = re.search(r"\.(\d+)\.(key|value)s?$", name)
    return (int(found[1]), found[2]) if found else None


def _value(tensor: Tensor) -> Any:
    """The same memory for ONNX Runtime."""
    return require("onnxruntime", "onnx").OrtValue.from_dlpack(tensor.contiguous())
