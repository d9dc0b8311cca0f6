"""`capture`: called like the model, returning what the model returns, leaving the model as it was."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import flora_fx
from flora_fx import CaptureError
from tests.architectures import base_model, example_inputs, lora_model


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor, *rest: Tensor, scale: float = 1.0, extra: Tensor | None = None, **more: Any) -> Any:
        total = self.linear(x) * scale + sum(rest)
        return {"out": total if extra is None else total + extra, "more": list(more.values())}


def test_positional_keyword_and_variadic_arguments() -> None:
    model = Named().requires_grad_(False)
    args, kwargs = (torch.ones(4, 3), torch.ones(4, 2), torch.ones(1, 2)), {"extra": torch.ones(2), "a": torch.ones(5)}
    graph = flora_fx.capture(model, *args, **kwargs)
    expected, found = model(*args, **kwargs), graph(*args, **kwargs)
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found, expected)


def test_dynamic_shapes_name_arguments_of_every_kind() -> None:
    model = Named().requires_grad_(False)
    auto = torch.export.Dim.AUTO
    graph = flora_fx.capture(
        model,
        torch.ones(4, 3),
        torch.ones(4, 2),
        a=torch.ones(5),
        dynamic_shapes={"x": {0: auto}, "args_1": {0: auto}, "a": {0: auto}},
    )
    found = graph(torch.ones(9, 3), torch.ones(9, 2), a=torch.ones(2))
    assert found["out"].shape == (9, 2)


def test_the_model_is_left_as_it_was() -> None:
    model = Named()
    before = dict(model.__dict__)
    flora_fx.capture(model, torch.ones(4, 3), dynamic_shapes={"x": {0: torch.export.Dim.AUTO}})
    assert model.__dict__ == before
    with pytest.raises(CaptureError):
        flora_fx.capture(model, torch.ones(4, 5))
    assert model.__dict__ == before


def test_the_model_keeps_its_dicts_and_lists_and_what_is_in_them() -> None:
    """torch.export gives modules copies: an adapter added later was then missing in one of PEFT's two dicts."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)
            self.calls: list[int] = [1]
            self.seen = {"sizes": [7], "kept": {"a": 1}}
            self.linear.shared = self.seen

        def forward(self, x: Tensor) -> Tensor:
            self.calls.append(len(self.calls))
            self.seen["sizes"].append(x.shape[0])
            self.seen["more"] = [x.shape[1]]
            return self.linear(x)

    model = Counting()
    calls, seen, sizes, kept = model.calls, model.seen, model.seen["sizes"], model.seen["kept"]
    flora_fx.capture(model, torch.ones(4, 3))
    assert model.calls is calls
    assert model.seen is seen
    assert model.linear.shared is seen
    assert seen["sizes"] is sizes
    assert seen["kept"] is kept
    assert (calls, seen) == ([1], {"sizes": [7], "kept": {"a": 1}})


def test_an_adapter_can_be_added_after_a_capture() -> None:
    model = lora_model("llama")
    flora_fx.capture(model, **example_inputs("llama"))
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert model.get_base_model().peft_config is model.peft_config
    assert "other" in model.get_base_model().peft_config


def test_a_patched_forward_survives() -> None:
    model = Named()
    inner = model.forward
    patched = lambda x: inner(x)["out"] * 2  # noqa: E731
    model.forward = patched  # type: ignore[method-assign]
    graph = flora_fx.capture(model, torch.ones(4, 3))
    torch.testing.assert_close(graph(torch.ones(4, 3)), model(torch.ones(4, 3)))
    assert model.forward is patched  # type: ignore[comparison-overlap]


def test_parameters_are_shared_and_named_as_in_the_model() -> None:
    model = lora_model("bert")
    graph = flora_fx.capture(model, **example_inputs("bert"))
    ours, theirs = dict(graph.named_parameters()), dict(model.named_parameters())
    assert set(ours) == set(theirs)
    assert all(ours[name].data_ptr() == theirs[name].data_ptr() for name in ours)


def test_outputs_are_the_models_own_types() -> None:
    model = base_model("llama")
    inputs = example_inputs("llama")
    with torch.no_grad():
        expected, found = model(**inputs), flora_fx.capture(model, **inputs)(**inputs)
    assert type(found) is type(expected)
    assert type(found.past_key_values) is type(expected.past_key_values)
    torch.testing.assert_close(found.logits, expected.logits)


def test_what_cannot_be_captured_says_why() -> None:
    with pytest.raises(TypeError, match=r"capture needs a torch.nn.Module, not function"):
        flora_fx.capture(lambda x: x, torch.ones(1))  # type: ignore[arg-type]
    with pytest.raises(CaptureError, match=r"could not trace Named: .*(?s:.*)Remedy: give it example inputs"):
        flora_fx.capture(Named(), torch.ones(4, 5))
    with pytest.raises(
        CaptureError, match=r"dynamic_shapes names y, which the example inputs do not have; they have x"
    ):
        flora_fx.capture(Named(), torch.ones(4, 3), dynamic_shapes={"y": {0: torch.export.Dim.AUTO}})


def test_another_shape_is_refused_and_the_remedy_named() -> None:
    graph = flora_fx.capture(nn.Linear(3, 2).requires_grad_(False), torch.ones(4, 3))
    for program in (graph, flora_fx.fuse(graph)):
        with pytest.raises(RuntimeError, match=r"to be equal to 4, but got 7.*specify dynamic_shapes"):
            program(torch.ones(7, 3))
