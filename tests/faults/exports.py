"""Exports written by hand, in milliseconds: a graph ``y = x W`` with W in the file of weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper

from flora_fx.export.directory.manifest import Manifest, _digest, write_manifest
from flora_fx.export.trace.model import Kind

__all__ = ["by_hand", "external", "reseal"]

WEIGHT = torch.arange(12, dtype=torch.float32).reshape(3, 4) + 0.5


def by_hand(place: Path, kind: Kind = "encoder", **more: Any) -> Path:
    """Write an export; an encoder can be loaded and run.

    Args:
        place: where to.
        kind: what the manifest says it is.
        more: further fields of the graph and of the model: ``node``, ``sparse_initializer``, ``functions``, ….
    """
    place.mkdir(parents=True)
    (place / "model.onnx.data").write_bytes(WEIGHT.numpy().tobytes())
    weight = external("W", "model.onnx.data")
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "W"], ["y"])], "graph", [x], [y], [weight])
    for name in ("node", "initializer", "sparse_initializer"):
        getattr(graph, name).extend(more.get(name, ()))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
    for name in ("functions", "training_info"):
        getattr(model, name).extend(more.get(name, ()))
    for name in ("model.onnx", *(("encoder.onnx",) if kind == "seq2seq-lm" else ())):
        (place / name).write_bytes(model.SerializeToString())
    (place / "config.json").write_text('{"model_type": "by hand"}', encoding="utf-8")
    (place / "tokenizer.json").write_text('{"version": "1.0"}', encoding="utf-8")
    manifest = Manifest(
        kind=kind, architecture="ByHand", dtype="float32", inputs=["x"], outputs=["y"], vocab_size=7, max_positions=64
    )
    write_manifest(place, manifest)
    return place


def external(name: str, *locations: str) -> onnx.TensorProto:
    """A tensor of W's shape in other files: none, one, or by several entries."""
    tensor = onnx.TensorProto(name=name, data_type=TensorProto.FLOAT, dims=WEIGHT.shape)
    tensor.data_location = TensorProto.EXTERNAL
    for location in locations:
        tensor.external_data.add(key="location", value=location)
    return tensor


def reseal(place: Path, **changes: Any) -> None:
    """Change the manifest, and its checksum with it, as who attacks would."""
    path = place / "flora_fx.json"
    content = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    content.pop("sha256", None)
    path.write_text(json.dumps({**content, "sha256": _digest(content)}), encoding="utf-8")
