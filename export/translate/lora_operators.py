"""A decoder's graph in the operators of ``flora_ort``: what adds a LoRA is one node, with what reads the sum.

    p = x [W; A];  y, z = split(p);  s = y + z B;  q, k, v = split(s)

    attention(q, k, v)                               ->  attention(LoraAdd(p, B))
    norm(q by heads)                                 ->  LoraSkipRMSNorm(p, B, gamma)
    g, u = split(s);  act(g) * u                     ->  LoraSwiGLU(p, B)
    norm(s + skip) or norm(s)                        ->  LoraSkipRMSNorm(p, B, gamma, skip)
    any other that reads s or a part of it           ->  LoraAdd(p, B)

Where z comes from a GEMM of its own (a LoRA that may be replaced), it is a further input.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flora_fx.errors import require
from flora_fx.reporting.fusion_report import FusionReport

from ..directory.operators import DOMAIN
from .lora_sums import SKIP_NORM, Sum, Sums, attribute, bias_place, is_read, readers_of_pack, sizes

if TYPE_CHECKING:
    import onnx_ir

__all__ = ["use_lora_operators"]

_VERSION = 1


def use_lora_operators(model: onnx_ir.Model, fusion: FusionReport) -> Counter[str]:
    """Rewrite a translated graph in place.

    Args:
        model: a decoder's graph; B's that are block-diagonal, ``y + z B`` an addition.
        fusion: of the program that it was translated from.

    Returns:
        how many nodes of each operator it has now.
    """
    require("onnx_ir.passes.common", "onnx")
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    rewriting = _Rewriting(model, Sums(model, fusion))
    for node in list(model.graph):
        rewriting.take(node)
    RemoveUnusedNodesPass()(model)  # what stood between sums and those who take them now
    for node in list(model.graph):
        rewriting.give(node)
    rewriting.finish()
    if rewriting.written:
        model.opset_imports[DOMAIN] = _VERSION
        RemoveUnusedNodesPass()(model)
        _absorb_biases(model)
        RemoveUnusedNodesPass()(model)
    return Counter(node.op_type for node in model.graph if node.domain == DOMAIN)


class _Rewriting:
    """Of one graph.

    Attributes:
        written: whether there is any operator.
    """

    def __init__(self, model: onnx_ir.Model, sums: Sums) -> None:
        self._graph = model.graph
        self._sums = sums
        self._done: set[onnx_ir.Value] = set()
        self.written = False

    def take(self, node: onnx_ir.Node) -> None:
        """Let an operator compute what a node makes of sums, where there is one for that."""
        _ = self._attention(node) or self._norm(node) or self._gated(node)

    def give(self, node: onnx_ir.Node) -> None:
        """Let a node have the sums that it reads from operators, unless it only takes them apart or adds to them."""
        if any(value in self._sums for value in node.outputs):
            return
        for value in node.inputs:
            if value is not None and self._sums.adapted(value) is not None:
                self._materialise(value, node)

    def finish(self) -> None:
        """Outputs of the graph."""
        for value in list(self._graph.outputs):
            if self._sums.adapted(value) is not None:
                self._materialise(value, None)

    def _materialise(self, value: onnx_ir.Value, before: onnx_ir.Node | None) -> None:
        total = self._sums.adapted(value)
        if total is None or value in self._done:
            return
        self._done.add(value)
        before = value.producer() if before is None else before
        assert before is not None
        self._write("LoraAdd", total, (), {"parts": total.ranges()}, before, [value])

    # --- what reads sums ----------------------------------------------------------------------------------

    def _attention(self, node: onnx_ir.Node) -> bool:
        """One that takes q, k and v apart, where they are one sum, takes that."""
        if node.op_type != "GroupQueryAttention" or None in node.inputs[:3]:
            return False
        parts = [self._sums.get(value) for value in node.inputs[:3]]
        total = Sum.joined([part for part in parts if part is not None]) if None not in parts else None
        if total is None or not total.adapted:
            return False
        query = node.inputs[0]
        assert query is not None
        shape = [*(query.shape or ())]
        packed = _value(f"{query.name}_packed", [*shape[:-1], total.width] if shape else None, query.type)
        self._write("LoraAdd", total, (), {"parts": total.ranges()}, node, [packed], replace=False)
        for index, value in enumerate((packed, None, None)):
            node.replace_input_with(index, value)
        return True

    def _norm(self, node: onnx_ir.Node) -> bool:
        if node.op_type == SKIP_NORM:
            return self._skip_norm(node)
        if node.op_type != "SimplifiedLayerNormalization" or attribute(node, "axis", -1) != -1:
            return False
        value, gamma = node.inputs[:2]
        if value is None or gamma is None or any(map(is_read, node.outputs[1:])):
            return False
        total = self._sums.adapted(value)
        if total is not None and sizes(gamma) == [total.width]:
            return self._write_norm(total, node, gamma, None, [node.outputs[0]], total.width)
        return self._norm_by_heads(node, value, gamma)

    def _skip_norm(self, node: onnx_ir.Node) -> bool:
        """One that adds a sum and something else, or y and z B."""
        if len(node.inputs) != 3 or None in node.inputs or any(map(is_read, node.outputs[1:3])):
            return False
        first, second, gamma = node.inputs
        assert first is not None
        assert second is not None
        assert gamma is not None
        whole = self._sums.added(first, second)
        for total, skip in ((whole, None), (self._sums.adapted(first), second), (self._sums.adapted(second), first)):
            if total is None or sizes(gamma) != [total.width]:
                continue
            if skip is not None and self._sums.adapted(skip) is not None:
                self._materialise(skip, node)
                skip = node.inputs[1 if total is self._sums.adapted(first) else 0]
            return self._write_norm(total, node, gamma, skip, [node.outputs[0], *node.outputs[3:4]], total.width)
        return False

    def _norm_by_heads(self, node: onnx_ir.Node, value: onnx_ir.Value, gamma: onnx_ir.Value) -> bool:
        """[batch, seq, heads · dim] -> by heads -> norm -> [batch, seq, heads · dim], with heads in front or not."""
        apart, turned = value.producer(), False
        if apart is not None and apart.op_type == "Transpose" and _swaps_heads(apart):
            apart, turned = _producer(apart.inputs[0]), True
        if apart is None or apart.op_type != "Reshape" or apart.inputs[0] is None or len(sizes(gamma)) != 1:
            return False
        (dim,) = sizes(gamma)
        together = _only_reader(node.outputs[0])
        if turned:
            if together is None or together.op_type != "Transpose" or not _swaps_heads(together):
                return False
            together = _only_reader(together.outputs[0])
        total = self._sums.adapted(apart.inputs[0])
        if total is None or together is None or together.op_type != "Reshape":
            return False
        by_heads, result = sizes(apart.outputs[0]), together.outputs[0]
        if len(by_heads) != 4 or by_heads[-1] != dim or len(sizes(result)) != 3 or sizes(result)[-1] != total.width:
            return False
        return self._write_norm(total, node, gamma, None, [result], dim)

    def _write_norm(
        self,
        total: Sum,
        node: onnx_ir.Node,
        gamma: onnx_ir.Value,
        skip: onnx_ir.Value | None,
        results: Sequence[onnx_ir.Value],
        group: int,
    ) -> bool:
        if len(total.parts) != 1:
            return False
        start, width = total.parts[0]
        attributes = {"start": start, "width": width, "group": group, "epsilon": attribute(node, "epsilon", 1e-5)}
        self._write("LoraSkipRMSNorm", total, (gamma, skip), attributes, node, results)
        return True

    def _gated(self, node: onnx_ir.Node) -> bool:
        if node.op_type != "Mul" or node.domain != "":
            return False
        for one, other in (node.inputs, node.inputs[::-1]):
            activation, gate = _activation(one)
            if gate is None or other is None:
                continue
            halves = [self._sums.get(gate), self._sums.get(other)]
            total = Sum.joined([half for half in halves if half is not None]) if None not in halves else None
            if total is None or not total.adapted or len(total.parts) != 2:
                continue
            (first, width), (second, same) = total.parts
            if width == same:
                attributes = {"gate": first, "up": second, "width": width, "activation": activation}
                self._write("LoraSwiGLU", total, (), attributes, node, [node.outputs[0]])
                return True
        return False

    # --- write --------------------------------------------------------------------------------------------

    def _write(
        self,
        name: str,
        total: Sum,
        further: Sequence[onnx_ir.Value | None],
        attributes: Mapping[str, Any],
        before: onnx_ir.Node,
        results: Sequence[onnx_ir.Value],
        *,
        replace: bool = True,
    ) -> None:
        """One operator in front of a node; it makes the results instead of whoever did, if there is someone."""
        import onnx_ir

        assert total.up is not None
        inputs = [total.pack, total.up, *further, None, total.low]
        while inputs[-1] is None:
            inputs.pop()
        outputs = [_value(value.name, value.shape, value.type) for value in results] if replace else list(results)
        place = {"blocks": [number for block in total.blocks for number in block], "z_start": total.z_start}
        made = onnx_ir.node(name, inputs, {**attributes, **place}, domain=DOMAIN, outputs=outputs)
        self._graph.insert_before(before, made)
        self.written = True
        if not replace:
            return
        for old, new in zip(results, outputs, strict=True):
            old.name = f"{old.name}_replaced"
            onnx_ir.convenience.replace_all_uses_with(old, new)
            for index, output in enumerate(self._graph.outputs):
                if output is old:
                    self._graph.outputs[index] = new


def _absorb_biases(model: onnx_ir.Model) -> None:
    """A bias that is added to a pack for operators alone is added by them."""
    for node in list(model.graph):
        readers = readers_of_pack(node.outputs[0]) if node.op_type == "Add" and node.domain == "" else []
        if not readers:
            continue
        for pack, bias in (node.inputs, node.inputs[::-1]):
            product = _producer(pack)
            if product is None or product.op_type != "MatMul" or bias is None or not bias.is_initializer():
                continue
            if sizes(bias) != sizes(node.outputs[0])[-1:]:
                continue
            for reader in readers:
                place = bias_place(reader)
                if len(reader.inputs) <= place:
                    reader.resize_inputs(place + 1)
                reader.replace_input_with(place, bias)
                reader.replace_input_with(0, pack)
            break


# --- values and nodes -------------------------------------------------------------------------------------


def _value(name: str | None, shape: Any, kind: Any) -> onnx_ir.Value:
    import onnx_ir

    shape = onnx_ir.Shape(shape) if isinstance(shape, list) else shape
    return onnx_ir.Value(name=name, shape=shape, type=kind)


def _activation(value: onnx_ir.Value | None) -> tuple[str, onnx_ir.Value | None]:
    """What a value is of another one: x · sigmoid(x), and GELU."""
    node = _producer(value)
    if node is None:
        return "", None
    kind = (node.domain, node.op_type)
    if kind == ("com.microsoft", "QuickGelu") and attribute(node, "alpha", 1.702) == 1.0:
        return "silu", node.inputs[0]
    if kind == ("", "Gelu"):
        return ("gelu_tanh" if attribute(node, "approximate", "none") == "tanh" else "gelu"), node.inputs[0]
    if kind == ("", "Mul"):
        for one, other in (node.inputs, node.inputs[::-1]):
            sigmoid = _producer(other)
            if sigmoid is not None and sigmoid.op_type == "Sigmoid" and sigmoid.inputs[0] is one:
                return "silu", one
    return "", None


def _producer(value: onnx_ir.Value | None) -> onnx_ir.Node | None:
    return None if value is None else value.producer()


def _only_reader(value: onnx_ir.Value) -> onnx_ir.Node | None:
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def _swaps_heads(node: onnx_ir.Node) -> bool:
    return list(attribute(node, "perm", ())) == [0, 2, 1, 3]
