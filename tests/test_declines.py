"""Every refusal: its reason reaches the report, and the outputs stay right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import flora_fx
from flora_fx import AdapterError, FuseConfig, Reason
from tests.adapters import D_IN, D_OUT, FORMS, RANK, Adapted

Forward = Callable[[Adapted, Tensor], Any]


def fuse_and_compare(model: nn.Module, x: Tensor, config: FuseConfig | None = None) -> flora_fx.FusionReport:
    """Fuse from torch.export and from a symbolic trace, compare both with what they were, return the first's report."""
    reports = []
    for graph in (flora_fx.capture(model, x), fx.symbolic_trace(model)):
        expected = graph(x)  # not the model: symbolic_trace itself turns += into +
        fused = flora_fx.fuse(graph, config=config)
        torch.testing.assert_close(fused(x), expected, rtol=1e-12, atol=1e-12)
        reports.append(flora_fx.report(fused))
    return reports[0]


def adapted(form: Forward) -> Adapted:
    return Adapted(form).double().eval().requires_grad_(False)


X = torch.randn(4, D_IN, dtype=torch.float64)


def reasons(report: flora_fx.FusionReport) -> list[Reason]:
    return [decline.reason for decline in report.declines]


def test_the_delta_has_another_reader() -> None:
    def form(m: Adapted, x: Tensor) -> tuple[Tensor, Tensor]:
        delta = m.b(m.a(x)) * 0.3
        return m.w(x) + delta, delta

    report = fuse_and_compare(adapted(form), X)
    assert reasons(report) == [Reason.OTHER_READER]
    assert "mul" in report.declines[0].detail
    assert not report.fused


