"""Let each row of a batch take one of the LoRAs that stand in a graph, or none: ``adapter_ids`` [batch].

    z = A x;  y = W x + B z      ->      z = A x;  y = W x + B Where(mask, z, 0)

``mask`` [batch, 1, rank of all] is computed once a run for packs that are laid out alike: where the slot that owns a
column is the row's. It selects and does not multiply: 0 · inf is NaN. Operators of ``flora_ort`` are given the ids, and
select for themselves.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from flora_fx.errors import ExportError, require
from flora_fx.mixed.selection import ADAPTER_IDS
from flora_fx.reporting.fusion_report import FusionReport

from ..directory.operators import DOMAIN
from ..lora.stacking import SlotPlan
from ..lora.swappable import SwappableWeight
from .lora_sums import is_read, split_edges
from .slots_of_operators import let_operators_choose
from .swappable import swappable_weights

if TYPE_CHECKING:
    import onnx_ir

__all__ = ["make_slots"]

_BASE = -1
"""Owner of what is no slot's."""


def make_slots(model: onnx_ir.Model, fusion: FusionReport, plan: SlotPlan) -> tuple[SwappableWeight, ...]:
    """Let a row choose its LoRA, and let each be replaced if that is planned; the graph is changed in place.

    Args:
        model: a decoder's graph, of a program of `stack`, as it was translated.
        fusion: of the program that it was translated from.
        plan: the slots.

    Returns:
        the weights that the slots stand in, if they can be replaced.

    Raises:
        ExportError: a LoRA is not fused completely, or a low-rank value does not stand alone.
    """
    if fusion.declines:
        raise ExportError(f"adapters= needs adapters that are fused completely; declined: {fusion.declines[0]}")
    weights = tuple(swappable_weights(model, fusion))
    ids = _new_input(model)
    let_operators_choose(model, weights, plan, ids)
    _Selection(model, plan, ids).write(weights)
    if not plan.replaceable:
        return ()
    for weight in weights:
        model.graph.inputs.append(model.graph.initializers[weight.name])
    return weights


def _new_input(model: onnx_ir.Model) -> onnx_ir.Value:
    """[batch]."""
    ir = require("onnx_ir", "onnx")
    given: onnx_ir.Value = ir.Value(name=ADAPTER_IDS, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["batch"]))
    model.graph.inputs.append(given)
    return given


