"""A product with a weight that is larger than a part of a graph shall be: some columns at a time.

That is the output layer. ONNX Runtime has no products of half precision on a CPU: it makes a copy in float32 that is
twice as large, and one more where the weight is transposed as it runs, as a tied embedding is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["Cut", "cut_of"]


@dataclass(frozen=True)
class Cut:
    """Columns of a product.

    Attributes:
        weight: a matrix [in, out], or [out, in] if it is transposed first.
        axis: its dimension of the columns.
        product: the name of what is made.
    """

    weight: str
    axis: int
    product: str

    def pieces(self, tensor: Any, directory: Path, size: int, scratch: str) -> Iterator[Any]:
        """The weight, as initializers of the same name that have one group of columns each, in order.

        Their numbers stay in files: protobuf would hold them several times before they are read.

        Args:
            tensor: the initializer; its numbers are in a file.
            directory: of the file.
            size: about the bytes of a piece; one column, at the least.
            scratch: name of a file in the directory, which holds a piece whose numbers do not lie together until the
                next one is asked for.
        """
        rows, columns = tensor.dims
        offset, length, path = int(_entry(tensor, "offset") or 0), _length(tensor), _entry(tensor, "location")
        count = tensor.dims[self.axis]
        line = length // count  # the bytes of a row, or of a column
        step = max(1, size // line)
        for start in range(0, count, step):
            lines = min(step, count - start)
            if self.axis == 0:
                yield _initializer(tensor, (lines, columns), path, offset + start * line, lines * line)
                continue
            width = line // rows
            try:
                with (directory / path).open("rb") as file, (directory / scratch).open("wb") as copy:
                    for row in range(rows):
                        copy.write(_read(file, offset + (row * columns + start) * width, lines * width))
                yield _initializer(tensor, (rows, lines), scratch, 0, lines * line)
            finally:
                (directory / scratch).unlink(missing_ok=True)


def cut_of(nodes: Sequence[Any], weights: Mapping[str, Any]) -> Cut | None:
    """How a product can be cut, if it can: a matrix, or a transposed one, is all that something is multiplied by.

    Args:
        nodes: ONNX nodes, each behind those whose results it reads.
        weights: the initializers, by name.
    """
    *before, product = nodes
    if product.op_type != "MatMul":
        return None
    given, axis = product.input[1], 1
    if before:
        (turn, *more) = before
        turned = not more and turn.op_type == "Transpose" and list(turn.output) == [given]
        if not turned or [list(attribute.ints) for attribute in turn.attribute] not in ([], [[1, 0]]):
            return None
        given, axis = turn.input[0], 0
    tensor = weights.get(given)
    if tensor is None or len(tensor.dims) != 2 or not tensor.external_data or product.input[0] in weights:
        return None
    return Cut(given, axis, product.output[0])


def _initializer(like: Any, shape: tuple[int, int], location: str, offset: int, length: int) -> Any:
    made = type(like)(name=like.name, data_type=like.data_type, dims=shape, data_location=like.data_location)
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        made.external_data.add(key=key, value=str(value))
    return made


def _read(file: BinaryIO, at: int, count: int) -> bytes:
    file.seek(at)
    return file.read(count)


def _entry(tensor: Any, key: str) -> str:
    return next((entry.value for entry in tensor.external_data if entry.key == key), "")


def _length(tensor: Any) -> int:
    return int(_entry(tensor, "length"))
