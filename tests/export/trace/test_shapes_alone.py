"""A large model is run for its shapes without its numbers: what is found is what a run with them finds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flora_fx.export.trace import shapes_alone
from flora_fx.export.trace.decoder import trace_decoder
from flora_fx.export.trace.model import private_copy, unwrap
from flora_fx.export.trace.shapes_alone import for_shapes
from flora_fx.internals import FakeTensor
from tests.export.exported_models import build
from tests.export.longrope_models import plain_longrope


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model is a large one."""
    monkeypatch.setattr(shapes_alone, "_LARGE", 0)


class Twice(nn.Module):
    """Counts its runs, and keeps something that it made."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(3, 5)
        self.register_buffer("made", torch.zeros(5))
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        made = self.inside(x)
        self.made = made[0] * 2
        self.kept = made[1]
        return made


def test_nothing_is_computed(large: None) -> None:
    model, x = Twice(), torch.ones(2, 3)
    found = for_shapes(model, lambda: model(x))
    assert isinstance(found, FakeTensor)
    assert (found.shape, found.dtype, model.runs) == (torch.Size([2, 5]), torch.float32, 1)


def test_a_small_one_is_run_as_it_is() -> None:
    model, x = Twice(), torch.ones(2, 3)
    found = for_shapes(model, lambda: model(x))
    assert not isinstance(found, FakeTensor)
    assert model.runs == 1


def test_a_run_that_looks_at_numbers_gets_them(large: None) -> None:
    model, x = Twice(), torch.ones(2, 3)
    assert for_shapes(model, lambda: model(x).sum().item()) == model(x).sum().item()
    assert model.runs == 3


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_without_numbers_is_left_in_the_model(fails: bool, large: None) -> None:
    model, x = Twice(), torch.ones(2, 3)
    seen: list[Any] = []

    def run() -> Tensor:
        seen.append((model.made, hasattr(model, "kept")))
        made: Tensor = model(x)
        return made.nonzero() if fails else made  # of a shape that depends on numbers

    for_shapes(model, run)
    if fails:
        first, again = seen
        assert first == again
        assert torch.equal(model.kept, model.inside(x)[1])
    else:
        assert torch.equal(model.made, torch.zeros(5))
        assert not hasattr(model, "kept")


def test_an_error_of_the_run_is_its_own(large: None) -> None:
    model = Twice()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        for_shapes(model, lambda: model(torch.ones(2, 4)))


MODELS: dict[str, Callable[[], Any]] = {
    "windows": lambda: build("Mistral", num_hidden_layers=4),
    "numbers": plain_longrope,
}


@pytest.mark.parametrize("name", MODELS)
def test_the_program_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model that looks at no number, and of one that chooses its frequencies by how long a text is."""
    model = private_copy(unwrap(MODELS[name]()))
    expected = trace_decoder(model).program
    monkeypatch.setattr(shapes_alone, "_LARGE", 0)
    found = trace_decoder(model).program
    assert found.graph_module.code == expected.graph_module.code
    assert list(found.state_dict) == list(expected.state_dict)