def test_the_low_rank_value_may_have_another_reader() -> None:
    def form(m: Adapted, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z, y = m.a(x), m.w(x)
        return y + m.b(z) * 0.3, z, y

    report = fuse_and_compare(adapted(form), X)
    assert not report.declines
    assert report.ops_after["gemm"] == 2


def test_a_weight_that_is_used_twice_stays_out_of_the_pack() -> None:
    def form(m: Adapted, x: Tensor) -> tuple[Tensor, Tensor]:
        return m.w(x) + m.b(m.a(x)) * 0.3, m.w(torch.tanh(x))

    report = fuse_and_compare(adapted(form), X)
    assert Reason.WEIGHT_SHARED in reasons(report)
    assert "w.weight" in next(d for d in report.declines if d.reason is Reason.WEIGHT_SHARED).detail
    assert not report.packs
    assert report.fused == ("b.weight",)  # the up-projection still accumulates


def test_a_weight_that_shares_memory_with_another_stays_out_of_the_pack() -> None:
    class Model(Adapted):
        def __init__(self) -> None:
            super().__init__(lambda m, x: (m.w(x) + m.b(m.a(x)) * 0.3, m.other(x)))
            self.other = nn.Linear(D_IN, D_OUT, bias=False)
            self.other.weight = nn.Parameter(self.w.weight.detach()[:])  # another parameter, the same memory

    model = Model().eval().requires_grad_(False)
    model.w.weight.data = torch.randn(D_OUT, D_IN, dtype=torch.float64)
    for layer in (model.a, model.b):
        layer.double()
    model.other.weight.data = model.w.weight.data
    report = fuse_and_compare(model, X)
    assert Reason.WEIGHT_SHARED in reasons(report)
    model.w.weight.mul_(2)
    torch.testing.assert_close(model.other.weight, model.w.weight)


def test_a_tied_embedding_keeps_its_head_out_of_the_pack() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(11, D_IN), nn.Linear(D_IN, 11, bias=False)
            self.head.weight = self.embed.weight
            self.a, self.b = nn.Linear(D_IN, RANK, bias=False), nn.Linear(RANK, 11, bias=False)

        def forward(self, ids: Tensor) -> Tensor:
            h = self.embed(ids)
            return self.head(h) + self.b(self.a(h)) * 0.3

    report = fuse_and_compare(Tied().double().requires_grad_(False), torch.tensor([[1, 5, 7]]))
    assert Reason.WEIGHT_SHARED in reasons(report)
    assert report.fused == ("b.weight",)


def test_active_dropout() -> None:
    model = Adapted(FORMS["peft"]).double().requires_grad_(False).train()
    graph = fx.symbolic_trace(model)
    fused = flora_fx.fuse(graph)
    report = flora_fx.report(fused)
    assert reasons(report) == [Reason.DROPOUT_ACTIVE]
    assert not report.fused
    torch.manual_seed(3)
    expected = model(X)
    torch.manual_seed(3)
    torch.testing.assert_close(fused(X), expected, rtol=0, atol=0)
    functional = flora_fx.fuse(flora_fx.capture(model, X))
    assert reasons(flora_fx.report(functional)) == [Reason.DROPOUT_ACTIVE]


def test_a_graph_fused_in_eval_mode_refuses_training_mode() -> None:
    fused = flora_fx.fuse(fx.symbolic_trace(adapted(FORMS["peft"])))
    fused.train()
    with pytest.raises(flora_fx.TieError, match=r"drop is in training mode.*fuse the graph again"):
        fused(X)
    fused.eval()(X)


@pytest.mark.parametrize("kind", ["per feature", "matrix"])
def test_a_scale_that_is_not_one_number_per_token(kind: str) -> None:
    class Model(Adapted):
        def __init__(self) -> None:
            super().__init__(lambda m, x: m.w(x) + m.b(m.a(x)) * m.gate)
            self.gate = nn.Parameter(torch.randn(D_OUT) if kind == "per feature" else torch.randn(4, D_OUT))

    report = fuse_and_compare(Model().double().eval().requires_grad_(False), X)
    assert reasons(report) == [Reason.SCALE_NOT_SCALAR]
    assert "gate" in report.declines[0].detail


def test_a_selection_that_is_not_by_token() -> None:
    report = fuse_and_compare(adapted(lambda m, x: m.w(x) + torch.where(m.w(x) > 0, m.b(m.a(x)), 0)), X)
    assert reasons(report) == [Reason.NOT_BY_TOKEN]
    assert "not known to keep or drop whole tokens" in report.declines[0].detail


def test_a_scale_per_token_is_kept_as_a_multiplication() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.a, self.b, self.gate = (
                nn.Linear(i, o, bias=False) for i, o in [(D_IN, 10), (D_IN, 3), (3, 10), (D_IN, 1)]
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.w(x) + self.b(self.a(x)) * torch.sigmoid(self.gate(x))

    model = Gated().double().requires_grad_(False)
    x = torch.randn(2, 5, D_IN, dtype=torch.float64)
    for program in (torch.export.export(model, (x,)), torch.export.export(model, (x,)).run_decompositions()):
        fused = flora_fx.fuse(program)
        torch.testing.assert_close(fused.module()(x), model(x), rtol=1e-12, atol=1e-12)
    report = flora_fx.report(flora_fx.fuse(flora_fx.capture(model, x)))
    assert not report.declines
    assert (report.ops_after["gemm"], report.ops_after["elementwise"]) == (2, 1)


def test_a_scale_that_depends_on_the_data() -> None:
    def form(m: Adapted, x: Tensor) -> Tensor:
        return m.w(x) + m.b(m.a(x)) * x.abs().max()

    model = adapted(form)
    fused = flora_fx.fuse(flora_fx.capture(model, X))
    torch.testing.assert_close(fused(3 * X), model(3 * X), rtol=1e-12, atol=1e-12)
    assert flora_fx.report(fused).fused == ("b.weight",)


class MixedSiblings(nn.Module):
    """A bfloat16 base with float32 adapters, as PEFT makes it by default."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = (nn.Linear(D_IN, n, bias=False, dtype=torch.bfloat16) for n in (10, 6))
        self.q_a, self.q_b = nn.Linear(D_IN, 3, bias=False), nn.Linear(3, 10, bias=False)
        self.k_a, self.k_b = nn.Linear(D_IN, 5, bias=False), nn.Linear(5, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q = (self.q(x) + self.q_b(self.q_a(x.to(torch.float32))) * 0.3).to(torch.bfloat16)
        k = (self.k(x) + self.k_b(self.k_a(x.to(torch.float32))) * 0.6).to(torch.bfloat16)
        return torch.cat([q, k], -1)


def test_adapters_of_another_dtype_pack_among_themselves() -> None:
    model = MixedSiblings().requires_grad_(False)
    x = torch.randn(4, D_IN, dtype=torch.bfloat16)
    fused = flora_fx.fuse(flora_fx.capture(model, x))
    assert torch.equal(fused(x), model(x))
    report = flora_fx.report(fused)
    assert reasons(report)[:2] == [Reason.DTYPE_DIFFERS] * 2
    assert "allow_cast=True" in report.declines[0].detail
    assert ("q_a.weight", "k_a.weight") in [pack.members for pack in report.packs]
    assert ("q.weight", "k.weight") not in [pack.members for pack in report.packs]


@pytest.mark.parametrize("layout", ["joined", "beside", "ahead"])
def test_allow_cast_joins_adapters_of_another_dtype(layout: Any) -> None:
    model = MixedSiblings().requires_grad_(False)
    x = torch.randn(64, D_IN, dtype=torch.bfloat16)
    exact = MixedSiblings().requires_grad_(False)
    exact.load_state_dict(model.state_dict())
    fused = flora_fx.fuse(flora_fx.capture(model, x), config=FuseConfig(allow_cast=True, layout=layout))
    report = flora_fx.report(fused)
    assert len(report.fused) == 2
    out = fused(x)
    assert out.dtype == model(x).dtype
    wide = exact.double()
    # In float64: MixedSiblings' own casts would narrow it.
    y = x.double()
    reference = torch.cat([wide.q(y) + wide.q_b(wide.q_a(y)) * 0.3, wide.k(y) + wide.k_b(wide.k_a(y)) * 0.6], -1)
    assert (out.double() - reference).abs().max() < 0.05
    assert model.q_a.weight.dtype == torch.float32  # the user's adapters are copied, not converted
    with torch.no_grad():
        model.q_b.weight.zero_()
    torch.testing.assert_close(fused(x)[:, :10], model.q(x), atol=0.02, rtol=0.02)  # the copy follows


@pytest.mark.parametrize("returned", [True, False])
def test_allow_cast_leaves_low_rank_values_whose_dtype_matters(returned: bool) -> None:
    class Mixed(MixedSiblings):
        def forward(self, x: Tensor) -> Any:
            z = self.q_a(x.to(torch.float32))
            z = z.relu() if returned else z.to(torch.float32).relu()
            y = self.q(x) + self.q_b(z) * 0.3
            return (y, z) if returned else (y,)

    model = Mixed().requires_grad_(False)
    x = torch.randn(4, D_IN, dtype=torch.bfloat16)
    fused = flora_fx.fuse(flora_fx.capture(model, x), config=FuseConfig(allow_cast=True))
    assert all(torch.equal(found, expected) for found, expected in zip(fused(x), model(x), strict=True))
    assert reasons(flora_fx.report(fused))[:1] == [Reason.DTYPE_DIFFERS]
    assert not flora_fx.report(fused).fused


def test_an_adapter_is_not_taken_for_the_base_of_a_base_that_may_not_move() -> None:
    """Two projections behind each other look like a path, too: the adapter is what is added nonetheless."""

    class Chained(Adapted):
        def __init__(self) -> None:
            super().__init__(lambda m, x: x)
            self.first = nn.Linear(D_IN, D_IN, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            x = x * 1
            h = self.first(x)
            x.mul_(0.5)
            return self.b(self.a(h)) * 0.3 + self.w(h)

    report = fuse_and_compare(Chained().double().requires_grad_(False), X)
    assert report.fused == ("b.weight",)


def test_of_two_adapters_added_to_each_other_one_may_be_refused() -> None:
    def form(m: Adapted, x: Tensor) -> tuple[Tensor, Tensor]:
        second = m.b2(m.a2(x))
        return m.b(m.a(x)) * 0.3 + second, second

    report = fuse_and_compare(adapted(form), X)
    assert report.fused == ("b.weight",)
    assert not report.declines


def test_values_changed_in_place_are_left_alone() -> None:
    def form(m: Adapted, x: Tensor) -> Tensor:
        h = x * 1
        y = m.w(h)
        h.add_(1.0)
        return y + m.b(m.a(h)) * 0.3

    report = fuse_and_compare(adapted(form), X)
    assert set(reasons(report)) == {Reason.MUTATED}
    assert not report.fused


def test_the_same_operation_before_and_after_a_change_is_not_the_same_value() -> None:
    def form(m: Adapted, x: Tensor) -> Tensor:
        h = x * 1
        y = m.w(torch.tanh(h))
        h.add_(1.0)
        return y + m.b(m.a(torch.tanh(h))) * 0.3

    report = fuse_and_compare_exported(adapted(form), X)
    assert reasons(report) == [Reason.READS_ANOTHER_VALUE]


def test_adapters_that_share_their_up_projection() -> None:
    """One B for two adapters: it cannot live in two packs, so it is read where it is."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(D_IN, D_OUT, bias=False) for _ in range(4))
            self.qa, self.ka, self.va, self.oa = (nn.Linear(D_IN, RANK, bias=False) for _ in range(4))
            self.b, self.b2 = nn.Linear(RANK, D_OUT, bias=False), nn.Linear(RANK, D_OUT, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            q, k = self.q(x) + self.b(self.qa(x)) * 0.3, self.k(x) + self.b(self.ka(x)) * 0.3
            return q + k + self.v(x) + self.b2(self.va(x)) * 0.3 + torch.tanh(self.o(x) + self.b(self.oa(x)) * 0.3)

    model = Shared().double().requires_grad_(False)
    report = fuse_and_compare(model, X)
    assert len(report.fused) == 4
    assert not any("b.weight" in pack.members for pack in report.packs)


def layout_bound(x: Tensor) -> Tensor:
    return x.view(-1)


fx.wrap("layout_bound")


def test_code_that_is_not_torchs_gets_the_layout_it_had() -> None:
    def form(m: Adapted, x: Tensor) -> tuple[Tensor, Tensor]:
        y = m.w(x)
        return y + m.b(m.a(x)) * 0.3, layout_bound(y)

    model = adapted(form)
    graph = fx.symbolic_trace(model)
    assert "layout_bound" in str(graph.graph)
    for found, expected in zip(flora_fx.fuse(graph)(X), graph(X), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_an_in_place_add_that_others_see_is_left_alone() -> None:
    def form(m: Adapted, x: Tensor) -> tuple[Tensor, Tensor]:
        y = m.w(x)
        alias = y.view(-1)
        y += m.b(m.a(x)) * 0.3
        return y, alias * 2

    report = fuse_and_compare_exported(adapted(form), X)
    assert set(reasons(report)) == {Reason.MUTATED}
    assert not report.fused


def test_a_layout_that_is_read_by_address_is_left_alone() -> None:
    def form(m: Adapted, x: Tensor) -> tuple[Tensor, Tensor]:
        y = m.w(x)
        return y + m.b(m.a(x)) * 0.3, y.as_strided((D_OUT, 2), (1, D_OUT))

    report = fuse_and_compare(adapted(form), X)
    assert Reason.MUTATED in reasons(report)


def test_two_adds_that_branch_off_one_projection_do_not_mix() -> None:
    def form(m: Adapted, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = m.w(x)
        first = y + m.b(m.a(x)) * 0.3
        return first, y + m.b2(m.a2(x)) * 1.7, first + m.b2(m.a2(x)) * 0.2

    fuse_and_compare(adapted(form), X)


class Quantized(nn.Module):
    """A base that is no nn.Linear: int8 weight, dequantized on the fly."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("w8", torch.randint(-127, 127, (10, D_IN), dtype=torch.int8))
        self.a, self.b = nn.Linear(D_IN, 3, bias=False), nn.Linear(3, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w8.to(x.dtype) * 0.01) + self.b(self.a(x)) * 0.3


def test_a_quantized_base_keeps_its_kernel_and_accumulates() -> None:
    report = fuse_and_compare_exported(Quantized().double().requires_grad_(False), X)
    assert report.fused == ("b.weight",)
    assert not report.packs
    assert reasons(report) == [Reason.READS_ANOTHER_VALUE]


def fuse_and_compare_exported(model: nn.Module, x: Tensor) -> flora_fx.FusionReport:
    fused = flora_fx.fuse(flora_fx.capture(model, x))
    torch.testing.assert_close(fused(x), model(x), rtol=1e-12, atol=1e-12)
    return flora_fx.report(fused)


class Subclass(Tensor):
    """A weight that is a tensor subclass, as torchao's are."""


def test_a_tensor_subclass_is_not_stored_anew() -> None:
    model = adapted(FORMS["loralib"])
    graph = fx.symbolic_trace(model)
    weight = torch.randn(D_OUT, D_IN, dtype=torch.float64).as_subclass(Subclass)
    graph.get_submodule("w").weight = nn.Parameter(weight, requires_grad=False)
    report = flora_fx.report(flora_fx.fuse(graph))
    assert Reason.WEIGHT_NOT_DENSE in reasons(report)
    assert isinstance(graph.get_submodule("w").weight, Subclass)


def test_a_target_that_is_broadcast_is_left_alone() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(D_IN, 3, bias=False), nn.Linear(3, 10, bias=False)
            self.row = nn.Parameter(torch.randn(10))

        def forward(self, x: Tensor) -> Tensor:
            return self.row + self.b(self.a(x)) * 0.3

    report = fuse_and_compare(Model().double().requires_grad_(False), X)
    assert reasons(report) == [Reason.SHAPE_UNKNOWN]


def test_a_hooked_module_is_left_alone() -> None:
    model = adapted(lambda m, x: m.w(x) + m.b(m.a(x)) * 0.3)
    graph = fx.symbolic_trace(model)
    graph.get_submodule("w").register_forward_hook(lambda module, args, out: out * 2)
    fused = flora_fx.fuse(graph)
    torch.testing.assert_close(fused(X), graph(X), rtol=1e-12, atol=1e-12)
    assert "w" in [node.target for node in fused.graph.nodes if node.op == "call_module"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["a", "b"])
def test_an_adapter_with_nan_is_refused_and_the_model_left_as_it_was(bad: float, which: str) -> None:
    model = adapted(FORMS["peft"])
    getattr(model, which).weight[1, 1] = bad
    pointers = {name: p.data_ptr() for name, p in model.named_parameters()}
    with pytest.raises(AdapterError, match=rf"{which}\.weight holds NaN or infinity"):
        flora_fx.fuse(fx.symbolic_trace(model))
    assert pointers == {name: p.data_ptr() for name, p in model.named_parameters()}


@pytest.mark.parametrize("wrong", [nn.Linear(2, 2), torch.ones(2), lambda x: x, None])
def test_what_is_not_a_graph_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"fuse needs a torch.fx.GraphModule or torch.export.ExportedProgram"):
        flora_fx.fuse(wrong)
    with pytest.raises(TypeError, match=r"not a fused graph"):
        flora_fx.report(wrong)


def test_wrong_configurations_are_refused() -> None:
    graph = fx.symbolic_trace(adapted(FORMS["peft"]))
    with pytest.raises(TypeError, match=r"must be a flora_fx.FuseConfig"):
        flora_fx.fuse(graph, config={"layout": "joined"})  # type: ignore[call-overload]
    with pytest.raises(ValueError, match=r"layout is 'sideways'.*'joined'"):
        FuseConfig(layout="sideways")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"pack_base is 1"):
        FuseConfig(pack_base=1)  # type: ignore[arg-type]  # noqa: RUF100
    with pytest.raises(TypeError, match=r"not a fused graph"):
        flora_fx.report(graph)


@torch.library.custom_op("flora_tests::noise", mutates_args=())
def noise(x: Tensor) -> Tensor:
    """An operator of somebody's own that draws numbers and does not say so."""
    return torch.rand_like(x)


@noise.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_an_operator_that_is_not_torchs_is_never_taken_for_the_same_value_twice() -> None:
    model = adapted(lambda m, x: m.w(noise(x)) + m.b(m.a(noise(x))) * 0.3)
    graph = flora_fx.capture(model, X)
    fused = flora_fx.fuse(graph)
    torch.manual_seed(5)
    expected = graph(X)
    torch.manual_seed(5)
    torch.testing.assert_close(fused(X), expected, rtol=1e-12, atol=1e-12)
    assert [d.reason for d in flora_fx.report(fused).declines] == [Reason.READS_ANOTHER_VALUE]
