"""Adapters that are for some tokens: the graph, the numbers, the gradients, what is left as it is."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import flora_fx
from flora_fx import FuseConfig, MixedAdapters, Reason
from flora_fx.ops import pick_columns
from flora_fx.quantized import QuantizedLinear
from tests.adapters import D_IN, D_OUT, RANK, linear
from tests.quantized.weights import affine
from tests.variants.models import Linears, Wide

from .models import ADAPTERS, adapted, alone, assert_exact, batch, ffba

NAMES = list(ADAPTERS)
MIXES: list[list[str | None]] = [["code", None, "sql", "chat", "math"], ["sql", "sql", None, "chat", None]]
AUTO = torch.export.Dim.AUTO

aten = torch.ops.aten


def frozen() -> Any:
    return adapted().requires_grad_(False)


def captured(model: Any, names: list[str] = NAMES) -> fx.GraphModule:
    return flora_fx.capture(model, batch(3), adapters=names, dynamic_shapes={"args_0": {0: AUTO, 1: AUTO}})


@functools.cache
def captured_once() -> tuple[Any, fx.GraphModule]:
    """The model and its graph, to be copied together: what is fused ties its packs to the weights of both."""
    model = frozen()
    return model, captured(model)


def wheres(graph: fx.Graph) -> int:
    """How many values are selected by token."""
    kinds = (torch.where, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.self, aten.masked_fill.Scalar)
    found = [node for node in graph.nodes if node.target in kinds and node.meta["val"].dim() > 1]
    return len(found)


@pytest.mark.parametrize(
    ("layout", "up", "accumulate", "fold_scale"),
    [
        *itertools.product(["joined", "beside"], ["block_diagonal", "per_projection"], ["addmm", "add"], [False, True]),
        ("ahead", "block_diagonal", "addmm", False),
        *itertools.product(["joined", "beside"], ["per_projection"], ["unrolled"], [False, True]),
    ],
)
def test_every_configuration_is_exact(layout: Any, up: Any, accumulate: Any, fold_scale: bool) -> None:
    model, graph = copy.deepcopy(captured_once())
    mixed = MixedAdapters(model, NAMES)
    config = FuseConfig(layout=layout, up=up, accumulate=accumulate, fold_scale=fold_scale)
    fused = flora_fx.fuse(graph, config=config)
    report = flora_fx.report(fused)
    assert (len(report.fused), report.declines) == (11, ()), str(report)
    for names in MIXES:
        x = batch(len(names))
        assert_exact(fused(x, adapter_ids=mixed.ids(names)), alone(model, x, names))
        assert_exact(graph(x, adapter_ids=mixed.ids(names)), alone(model, x, names))


def test_a_group_selects_once_and_each_base_accumulates_once() -> None:
    """q, k and v have four adapters of four ranks and three scales: one GEMM, one selection, three up-projections."""
    model = frozen()
    fused = flora_fx.fuse(captured(model), config=FuseConfig(up="per_projection"))
    report = flora_fx.report(fused)
    assert report.ops_after["gemm"] == 3 + 3 + 1 + 1  # packs of qkv, o and head; B's of q, k, v, of o, of head
    biases = 4  # of the adapter that has them
    assert wheres(fused.graph) == 3 + biases
    assert report.ops_before["gemm"] == 5 + 2 * 11


@pytest.mark.parametrize("count", [1, 16])
def test_one_adapter_or_sixteen_of_ranks_to_64(count: int) -> None:
    ranks = [64, 1, 3, 17, 2, 5, 33, 7, 9, 4, 6, 8, 11, 13, 15, 16][:count]
    options = {f"of {r}": {"r": r, "lora_alpha": 2 * r + i, "target_modules": ["q", "o"]} for i, r in enumerate(ranks)}
    model = adapted(Linears(), options).requires_grad_(False)
    names = list(options)
    fused, mixed = flora_fx.fuse(captured(model, names)), MixedAdapters(model, names)
    assert len(flora_fx.report(fused).fused) == 2 * count
    order: list[str | None] = [None, *reversed(names), names[0]]
    x = batch(len(order))
    assert_exact(fused(x, adapter_ids=mixed.ids(order)), alone(model, x, order))


def test_equal_adapters_count_instead_of_telling_each_column() -> None:
    """Adapters of one rank and one scale: whose a column is follows from its place, and no factor is written."""
    options = {name: {"r": 3, "lora_alpha": 4, "target_modules": ["q", "v"]} for name in "abcd"}
    model = adapted(Linears(2), options).requires_grad_(False)
    fused, mixed = flora_fx.fuse(captured(model, list(options))), MixedAdapters(model, list(options))
    targets = [node.target for node in fused.graph.nodes]
    assert targets.count(aten.eq.Tensor) == 1  # one mask for both layers: their columns are alike
    assert targets.count(aten.lt.Scalar) == 1  # q's columns, v's columns
    assert torch.mul not in targets
    x, names = batch(3), ["d", None, "b"]
    assert_exact(fused(x, adapter_ids=mixed.ids(names)), alone(model, x, names))


@pytest.mark.parametrize("kind", ["export", "decomposed", "compiled"])
def test_every_kind_of_graph(kind: str) -> None:
    model = frozen()
    mixed, x, names = MixedAdapters(model, NAMES), batch(5), MIXES[0]
    ids = mixed.ids(names)
    run: Any
    if kind == "compiled":
        run = torch.compile(mixed, backend="flora", options={"flora.inner": "aot_eager"}, fullgraph=True)
    else:
        kwargs = {"adapter_ids": ids}
        program = torch.export.export(mixed, (x,), kwargs, strict=False)
        program = program.run_decompositions() if kind == "decomposed" else program
        fused = flora_fx.fuse(program)
        assert (len(flora_fx.report(fused).fused), flora_fx.report(fused).declines) == (11, ())
        run = fused.module()
    assert_exact(run(x, adapter_ids=ids), alone(model, x, names))
    if kind == "compiled":
        report = flora_fx.backend.last_report()
        assert report is not None
        assert (len(report.fused), report.declines) == (11, ()), str(report)
        assert report.ops_after["gemm"] == 3 + 5


@pytest.mark.parametrize("accumulate", ["addmm", "add", "unrolled"])
def test_adapters_train_together(accumulate: str) -> None:
    model = adapted(adapters={name: {**o, "lora_dropout": 0} for name, o in ADAPTERS.items()})
    mixed, x, weight = MixedAdapters(model, NAMES).train(), batch(5), batch(5, 7)
    options = {"flora.inner": "aot_eager", "flora.accumulate": accumulate}
    compiled = torch.compile(mixed, backend="flora", options=options, fullgraph=True)

    def gradients(call: Callable[..., Tensor], ids: Tensor) -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        (call(x, adapter_ids=ids) * weight).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    for names in MIXES:
        ids = mixed.ids(names)
        expected, found = gradients(mixed, ids), gradients(compiled, ids)
        assert len(flora_fx.backend.last_report().fused) == 11  # type: ignore[union-attr]
        assert found.keys() == expected.keys()
        assert sum("lora_" in name for name in found) == 2 * 11 + 4  # A, B, and the biases of one
        for name, gradient in found.items():
            assert_exact(gradient, expected[name])


def test_other_ids_do_not_compile_anew() -> None:
    model = frozen()
    mixed, x = MixedAdapters(model, NAMES), batch(5)
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(mixed, backend="flora", options={"flora.inner": "aot_eager"}, fullgraph=True)
    for names in [MIXES[0], *MIXES, MIXES[0]]:
        assert_exact(compiled(x, adapter_ids=mixed.ids(names)), alone(model, x, names))
    # The second because the B's have become columns of one weight, which Dynamo sees in the call after.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_infinities_stay_in_their_rows() -> None:
    """An A that overflows once the graph is fused: its rows do, the others are what they were."""
    model = frozen()
    fused, mixed, x = flora_fx.fuse(captured(model)), MixedAdapters(model, NAMES), batch(3)
    expected = alone(model, x, ["sql", "chat", None])
    model.base_model.model.layers[0].o.lora_A["chat"].weight.data.fill_(float("inf"))
    found = fused(x, adapter_ids=mixed.ids(["sql", "chat", None]))
    assert_exact(found[[0, 2]], expected[[0, 2]])
    assert not found[1].isfinite().all()


@pytest.mark.parametrize("fold_scale", [False, True])
def test_infinities_of_a_b_stay_in_their_rows_where_columns_are_picked(fold_scale: bool) -> None:
    """A B that is no longer finite once the graph is fused; a GEMM of all B's would multiply it by zeros."""
    model = frozen()
    config = FuseConfig(up="per_projection", accumulate="unrolled", fold_scale=fold_scale)
    fused, mixed, x = flora_fx.fuse(captured(model), config=config), MixedAdapters(model, NAMES), batch(3)
    assert pick_columns in [node.target for node in fused.graph.nodes]
    ids, expected = mixed.ids(["sql", "chat", None]), alone(model, x, ["sql", "chat", None])
    assert_exact(fused(x, adapter_ids=ids), expected)
    with torch.no_grad():
        model.base_model.model.layers[0].o.lora_B["chat"].weight[0, 0] = float("inf")
    found = fused(x, adapter_ids=ids)
    assert_exact(found[[0, 2]], expected[[0, 2]])
    assert not found[1].isfinite().all()


