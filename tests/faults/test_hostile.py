"""An export that was made to harm: its graph reads a file from elsewhere. ONNX Runtime never sees it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import helper

from flora_fx.errors import ExportError
from flora_fx.export import Encoder, load
from flora_fx.export.run import loading

from .exports import WEIGHT, by_hand, external, reseal


@pytest.fixture
def _unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(*_: Any, **__: Any) -> None:
        pytest.fail("ONNX Runtime was given the graph")

    monkeypatch.setattr(loading, "Session", opened)


def test_an_honest_one_runs(tmp_path: Path) -> None:
    encoder = load(by_hand(tmp_path / "out"))
    assert isinstance(encoder, Encoder)
    x = torch.tensor([[1.0, 0.0, -2.0]])
    assert torch.equal(encoder(x=x)["y"], x @ WEIGHT)


def constant(*locations: str) -> onnx.NodeProto:
    return helper.make_node("Constant", [], ["c"], value=external("c", *locations))


def sparse(location: str) -> onnx.SparseTensorProto:
    return onnx.SparseTensorProto(values=external("s", location), dims=[3])


def within(graph: onnx.GraphProto) -> onnx.NodeProto:
    return helper.make_node("If", ["x"], ["z"], then_branch=graph, else_branch=graph)


def inner(location: str) -> onnx.GraphProto:
    return helper.make_graph([constant(location)], "inner", [], [])


def function(location: str) -> onnx.FunctionProto:
    return onnx.FunctionProto(name="f", domain="d", node=[within(inner(location))])


def defaulted(location: str) -> onnx.FunctionProto:
    default = helper.make_attribute("a", external("a", location))
    return onnx.FunctionProto(name="f", domain="d", attribute_proto=[default])


def trained(location: str) -> onnx.TrainingInfoProto:
    return onnx.TrainingInfoProto(algorithm=inner(location))


PLACES: dict[str, Callable[[str], dict[str, Any]]] = {
    "initializer": lambda at: {"initializer": [external("V", at)]},
    "constant": lambda at: {"node": [constant(at)]},
    "sparse initializer": lambda at: {"sparse_initializer": [sparse(at)]},
    "sparse constant": lambda at: {"node": [helper.make_node("Constant", [], ["c"], sparse_value=sparse(at))]},
    "branch": lambda at: {"node": [within(inner(at))]},
    "function": lambda at: {"functions": [function(at)]},
    "default of a function": lambda at: {"functions": [defaulted(at)]},
    "training": lambda at: {"training_info": [trained(at)]},
    "second location": lambda at: {"initializer": [external("V", at, "model.onnx.data")]},
    "last location": lambda at: {"initializer": [external("V", "model.onnx.data", at)]},
}


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.usefixtures("_unseen")
def test_weights_from_elsewhere(tmp_path: Path, place: str, verify: bool) -> None:
    for number, location in enumerate(("/etc/passwd", "../model.onnx.data", "other.data", "sub/../../x", "")):
        out = by_hand(tmp_path / str(number), **PLACES[place](location))
        with pytest.raises(ExportError, match=r"reads its weights from .*, which is not a file of this export; do not"):
            load(out, verify=verify)


@pytest.mark.usefixtures("_unseen")
def test_no_location_at_all(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="reads its weights from ''"):
        load(by_hand(tmp_path / "out", initializer=[external("V")]))


@pytest.mark.parametrize("location", ["sub/model.onnx.data", "*/_ORT_MEM_ADDR_/*"])
@pytest.mark.usefixtures("_unseen")
def test_a_path_that_the_manifest_lists(tmp_path: Path, location: str) -> None:
    """ONNX Runtime takes the second for an address in the memory of its process."""
    out = by_hand(tmp_path / "out", initializer=[external("V", location)])
    (out / location).parent.mkdir(parents=True, exist_ok=True)
    (out / location).write_bytes(b"x")
    content = (out / location).read_bytes()
    files = json.loads((out / "flora_fx.json").read_text())["files"]
    files[location] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    reseal(out, files=files)
    with pytest.raises(ExportError, match="reads its weights from"):
        load(out)


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../x", "C:x", "a\\b", ""])
@pytest.mark.usefixtures("_unseen")
def test_files_from_elsewhere(tmp_path: Path, name: str) -> None:
    out = by_hand(tmp_path / "out")
    files = json.loads((out / "flora_fx.json").read_text())["files"]
    reseal(out, files={**files, name: {"bytes": 1, "sha256": ""}})
    with pytest.raises(ExportError, match="which is outside the directory; do not trust it"):
        load(out, verify=False)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.usefixtures("_unseen")
def test_a_link_on_the_way(tmp_path: Path, verify: bool) -> None:
    out = by_hand(tmp_path / "out")
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "key").write_bytes(b"secret")
    (out / "sub").symlink_to(tmp_path / "secrets")
    files = json.loads((out / "flora_fx.json").read_text())["files"]
    files["sub/key"] = {"bytes": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}
    reseal(out, files=files)
    with pytest.raises(ExportError, match="sub/key is outside the directory, by a link; do not trust it"):
        load(out, verify=verify)


def test_the_directory_itself_may_be_a_link(tmp_path: Path) -> None:
    by_hand(tmp_path / "out")
    (tmp_path / "current").symlink_to("out")
    assert isinstance(load(tmp_path / "current"), Encoder)
