"""FFBA adapters fused in captured graphs, in every form."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, fx, nn

import flora_fx
from flora_fx import FuseConfig
from flora_fx.ir import Pack, Role
from flora_fx.passes.plan.layout import ALIGNED

from .counted import assert_all_fused, gemms, ups_of, widened
from .reference import (
    LAYERS,
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

CONFIGS: dict[str, FuseConfig] = {
    "default": FuseConfig(),
    "beside": FuseConfig(layout="beside"),
    "ahead": FuseConfig(layout="ahead"),
    "accumulated": FuseConfig(write="accumulated"),
    "folded": FuseConfig(fold_scale=True),
    "per projection": FuseConfig(up="per_projection"),
    "all else": FuseConfig(
        layout="beside", write="accumulated", accumulate="add", fold_scale=True, up="per_projection", pack_base=True
    ),
}


class Captured(NamedTuple):
    place: str
    activation: str | None
    base: nn.Module
    model: nn.Module
    graph: fx.GraphModule
    inputs: dict[str, Tensor]
    expected: Tensor


@pytest.fixture(
    scope="module",
    params=[(place, activation) for place in PLACES for activation in (None, "silu")],
    ids=lambda param: f"{param[0]}-{param[1]}",
)
def captured(request: pytest.FixtureRequest) -> Captured:
    place, activation = request.param
    torch.manual_seed(1234)
    base, inputs = base_model("llama").requires_grad_(False), tokens()
    model = attach(base, activation=activation, **PLACES[place]).requires_grad_(False)
    with by_hand(base, "llama", weights_of(model), SCALE, place, activation):
        expected = output(base, inputs)
    return Captured(place, activation, base, model, flora_fx.capture(model, **inputs), inputs, expected)


@pytest.mark.parametrize("form", CONFIGS)
def test_a_captured_llama_in_every_form(captured: Captured, form: str) -> None:
    place, linear, config = captured.place, captured.activation is None, CONFIGS[form]
    fused = flora_fx.fuse(copy.deepcopy(captured.graph), config=config)
    assert_close(output(fused, captured.inputs), captured.expected, 1e-10)
    assert_differ(output(fused, captured.inputs), output(captured.base, captured.inputs))
    report = flora_fx.report(fused)
    assert_all_fused(report, captured.model, place)
    first_too = place != "forward" or (config.layout == "ahead" and linear)
    assert bool(widened(report)) == (config.write == "widened" and first_too)
    if form != "all else":
        assert report.ops_after["gemm"] == gemms(
            place, layout=config.layout, widened=config.write == "widened", stacked=linear
        )


def test_what_a_layer_costs() -> None:
    """The table of the design, from the same count that the graphs are held to."""
    per_layer = {place: gemms(place, layers=9) - gemms(place, layers=8) for place in PLACES}
    assert per_layer == {"block": 4, "forward": 6, "backward": 9, "shared": 6, "cross": 4}
    assert gemms("cross", layers=1) == 1 + 3 + 3  # head; q, k, v, which nothing is written onto; three packs


@functools.cache
def plain_operations() -> Mapping[str, int]:
    """What a Llama without adapters costs."""
    return flora_fx.report(flora_fx.fuse(flora_fx.capture(base_model("llama"), **tokens()))).ops_before


def test_nothing_elementwise_of_a_linear_adapter_is_left(captured: Captured) -> None:
    """Folded: nothing at all. Otherwise the scale of each z that is widened: one product of rank features."""
    before = plain_operations()
    scaled = {"forward": 0, "cross": 2 * LAYERS - 1}.get(captured.place, 2 * LAYERS)
    for config, left in ((CONFIGS["folded"], 0), (CONFIGS["default"], scaled), (CONFIGS["accumulated"], 0)):
        fused = flora_fx.fuse(copy.deepcopy(captured.graph), config=config)
        assert flora_fx.report(fused).ops_after["elementwise"] == before["elementwise"] + left


def test_an_unfused_graph_is_left_as_it_was(captured: Captured) -> None:
    code, again = captured.graph.code, copy.deepcopy(captured.graph)
    flora_fx.fuse(again)
    assert again.code == code
    assert_close(output(again, captured.inputs), captured.expected, 1e-10)


def test_fusing_twice_changes_nothing(captured: Captured) -> None:
    fused = flora_fx.fuse(copy.deepcopy(captured.graph))
    again = flora_fx.fuse(fused)
    assert again.code == fused.code
    assert flora_fx.report(again) == flora_fx.report(fused)


def shortened(pack: Pack) -> list[tuple[str, str]]:
    """(role, name of the module) of a pack's members."""
    found = []
    for piece, name in zip(pack.slices, pack.members, strict=True):
        parts = [part for part in name.split(".") if part.endswith("_proj")]
        found.append((piece.role.value, parts[-1].removesuffix("_proj")))
    return found