@pytest.mark.parametrize(
    ("options", "adapters", "gemms"),
    [
        # Packs of qkv, gate and up, each with all A's; B's of q, k and v, of gate and up; o and down; lm_head.
        ({"placement": "shared"}, 28, 2 * 10 + 1),
        ({"placement": "block", "activation": "silu"}, 8, 2 * 8 + 1),
        # What attention reads is written onto the MLP, and the other way round: each B accumulates alone.
        ({"placement": "cross"}, 14, 29),
    ],
    ids=str,
)
def test_ffba_adapters_fuse(options: dict[str, Any], adapters: int, gemms: int) -> None:
    model = ffba(**options).requires_grad_(False)
    tokens, names = torch.randint(40, (3, 6)), ["two", None, "one"]
    graph = flora_fx.capture(model, input_ids=tokens, use_cache=False, adapters=["one", "two"])
    fused, mixed = flora_fx.fuse(graph), MixedAdapters(model, ["one", "two"])
    report = flora_fx.report(fused)
    assert (len(report.fused), report.declines) == (adapters, ()), str(report)
    assert report.ops_after["gemm"] == gemms
    ids = mixed.ids(names)
    found = fused(input_ids=tokens, use_cache=False, adapter_ids=ids).logits
    for row, name in enumerate(names):
        model.base_model.enable_adapter_layers() if name else model.base_model.disable_adapter_layers()
        if name:
            model.set_adapter(name)
        assert_exact(found[row : row + 1], model(input_ids=tokens[row : row + 1], use_cache=False).logits)


