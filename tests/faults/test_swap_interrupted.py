"""Ctrl-C, or memory that runs out, while an adapter is swapped: then it is the old one or the new one, no mixture."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from flora_fx.export.lora.reading import Lora, LoraLayer
from flora_fx.export.lora.swappable import SwappablePart, SwappableWeight
from flora_fx.export.run import swapping
from flora_fx.export.run.session import Session
from flora_fx.export.run.swapping import SwappableAdapter

from .test_out_of_memory import ERRORS, Failing, interrupted

pytestmark = pytest.mark.usefixtures("uncollected")

WEIGHTS = {"a": (3, 2), "b": (2, 4), "c": (4, 3), "d": (3, 5)}
"""x a b c d: two layers of inputs 3 and 4, ranks 2 and 3, outputs 4 and 5; all stored transposed."""


@pytest.fixture
def adapter(tmp_path: Path) -> SwappableAdapter:
    stored = [numpy_helper.from_array(torch.rand(*shape).numpy(), name) for name, shape in WEIGHTS.items()]
    values = ["x", "xa", "xab", "xabc", "xabcd"]
    nodes = [
        helper.make_node("MatMul", [value, weight], [result])
        for value, weight, result in zip(values, WEIGHTS, values[1:], strict=False)
    ]
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in WEIGHTS.items()]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])
    y = helper.make_tensor_value_info("xabcd", TensorProto.FLOAT, ["batch", 5])
    graph = helper.make_graph(nodes, "graph", [x, *inputs], [y], stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
    onnx.save(model, tmp_path / "model.onnx")
    live = [
        SwappableWeight(name, True, (SwappablePart(module, which, (0, WEIGHTS[name][1]), (0, WEIGHTS[name][0])),))
        for name, module, which in (("a", "one", "A"), ("b", "one", "B"), ("c", "two", "A"), ("d", "two", "B"))
    ]
    return SwappableAdapter(Session(tmp_path / "model.onnx", providers=["CPUExecutionProvider"]), live)


def lora(value: float, *, both: bool) -> Lora:
    layers = {"one": LoraLayer(torch.full((1, 3), value), torch.full((4, 1), value + 1), 0.5)}
    if both:
        layers["two"] = LoraLayer(torch.full((3, 4), value + 2), torch.full((5, 3), value + 3), 2.0)
    return Lora("test", layers)


def weights(adapter: SwappableAdapter) -> list[Tensor]:
    return [buffer.host(tuple(map(int, shape)), torch.float32).clone() for buffer, shape in adapter.places.values()]


def same(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", [*ERRORS, "at a line"])
def test_either_the_old_one_or_the_new_one(adapter: SwappableAdapter, name: str) -> None:
    old, new = lora(3.0, both=True), lora(11.0, both=False)
    adapter.write(new)
    after = weights(adapter)
    adapter.write(old)
    before, met = weights(adapter), set()
    assert not same(before, after)
    for at in range(1000):
        try:
            if name == "at a line":
                with interrupted(at, swapping.__file__):
                    adapter.write(new)
            else:
                with Failing(at, ERRORS[name]):
                    adapter.write(new)
        except type(ERRORS.get(name, KeyboardInterrupt)()):
            found = weights(adapter)
            assert same(found, before) or same(found, after)
            met.add(same(found, after))
        else:
            break
        adapter.write(old)
    assert met == {False, True}
    assert same(weights(adapter), after)