QKV = [("base", "q"), ("base", "k"), ("base", "v")]
MLP = [("base", "gate"), ("base", "up")]
MEMBERS: dict[str, list[list[tuple[str, str]]]] = {
    "block": [
        [*QKV, ("down", "q")],
        [("base", "o"), ("up", "o")],
        [*MLP, ("down", "gate")],
        [("base", "down"), ("up", "down")],
    ]
    * LAYERS,
    "shared": [
        [*QKV, ("down", "q")],
        [("up", "q"), ("up", "k"), ("up", "v")],
        [("base", "o"), ("up", "o")],
        [*MLP, ("down", "gate")],
        [("up", "gate"), ("up", "up")],
        [("base", "down"), ("up", "down")],
    ]
    * LAYERS,
    "cross": [
        [("base", "o"), ("down", "o")],
        [*MLP, ("up", "gate"), ("up", "up")],
        [("base", "down"), ("down", "down")],
        [*QKV, ("up", "q"), ("up", "k"), ("up", "v")],
        [("base", "o"), ("down", "o")],
        [*MLP, ("up", "gate"), ("up", "up")],
    ],
    "backward": [[("base", "o"), ("up", "o")], [("base", "down"), ("up", "down")]] * LAYERS,
}


@pytest.mark.parametrize("place", MEMBERS)
def test_members_and_shapes_of_packs(place: str) -> None:
    model = attach(base_model("llama"), **PLACES[place]).requires_grad_(False)
    packs = flora_fx.report(flora_fx.fuse(flora_fx.capture(model, **tokens()))).packs
    assert sorted(map(shortened, packs)) == sorted(MEMBERS[place])
    for pack in packs:
        roles = [piece.role for piece in pack.slices]
        rows = max(piece.rows[1] for piece in pack.slices)
        if Role.BASE in roles and Role.DOWN in roles:
            assert pack.shape[0] % ALIGNED == 0
            assert 0 <= pack.shape[0] - rows < ALIGNED
        else:
            assert pack.shape[0] == rows
        if Role.BASE in roles and Role.UP in roles:
            # All of them multiply one z: the columns behind those of the bases, each in the rows of its base.
            width = pack.shape[1] - 3
            at = {name: piece for piece, (role, name) in zip(pack.slices, shortened(pack), strict=True) if role == "up"}
            for piece, (role, name) in zip(pack.slices, shortened(pack), strict=True):
                if role == "base" and name in at:
                    assert (piece.columns, at[name].columns) == ((0, width), (width, width + 3))
                    assert piece.rows == at[name].rows


@pytest.mark.parametrize("place", ["block", "shared", "cross"])
@pytest.mark.parametrize("fold_scale", [False, True])
def test_the_fused_graph_and_the_live_model_share_their_weights(place: str, fold_scale: bool) -> None:
    base, inputs = base_model("llama"), tokens()
    model = attach(base, activation="silu", **PLACES[place]).requires_grad_(False)
    fused = flora_fx.fuse(flora_fx.capture(model, **inputs), config=FuseConfig(fold_scale=fold_scale))
    ours = {name: p for name, p in model.named_parameters() if p.dim() == 2 and "_proj" in name}
    theirs = dict(fused.named_parameters())
    before = output(fused, inputs)

    def assert_followed() -> None:
        nonlocal before
        after = output(fused, inputs)
        assert_close(after, output(model, inputs), 1e-10)
        assert_differ(after, before)
        before = after

    for part in (".flora_B.", ".flora_A.", "base_layer"):
        for name, parameter in ours.items():
            if part in name:
                assert theirs[name].data_ptr() == parameter.data_ptr()
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
        assert_followed()
        for name, parameter in theirs.items():
            if part in name:
                parameter.mul_(0.9)
        assert_followed()
    other = attach(base_model("llama"), activation="silu", **PLACES[place])
    model.load_state_dict(other.state_dict())
    assert_followed()
    assert_close(before, output(other, inputs), 1e-10)
    fused.load_state_dict({name: value * 0.9 for name, value in fused.state_dict().items()})
    assert_followed()
    assert all(theirs[name].data_ptr() == parameter.data_ptr() for name, parameter in ours.items())


@pytest.mark.parametrize("place", ["block", "cross"])
def test_fusing_again_with_folded_scales_leaves_the_model_alone(place: str) -> None:
    base, inputs = base_model("llama"), tokens()
    model = attach(base, **PLACES[place]).requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    graph = flora_fx.capture(model, **inputs)
    first = flora_fx.fuse(graph)
    flora_fx.fuse(graph, config=FuseConfig(fold_scale=True))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert flora_fx.report(first).fused


@pytest.mark.parametrize(
    ("family", "place"),
    [
        *(("gpt2", place) for place in ("block", "shared", "cross")),
        *(("opt", place) for place in ("block", "shared", "cross")),
        ("bert", "block"),
        ("bert", "cross"),
        ("phi3", "shared"),
        ("gemma2", "cross"),
    ],
)
def test_other_families(family: str, place: str) -> None:
    base, inputs = base_model(family), tokens()
    activation = {"block": None, "shared": "silu", "cross": "tanh"}[place]
    model = attach(base, activation=activation, **PLACES[place]).requires_grad_(False)
    with by_hand(base, family, weights_of(model), SCALE, place, activation):
        expected = output(base, inputs)
    graph = flora_fx.capture(model, **inputs)
    for config in (FuseConfig(), FuseConfig(layout="beside", accumulate="add", fold_scale=True)):
        fused = flora_fx.fuse(copy.deepcopy(graph), config=config)
        assert_close(output(fused, inputs), expected, 1e-10)
        report = flora_fx.report(fused)
        assert_all_fused(report, model)
        # Beside all of their bases, or of the last projections of their blocks alone.
        columns = {name for pack in widened(report) for name in pack.members if ".flora_B." in name}
        assert len(columns) == {"block": 2 * LAYERS, "shared": 2 * LAYERS, "cross": len(ups_of(model))}[place]