@pytest.mark.parametrize(("accumulate", "gemms"), [("addmm", 3), ("unrolled", 2)])
def test_a_quantized_base(accumulate: Any, gemms: int) -> None:
    """Its codes pack by themselves; the adapters beside it are as beside any other."""
    base = Wide()
    for seed, (name, layer) in enumerate(list(base.named_children())):
        weight, _ = affine(layer.out_features, layer.in_features, seed=seed)
        setattr(base, name, QuantizedLinear(weight, layer.bias))
    options = {"a": {"r": 3, "lora_alpha": 4, "target_modules": ["q", "k"]}, "b": {"r": 2, "target_modules": ["q"]}}
    model = adapted(base.double(), options).requires_grad_(False)
    x, names = batch(3, 64), ["b", None, "a"]
    graph, mixed = flora_fx.capture(model, x, adapters=["a", "b"]), MixedAdapters(model, ["a", "b"])
    fused = flora_fx.fuse(graph, config=FuseConfig(accumulate=accumulate))
    report = flora_fx.report(fused)
    assert (len(report.fused), report.declines) == (3, ()), str(report)
    assert (report.ops_before["gemm"], report.ops_after["gemm"]) == (8, gemms)
    assert_exact(fused(x, adapter_ids=mixed.ids(names)), alone(model, x, names))


class Chosen(nn.Module):
    """A projection and two adapters, the first for some tokens; a mask is given, or ids."""

    def __init__(self, form: Callable[[Chosen, Tensor, Tensor], Tensor], bias: bool = False) -> None:
        super().__init__()
        self.form = form
        self.w, self.a, self.b = linear(D_IN, D_OUT), linear(D_IN, RANK), linear(RANK, D_OUT, bias)
        self.a2, self.b2 = linear(D_IN, RANK + 2), linear(RANK + 2, D_OUT)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.form(self, x, ids)


