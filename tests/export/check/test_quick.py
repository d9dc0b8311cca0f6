"""The check of a model that need not stand in memory: a graph in parts, a model layer by layer."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import onnx
import pytest
import torch
from torch import Tensor, nn

from flora_fx.errors import ExportError
from flora_fx.export import export_onnx
from flora_fx.export.check import parts
from flora_fx.export.check.columns import Cut, cut_of
from flora_fx.export.check.crossing import text_input
from flora_fx.export.check.layered import Run, _Weights, in_float32
from flora_fx.export.check.parts import Parts
from flora_fx.export.check.quick import check_quickly
from flora_fx.export.directory.manifest import read_manifest
from flora_fx.export.targets import TargetName
from flora_fx.export.trace.model import private_copy, unwrap
from tests.export.exported_models import Export, Exported, build
from tests.patience import LIMIT_S

CPU = ["CPUExecutionProvider"]


@pytest.fixture
def exported(exported: Export, tmp_path: Path) -> Export:
    """Copies: parts of a graph are written beside it."""

    def get(name: str, target: TargetName | None = None) -> Exported:
        found = exported(name, target)
        place = tmp_path / found.directory.parent.name
        shutil.copytree(found.directory, place)
        return replace(found, result=replace(found.result, directory=place))

    return get


def quick(export: Exported, model: nn.Module | None = None, **changes: Any) -> Any:
    manifest = replace(read_manifest(export.directory), **changes)
    reference = unwrap(export.model.eval()) if model is None else model
    with torch.no_grad():
        return check_quickly(export.directory / "model.onnx", manifest, reference, CPU, wide=False)


@pytest.mark.parametrize(("name", "target"), [("Llama", None), ("Mistral", None), ("llama", "general")])
def test_what_is_compared(exported: Export, name: str, target: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    export = exported(name, target)
    before = sorted(path.name for path in export.directory.iterdir())
    whole = quick(export)
    monkeypatch.setattr(parts, "_BYTES", 2**13)  # each matrix in a part of its own, and the larger ones in columns
    found = quick(export)
    assert found.max_abs_error == pytest.approx(whole.max_abs_error, abs=1e-6)
    assert 0 < found.max_rel_error < 1e-4
    assert (found.verified, found.greedy_tokens_equal, found.checked_on) == ("quick", None, CPU[0])
    assert found.crossed == export.result.crossed
    assert sorted(path.name for path in export.directory.iterdir()) == before


def test_parts_are_the_graph(exported: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tied embedding is transposed at run time: in the part that multiplies by it, not in front of it."""
    export = exported("llama", "general")
    monkeypatch.setattr(parts, "_BYTES", 2**13)
    graph = Parts(export.directory / "model.onnx", "logits", providers=CPU, wide=False)
    manifest = read_manifest(export.directory)

    def given(new: int, name: str) -> Tensor:
        return text_input(graph.signature, manifest, name, 2, 9, new)

    named = [partial(given, new) for new in (9, 4)]
    pieces = list(graph._parts())
    assert len(pieces) > 8
    nodes = onnx.load(str(export.directory / "model.onnx"), load_external_data=False).graph.node
    assert {number for piece in pieces for number in piece.nodes} >= {
        number for number, node in enumerate(nodes) if any(node.output[0] in other.input for other in nodes)
    }
    assert not any("embed_tokens" in name or name.endswith(".T") for piece in pieces for name in piece.made)
    (turning,) = [
        number for number, node in enumerate(nodes) if node.op_type == "Transpose" and "weight" in node.input[0]
    ]
    made = [piece for piece in pieces if turning in piece.nodes]
    assert all(nodes[turning].output[0] not in piece.made for piece in made)
    for give, logits in zip(named, graph.run(named), strict=True):
        wanted = export.decoder.session.run({name: give(name) for name in graph.signature})["logits"]
        torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)


