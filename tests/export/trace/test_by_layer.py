"""A decoder of which one layer of each kind was traced is the one of which all were."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.export import ExportedProgram

from flora_fx.export.rewrite.rotary import ATTENTION
from flora_fx.export.trace import by_layer
from flora_fx.export.trace.capture import capture
from flora_fx.export.trace.decoder import trace_decoder
from flora_fx.export.trace.model import private_copy, unwrap
from flora_fx.export.trace.traced import Traced
from tests.export.exported_models import build, plain

LAYERS = 5
SCALE = 11
"""An argument of the operator."""


def mixed_ranks() -> nn.Module:
    """Llama, its third layer with another rank than the others, and its last without an adapter."""
    lora = peft.LoraConfig(
        r=5,
        lora_alpha=7,
        target_modules=r".*layers\.[0123]\..*_proj",
        rank_pattern={r".*layers\.2\..*": 3},
        init_lora_weights=False,
    )
    return peft.get_peft_model(plain("Llama", num_hidden_layers=LAYERS), lora)


def every_other() -> nn.Module:
    """SmolLM3, some of its layers without positions."""
    return build(
        "SmolLM3", num_hidden_layers=LAYERS, no_rope_layers=[1, 0, 1, 1, 0], layer_types=["full_attention"] * LAYERS
    )


def windows() -> nn.Module:
    """Gemma-3, two windows for each layer that sees all."""
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
    return build("Gemma-3", num_hidden_layers=LAYERS, layer_types=kinds)


def own_scales() -> nn.Module:
    """GPT-2, each layer with another scale."""
    return build("GPT-2", num_hidden_layers=LAYERS, scale_attn_by_inverse_layer_idx=True)


def experts() -> nn.Module:
    return build("Mixtral", num_hidden_layers=LAYERS)


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "ranks": (mixed_ranks, 4),
    "positions": (every_other, 3),
    "windows": (windows, 3),
    "experts": (experts, 2),
}
"""Models, and how many of their layers are traced: the first, and one of each kind of the others."""


@pytest.fixture
def traced_layers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each capture had."""
    found: list[int] = []

    def counted(module: nn.Module, args: tuple[Any, ...], shapes: Any) -> ExportedProgram:
        found.append(len(args[-1]) // 2)
        return capture(module, args, shapes)

    monkeypatch.setattr(by_layer, "capture", counted)
    return found


def of_all_layers(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> Traced:
    with monkeypatch.context() as patch:
        patch.setattr(by_layer, "path_of_layers", lambda module, count: None)
        return trace_decoder(model)


def outputs(traced: Traced) -> tuple[Tensor, ...]:
    """Of prompts of different lengths, behind three tokens that are cached."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.tensor([7, 5])
    ids = torch.randint(0, 97, (2, 4), generator=generator)
    mask = (torch.arange(7) < lengths[:, None]).long()
    shape = (2, traced.kv_heads, 3, traced.head_dim)
    dtype = next(value.dtype for value in traced.program.state_dict.values() if value.is_floating_point())
    past = tuple(torch.randn(shape, generator=generator).to(dtype) for _ in range(2 * traced.layers))
    module: Any = traced.program.module(check_guards=False)
    with torch.no_grad():
        found: tuple[Tensor, ...] = module(ids, mask, past)
    return found


def inputs(program: ExportedProgram) -> list[tuple[Any, ...]]:
    specs = program.graph_signature.input_specs
    return [(spec.kind, spec.target, spec.arg.name) for spec in specs if "lifted_tensor" not in str(spec.target)]


def operators(program: ExportedProgram) -> Counter[str]:
    """But sizes, which may be seen at any input that has them."""
    nodes = program.graph.find_nodes(op="call_function", target=torch.ops.aten.sym_size.int)
    return Counter(str(n.target) for n in program.graph.nodes if n.op == "call_function" and n not in nodes)


@pytest.mark.parametrize(
    "name", [name if name in ("ranks", "positions") else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
)
def test_the_program_is_that_of_all_layers(
    name: str, traced_layers: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    make, count = MODELS[name]
    model = private_copy(unwrap(make())).double() if name == "ranks" else private_copy(unwrap(make()))
    found = trace_decoder(model)
    full = of_all_layers(model, monkeypatch)
    assert traced_layers == [count, LAYERS]
    assert inputs(found.program) == inputs(full.program)
    assert operators(found.program) == operators(full.program)
    assert found.program.state_dict.keys() == full.program.state_dict.keys()
    for value, wanted in zip(outputs(found), outputs(full), strict=True):
        torch.testing.assert_close(value, wanted, rtol=0, atol=0)


def test_what_is_of_no_layer_twice_is_traced_in_full(
    traced_layers: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="flora_fx"):
        program = trace_decoder(private_copy(unwrap(own_scales()))).program
    assert "no two of its layers are alike" in caplog.text
    assert traced_layers == [LAYERS]
    scales = [node.args[SCALE] for node in program.graph.find_nodes(op="call_function", target=ATTENTION)]
    assert scales == [pytest.approx(0.25 / (index + 1)) for index in range(LAYERS)]


class Skipping(nn.Module):
    """A layer; the first notes what came in or out, the last ones add it."""

    def __init__(self, layer: nn.Module, noted: list[Tensor], what: str) -> None:
        super().__init__()
        self.layer = layer
        self.noted = noted
        self.what = what

    def forward(self, hidden_states: Tensor, **options: Any) -> Tensor:
        found: Tensor = self.layer(hidden_states, **options)
        if self.what == "adds":
            return found + self.noted[0]
        self.noted[:] = [hidden_states if self.what == "notes in" else found]
        return found


def skipping(first: str) -> Any:
    model: Any = private_copy(unwrap(build("Llama", num_hidden_layers=LAYERS)))
    layers, noted = model.model.layers, []
    for index in (0, 2, 3, 4):
        layers[index] = Skipping(layers[index], noted, "adds" if index else first)
    return model


def test_a_layer_that_reads_more_than_the_last_is_traced_in_full(
    traced_layers: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="flora_fx"):
        trace_decoder(skipping("notes out"))
    assert "a layer reads what a layer before the last one has made" in caplog.text
    assert traced_layers == [LAYERS]


def test_what_stands_in_front_of_all_layers_may_be_read_by_all(
    traced_layers: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = skipping("notes in")
    found = trace_decoder(model)
    assert traced_layers == [3]
    for value, wanted in zip(outputs(found), outputs(of_all_layers(model, monkeypatch)), strict=True):
        torch.testing.assert_close(value, wanted, rtol=0, atol=0)


class Counting(transformers.LlamaForCausalLM):
    """Runs with as many layers as it was made with."""

    def forward(self, *args: Any, position_ids: Tensor | None = None, **kwargs: Any) -> Any:
        assert self.model.layers[LAYERS - 1] is not None
        return super().forward(*args, position_ids=position_ids, **kwargs)


def test_what_does_not_run_with_fewer_layers_is_traced_in_full(
    traced_layers: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    model: Any = private_copy(unwrap(build("Llama", num_hidden_layers=LAYERS)))
    model.__class__ = Counting
    with caplog.at_level(logging.INFO, logger="flora_fx"):
        trace_decoder(model)
    assert "with fewer layers it does not run (index 4 is out of range)" in caplog.text
    assert traced_layers == [LAYERS]


def test_the_config_of_the_model_stays(traced_layers: list[int]) -> None:
    model: Any = private_copy(unwrap(windows()))
    before = model.config.to_dict()
    trace_decoder(model)
    assert traced_layers == [3]
    assert model.config.to_dict() == before
    assert len(model.model.layers) == LAYERS
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [*range(LAYERS)]


def test_weights_are_those_of_the_model() -> None:
    model: Any = private_copy(unwrap(build("Llama", num_hidden_layers=LAYERS)))
    program = trace_decoder(model).program
    for name, parameter in model.named_parameters():
        assert program.state_dict[f"model.{name}"].data_ptr() == parameter.data_ptr()


def test_layers_of_other_numbers_are_not_alike(traced_layers: list[int]) -> None:
    """A number that a layer multiplies by is seen where it is used, not where it is kept."""
    config = transformers.GraniteConfig(
        **{"vocab_size": 97, "hidden_size": 64, "intermediate_size": 80, "num_attention_heads": 4},
        num_key_value_heads=2,
        num_hidden_layers=LAYERS,
    )
    model: Any = transformers.GraniteForCausalLM(config).eval()
    model.model.layers[3].residual_multiplier = 0.7
    program = trace_decoder(private_copy(model)).program
    assert traced_layers == [3]
    factors = [n.args[1] for n in program.graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor)]
    assert factors.count(0.7) == 2


def test_a_program_of_repeated_layers_can_be_decomposed() -> None:
    """As it is for torch.onnx, which translates what is not written node by node."""
    program = trace_decoder(private_copy(unwrap(build("Llama", num_hidden_layers=LAYERS)))).program
    decomposed = program.run_decompositions()
    assert len(decomposed.graph_signature.output_specs) == 1 + 2 * LAYERS
