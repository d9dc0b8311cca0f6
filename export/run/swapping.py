"""Replace a LoRA of a loaded export: in place, all of it or nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flora_fx.checkpoint.numbers import check_finite
from flora_fx.errors import AdapterError, ExportError, require

from ..lora.reading import Lora, LoraLayer
from ..lora.swappable import SwappableWeight
from .buffer import Buffer
from .session import Session

if TYPE_CHECKING:
    import onnx_ir

__all__ = ["SwappableAdapter"]

_Write = tuple[Tensor, Tensor, float]
"""Where (a view of a swappable weight), what, and times what."""


@dataclass(frozen=True)
class _Remedies:
    """What is said where a LoRA adapts further layers, and where its rank is too high."""

    layers: str
    rank: str


_OF_ONE = _Remedies(
    "and the exported LoRA does not; export the model again, hot_swap=True, with a LoRA on all layers that are to be "
    "adapted",
    "and the exported LoRA {room}; export the model again, hot_swap=True, with a LoRA of rank {rank}",
)
_OF_SLOTS = _Remedies(
    "and none of the exported LoRAs does; export the model again, adapters=[…], with one on all layers that are to be "
    "adapted",
    "and a slot {room}; export the model again with rank={rank}",
)

_Regions = dict[str, dict[str, Tensor]]
"""A and B of each layer, views of swappable weights."""


class SwappableAdapter:
    """The swappable weights of a session, in memory at addresses that stay; at first they hold what was exported.

    Args:
        session: of the graph.
        weights: which they are.
        slots: how many LoRAs stand in them, one beside the other, each in as many rows of A and columns of B; 0 for the
            one of an export whose rows do not choose.

    Attributes:
        places: buffer and shape of each, by the name of the input that it is bound to.

    Raises:
        ExportError: the graph does not have them.
    """

    def __init__(self, session: Session, weights: Iterable[SwappableWeight], slots: int = 0) -> None:
        ir = require("onnx_ir", "onnx")
        stored = ir.load(session.path).graph.initializers
        self.places: dict[str, tuple[Buffer, Sequence[int]]] = {}
        self._slots: tuple[_Regions, ...] = tuple({} for _ in range(slots or 1))
        self._remedies = _OF_SLOTS if slots else _OF_ONE
        for weight in weights:
            if weight.name not in session.signature or weight.name not in stored:
                raise ExportError(f"{session.path} has no weight {weight.name} that may be replaced; export it again")
            shape, dtype = session.signature[weight.name]
            sizes = tuple(map(int, shape))
            buffer = _filled(stored[weight.name].const_value, session)
            self.places[weight.name] = buffer, sizes
            matrix = buffer.nearest(sizes, dtype)
            matrix = matrix.t() if weight.transposed else matrix
            for part in weight.parts:
                whole = matrix[slice(*part.rows), slice(*part.columns)]
                own = _parts(whole, len(self._slots), part.which)
                if len({region.shape for region in own}) != 1 or len(own) != len(self._slots):
                    raise ExportError(
                        f"{session.path} has no {len(self._slots)} slots in {weight.name}; export it again"
                    )
                for regions, region in zip(self._slots, own, strict=True):
                    regions.setdefault(part.module, {})[part.which] = region

    @torch.no_grad()
    def write(self, lora: Lora, slot: int = 0) -> None:
        """Replace A and B of all layers in a slot; those of layers that the LoRA does not have become zero.

        Raises:
            AdapterError: the LoRA does not fit, or holds NaN, infinity, or what becomes infinity in the export's dtype;
                nothing was written.
        """
        regions = self._slots[slot]
        unknown = [module for module in lora.layers if module not in regions]
        if unknown:
            more = ", …" if len(unknown) > 3 else ""
            raise AdapterError(f"{lora.name} adapts {', '.join(unknown[:3])}{more}, {self._remedies.layers}")
        writes: list[_Write] = []
        for module, layer in lora.layers.items():
            writes += _checked(regions[module], module, layer, lora.name, self._remedies)
        # From here on nothing fails; but Ctrl-C may come, and a half of each would be neither.
        try:
            self._write(regions, lora, writes)
        except BaseException:
            self._write(regions, lora, writes)
            raise

    def _write(self, regions: _Regions, lora: Lora, writes: Iterable[_Write]) -> None:
        for module in regions.keys() - lora.layers.keys():
            for region in regions[module].values():
                region.zero_()
        for region, tensor, scale in writes:
            rows, columns = tensor.shape
            torch.mul(tensor, scale, out=region[:rows, :columns])
            region[rows:].zero_()
            region[:, columns:].zero_()
        for buffer, _ in self.places.values():
            buffer.flush()


def _parts(whole: Tensor, count: int, which: str) -> Sequence[Tensor]:
    """Those of an A [rank, in], or of a B [out, rank], that the slots own."""
    return whole.chunk(count, 0 if which == "A" else 1)


def _filled(tensor: onnx_ir.TensorProtocol, session: Session) -> Buffer:
    buffer = session.buffer(tensor.nbytes)
    content = torch.frombuffer(bytearray(tensor.tobytes()), dtype=torch.uint8)  # numpy has no bfloat16
    buffer.nearest((tensor.nbytes,), torch.uint8).copy_(content)
    buffer.flush()
    return buffer


def _checked(regions: dict[str, Tensor], module: str, layer: LoraLayer, name: str, remedies: _Remedies) -> list[_Write]:
    """What is to be written of one layer, on the device and in the dtype of the swappable weights."""
    down, up = regions["A"], regions["B"]
    (room, inside), outside = down.shape, up.shape[0]
    rank = layer.down.shape[0]
    if (layer.down.shape[1], layer.up.shape[0]) != (inside, outside):
        raise AdapterError(
            f"{name}: A of {module} is {list(layer.down.shape)} and B {list(layer.up.shape)}; this layer has {inside} "
            f"inputs and {outside} outputs: is it the adapter of another model?"
        )
    if rank > room:
        raise AdapterError(f"{name}: {module} has rank {rank}, {remedies.rank.format(room=room, rank=rank)} or more")
    return [
        (down, _cast(layer.down, 1.0, down, f"{name}: A of {module}"), 1.0),
        (up, _cast(layer.up, layer.scale, up, f"{name}: B of {module}"), layer.scale),
    ]


def _cast(tensor: Tensor, scale: float, like: Tensor, name: str) -> Tensor:
    """On the device and in the dtype of another tensor, if all numbers are such, with their scale, too."""
    if not tensor.is_floating_point():
        raise AdapterError(f"{name} is of {tensor.dtype}, which must be floating-point; save the adapter again")
    cast = tensor.to(like.device, like.dtype)
    low, high = torch.aminmax(cast)
    largest = max(-low.item(), high.item()) * max(1.0, abs(scale))  # NaN if there is one: then it is low and high
    if not largest <= torch.finfo(like.dtype).max:
        check_finite(tensor, name)
        raise AdapterError(
            f"{name}, times its scale {scale:g}, is too large for {like.dtype}; export the model in another dtype"
        )
    return cast
