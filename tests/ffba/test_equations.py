"""An adapted model computes the equations in FloraConfig's docstring, as hooks on the plain base model write them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from flora_fx.adapters import FloraConfig

from .reference import (
    ACTIVATIONS,
    LAYOUTS,
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

OTHERS = sorted(LAYOUTS.keys() - {"llama", "gpt2"})
NORMED = {family for family, layout in LAYOUTS.items() if layout.norms}


def check(family: str, place: str, scale: float = SCALE, fields: dict[str, Any] | None = None, **said: Any) -> None:
    """Attach with a configuration; the reference is told ``said`` alone."""
    base, inputs = base_model(family), tokens()
    model = attach(base, **PLACES[place], **(fields or {}))
    with torch.no_grad():
        plain, found = output(base, inputs), output(model, inputs)
        with by_hand(base, family, weights_of(model), scale, place, **said):
            expected = output(base, inputs)
    assert_differ(expected, plain)
    assert_close(found, expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_placements_and_activations(family: str, place: str, activation: str | None) -> None:
    check(family, place, fields={"activation": activation}, activation=activation)


@pytest.mark.parametrize(
    ("family", "place"), [(f, p) for f in OTHERS for p in PLACES if f in NORMED or p != "backward"]
)
def test_other_families(family: str, place: str) -> None:
    check(family, place)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("blocks", [("attention",), ("mlp",)], ids=["attention", "mlp"])
def test_one_kind_of_block(blocks: tuple[str, ...], place: str) -> None:
    check("llama", place, fields={"blocks": list(blocks)}, blocks=blocks)


@pytest.mark.parametrize("place", PLACES)
def test_one_layer(place: str) -> None:
    check("llama", place, fields={"layers": [1]}, layers=(1,))


def test_order_of_blocks_and_layers_does_not_matter() -> None:
    check("llama", "cross", fields={"blocks": ["mlp", "attention"], "layers": [1, 0]})


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("r", [1, 5])
def test_scaling(r: int, use_rslora: bool) -> None:
    fields = {"r": r, "alpha": 6.5, "use_rslora": use_rslora}
    check("llama", "shared", 6.5 / (math.sqrt(r) if use_rslora else r), fields)


def test_sharing_is_one_low_rank_value() -> None:
    model = attach(base_model("llama"), placement="shared", activation="silu")
    calls: list[str] = []
    for name, module in model.named_modules():
        if name.endswith(".flora_A.default"):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    output(model, tokens())
    assert len(calls) == len(set(calls)) == 4  # two blocks in each of two layers
    assert all(".q_proj." in name or ".gate_proj." in name for name in calls)


@pytest.mark.parametrize("places", [("block", "block"), ("shared", "cross"), ("forward", "backward")])
def test_active_adapters_add_up(places: tuple[str, str]) -> None:
    base, inputs = base_model("llama"), tokens()
    model = attach(base, "one", **PLACES[places[0]])
    model.add_adapter("two", FloraConfig(r=5, alpha=3, init="random", activation="tanh", **PLACES[places[1]]))
    a, b = weights_of(model, "one"), weights_of(model, "two")
    by_a = (base, "llama", a, SCALE, places[0])
    by_b = (base, "llama", b, 3 / 5, places[1], "tanh")
    with torch.no_grad():
        with by_hand(*by_a):
            expected = output(base, inputs)
            assert_close(output(model, inputs), expected)
            with by_hand(*by_b):
                both = output(base, inputs)
        assert_differ(both, expected)
        model.base_model.set_adapter(["one", "two"])
        assert_close(output(model, inputs), both)
        model.set_adapter("two")
        with by_hand(*by_b):
            assert_close(output(model, inputs), output(base, inputs))


def test_every_end_of_a_pass_has_its_own_values() -> None:
    """A prompt and then a token with a cache give the last logits of both at once."""
    model, inputs = attach(base_model("llama"), placement="shared", activation="gelu"), tokens(length=8)
    ids = inputs["input_ids"]
    with torch.no_grad():
        whole = model(ids).logits[:, -1]
        prompt = model(ids[:, :-1], use_cache=True)
        assert_close(model(ids[:, -1:], past_key_values=prompt.past_key_values).logits[:, -1], whole)