class _Selection:
    def __init__(self, model: onnx_ir.Model, plan: SlotPlan, ids: onnx_ir.Value) -> None:
        self._ir = require("onnx_ir", "onnx")
        self._graph = model.graph
        self._plan = plan
        self._ids = ids
        self._first = next(iter(self._graph))
        self._rows: onnx_ir.Value | None = None
        self._masks: dict[tuple[int, ...], onnx_ir.Value] = {}
        self._zeros: dict[onnx_ir.DataType, onnx_ir.Value] = {}

    def write(self, weights: Iterable[SwappableWeight]) -> None:
        for weight in weights:
            if any(part.which == "A" for part in weight.parts):
                owners = self._owners(weight)
                for use in list(self._graph.initializers[weight.name].uses()):
                    for value, start, stop in self._low_rank(use.node, use.idx, weight, owners):
                        self._select(value, owners[start:stop])

    def _owners(self, weight: SwappableWeight) -> tuple[int, ...]:
        """Whose each row of a pack is, `_BASE` where it is not of an A."""
        sizes = [int(size) for size in self._graph.initializers[weight.name].shape or ()]
        owners = [_BASE] * sizes[1 if weight.transposed else 0]
        for part in weight.parts:
            widths = self._plan.widths[part.module]
            if part.which == "A" and part.rows[1] - part.rows[0] == sum(widths):
                owners[slice(*part.rows)] = [slot for slot, width in enumerate(widths) for _ in range(width)]
        return tuple(owners)

    def _low_rank(
        self, node: onnx_ir.Node, place: int, weight: SwappableWeight, owners: tuple[int, ...]
    ) -> Iterator[tuple[onnx_ir.Value, int, int]]:
        """What others than operators of ``flora_ort`` read of a product with A's, and of which columns it is."""
        products = {"MatMul": 0, "SkinnyMatMul": place - 1}
        product = node.outputs[products.get(node.op_type, 0)]
        if node.op_type not in products or product.shape is None or len(product.shape) != 3 or product.dtype is None:
            raise ExportError(
                f"adapters= needs a product with {weight.name} [batch, seq, rank]; {node.name} is another"
            )
        if _BASE not in owners:
            yield product, 0, len(owners)
            return
        for reader in [use.node for use in product.uses() if use.node.domain != DOMAIN]:
            edges = split_edges(reader) if reader.op_type == "Split" else [0, len(owners)]
            for value, (start, stop) in zip(reader.outputs, itertools.pairwise(edges), strict=False):
                mine = owners[start:stop]
                if set(mine) == {_BASE} or not is_read(value):
                    continue
                if reader.op_type != "Split" or _BASE in mine:
                    raise ExportError(
                        f"adapters= needs low-rank values that stand alone; {value.name} holds others, too: leave "
                        'config out, or let config.layout be "beside" or "ahead"'
                    )
                yield value, start, stop

    def _select(self, z: onnx_ir.Value, owners: tuple[int, ...]) -> None:
        readers = [use for use in z.uses() if use.node.domain != DOMAIN]
        node = z.producer()
        if not readers:
            return
        assert node is not None
        mask = self._mask(owners)
        wide, narrow = self._ir.DataType.FLOAT, self._ir.DataType.BFLOAT16
        last, value = node, z
        if z.dtype == narrow:  # which ONNX Runtime does not select on CUDA
            last, value = self._after(last, "Cast", [value], wide, z, to=wide.value)
        last, value = self._after(last, "Where", [mask, value, self._zero(value)], value.dtype, z)
        if z.dtype == narrow:
            last, value = self._after(last, "Cast", [value], narrow, z, to=narrow.value)
        for use in readers:
            use.node.replace_input_with(use.idx, value)

    def _after(
        self,
        before: onnx_ir.Node,
        op: str,
        inputs: list[onnx_ir.Value],
        dtype: onnx_ir.DataType | None,
        like: onnx_ir.Value,
        **attributes: int,
    ) -> tuple[onnx_ir.Node, onnx_ir.Value]:
        assert dtype is not None
        name = f"{like.name}_{op.lower()}_{len(self._graph)}"
        result = self._ir.Value(name=name, type=self._ir.TensorType(dtype), shape=like.shape)
        made = self._node(op, inputs, result, **attributes)
        self._graph.insert_after(before, made)
        return made, result

    def _mask(self, owners: tuple[int, ...]) -> onnx_ir.Value:
        if owners not in self._masks:
            rows = self._given()
            number = len(self._masks)
            name = f"{ADAPTER_IDS}_mask_{number}"
            kind = self._ir.TensorType(self._ir.DataType.BOOL)
            mask = self._ir.Value(name=name, type=kind, shape=self._ir.Shape(["batch", 1, len(owners)]))
            owner = self._constant(f"{ADAPTER_IDS}_owner_{number}", [[list(owners)]], self._ir.DataType.INT64)
            self._graph.insert_before(self._first, self._node("Equal", [rows, owner], mask))
            self._masks[owners] = mask
        return self._masks[owners]

    def _given(self) -> onnx_ir.Value:
        """The input, [batch, 1, 1]."""
        if self._rows is None:
            self._rows = self._ir.Value(
                name=f"{ADAPTER_IDS}_rows", type=self._ids.type, shape=self._ir.Shape(["batch", 1, 1])
            )
            axes = self._constant(f"{ADAPTER_IDS}_axes", [1, 2], self._ir.DataType.INT64)
            self._graph.insert_before(self._first, self._node("Unsqueeze", [self._ids, axes], self._rows))
        return self._rows

    def _zero(self, like: onnx_ir.Value) -> onnx_ir.Value:
        assert like.dtype is not None
        if like.dtype not in self._zeros:
            self._zeros[like.dtype] = self._constant(f"{ADAPTER_IDS}_zero_{like.dtype.name}", 0, like.dtype)
        return self._zeros[like.dtype]

    def _constant(self, name: str, content: object, dtype: onnx_ir.DataType) -> onnx_ir.Value:
        tensor = self._ir.tensor(content, dtype=dtype, name=name)
        value = self._ir.Value(
            name=name, type=self._ir.TensorType(dtype), shape=self._ir.Shape(tensor.shape), const_value=tensor
        )
        self._graph.register_initializer(value)
        return value

    def _node(self, op: str, inputs: list[onnx_ir.Value], output: onnx_ir.Value, **attributes: int) -> onnx_ir.Node:
        given = self._ir.convenience.convert_attributes(attributes)
        made: onnx_ir.Node = self._ir.Node("", op, inputs, given, outputs=[output], name=f"{op}_{output.name}")
        return made