def _mask(ids: Tensor, number: int = 1) -> Tensor:
    return (ids == number)[:, None, None]


def _two(m: Chosen, x: Tensor, ids: Tensor) -> Tensor:
    y = m.w(x) + m.b(torch.where(_mask(ids), m.a(x), 0)) * 0.3
    return y + m.b2(torch.where(_mask(ids, 7), m.a2(x), 0)) * 1.7


def _zeros(m: Chosen, x: Tensor, ids: Tensor) -> Tensor:
    z = m.a(x)
    return m.w(x) + m.b(torch.where(_mask(ids), z, torch.zeros_like(z)))


def _by_feature(m: Chosen, x: Tensor, ids: Tensor) -> Tensor:
    z = m.a(x)
    return m.w(x) + m.b(torch.where(z > 0, z, 0)) * 0.3


FORMS: dict[str, tuple[Callable[[Chosen, Tensor, Tensor], Tensor], int]] = {
    # the form, and how many up-projections are left of it beside the pack
    "below": (lambda m, x, ids: m.w(x) + m.b(torch.where(_mask(ids), m.a(x), 0)) * 0.3, 1),
    "above": (lambda m, x, ids: m.w(x) + torch.where(_mask(ids), m.b(m.a(x)), 0) * 0.3, 1),
    "scaled inside": (lambda m, x, ids: m.w(x) + torch.where(_mask(ids), m.b(m.a(x)) * 0.3, 0), 1),
    "scaled below": (lambda m, x, ids: m.w(x) + m.b(torch.where(_mask(ids), m.a(x) * 0.3, 0)), 1),
    "zeros": (_zeros, 1),
    "the other way": (lambda m, x, ids: m.w(x) + m.b(torch.where(_mask(ids), 0, m.a(x))) * 0.3, 1),
    "masked_fill": (lambda m, x, ids: m.w(x) + m.b(m.a(x).masked_fill(~_mask(ids), 0)) * 0.3, 1),
    "tensor.where": (lambda m, x, ids: m.w(x) + m.b(m.a(x).where(_mask(ids), 0)) * 0.3, 1),
    "views": (lambda m, x, ids: m.w(x) + m.b(torch.where((ids.view(-1, 1, 1) == 1), m.a(x), 0)) * 0.3, 1),
    "no comparison": (lambda m, x, ids: m.w(x) + m.b(torch.where((ids > 1)[:, None, None], m.a(x), 0)) * 0.3, 1),
    "two": (_two, 1),
    "beside one for all": (lambda m, x, ids: m.b2(m.a2(x)) * 0.2 + FORMS["below"][0](m, x, ids), 2),
    "by token": (lambda m, x, ids: m.w(x) + m.b(torch.where(x[..., :1] > 0, m.a(x), 0)) * 0.3, 1),
    "by feature": (_by_feature, 1),
    "another fill": (lambda m, x, ids: m.w(x) + m.b(torch.where(_mask(ids), m.a(x), 0.5)) * 0.3, 1),
}


@functools.cache
def programs(form: str) -> tuple[nn.Module, Any]:
    """A model and both kinds of graph, to be copied together."""
    model = Chosen(FORMS[form][0]).double().requires_grad_(False)
    example = torch.randn(4, 5, D_IN, dtype=torch.float64), torch.tensor([1, 0, 7, 1])
    return model, (flora_fx.capture(model, *example), torch.export.export(model, example).run_decompositions())


@pytest.mark.parametrize("accumulate", ["addmm", "add", "unrolled"])
@pytest.mark.parametrize("form", FORMS)
def test_every_way_to_write_it_is_fused(form: str, accumulate: Any) -> None:
    x, ids = torch.randn(4, 5, D_IN, dtype=torch.float64), torch.tensor([1, 0, 7, 1])
    model, both = copy.deepcopy(programs(form))
    for program in both:
        fused = flora_fx.fuse(program, config=FuseConfig(accumulate=accumulate))
        run: Any = fused if isinstance(fused, fx.GraphModule) else fused.module()
        assert_exact(run(x, ids), model(x, ids))
        report = flora_fx.report(fused)
        assert not report.declines, str(report)
        assert report.ops_after["gemm"] == 1 + (0 if accumulate == "unrolled" else FORMS[form][1]), str(report)


