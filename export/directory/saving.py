"""Write the graphs of an export with one file of weights between them."""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from flora_fx.errors import require
from flora_fx.storage.mapped import give_back

from .manifest import DATA

if TYPE_CHECKING:
    import onnx_ir

__all__ = ["save_graphs"]

_READ = 64 * 2**20
"""After so many bytes of weights have been read, they are given back, where they are mapped."""
_WRITERS = 2
"""Threads that write: while one copies a pack together or transposes a weight, the other waits for the file."""
_INLINE = 256
"""Tensors of at most so many bytes stay in the graph's own file, as `onnx_ir.save` has it."""


def save_graphs(graphs: Mapping[str, onnx_ir.Model], place: Path) -> None:
    """Write graphs and their weights; a weight that several of them read is written once.

    Args:
        graphs: by file name; their weights are in the file when this returns, and no more in memory.
        place: the directory.
    """
    ir = require("onnx_ir", "onnx")
    values = [
        value
        for graph in graphs.values()
        for value in graph.graph.initializers.values()
        if value.const_value is not None and value.const_value.nbytes > _INLINE
    ]
    unique = {_identity(value.const_value): value.const_value for value in values}
    write = ir.external_data.convert_tensors_to_external
    # Since onnx_ir 1.1; what is larger than the bytes in flight is written alone, beside the others.
    more = {"max_workers": _WRITERS, "max_in_flight_bytes": _READ}
    known = inspect.signature(write).parameters
    written = write(
        list(unique.values()),
        place,
        DATA,
        callback=_Reader(),
        **{name: value for name, value in more.items() if name in known},
    )
    stored = dict(zip(unique, written, strict=True))
    for value in values:
        at = stored[_identity(value.const_value)]
        value.const_value = ir.ExternalTensor(
            at.location, at.offset, at.length, at.dtype, shape=at.shape, name=value.name, base_dir=place
        )
    for name, graph in graphs.items():
        ir.save(graph, place / name)


class _Reader:
    """Called before a weight is read, by one thread at a time; from time to time what was read before is given back.

    What another thread reads at that moment is read again from its file: it stays what it is.
    """

    def __init__(self) -> None:
        self.read = 0

    def __call__(self, tensor: Any, info: Any) -> None:
        if self.read > _READ:
            give_back()
            self.read = 0
        self.read += tensor.nbytes


def _identity(tensor: Any) -> Hashable:
    """Equal for tensors that are the same memory, seen the same way."""
    import onnx_ir

    raw = None if isinstance(tensor, onnx_ir.LazyTensor) else getattr(tensor, "raw", None)
    if isinstance(raw, torch.Tensor):
        return (raw.data_ptr(), tuple(raw.shape), raw.stride(), raw.dtype)
    return id(tensor)
