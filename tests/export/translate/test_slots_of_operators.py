"""Rows that choose among LoRAs in the operators of ``flora_ort``: their nodes, PyTorch's tokens, slots, and limits."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import peft
import pytest
import torch

from flora_fx.errors import ExportError
from flora_fx.export import Decoder, export_onnx, load_decoder
from flora_fx.export.directory import operators
from flora_fx.export.directory.manifest import read_manifest
from flora_fx.export.lora.stacking import SlotPlan
from flora_fx.export.lora.swappable import SwappablePart, SwappableWeight
from flora_fx.export.translate import lora_sums, slots_of_operators
from tests.export.slot_models import FILLED, Mixed, padded
from tests.export.stand_in import CUDA, FakeCuda
from tests.faults.models import ADAPTERS, adapted

pytestmark = pytest.mark.usefixtures("library")
CPU = ["CPUExecutionProvider"]
LAYERS = 2
LAYER = {"MatMul": 4, "LoraAdd": 1, "GroupQueryAttention": 1, "LoraSwiGLU": 1, "LoraSkipRMSNorm": 2}
FURTHER = {"sixth": 8, "seventh": 1, "eighth": 2}
EIGHT = (*ADAPTERS, *FURTHER)


@dataclass(frozen=True)
class Made:
    """Eight adapters.

    Attributes:
        model: of PEFT, with all of them.
        one: an export of the first alone.
        fixed: of all of them.
        slots: of three, in eight slots of rank 8.
    """

    model: Any
    one: Path
    fixed: Path
    slots: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, library: Path) -> Made:
    place = tmp_path_factory.mktemp("chosen")
    model = adapted(*ADAPTERS, layers=LAYERS)
    for name, rank in FURTHER.items():
        lora = peft.LoraConfig(r=rank, lora_alpha=9, target_modules="all-linear", init_lora_weights=False)
        model.add_adapter(name, lora)
    model.set_adapter("exported")
    export_onnx(model, place / "one", custom_ops=True, providers=CPU)
    export_onnx(model, place / "fixed", adapters=EIGHT, custom_ops=True, providers=CPU)
    export_onnx(model, place / "slots", adapters=FILLED, slots=8, rank=8, custom_ops=True, providers=CPU)
    return Made(model, place / "one", place / "fixed", place / "slots")


def graph_of(directory: Path) -> onnx.GraphProto:
    return onnx.load(str(directory / "model.onnx"), load_external_data=False).graph


def ops(directory: Path) -> Counter[str]:
    return Counter(node.op_type for node in graph_of(directory).node)


def ours(directory: Path) -> list[onnx.NodeProto]:
    return [node for node in graph_of(directory).node if node.domain == "flora_ort"]


def numbers(node: onnx.NodeProto, name: str) -> list[int]:
    found: list[int] = onnx.helper.get_node_attr_value(node, name)
    return found


# Nodes


def test_eight_adapters_have_the_nodes_of_one(made: Made) -> None:
    assert ops(made.fixed) == ops(made.one)
    nodes = list(graph_of(made.fixed).node)
    first = next(index for index, node in enumerate(nodes) if node.op_type == "MatMul")
    layer = [node.op_type for node in nodes[first:] if node.op_type not in ("Cast", "Shape", "Squeeze")][:9]
    assert layer == [
        *("MatMul", "LoraAdd", "GroupQueryAttention", "MatMul", "LoraSkipRMSNorm"),
        *("MatMul", "LoraSwiGLU", "MatMul", "LoraSkipRMSNorm"),
    ]
    assert all(node.input[-1] == "adapter_ids" for node in ours(made.fixed))
    assert read_manifest(made.fixed).custom_ops
    assert read_manifest(made.fixed).inputs[-1] == "adapter_ids"


def test_slots_have_a_gemm_of_their_own_for_a_pack(made: Made) -> None:
    layer = {**LAYER, "MatMul": 8}
    found = ops(made.slots)
    assert {op: found[op] for op in layer} == {op: LAYERS * count + (op == "MatMul") for op, count in layer.items()}, (
        "and the head"
    )
    assert "Where" not in found


def test_each_adapter_has_as_many_rows_of_b_as_its_rank(made: Made) -> None:
    """In the order of projections; `fewer` is on two of them alone."""
    ranks = [options["r"] for options in ADAPTERS.values()] + [*FURTHER.values()]
    without = [0 if name == "fewer" else rank for name, rank in zip(EIGHT, ranks, strict=True)]
    qkv, o, gate_up, down = ours(made.fixed)[:4]
    for node, projections in (
        (qkv, [ranks, without, without]),
        (o, [without]),
        (gate_up, [without, without]),
        (down, [ranks]),
    ):
        blocks, edges = numbers(node, "blocks"), numbers(node, "adapters")
        assert len(blocks) == 5 * len(projections)
        for index, projection in enumerate(projections):
            mine = edges[9 * index : 9 * index + 9]
            assert [last - first for first, last in itertools.pairwise(mine)] == projection
            assert blocks[5 * index + 2 : 5 * index + 4] == [mine[0], mine[-1]]
    wide = numbers(ours(made.slots)[0], "adapters")
    assert wide[:9] == [*range(0, 72, 8)]


# What they compute


@torch.no_grad()
@pytest.mark.parametrize("export", ["fixed", "slots"])
def test_logits_are_those_of_float64(made: Made, export: str) -> None:
    decoder = load_decoder(getattr(made, export), providers=CPU)
    rows = [None, *FILLED, "exported"]
    ids, mask = padded(len(rows))
    found = decoder(ids, mask, adapters=rows).double()
    try:
        made.model.double()
        for row, name in enumerate(rows):
            expected = expected_logits(made.model, name, ids[row], mask[row])
            assert (found[row, -1] - expected).abs().max() < 1e-5 * expected.abs().max(), name
    finally:
        made.model.float()


def expected_logits(model: Any, name: str | None, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Of the last token, with one adapter alone."""
    kept = ids[mask.bool()][None]
    if name is None:
        with model.disable_adapter():
            return model(input_ids=kept).logits[0, -1]  # type: ignore[no-any-return]
    model.set_adapter(name)
    return model(input_ids=kept).logits[0, -1]  # type: ignore[no-any-return]


