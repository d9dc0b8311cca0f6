"""What `onnx.checker` says of exports: nothing, once it knows an operator that ONNX Runtime has in ONNX's domain."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
import onnxruntime
import pytest
from onnx import TensorProto, defs, helper

from tests.export.exported_models import Export

NORM = "SimplifiedLayerNormalization"


def schema() -> defs.OpSchema:
    """ONNX Runtime's, as far as a checker needs it; docs/deploying.md has the same."""
    floats = ["tensor(float16)", "tensor(bfloat16)", "tensor(float)", "tensor(double)"]
    of = defs.OpSchema.FormalParameter
    kind = defs.OpSchema.AttrType
    return defs.OpSchema(
        NORM,
        "",
        1,
        inputs=[of("X", "T"), of("scale", "V")],
        outputs=[of("Y", "V"), of("inv_std_var", "U", param_option=defs.OpSchema.FormalParameterOption.Optional)],
        type_constraints=[("T", floats, ""), ("V", floats, ""), ("U", floats, "")],
        attributes=[
            defs.OpSchema.Attribute(name, type_, "", required=False)
            for name, type_ in (("axis", kind.INT), ("epsilon", kind.FLOAT), ("stash_type", kind.INT))
        ],
    )


@pytest.fixture
def known() -> Iterator[None]:
    defs.register_schema(schema())
    yield
    defs.deregister_schema(NORM, 1, "")


@pytest.mark.parametrize(("name", "target"), [("llama", "general"), ("bert", None)])
def test_the_general_route_is_plain_onnx(exported: Export, name: str, target: None) -> None:
    path = exported(name, target).directory / "model.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(str(path), load_external_data=False)
    assert {(opset.domain, opset.version) for opset in model.opset_import} == {("", 20)}


def test_a_decoder_has_one_operator_that_onnx_does_not_know(exported: Export) -> None:
    path = exported("Llama").directory / "model.onnx"
    with pytest.raises(onnx.checker.ValidationError, match=f"No Op registered for {NORM} with domain_version of 20"):
        onnx.checker.check_model(str(path))
    model = onnx.load(str(path), load_external_data=False)
    assert {node.op_type for node in model.graph.node if not node.domain and not defs.has(node.op_type)} == {NORM}
    assert {(opset.domain, opset.version) for opset in model.opset_import} == {("", 20), ("com.microsoft", 1)}


def test_nothing_else_is_wrong_with_a_decoder(exported: Export, known: None) -> None:
    onnx.checker.check_model(str(exported("Llama").directory / "model.onnx"), full_check=True)


def test_onnxruntime_has_it_in_no_other_domain(tmp_path: Path) -> None:
    """So it stands where it must: in ONNX's domain ONNX Runtime runs it, in its own it does not know it."""

    def model(domain: str) -> bytes:
        values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in SHAPES.items()]
        node = helper.make_node(NORM, ["x", "scale"], ["y"], domain=domain, axis=-1)
        graph = helper.make_graph([node], "norm", values[:2], values[2:])
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()  # type: ignore[no-any-return]

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    onnxruntime.InferenceSession(model(""), options, providers=["CPUExecutionProvider"])
    with pytest.raises(Exception, match=f"com.microsoft.{NORM}.* is not a registered function/op"):
        onnxruntime.InferenceSession(model("com.microsoft"), options, providers=["CPUExecutionProvider"])


SHAPES = {"x": [2, 4], "scale": [4], "y": [2, 4]}
