"""FFBA adapters in ONNX, and from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import flora_fx
from flora_fx import AdapterError
from flora_fx.adapters import FloraLayer
from flora_fx.checkpoint import load_model
from flora_fx.export import Decoder, export_onnx, load

from .counted import assert_all_fused, ups_of, widened
from .reference import (
    PLACES,
    SCALE,
    assert_close,
    assert_differ,
    attach,
    base_model,
    by_hand,
    output,
    tokens,
    weights_of,
)


@pytest.mark.parametrize(
    "place", ["block", pytest.param("shared", marks=pytest.mark.slow), pytest.param("cross", marks=pytest.mark.slow)]
)
def test_exported_to_onnx(place: str, tmp_path: Path) -> None:
    base = base_model("llama", torch.float32)
    if place != "cross":  # which reaches into the next layer
        base.model.layers, base.config.num_hidden_layers = base.model.layers[:1], 1
    model = attach(base, activation="silu" if place == "shared" else None, **PLACES[place])
    layers = base.config.num_hidden_layers

    def state() -> dict[str, tuple[Any, ...]]:
        return {
            name: (p.data_ptr(), p.stride(), p.storage_offset(), p.dtype, p.requires_grad)
            for name, p in model.named_parameters()
        }

    places, values = state(), {name: p.detach().clone() for name, p in model.named_parameters()}
    result = export_onnx(model, tmp_path / "out")
    assert state() == places
    assert all(torch.equal(p, values[name]) for name, p in model.named_parameters())
    assert len(result.report.fused) == len(ups_of(model))
    assert not result.report.declines
    assert len(widened(result.report)) == (3 if place == "cross" else 2 * layers)

    ids = torch.tensor([[11, 23, 5, 40], [3, 61, 8, 9]])
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    decoder = load(tmp_path / "out")
    assert isinstance(decoder, Decoder)
    mask = torch.ones_like(ids)
    expected = model.get_base_model().generate(ids, attention_mask=mask, **options)
    assert torch.equal(decoder.generate(ids, max_new_tokens=24, eos_token_id=[]), expected)
    with model.disable_adapter():
        plain = model.get_base_model().generate(ids, attention_mask=mask, **options)
    assert not torch.equal(plain, expected), "tokens that the base alone gives prove nothing"

    if place == "block":
        graph = onnx.load(str(tmp_path / "out" / "model.onnx"), load_external_data=False).graph
        # Per block: first projections, A (beside), last projection with B; per layer q·kᵀ and weights·v; the head.
        assert sum(node.op_type in ("MatMul", "Gemm") for node in graph.node) == layers * (2 * 3 + 2) + 1
        made = {name: node for node in graph.node for name in node.output}
        wide = [
            made[node.input[0]].op_type
            for node in graph.node
            if node.op_type == "MatMul" and node.input[1].startswith("_flora.") and node.input[0] in made
        ]
        assert wide.count("Concat") == 2 * layers
        weights = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 2}
        assert not [n.op_type for n in graph.node for i in n.input if i in weights and n.op_type in ("Concat", "Mul")]


# Checkpoints


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and an FFBA adapter, as PEFT saves it."""
    torch.manual_seed(4321)
    directory = tmp_path_factory.mktemp("checkpoint")
    base = base_model("llama", torch.float32)
    base.save_pretrained(directory / "base")
    attach(base, placement="shared", activation="silu").save_pretrained(directory / "adapter")
    return directory


def spoiled(saved: Path, directory: Path, change: Callable[[Tensor], Tensor], end: str) -> Path:
    """The adapter with one of its tensors changed."""
    attach(base_model("llama", torch.float32), placement="shared", activation="silu").save_pretrained(directory)
    tensors = load_file(saved / "adapter" / "adapter_model.safetensors")
    key = next(name for name in tensors if f".flora_{end}." in name)
    tensors[key] = change(tensors[key]).contiguous()
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


def test_a_saved_adapter_loads_and_fuses(saved: Path) -> None:
    inputs = tokens()
    model = load_model(saved / "base", saved / "adapter")
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert any(isinstance(module, FloraLayer) for module in model.modules())
    tensors = load_file(saved / "adapter" / "adapter_model.safetensors")
    weights = {
        key.removeprefix("base_model.model.").replace(".flora_", ".").removesuffix(".weight"): value
        for key, value in tensors.items()
    }
    assert all(torch.equal(value, weights[name]) for name, value in weights_of(model).items())
    base = load_model(saved / "base")
    with by_hand(base, "llama", weights, SCALE, "shared", "silu"), torch.no_grad():
        expected = output(base, inputs)
    assert_close(output(model, inputs), expected, 1e-5)
    fused = flora_fx.fuse(flora_fx.capture(model, **inputs))
    assert_all_fused(flora_fx.report(fused), model)
    assert_close(output(fused, inputs), expected, 1e-5)
    assert_differ(output(fused, inputs), output(base, inputs))


@pytest.mark.parametrize("end", ["A", "B"])
@pytest.mark.parametrize(
    "change",
    [lambda t: t[:-1], lambda t: t[:, :-1], lambda t: torch.cat([t, t]), lambda t: t.t()],
    ids=["fewer rows", "fewer columns", "more rows", "transposed"],
)
def test_an_adapter_of_another_shape_is_refused(
    saved: Path, tmp_path: Path, change: Callable[[Tensor], Tensor], end: str
) -> None:
    adapter = spoiled(saved, tmp_path / "adapter", change, end)
    with pytest.raises(AdapterError, match=r"does not fit LlamaForCausalLM|is the adapter of another model"):
        load_model(saved / "base", adapter)


@pytest.mark.parametrize("end", ["A", "B"])
@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_an_adapter_with_nan_is_refused(saved: Path, tmp_path: Path, bad: float, end: str) -> None:
    def change(tensor: Tensor) -> Tensor:
        tensor[-1, -1] = bad
        return tensor

    adapter = spoiled(saved, tmp_path / "adapter", change, end)
    with pytest.raises(AdapterError, match=rf"flora_{end}\.weight holds NaN or Inf"):
        load_model(saved / "base", adapter)
    model, inputs = attach(base_model("llama"), placement="shared").requires_grad_(False), tokens()
    next(iter(weights_of(model).values()))[0, 0] = bad
    with pytest.raises(AdapterError, match=r"flora_.\.default\.weight holds NaN or infinity"):
        flora_fx.fuse(flora_fx.capture(model, **inputs))
