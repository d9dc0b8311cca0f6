"""From a fused program to an ONNX model: readable names, no weight twice, no weight transposed at run time."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.export import ExportedProgram

from flora_fx.errors import ExportError, require
from flora_fx.storage.casting import read_all
from flora_fx.storage.module import FusedExportedProgram

from ..trace.capture import PREFIX
from ..trace.quantized_base import QuantizedBase
from ..trace.traced import Traced
from .decoder_lowering import as_onnx_nodes, fuse_norms

if TYPE_CHECKING:
    import onnx_ir

__all__ = ["by_torch_onnx", "lower"]

log = logging.getLogger(__name__)

_OPSET = 20
_SMALL = 1024
"""Constants of at most so many elements are folded; weights are larger and keep their names."""


def lower(program: ExportedProgram, traced: Traced, base: QuantizedBase | None = None) -> onnx_ir.Model:
    """Translate a program; its inputs and outputs get the names and axes of ``traced``.

    A decoder is written operator by operator, see `write_graph`. What has an operator that is not known there, and
    every other program, goes through `torch.onnx`, which traces it twice.

    The program's graph is used up: transformers' fixes for the translation are made in place.

    Raises:
        ExportError: an operator has no ONNX translation.
    """
    require("onnx_ir", "onnx")
    if program.graph.find_nodes(op="call_function", target=torch.ops.flora_fx.group_query_attention.default):
        from .direct import Unknown, write_graph

        try:
            return write_graph(program, traced, base)
        except Unknown as reason:
            log.info("translated by torch.onnx, which takes longer: the program has %s", reason)
    return by_torch_onnx(program, traced)


def by_torch_onnx(program: ExportedProgram, traced: Traced) -> onnx_ir.Model:
    """As `lower`, whatever the program is."""
    read_all(program)  # torch.onnx knows no weight that is cast later
    if isinstance(program, FusedExportedProgram):
        program.store()
    require("onnxscript", "onnx")
    onnx_ir = require("onnx_ir", "onnx")
    require("onnx_ir.passes.common", "onnx")
    exporters = require("transformers.exporters.exporter_onnx", "hf")
    patches = require("transformers.exporters.utils", "hf")
    with patches.apply_patches("onnx"), _quiet():
        program = as_onnx_nodes(program)
        patches.apply_fx_node_fixes("onnx", program.graph_module)
        try:
            translated = torch.onnx.export(
                program,
                args=(),
                input_names=list(traced.inputs),
                output_names=list(traced.outputs),
                opset_version=_OPSET,
                custom_translation_table=exporters._ONNX_TRANSLATION_TABLE,
                optimize=False,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            cause = error.__cause__ or error
            raise ExportError(f"torch.onnx cannot translate the graph: {str(cause).splitlines()[0]}") from error
        assert translated is not None
        model: Any = translated.model
        _name_weights(model)
        _transpose_weights(model)
        _optimize(model)
        if any(node.domain == "com.microsoft" for node in model.graph):  # not for any runtime as it is
            fuse_norms(model)
        _name_axes(model, traced)
        onnx_ir.passes.common.ClearMetadataAndDocStringPass()(model)  # stack traces, with the user's paths
    model.producer_name = "flora_fx"
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """torch.onnx logs what it finds odd in transformers' translations; none of it is for users."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _name_weights(model: onnx_ir.Model) -> None:
    """Names as the user's model has them: without the wrapper's prefix."""
    for value in list(model.graph.initializers.values()):
        if value.name is not None and value.name.startswith(PREFIX):
            value.name = value.name.removeprefix(PREFIX)


def _transpose_weights(model: onnx_ir.Model) -> None:
    """Linear layers store W and multiply by Wᵀ: store Wᵀ, as ``<name>.T``.

    A weight that is also read as it stands (a tied embedding) is left alone: stored both ways it would be twice in
    the file. ONNX Runtime folds that one transposition itself, in memory, when it loads.
    """
    import onnx_ir

    graph = model.graph
    for value in list(graph.initializers.values()):
        readers = [use.node for use in value.uses()]
        if not readers or not all(_is_transpose(node) for node in readers) or value.const_value is None:
            continue
        weight = value.const_value
        turned = onnx_ir.Value(
            name=f"{value.name}.T",
            shape=onnx_ir.Shape(tuple(weight.shape)[::-1]),
            type=onnx_ir.TensorType(weight.dtype),
            const_value=_transposed(weight, f"{value.name}.T"),
        )
        graph.register_initializer(turned)
        for node in readers:
            onnx_ir.convenience.replace_all_uses_with(node.outputs[0], turned)
            graph.remove(node, safe=True)
        del graph.initializers[value.name]


def _is_transpose(node: onnx_ir.Node) -> bool:
    """Whether a node transposes a matrix (and is not an output of the graph)."""
    if node.op_type != "Transpose" or node.domain != "" or node.outputs[0].is_graph_output():
        return False
    perm = node.attributes.get("perm")
    return perm is not None and list(perm.as_ints()) == [1, 0]


def _transposed(weight: Any, name: str) -> Any:
    """Transposed when it is written, not before: one weight at a time in memory."""
    import onnx_ir

    shape = onnx_ir.Shape(tuple(weight.shape)[::-1])
    raw = getattr(weight, "raw", None)
    if isinstance(raw, torch.Tensor):
        from onnx_ir.tensor_adapters import TorchTensor

        return onnx_ir.LazyTensor(
            lambda: TorchTensor(raw.detach().t().contiguous(), name=name), dtype=weight.dtype, shape=shape, name=name
        )
    return onnx_ir.tensor(weight.numpy().T.copy(), dtype=weight.dtype, name=name)


def _optimize(model: onnx_ir.Model) -> None:
    from onnxscript.optimizer import optimize_ir

    optimize_ir(model, input_size_limit=_SMALL, output_size_limit=_SMALL, should_fold=_may_fold)


def _may_fold(node: onnx_ir.Node) -> bool | None:
    """Anything but weights: a folded weight would be there twice or lose its name."""
    return False if any(i is not None and i.is_initializer() and _is_weight(i) for i in node.inputs) else None


def _is_weight(value: onnx_ir.Value) -> bool:
    return value.name is not None and "." in value.name


def _name_axes(model: onnx_ir.Model, traced: Traced) -> None:
    """``batch``, ``sequence``, ``past`` and ``total`` instead of ``s43``."""
    import onnx_ir

    for value in (*model.graph.inputs, *model.graph.outputs):
        axes = traced.axes.get(str(value.name), {})
        if value.shape is None:
            continue
        dims = [axes.get(i, dim if isinstance(dim, int) else None) for i, dim in enumerate(value.shape)]
        value.shape = onnx_ir.Shape(dims)
