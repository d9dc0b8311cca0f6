"""A graph run in parts, one after the other: no more than one part's weights are in memory.

A part is some nodes that stand one behind the other, wherever that is; it is given the values that the parts before it
made for it and for those behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flora_fx.errors import ExportError, require
from flora_fx.storage.mapped import give_back

from ..run.session import Session
from .columns import cut_of
from .crossing import Signature
from .upcast import save_in_float32

__all__ = ["Inputs", "Parts"]

_BYTES = 192 * 2**20
"""Of weights, in a part that has more than one."""
_PART, _DATA, _COLUMNS = ".part.onnx", ".part.onnx.data", ".part.onnx.columns"

Inputs = Callable[[str], Tensor]
"""Gives an input by its name, when it is needed."""


@dataclass(frozen=True)
class _Part:
    """Nodes, by their numbers, and the names of what they are given, keep, and give."""

    nodes: tuple[int, ...]
    given: tuple[str, ...]
    weights: tuple[str, ...]
    made: tuple[str, ...]


class Parts:
    """A graph in parts.

    Args:
        path: of the ``.onnx`` file; parts are written beside it, and removed.
        output: the one that is wanted.
        providers: see `Session`.
        wide: compute in float32 what the graph has in bfloat16.

    Attributes:
        signature: of the graph's inputs.
        provider: where it ran.

    Raises:
        ExportError: the graph cannot be read, or the type of a value is not in it.
    """

    def __init__(self, path: Path, output: str, *, providers: Sequence[Any] | None, wide: bool) -> None:
        onnx = require("onnx", "onnx")
        self._onnx = onnx
        self._path = path
        self._output = output
        self._providers = providers
        self._wide = wide
        self._model = onnx.load(str(path), load_external_data=False)
        graph = self._model.graph
        self._weights = {tensor.name: tensor for tensor in graph.initializer}
        self._values = {value.name: value for value in (*graph.value_info, *graph.input, *graph.output)}
        self._inputs = [value.name for value in graph.input if value.name not in self._weights]
        self.signature: Signature = {name: self._typed(name) for name in self._inputs}
        self._nodes = list(graph.node)
        self._steps = self._in_steps()
        self.provider = ""

    def _typed(self, name: str) -> tuple[tuple[int | str, ...], torch.dtype]:
        kind = self._values[name].type.tensor_type
        shape = tuple(size.dim_param or size.dim_value for size in kind.shape.dim)
        dtype = getattr(torch, _DTYPES[self._onnx.TensorProto.DataType.Name(kind.elem_type)])
        return shape, torch.float32 if self._wide and dtype == torch.bfloat16 else dtype

    def run(self, texts: Sequence[Inputs]) -> list[Tensor]:
        """The output for each of several inputs; every part is opened once.

        Raises:
            ExportError: ONNX Runtime fails.
        """
        parts = list(self._parts())
        known: list[dict[str, Tensor]] = [{} for _ in texts]
        for index, part in enumerate(parts):
            made: list[dict[str, list[Tensor]]] = [{} for _ in texts]
            for weights in self._weights_of(part):
                session = self._opened(part, weights)
                for pieces, values, inputs in zip(made, known, texts, strict=True):
                    given = {name: inputs(name) if name in self._inputs else values[name] for name in part.given}
                    for name, value in session.run(dict(given)).items():
                        pieces.setdefault(name, []).append(value)
                self.provider = session.provider
                del session
                give_back()
            for pieces, values in zip(made, known, strict=True):
                values.update(
                    {name: value[0] if len(value) == 1 else torch.cat(value, -1) for name, value in pieces.items()}
                )
            needed = {self._output, *(name for later in parts[index + 1 :] for name in later.given)}
            known = [{name: value for name, value in values.items() if name in needed} for values in known]
        return [values[self._output] for values in known]

    def _parts(self) -> Iterator[_Part]:
        starts, held, known = [0], 0, set[str]()
        for index, nodes in enumerate(self._steps):
            read = {name for number in nodes for name in self._nodes[number].input if name in self._weights}
            size = sum(map(self._size, read - known))
            if held and held + size > _BYTES:
                starts.append(index)
                held, known, size = 0, set(), sum(map(self._size, read))
            held, known = held + size, known | read
        ends = [*starts[1:], len(self._steps)]
        later: set[str] = {self._output}
        found = []
        for start, end in reversed(list(zip(starts, ends, strict=True))):
            numbers = sorted({number for nodes in self._steps[start:end] for number in nodes})
            read_here = dict.fromkeys(name for number in numbers for name in self._nodes[number].input if name)
            made = {name for number in numbers for name in self._nodes[number].output if name}
            weights = tuple(name for name in read_here if name in self._weights)
            given = tuple(name for name in read_here if name not in made and name not in self._weights)
            found.append(_Part(tuple(numbers), given, weights, tuple(sorted(made & later))))
            later = later | set(given)
        return reversed(found)

    def _in_steps(self) -> list[list[int]]:
        """The nodes that read inputs, in order, each behind those that make what it reads of weights alone.

        Such a one is made wherever it is read: a transposed weight is as large as the weight.
        """
        makers: dict[str, list[int]] = {}
        steps = []
        for number, node in enumerate(self._nodes):
            names = [name for name in node.input if name]
            before = [other for name in names for other in makers.get(name, ())]
            own = [*dict.fromkeys(before), number]
            if all(name in self._weights or name in makers for name in names):
                makers.update(dict.fromkeys(node.output, own))
            else:
                steps.append(own)
        return steps

    def _size(self, name: str) -> int:
        tensor = self._weights[name]
        lengths = [int(entry.value) for entry in tensor.external_data if entry.key == "length"]
        return lengths[0] if lengths else len(tensor.raw_data)

    def _weights_of(self, part: _Part) -> Iterator[list[Any]]:
        """The initializers of a part: once, or where they are one large weight once for some columns of it."""
        weights = [self._weights[name] for name in part.weights]
        cut = cut_of([self._nodes[number] for number in part.nodes], self._weights)
        if cut is None or part.made != (cut.product,) or self._size(cut.weight) <= _BYTES:
            yield weights
            return
        for piece in cut.pieces(self._weights[cut.weight], self._path.parent, _BYTES, _COLUMNS):
            yield [piece]

    def _opened(self, part: _Part, weights: Sequence[Any]) -> Session:
        helper = self._onnx.helper
        graph = helper.make_graph(
            [self._nodes[number] for number in part.nodes],
            "part",
            [self._value(name) for name in part.given],
            # Without shapes: of a product's columns there are fewer.
            [helper.make_tensor_value_info(name, self._kind(name), None) for name in part.made],
            weights,
        )
        model = helper.make_model(graph, opset_imports=self._model.opset_import, ir_version=self._model.ir_version)
        written = [self._path.with_name(name) for name in (_PART, f"wide{_PART}", f"wide{_DATA}")]
        plain, wide, data = written
        try:
            plain.write_bytes(model.SerializeToString())
            if self._wide:
                save_in_float32(plain, wide, data=data.name)
            return Session(
                wide if self._wide else plain, providers=self._providers, session_options=self._session_options()
            )
        finally:
            for path in written:
                path.unlink(missing_ok=True)

    def _session_options(self) -> Any:
        options = require("onnxruntime", "onnx").SessionOptions()
        options.log_severity_level = 3
        options.enable_cpu_mem_arena = False  # which would keep what it once had
        options.enable_mem_pattern = False
        # Present keys and values that nobody reads would be written in the place of past ones, which are shorter.
        options.enable_mem_reuse = False
        return options

    def _kind(self, name: str) -> int:
        return int(self._value(name).type.tensor_type.elem_type)

    def _value(self, name: str) -> Any:
        if (found := self._values.get(name)) is None:
            raise ExportError(f"{self._path} does not say what {name} is; export the model with verify='full'")
        return found


_DTYPES = {
    "FLOAT": "float32",
    "FLOAT16": "float16",
    "BFLOAT16": "bfloat16",
    "INT64": "int64",
    "INT32": "int32",
    "BOOL": "bool",
    "UINT8": "uint8",
}
"""torch's names of ONNX's."""