def new_tokens(decoder: Decoder, rows: list[str | None], count: int = 24) -> torch.Tensor:
    ids, mask = padded(len(rows))
    return decoder.generate(ids, mask, adapters=rows, max_new_tokens=count, eos_token_id=[])[:, ids.shape[1] :]


def expected_tokens(made: Made, rows: list[str | None], count: int = 24) -> list[list[int]]:
    mixed = Mixed(made.model, made.one, made.fixed, made.slots)
    ids, mask = padded(len(rows))
    return [mixed.expected(name, ids[row], mask[row], count).tolist() for row, name in enumerate(rows)]


def test_tokens_of_mixed_batches(made: Made) -> None:
    decoder = load_decoder(made.fixed, providers=CPU)
    for rows in ([None, *EIGHT], ["sixth"], ["eighth", "fewer", None]):
        assert new_tokens(decoder, rows).tolist() == expected_tokens(made, rows), rows


def test_slots_are_filled_replaced_and_emptied(made: Made) -> None:
    decoder = load_decoder(made.slots, providers=CPU)
    for name in ("sixth", "seventh"):
        made.model.set_adapter(name)
        decoder.load_adapter(made.model, name=name)
    made.model.set_adapter("eighth")
    decoder.load_adapter(made.model, slot="lower", name="eighth")
    rows = ["eighth", None, "sixth", "fewer", "seventh", "exported"]
    assert new_tokens(decoder, rows).tolist() == expected_tokens(made, rows)
    decoder.unload_adapter("sixth")
    rows = ["eighth", "seventh", None]
    assert new_tokens(decoder, rows).tolist() == expected_tokens(made, rows)


