"""FFBA adapters through `torch.compile`: widened for inference, accumulated in training, and back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from flora_fx import FusionReport
from flora_fx.backend import last_report

from .counted import gemms, ups_of, widened
from .reference import (
    LAYERS,
    PLACES,
    assert_close,
    assert_differ,
    attach,
    base_model,
    tokens,
)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(12, 10, bias=False), nn.Linear(12, 10), nn.Linear(12, 6)
        self.o_proj = nn.Linear(6, 12)

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.softmax(self.q_proj(x) @ self.k_proj(x).transpose(1, 2), -1)
        return self.o_proj(weights @ self.v_proj(x))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(12, 20, bias=False), nn.Linear(12, 20, bias=False)
        self.down_proj = nn.Linear(20, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(torch.sigmoid(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm, self.self_attn = nn.LayerNorm(12), Attention()
        self.post_attention_layernorm, self.mlp = nn.LayerNorm(12), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Net(nn.Module):
    """A Llama's projections and norms, and little else: a whole one takes seconds to compile."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList([Layer() for _ in range(LAYERS)]), nn.Linear(12, 7)
        self.config = {"model_type": "net", "tie_word_embeddings": False}

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


SMALL = {f"{place}-{activation}": (place, activation) for place in PLACES for activation in (None, "silu")}
WHOLE = {"llama-shared-silu": ("shared", "silu"), "llama-cross-None": ("cross", None)}


class Compiled(NamedTuple):
    """A model with an adapter, and the function of it that a test calls: a loss, or what is its output."""

    place: str
    activation: str | None
    model: Any
    inputs: Callable[[], dict[str, Tensor]]

    def call(self, module: Any, inputs: dict[str, Tensor]) -> Tensor:
        found = module(**inputs)
        logits: Tensor = found if isinstance(found, Tensor) else found.logits
        return logits

    def loss(self, module: Any, inputs: dict[str, Tensor]) -> Tensor:
        logits = self.call(module, inputs)
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(7), dtype=logits.dtype)
        return (logits * weights).sum()


def compilable(case: str) -> Compiled:
    place, activation = {**SMALL, **WHOLE}[case]
    if case in SMALL:
        model = attach(Net().double(), activation=activation, **PLACES[place])
        return Compiled(place, activation, model, lambda: {"x": torch.randn(2, 5, 12, dtype=torch.float64)})
    model = attach(base_model("llama"), activation=activation, **PLACES[place])
    return Compiled(place, activation, model, lambda: {**tokens(), "use_cache": False})  # type: ignore[dict-item]


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="flora", fullgraph=True, options={"flora.inner": "aot_eager", **options})


def last() -> FusionReport:
    report = last_report()
    assert report is not None
    return report


@pytest.mark.parametrize("case", [*SMALL, *WHOLE])
def test_compiled_for_inference(case: str) -> None:
    case_ = compilable(case)
    place, model, inputs = case_.place, case_.model.requires_grad_(False), case_.inputs()
    expected = case_.call(model, inputs)
    call = compiled(model)
    assert_close(case_.call(call, inputs), expected, 1e-12)
    report = last()
    assert len(report.fused) == len(ups_of(model))
    assert bool(widened(report)) == (place != "forward")
    assert report.ops_after["gemm"] == gemms(place, stacked=case_.activation is None) + (2 * LAYERS) * (case in SMALL)
    for name, parameter in model.named_parameters():
        if ".flora_" in name or "base_layer" in name:
            parameter.mul_(1.1)
    assert_close(case_.call(call, inputs), case_.call(model, inputs), 1e-12)
    assert_differ(case_.call(model, inputs), expected)


def compilations(write: str) -> list[int]:
    """How many graphs Dynamo has made after each of four calls."""
    case = compilable("block-None")
    model, inputs, made = case.model.requires_grad_(False), case.inputs(), []
    torch._dynamo.utils.counters.clear()
    call = compiled(model, **{"flora.write": write})
    for _ in range(4):
        case.call(call, inputs)
        made.append(int(torch._dynamo.utils.counters["stats"]["unique_graphs"]))
    return made


def test_a_compiled_model_is_not_compiled_over_and_over() -> None:
    assert compilations("accumulated") == [1, 1, 1, 1]
    assert compilations("widened")[1:] == [2, 2, 2]


def assert_same_step(case: Compiled, call: Any, reference: nn.Module) -> None:
    """One forward and backward of both; the gradients stay."""
    inputs = case.inputs()
    found, expected = case.loss(call, inputs), case.loss(reference, inputs)
    assert_close(found, expected, 1e-12)
    found.backward()
    expected.backward()
    wanted = dict(reference.named_parameters())
    for name, parameter in case.model.named_parameters():
        if ".flora_" not in name:
            assert parameter.grad is None, name
            continue
        gradient = wanted[name].grad
        assert parameter.grad is not None, name
        assert gradient is not None
        assert float(gradient.norm()) > 1e-6
        assert float((parameter.grad - gradient).norm()) <= 1e-9 * float(gradient.norm()), name


@pytest.mark.parametrize("case", [*SMALL, *WHOLE])
def test_compiled_for_training(case: str) -> None:
    case_ = compilable(case)
    place, model = case_.place, case_.model.train()
    reference, call = copy.deepcopy(model), compiled(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for fused in (False, True):
        modules = (model, reference)
        optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2, weight_decay=0.1, fused=fused) for m in modules]
        for _ in range(3):
            assert_same_step(case_, call, reference)
            for module, optimizer in zip(modules, optimizers, strict=True):
                optimizer.step()
                module.zero_grad()
        expected = dict(reference.named_parameters())
        for name, parameter in model.named_parameters():
            if ".flora_" in name:
                assert float((parameter - expected[name]).detach().abs().max()) <= 1e-9, name
                assert not torch.equal(parameter, before[name]), name
            else:
                assert torch.equal(parameter, before[name]), name
                assert parameter not in optimizers[0].state, name
    report = last()
    assert len(report.fused) == len(ups_of(model))
    assert not widened(report)  # columns are strided, and what trains is dense
    assert all(parameter.is_contiguous() for name, parameter in model.named_parameters() if ".flora_B." in name)
    wanted = gemms(place, widened=False, stacked=False) + (2 * LAYERS) * (case in SMALL)
    assert report.ops_after["gemm"] == wanted


@pytest.mark.parametrize("fused", [False, True])
def test_training_after_inference_and_inference_after_training(fused: bool) -> None:
    """What was widened trains, and is widened again, with nothing stale in between, and no base weight touched."""
    case = compilable("shared-None")
    model, inputs = case.model, case.inputs()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = {name: p.detach().clone() for name, p in model.named_parameters() if ".flora_" not in name}
    call = compiled(model)
    for _ in range(2):
        model.eval().requires_grad_(False)
        assert_close(case.call(call, inputs), case.call(copy.deepcopy(model), inputs), 1e-12)
        assert widened(last())
        model.train()
        for parameter in trained:
            parameter.requires_grad_(True)
        reference = copy.deepcopy(model)
        assert_same_step(case, call, reference)
        torch.optim.AdamW(trained, lr=1e-2, fused=fused).step()
        torch.optim.AdamW([p for p in reference.parameters() if p.requires_grad], lr=1e-2).step()
        model.zero_grad()
        for (name, parameter), wanted in zip(model.named_parameters(), reference.parameters(), strict=True):
            assert float((parameter - wanted).detach().abs().max()) <= 1e-9, name
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