REFUSED: dict[str, tuple[Callable[[Chosen, Tensor, Tensor], Tensor], str]] = {
    "by feature": (lambda m, x, ids: m.w(x) + torch.where(m.w(x) > 0, m.b(m.a(x)), 0), "keep or drop whole tokens"),
    "another fill": (lambda m, x, ids: m.w(x) + torch.where(_mask(ids), m.b(m.a(x)), 1), "be zero where it does not"),
    "twice": (
        lambda m, x, ids: m.w(x) + torch.where(_mask(ids), torch.where(x[..., :1] > 0, m.b(m.a(x)), 0), 0),
        "what it gives is selected from again",
    ),
    "in other groups": (
        lambda m, x, ids: m.w(x) + m.b(torch.where(_mask(ids)[:2], m.a(x).view(2, 10, RANK), 0)).view(4, 5, D_OUT),
        "groups them otherwise",
    ),
}


@pytest.mark.parametrize("form", REFUSED)
def test_what_is_not_selected_by_token_is_declined(form: str) -> None:
    write, words = REFUSED[form]
    model = Chosen(write).double().requires_grad_(False)
    x, ids = torch.randn(4, 5, D_IN, dtype=torch.float64), torch.tensor([1, 0, 7, 1])
    fused = flora_fx.fuse(flora_fx.capture(model, x, ids))
    assert_exact(fused(x, ids), model(x, ids))
    declines = flora_fx.report(fused).declines
    assert [decline.reason for decline in declines] == [Reason.NOT_BY_TOKEN]
    assert words in declines[0].detail


def test_a_bias_of_the_up_projection_is_selected_where_it_was() -> None:
    """Behind the up-projection the bias is selected, too; in front of it, it is added to every token."""
    x, ids = torch.randn(4, 5, D_IN, dtype=torch.float64), torch.tensor([1, 0, 7, 1])
    for form in ("above", "below", "scaled inside"):
        model = Chosen(FORMS[form][0], bias=True).double().requires_grad_(False)
        fused = flora_fx.fuse(flora_fx.capture(model, x, ids))
        assert_exact(fused(x, ids), model(x, ids))
        assert flora_fx.report(fused).fused == ("b.weight",), form


def test_a_mask_that_is_changed_in_place_is_read_where_it_was() -> None:
    def form(m: Chosen, x: Tensor, ids: Tensor) -> Tensor:
        mask = _mask(ids).clone()
        y = m.w(x) + m.b(torch.where(mask, m.a(x), 0))
        mask.logical_not_()
        return y + m.b2(torch.where(mask, m.a2(x), 0))

    model = Chosen(form).double().requires_grad_(False)
    x, ids = torch.randn(4, 5, D_IN, dtype=torch.float64), torch.tensor([1, 0, 7, 1])
    fused = flora_fx.fuse(flora_fx.capture(model, x, ids))
    assert_exact(fused(x, ids), model(x, ids))


def test_a_low_rank_value_that_two_masks_select_from() -> None:
    """One A for two B's, each for other tokens: the pack's value cannot be for either."""

    def form(m: Chosen, x: Tensor, ids: Tensor) -> Tensor:
        z = m.a(x)
        one, two = m.b(torch.where(_mask(ids), z, 0)), (torch.where(_mask(ids, 7), z, 0) @ m.b3.weight.T)
        return m.w(x) + one * 0.3 + two * 0.3

    model = Chosen(form)
    model.b3 = linear(RANK, D_OUT)
    model.double().requires_grad_(False)
    x, ids = torch.randn(4, 5, D_IN, dtype=torch.float64), torch.tensor([1, 0, 7, 1])
    fused = flora_fx.fuse(flora_fx.capture(model, x, ids))
    assert_exact(fused(x, ids), model(x, ids))
    assert len(flora_fx.report(fused).fused) == 2
    assert flora_fx.report(fused).ops_after["gemm"] == 3