def test_onnxruntime_genai_runs_a_mixed_batch(made: Made) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    model = genai.Model(str(made.fixed))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(batch_size=3, do_sample=False, max_length=16, min_length=16)
    generator = genai.Generator(model, parameters)
    numbers = np.array([5, -1, 3])  # which are not copied
    generator.set_model_input("adapter_ids", numbers)
    prompts = torch.tensor([[11, 23, 5, 40]] * 3)
    generator.append_tokens(prompts.numpy().astype("int32"))
    while not generator.is_done():
        generator.generate_next_token()
    mixed = Mixed(made.model, made.one, made.fixed, made.slots)
    for row, name in enumerate(["sixth", None, "fewer"]):
        expected = mixed.expected(name, prompts[row], torch.ones(4), 12, suppress_tokens=[0])  # which ends a row
        assert generator.get_sequence(row).tolist()[4:] == expected.tolist(), name


def test_on_another_device(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, library: Path) -> None:
    """For CUDA they are taken without being asked for; the export's own check compares every adapter."""
    monkeypatch.setattr(operators, "_has_cuda", lambda path: True)
    result = export_onnx(
        adapted("same", "fewer"), tmp_path / "out", adapters=["same", "fewer"], slots=3, dtype=torch.float16
    )
    assert result.checked_on == f"{CUDA}, in a CUDA graph"
    assert read_manifest(tmp_path / "out").custom_ops
    assert "Where" not in ops(tmp_path / "out")


def test_a_sum_that_no_operator_takes_is_selected_in_front_of_its_b(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the same graph; the export's own check compares every adapter."""
    monkeypatch.setattr(lora_sums, "_MOST_BLOCKS", 1)  # q, k and v are three, gate and up two
    export_onnx(adapted("same", "fewer"), tmp_path / "out", adapters=["same", "fewer"], custom_ops=True, providers=CPU)
    found = ops(tmp_path / "out")
    assert found["LoraSkipRMSNorm"] == 2
    assert found["Where"] == 2
    assert "LoraSwiGLU" not in found


# Limits


def plan_of(count: int) -> SlotPlan:
    return SlotPlan((), (), {"q": (1,) * count, "k": (1,) * count}, replaceable=False)


def added(blocks: list[int]) -> tuple[ir.Model, ir.Value]:
    """One LoraAdd, and the ids."""
    values = {name: ir.Value(name=name) for name in ("p", "up", "ids")}
    node = ir.node("LoraAdd", [values["p"], values["up"]], {"blocks": blocks}, domain="flora_ort")
    graph = ir.Graph([values["p"], values["up"]], node.outputs, nodes=[node], opset_imports={"flora_ort": 1})
    return ir.Model(graph, ir_version=10), values["ids"]


def b_of(count: int) -> SwappableWeight:
    parts = (SwappablePart("q", "B", (0, 8), (0, count)), SwappablePart("k", "B", (8, 16), (count, 2 * count)))
    return SwappableWeight("up", transposed=True, parts=parts)


def test_as_many_adapters_as_an_operator_has_room_for() -> None:
    for count in (127, 128):
        model, ids = added([0, 8, 0, count, 0, 8, 16, count, 2 * count, 8])
        if count == 127:
            slots_of_operators.let_operators_choose(model, [b_of(count)], plan_of(count), ids)
            assert list(model.graph[0].inputs)[2:] == [None, None, ids]
            assert list(model.graph[0].attributes["adapters"].as_ints()) == [*range(128), *range(127, 255)]
        else:
            with pytest.raises(ExportError, match=r"no room for \d+ adapters .* pass custom_ops=False"):
                slots_of_operators.let_operators_choose(model, [b_of(count)], plan_of(count), ids)


def test_a_b_whose_slots_do_not_stand_one_by_one() -> None:
    model, ids = added([0, 8, 0, 3, 0])
    with pytest.raises(ExportError, match="the adapters in up do not stand slot by slot; pass custom_ops=False"):
        slots_of_operators.let_operators_choose(model, [b_of(4)], plan_of(4), ids)


def test_more_slots_than_operators_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ExportError, match="custom_ops is for at most 50 adapters, and there are places for 51"):
        export_onnx(adapted("same"), tmp_path / "out", adapters=["same"], slots=51, custom_ops=True)
    monkeypatch.setattr(operators, "_has_cuda", lambda path: True)
    assert operators.choose_operators(None, CUDA, 50)
    assert not operators.choose_operators(None, CUDA, 51)
