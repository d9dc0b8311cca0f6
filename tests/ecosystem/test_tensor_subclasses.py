"""Weights that are tensor subclasses stay where they are, and what is compiled around them trains right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.testing._internal.two_tensor import TwoTensor

from flora_fx import Reason, backend
from tests.adapters import D_IN, FORMS, Adapted
from tests.ecosystem.lora_training import DEBUG, declined, fused_adapters

STEPS = 3


class Plain(Tensor):
    """A subclass without any behaviour of its own."""


SUBCLASSES: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda weight: weight.as_subclass(Plain),
    "wrapper": lambda weight: TwoTensor(weight, weight.clone()),
}


@pytest.fixture(autouse=True)
def _no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_last", None)


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def adapted(**weights: Callable[[Tensor], Tensor]) -> Adapted:
    """The same numbers at each call, in a subclass where a layer is named."""
    torch.manual_seed(7)
    model = Adapted(FORMS["peft"]).double().train()
    model.drop.p = 0.0
    model.w.requires_grad_(False)
    for name, subclass in weights.items():
        layer = getattr(model, name)
        layer.weight = nn.Parameter(subclass(layer.weight.detach()), requires_grad=layer.weight.requires_grad)
    return model


def plain(value: Tensor) -> Tensor:
    if isinstance(value, DTensor):
        return value.detach().full_tensor()
    return value.detach().a if isinstance(value, TwoTensor) else value.detach().as_subclass(Tensor)


def train(model: Adapted, forward: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """A and B after a few steps."""
    trained = [model.a.weight, model.b.weight]
    optimizer = torch.optim.SGD(trained, lr=0.01)
    for step in range(STEPS):
        forward(x + step).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [plain(parameter) for parameter in trained]


def compare(expected: Adapted, model: Adapted, x: Tensor, given: Tensor) -> None:
    """Compiled, a model trains as another one does that is not compiled; its base and its types stay."""
    types = {name: type(parameter) for name, parameter in model.named_parameters()}
    base = plain(model.w.weight).clone()
    found = train(model, torch.compile(model, backend="flora", options=DEBUG), given)
    for value, wanted in zip(found, train(expected, expected, x), strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-9, atol=1e-9)
    assert torch.equal(plain(model.w.weight), base)
    assert {name: type(parameter) for name, parameter in model.named_parameters()} == types
    assert Reason.WEIGHT_NOT_DENSE in declined()


@pytest.mark.parametrize("layer", ["w", "a", "b"])
@pytest.mark.parametrize("subclass", SUBCLASSES.values(), ids=SUBCLASSES)
def test_one_weight_is_a_subclass(subclass: Callable[[Tensor], Tensor], layer: str) -> None:
    x = torch.randn(4, D_IN, dtype=torch.float64)
    compare(adapted(**{layer: subclass}), adapted(**{layer: subclass}), x, x)
    assert len(fused_adapters()) == (layer == "w")  # such a base keeps its kernel, its adapter accumulates


def test_all_weights_are_distributed(mesh: DeviceMesh) -> None:
    def distribute(weight: Tensor) -> Tensor:
        return distribute_tensor(weight, mesh)

    x = torch.randn(4, D_IN, dtype=torch.float64)
    compare(adapted(), adapted(w=distribute, a=distribute, b=distribute), x, distribute(x))
    assert not fused_adapters()