def test_what_is_large_is_cut(exported: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into columns of a matrix, or rows of one that is transposed, as the output layer's is."""
    export = exported("Llama")
    monkeypatch.setattr(parts, "_BYTES", 2**11)
    graph = Parts(export.directory / "model.onnx", "logits", providers=CPU, wide=False)
    axes = {}
    for part in graph._parts():
        cut = cut_of([graph._nodes[number] for number in part.nodes], graph._weights)
        if cut is None or graph._size(cut.weight) <= 2**11:
            continue
        axes[cut.product] = cut.axis
        whole = onnx.numpy_helper.to_array(graph._weights[cut.weight], str(export.directory))
        pieces = [onnx.numpy_helper.to_array(weight, str(export.directory)) for (weight,) in graph._weights_of(part)]
        assert len(pieces) > 1
        assert all(piece.nbytes <= 2**11 for piece in pieces)
        numpy.testing.assert_array_equal(numpy.concatenate(pieces, cut.axis), whole)
    assert axes["logits"] == 0
    assert list(axes.values()).count(1) >= 2 * read_manifest(export.directory).layers


def test_what_is_not_cut() -> None:
    node = onnx.helper.make_node
    external = onnx.TensorProto(name="w", dims=[3, 5], data_type=onnx.TensorProto.FLOAT)
    external.external_data.add(key="location", value="data")
    inline = onnx.numpy_helper.from_array(numpy.ones((3, 5), numpy.float32), "inline")
    weights = {"w": external, "inline": inline}
    product, turned = node("MatMul", ["x", "w"], ["y"]), node("MatMul", ["x", "t"], ["y"])
    assert cut_of([product], weights) == Cut("w", 1, "y")
    assert cut_of([node("Transpose", ["w"], ["t"], perm=[1, 0]), turned], weights) == Cut("w", 0, "y")
    assert cut_of([node("Transpose", ["w"], ["t"]), turned], weights) == Cut("w", 0, "y")
    assert cut_of([node("Transpose", ["w"], ["t"], perm=[0, 1]), turned], weights) is None
    assert cut_of([node("Cast", ["w"], ["t"], to=1), turned], weights) is None
    assert cut_of([node("Gather", ["w", "x"], ["y"])], weights) is None
    assert cut_of([node("MatMul", ["w", "x"], ["y"])], weights) is None
    assert cut_of([node("MatMul", ["x", "inline"], ["y"])], weights) is None
    assert cut_of([node("MatMul", ["x", "z"], ["y"])], weights) is None


@pytest.mark.parametrize("layer", [0, 1])
def test_a_weight_that_is_another(exported: Export, layer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "_BYTES", 2**13)
    export = exported("Llama")
    model: Any = private_copy(unwrap(export.model))
    weight = model.model.layers[layer].mlp.down_proj.base_layer.weight
    weight.data = weight.data * 1.01
    with pytest.raises(ExportError, match="does not agree with PyTorch: the logits of a prompt differs"):
        quick(export, model)


def test_keys_that_are_read_otherwise(exported: Export) -> None:
    """A window that is another one is seen where it ends, by no prompt that is shorter."""
    export = exported("Mistral")
    model: Any = private_copy(unwrap(export.model))
    model.config.sliding_window = 64
    for layer in model.model.layers:
        layer.self_attn.sliding_window = 64
    with pytest.raises(ExportError, match=r"the logits of token (7|64|65) of a text differs|the logits of a prompt"):
        quick(export, model)


# A model in float32, layer by layer


IDS = [torch.tensor(ids) for ids in ([[3, 14, 15, 92]], [[6, 5], [35, 8]], [[9, 7, 9]])]


def test_one_layer_is_in_memory(exported: Export) -> None:
    core = private_copy(unwrap(exported("Llama").model), torch.float16)
    wanted = private_copy(core, torch.float32)
    with torch.no_grad(), in_float32(core, 2) as layered:
        held: list[list[int]] = []
        layers = layered.model.model.layers  # type: ignore[union-attr]

        def note(index: int) -> None:
            held.append([sum(p.untyped_storage().nbytes() for p in layer.parameters()) for layer in layers])

        found = layered.run([Run(lambda: layered.model(IDS[0]).logits, note, note)])
        full = sum(p.numel() * 4 for p in layers[0].parameters())
        empty = sum(4 for _ in layers[0].parameters())
        assert held == [[full, empty]] * 2 + [[empty, full]] * 2
        assert found[0].dtype == torch.float32
        torch.testing.assert_close(found, [wanted(IDS[0]).logits], rtol=0, atol=0)
        torch.testing.assert_close(layered.model(IDS[1]).logits, wanted(IDS[1]).logits, rtol=0, atol=0)
    assert all(p.dtype == torch.float16 for p in core.parameters())


def test_texts_go_through_the_layers_together(exported: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each gives what it gives alone, bit for bit; each weight is read once for all of them."""
    core = private_copy(unwrap(exported("Llama").model), torch.float16)
    wanted = private_copy(core, torch.float32)
    read: list[nn.Module] = []
    passed: list[tuple[str, int, int]] = []

    def run(number: int) -> Run:
        return Run(
            lambda: layered.model(IDS[number]).logits,
            lambda index: passed.append(("begins", number, index)),
            lambda index: passed.append(("ends", number, index)),
        )

    put = _Weights.put
    monkeypatch.setattr(_Weights, "put", lambda self: (read.append(self), put(self))[1])
    with torch.no_grad(), in_float32(core, 2) as layered:
        found = layered.run([run(number) for number in range(len(IDS))])
        torch.testing.assert_close(found, [wanted(ids).logits for ids in IDS], rtol=0, atol=0)
    assert len(read) == len(set(map(id, read))) == 3  # what is outside of the layers, and each of them
    assert passed == [
        (what, number, index) for index in range(2) for number in range(len(IDS)) for what in ("begins", "ends")
    ]
    assert not any(logits.requires_grad for logits in found)


def test_a_text_that_fails(exported: Export) -> None:
    core = private_copy(unwrap(exported("Llama").model), torch.float16)
    before = threading.active_count()
    with torch.no_grad(), in_float32(core, 2) as layered:
        runs = [Run(lambda ids=ids: layered.model(ids).logits) for ids in (IDS[0], torch.tensor([[10**6]]), IDS[2])]
        with pytest.raises(IndexError, match="out of range"):
            layered.run(runs)
        assert threading.active_count() == before
        assert len(layered.run(runs[::2])) == 2


def test_a_tied_weight_stays_one() -> None:
    core = private_copy(unwrap(build("llama")), torch.float16)
    with in_float32(core, 2) as layered:
        model: Any = layered.model
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model.lm_head.weight.dtype == torch.float32


def test_layers_that_are_not_found() -> None:
    model = nn.Sequential(nn.Linear(3, 4)).half()
    with torch.no_grad(), in_float32(model, 7) as layered:
        assert layered.layers == 0
        x = torch.randn(2, 3)
        torch.testing.assert_close(layered.model(x), private_copy(model, torch.float32)(x), rtol=0, atol=0)


# What is asked for, and what was done


@pytest.mark.parametrize(("verify", "dtype"), [("quick", torch.bfloat16), ("none", None)])
def test_what_the_manifest_says(verify: Any, dtype: Any, tmp_path: Path) -> None:
    result = export_onnx(build("Llama"), tmp_path / "out", verify=verify, dtype=dtype)
    told = json.loads((tmp_path / "out" / "flora_fx.json").read_text())["check"]
    assert result.verified == told["verified"] == verify
    if verify == "none":
        assert told == {"verified": "none"}
        assert "not checked against PyTorch" in str(result)
    else:
        assert result.checked_on == "CPUExecutionProvider, in float32"
        assert 0 < told["max_rel_error"] < 0.1
        assert "quick check against PyTorch" in str(result)


def test_a_way_that_there_is_not(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="verify is 'soon'; it must be 'full', 'quick', 'none' or None"):
        export_onnx(build("tiny"), tmp_path / "out", verify="soon")  # type: ignore[arg-type]


# In little memory

_LIMITED = """
import gc, os, resource, sys, traceback
gc.disable()
sys.modules.update(bitsandbytes=None, torchao=None)
import torch, onnxruntime
import transformers.exporters.exporter_onnx
from flora_fx.checkpoint import load_model
from flora_fx.export import export_onnx
from flora_fx.export.check import parts
from flora_fx.storage.mapped import giving_back

place, more = sys.argv[1], int(sys.argv[2])
parts._BYTES = 2**24
torch.set_num_threads(1)
model = load_model(place + "/model")
for verify in ("quick", "full"):
    if not os.fork():
        held = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData")) * 1024
        resource.setrlimit(resource.RLIMIT_DATA, (held + more, held + more))
        try:
            with giving_back(model):
                done = export_onnx(model, place + "/" + verify, providers=["CPUExecutionProvider"], verify=verify)
            said = done.verified
        except Exception as error:
            said = f"{type(error).__name__}: {error}".splitlines()[0]
        print(verify, said, sep=": ", flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")
def test_in_less_memory_than_the_weights_take(tmp_path: Path) -> None:
    """The whole graph in ONNX Runtime packs all weights once more; a part of it packs a part of them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **{"vocab_size": 97, "hidden_size": 256, "intermediate_size": 2**15, "num_hidden_layers": 4},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 64},
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            value.fill_(1.0) if "norm" in name else value.uniform_(-0.03, 0.03)
    model.save_pretrained(tmp_path / "model")
    size = sum(parameter.nbytes for parameter in model.parameters())
    del model
    command = [sys.executable, "-W", "ignore", "-c", _LIMITED, str(tmp_path), str(size * 3 // 5)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT_S)
    quick, full = done.stdout.splitlines() or [done.stderr[-2000:], ""]
    assert quick == "quick: quick"
    assert re.match("full: .*(bad_alloc|allocate|memory)", full), full
