"""Exported graphs as contenders: each in a plain ONNX Runtime session, with the same options.

Those whose past and present may be one buffer (GroupQueryAttention without a bias: ours of target ``"decoder"`` and the
onnxruntime-genai builder's) all run as `flora_fx.export.Decoder` runs its own: one buffer per layer, allocated and
bound once. The others return a present that is longer than the past.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flora_fx.errors import ExportError, FloraError, require
from flora_fx.export import Decoder, Manifest
from flora_fx.export.directory.genai_config import GENAI_CONFIG
from flora_fx.export.directory.manifest import MANIFEST, read_manifest
from flora_fx.export.run.session import Session
from flora_fx.measuring.sessions import session_options

from .contender import Contender
from .onnx_exports import PREFILL, PROVIDERS, decode_graph
from .settings import SHAPES, Settings
from .step import empty_cache

__all__ = ["GrowingContender", "SharedContender", "onnx_contenders"]

_Cache = dict[tuple[int, str], Any]
"""``onnxruntime.OrtValue`` by layer and by ``key`` or ``value``."""


Entries = Sequence[tuple[str, str]]
"""Of a session's configuration: keys and values."""


def onnx_contenders(
    settings: Settings, graphs: Mapping[str, Path | str], room: int, entries: Entries = ()
) -> dict[str, Contender | str]:
    """Load what `write_graphs` wrote.

    Args:
        settings: what the graphs were written for.
        graphs: by name, a folder, or why there is none; loaded in this order.
        room: tokens after the prompt; memory is allocated for both.
        entries: of the configuration of their sessions, beside those that all have.

    Returns:
        by the same names: what runs it, or why nothing does (ONNX Runtime cannot load it, or there is no graph).

    Raises:
        MissingExtraError: onnxruntime is not installed.
    """
    require("onnxruntime", "onnx")
    loaded: dict[str, Contender | str] = {}
    for name, graph in graphs.items():
        try:
            loaded[name] = graph if isinstance(graph, str) else _load(settings, graph, room, entries)
        except FloraError as error:
            loaded[name] = str(error)
    return loaded


def _load(settings: Settings, directory: Path, room: int, entries: Entries = ()) -> Contender:
    if not _shares(directory):
        return GrowingContender(settings, directory, entries)
    if settings.device == "cpu":
        return SharedContender(settings, directory, room, entries)
    try:
        captured = SharedContender(settings, directory, room, entries, cuda_graph=True)
        captured.prefill(torch.zeros(settings.batch, 2, dtype=torch.int64))
        captured.decode(torch.zeros(settings.batch, 1, dtype=torch.int64))
    except ExportError as error:
        plain = SharedContender(settings, directory, room, entries)
        plain.note = f"runs without a CUDA graph: {error}"
        return plain
    return captured


def _shares(directory: Path) -> bool:
    """Whether a graph's exporter says that past and present may be one buffer."""
    config = directory / GENAI_CONFIG
    return config.exists() and bool(json.loads(config.read_text())["search"]["past_present_share_buffer"])


def _session(settings: Settings, path: Path, entries: Entries, *, cuda_graph: bool = False) -> Session:
    providers = [PROVIDERS[settings.device]]
    options = session_options(settings.threads, entries)
    session = Session(path, providers=providers, session_options=options, cuda_graph=cuda_graph)
    if session.device != settings.device:
        raise ExportError(f"ONNX Runtime runs {path} on {session.device}, not on {settings.device}")
    return session


class SharedContender:
    """One exported model with one buffer per layer for its keys and values; see `Contender`.

    Args:
        settings: threads, device, shape of the cache.
        directory: a folder of `write_graphs`.
        room: tokens after the prompt.
        entries: of the session's configuration.
        cuda_graph: capture the decode step as a CUDA graph.

    Attributes:
        note: what readers of its figures should know.

    Raises:
        ExportError: ONNX Runtime cannot load the graph on the device, or not as a CUDA graph.
    """

    compiled = False

    def __init__(
        self, settings: Settings, directory: Path, room: int, entries: Entries = (), *, cuda_graph: bool = False
    ) -> None:
        session = _session(settings, decode_graph(directory), entries, cuda_graph=cuda_graph)
        self._cache = Decoder(session, _manifest(settings, directory, session)).new_cache()
        self._room = room
        self.note = ""

    def prefill(self, prompt: Tensor) -> Tensor:
        """Start a new sequence: tokens [batch, prompt] -> logits [batch, vocabulary]."""
        ids = prompt.cpu()
        return self._cache.prefill(ids, torch.ones_like(ids), self._room).tensor

    def decode(self, token: Tensor) -> Tensor:
        """Go on by one token: [batch, 1] -> logits [batch, vocabulary]."""
        return self._cache.decode(token[:, 0].tolist()).tensor


def _manifest(settings: Settings, directory: Path, session: Session) -> Manifest:
    """The export's own, or what it would say of a peer's graph."""
    if (directory / MANIFEST).exists():
        return read_manifest(directory, verify=False)
    shape: Any = SHAPES[settings.shape]
    return Manifest(
        kind="causal-lm",
        architecture=settings.shape,
        dtype=settings.dtype,
        inputs=list(session.inputs),
        outputs=session.outputs,
        target="decoder",
        layers=settings.depth,
        kv_heads=shape["num_key_value_heads"],
        head_dim=shape["head_dim"],
        vocab_size=settings.vocabulary,
        max_positions=shape["max_position_embeddings"],
    )


class GrowingContender:
    """One exported model with its growing cache; see `Contender`.

    Tokens, keys, values and logits stay on the device: the present of one step is the past of the next one.

    Args:
        settings: threads, device, shape of the cache.
        directory: a folder of `write_graphs`.
        entries: of the configuration of its sessions.

    Raises:
        ExportError: ONNX Runtime cannot load the graph on the device.
    """

    compiled = False
    note = ""

    def __init__(self, settings: Settings, directory: Path, entries: Entries = ()) -> None:
        prefill = directory / PREFILL
        self._decode = _Graph(settings, decode_graph(directory), entries)
        self._prefill = _Graph(settings, prefill, entries) if prefill.exists() else self._decode
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

    def __init__(self, settings: Settings, path: Path, entries: Entries) -> None:
        self._session = _session(settings, path, entries)
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
