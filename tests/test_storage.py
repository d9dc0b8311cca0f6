"""One copy of each weight, and ties that survive or are restored: never a stale output."""

from __future__ import annotations

import copy
import io
import pickle
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import flora_fx
from flora_fx import FuseConfig, TieError, fuse
from flora_fx.fusing import fuse_unstored
from flora_fx.ir import Pack, Role, Slice
from flora_fx.storage.module import FusedGraphModule
from flora_fx.storage.pack import assemble, tie
from tests.adapters import D_IN, FORMS, Adapted, Siblings

X = torch.randn(2, 5, D_IN, dtype=torch.float64)


def siblings() -> Siblings:
    """A model to fuse, in float64: what differs from its reference then differs by more than rounding."""
    return Siblings().double().eval().requires_grad_(False)


def assert_equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.fixture(params=["traced", "captured", "program", "ahead"])
def fused(request: pytest.FixtureRequest) -> FusedGraphModule:
    model = siblings()
    if request.param == "traced":
        return flora_fx.fuse(fx.symbolic_trace(model))  # type: ignore[return-value]
    if request.param == "captured":
        return flora_fx.fuse(flora_fx.capture(model, X))  # type: ignore[return-value]
    if request.param == "ahead":
        return flora_fx.fuse(flora_fx.capture(model, X), config=FuseConfig(layout="ahead"))  # type: ignore[return-value]
    return flora_fx.fuse(torch.export.export(model, (X,))).module()  # type: ignore[return-value]


def reference(module: nn.Module, x: Tensor = X) -> Tensor:
    """What a model with the module's present parameters computes."""
    model = Siblings().eval().to(next(module.parameters()).dtype)
    model.load_state_dict({key: value.clone() for key, value in module.state_dict().items()})
    with torch.no_grad():
        return model(x)


def assert_right(module: nn.Module, x: Tensor = X) -> None:
    with torch.no_grad():
        assert_equal(module(x), reference(module, x))


def assert_tied(module: FusedGraphModule) -> None:
    state = module.state_dict()
    for pack in module.fusion.packs:
        packed = module.get_buffer(f"_flora.{pack.name}")
        for piece in pack.slices:
            tensor = state[str(piece.source)]
            assert tensor.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr(), piece


def randomize(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))


def test_parameters_are_views_of_their_pack(fused: FusedGraphModule) -> None:
    assert_tied(fused)
    assert_right(fused)
    bytes_of = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in fused.parameters()}
    packs = {b.untyped_storage().data_ptr(): b.untyped_storage().nbytes() for b in fused.buffers()}
    weights = sum(p.nbytes for p in fused.parameters())
    filled = sum(fused.get_parameter(name).nbytes for pack in fused.fusion.packs for name in pack.members)
    zeros = sum(b.nbytes for b in fused.buffers()) - filled
    assert sum({**bytes_of, **packs}.values()) == weights + zeros  # nothing is stored twice


def test_state_dict_names_are_those_of_the_model(fused: FusedGraphModule) -> None:
    assert set(fused.state_dict()) == set(siblings().state_dict())


def test_an_update_of_a_parameter_is_visible_at_once(fused: FusedGraphModule) -> None:
    randomize(fused)
    assert_right(fused)
    assert_tied(fused)


def test_the_users_own_model_shares_the_storage() -> None:
    model = siblings()
    fused = flora_fx.fuse(flora_fx.capture(model, X))
    randomize(model)
    assert_equal(fused(X), model(X))


def test_deepcopy(fused: FusedGraphModule) -> None:
    before = fused(X)
    twin = copy.deepcopy(fused)
    assert_tied(twin)  # type: ignore[arg-type]
    randomize(fused)
    assert_equal(twin(X), before)
    assert_right(fused)
    randomize(twin)
    assert_right(twin)
    assert flora_fx.report(twin) == flora_fx.report(fused)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_to_dtype(fused: FusedGraphModule, dtype: torch.dtype) -> None:
    fused.to(dtype)
    assert_tied(fused)
    randomize(fused)
    x = X.to(dtype)
    if all(node.target != torch.ops.aten._assert_tensor_metadata.default for node in fused.graph.nodes):
        with torch.no_grad():
            out, expected = fused(x).double(), reference(fused.double(), x.double())
            tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]
            assert (out - expected).abs().max() <= tolerance * expected.abs().max()


def test_to_device(fused: FusedGraphModule) -> None:
    fused.to("meta")
    assert all(p.device.type == "meta" for p in [*fused.parameters(), *fused.buffers()])
    assert fused(X.to("meta")).shape == (2, 5, D_IN)


def test_state_dict_round_trip(fused: FusedGraphModule) -> None:
    other = siblings().state_dict()
    fused.load_state_dict(other)
    assert_tied(fused)
    assert_right(fused)
    torch.testing.assert_close(fused.state_dict()["q.weight"], other["q.weight"])


def test_load_state_dict_with_assign(fused: FusedGraphModule) -> None:
    other = {key: value.clone() for key, value in siblings().state_dict().items()}
    fused.load_state_dict(other, assign=True)
    assert_tied(fused)
    assert_right(fused)
    randomize(fused)
    assert_right(fused)


def test_a_state_dict_that_does_not_fit_is_refused_and_nothing_goes_stale(fused: FusedGraphModule) -> None:
    other = {**siblings().state_dict(), "q.weight": torch.zeros(3, 3, dtype=torch.float64)}
    for assign in (False, True):
        with pytest.raises(RuntimeError, match=r"size mismatch for q.weight"):
            fused.load_state_dict(other, assign=assign)
        assert_tied(fused)
        assert_right(fused)


def test_save_and_load(tmp_path: Path) -> None:
    fused = flora_fx.fuse(fx.symbolic_trace(siblings()))
    before = fused(X)
    torch.save(fused, tmp_path / "fused.pt")
    loaded = torch.load(tmp_path / "fused.pt", weights_only=False)
    assert isinstance(loaded, FusedGraphModule)
    assert_tied(loaded)
    assert_equal(loaded(X), before)
    randomize(loaded)
    assert_right(loaded)
    assert flora_fx.report(loaded) == flora_fx.report(fused)


def calls(graph: fx.Graph) -> list[tuple[str, Any]]:
    return [(node.op, node.target) for node in graph.nodes]


@pytest.mark.parametrize("fold_scale", [False, True])
@pytest.mark.parametrize("accumulate", ["addmm", "add", "unrolled"])
@pytest.mark.parametrize("layout", ["joined", "beside", "ahead"])
def test_every_way_is_read_as_it_was_written(layout: Any, accumulate: Any, fold_scale: bool) -> None:
    """Nothing of it was computed while torch traced the code anew: packs are empty then, and their members change."""
    config = FuseConfig(layout=layout, accumulate=accumulate, fold_scale=fold_scale)
    fused = flora_fx.fuse(fx.symbolic_trace(siblings()), config=config)
    loaded = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(fused))))
    assert calls(loaded.graph) == calls(fused.graph)
    assert_equal(loaded(X), fused(X))
    randomize(loaded)
    assert_right(loaded)


def test_what_torch_cannot_pickle_raises_and_stays_as_it_was(tmp_path: Path) -> None:
    graph = flora_fx.capture(siblings(), X)
    fused = flora_fx.fuse(graph)
    for module in (graph, fused):
        with pytest.raises((AttributeError, pickle.PicklingError), match=r"lambda"):
            torch.save(module, tmp_path / "fused.pt")
    assert_right(fused)


def test_a_symbolic_trace_can_be_pickled() -> None:
    fused = flora_fx.fuse(fx.symbolic_trace(siblings()))
    buffer = io.BytesIO()
    torch.save(fused, buffer)
    assert buffer.getbuffer().nbytes < 3 * sum(p.nbytes for p in fused.parameters()) + 40_000


@pytest.mark.parametrize("replace", ["data", "parameter"])
def test_a_parameter_that_was_moved_is_noticed(fused: FusedGraphModule, replace: str) -> None:
    owner = fused.get_submodule("q_a")
    new = torch.randn_like(owner.weight)
    if replace == "data":
        owner.weight.data = new
    else:
        owner.weight = nn.Parameter(new, requires_grad=False)
    with pytest.warns(UserWarning, match=r"had lost the tie"):
        out = fused(X)
    assert_equal(out, reference(fused))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_right(fused)
    assert_tied(fused)


def test_a_parameter_of_another_shape_is_refused(fused: FusedGraphModule) -> None:
    fused.get_submodule("q_a").weight = nn.Parameter(torch.randn(7, D_IN, dtype=torch.float64), requires_grad=False)
    with pytest.raises(TieError, match=r"q_a.weight has shape \[7, 12\] now; the graph was fused for \[3, 12\]"):
        fused(X)


def test_a_part_in_another_dtype_is_refused(fused: FusedGraphModule) -> None:
    fused.get_submodule("q_a").float()
    with pytest.raises(TieError, match=r"Convert the whole fused module"):
        fused(X)


def test_two_captures_of_one_model_share_their_packs() -> None:
    model = siblings()
    one, two = (flora_fx.fuse(flora_fx.capture(model, X[:, :n])) for n in (1, 5))
    for name, packed in one.named_buffers():
        assert packed.data_ptr() == two.get_buffer(name).data_ptr(), name
    randomize(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_equal(one(X[:, :1]), model(X[:, :1]))
        assert_equal(two(X), model(X))


def test_ways_of_fusing_one_model_take_turns_and_stay_right() -> None:
    model = siblings()
    configs = (
        FuseConfig(),
        FuseConfig(layout="beside", up="per_projection"),
        FuseConfig(layout="ahead"),
        FuseConfig(layout="ahead", fold_scale=True),
    )
    ways = [flora_fx.fuse(fx.symbolic_trace(model), config=config) for config in configs]
    for _ in range(2):
        for fused in ways:
            randomize(model)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert_equal(fused(X), model(X))


def test_folded_copies_follow_their_parameters() -> None:
    model = siblings()
    fused = flora_fx.fuse(fx.symbolic_trace(model), config=FuseConfig(fold_scale=True, accumulate="add"))
    b = model.q_b.weight.clone()
    assert_equal(fused(X), model(X))
    assert torch.equal(model.q_b.weight, b)  # scaled in a copy
    randomize(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_equal(fused(X), model(X))


def test_gradients_are_refused_and_not_silently_missing(fused: FusedGraphModule) -> None:
    fused.get_submodule("q_a").weight.requires_grad_(True)
    with pytest.raises(TieError, match=r"require gradients.*torch.no_grad\(\)"):
        fused(X)
    with torch.no_grad():
        fused(X)


def test_gradients_are_refused_under_a_compiler_too() -> None:
    fused = flora_fx.fuse(fx.symbolic_trace(siblings()))
    compiled = torch.compile(fused, backend="eager")
    fused.requires_grad_(True)
    fused.retie()
    with torch.no_grad():
        compiled(X)
    with pytest.raises(Exception, match=r"require gradients"):
        compiled(X)


def test_input_gradients_flow() -> None:
    model = siblings()
    fused = flora_fx.fuse(fx.symbolic_trace(model))
    grads = []
    for module in (model, fused):
        x = X.clone().requires_grad_()
        module(x).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-10)


def test_peak_memory_while_fusing_is_one_pack() -> None:
    """Old storages go as their pack is made: at no time are two packs' worth of weights alive twice."""
    layers, size = 8, 256

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(size, size, bias=False), nn.Linear(size, size, bias=False)
            self.a, self.b = nn.Linear(size, 4, bias=False), nn.Linear(4, size, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.q(x) + self.b(self.a(x))) + self.k(x)

    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        graph = fx.symbolic_trace(nn.Sequential(*[Layer() for _ in range(layers)]).requires_grad_(False))
        start = time.time_ns()
        flora_fx.fuse(graph)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    used, before, peak = 0, 0, 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        used += event.nbytes()
        if event.start_ns() < start:
            before = used
        else:
            peak = max(peak, used - before)
    pack = (2 * size + 4) * size * 4
    assert pack <= peak < 1.5 * pack


def test_fused_programs_compile(fused: FusedGraphModule) -> None:
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    assert_equal(compiled(X), fused(X))
    randomize(fused)
    assert_equal(compiled(X), reference(fused))
    fused.to(torch.float32).to(torch.float64)
    randomize(fused)
    assert_equal(compiled(X), reference(fused))


def test_an_exported_program_keeps_its_state_and_survives_saving(tmp_path: Path) -> None:
    model = siblings()
    program = torch.export.export(model, (X,))
    fused = flora_fx.fuse(program)
    assert isinstance(fused, torch.export.ExportedProgram)
    packs = {f"_flora.{pack.name}" for pack in flora_fx.report(fused).packs}
    assert set(fused.state_dict) == set(program.state_dict) | packs
    assert set(fused.module().state_dict()) == set(program.state_dict)
    torch.export.save(fused, tmp_path / "fused.pt2")
    loaded = torch.export.load(tmp_path / "fused.pt2")
    assert_equal(loaded.module()(X), model(X))
    assert_equal(fused.run_decompositions().module()(X), model(X))


def test_only_one_adapter_form_needs_no_up_pack() -> None:
    model: Any = Adapted(FORMS["peft"]).eval().requires_grad_(False)
    fused = flora_fx.fuse(fx.symbolic_trace(model))
    assert [pack.members for pack in flora_fx.report(fused).packs] == [("w.weight", "a.weight")]


class _Parallel(nn.Module):
    """A path from the first projection's input to the second one's output: its up-projection widens a pack."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(D_IN, 11), nn.Linear(11, 7)
        self.down, self.up = nn.Linear(D_IN, 3, bias=False), nn.Linear(3, 7, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) + self.up(self.down(x)) * 1.7


def test_a_pack_that_holds_copies_is_not_one_that_holds_the_parameters() -> None:
    """[W, 1.7·B] has the shape of [W, B], and W may stand in that already: written over, B would be 1.7·B for all."""
    model = _Parallel().double().eval().requires_grad_(False)
    expected, up = model(X), model.up.weight.clone()
    plain = flora_fx.fuse(flora_fx.capture(model, X))
    folded = flora_fx.fuse(flora_fx.capture(model, X), config=FuseConfig(fold_scale=True))
    for _ in range(2):
        for graph in (plain, folded, model):
            assert_equal(graph(X), expected)
    assert torch.equal(model.up.weight, up)
    model.up.weight.mul_(2)
    expected = model(X)
    for graph in (plain, folded):
        assert_equal(graph(X), expected)


def test_a_pack_whose_gaps_hold_somebody_elses_parameters_is_not_shared() -> None:
    """Found by random graphs: of one model fused in two ways, one had columns where the other had zeros."""
    parameters = {name: nn.Parameter(torch.randn(4, width)) for name, width in (("w", 3), ("b", 2))}
    w, b = Slice("w", Role.BASE, (0, 4), (0, 3)), Slice("b", Role.UP, (0, 4), (3, 5))
    full = tie(Pack("full", (4, 5), (w, b), "x", "w"), parameters.__getitem__)
    gaps = tie(Pack("gaps", (4, 5), (w,), "x", "w"), parameters.__getitem__)
    assert torch.equal(gaps, torch.cat([full[:, :3], torch.zeros(4, 2)], -1))
    again = tie(Pack("again", (4, 5), (w,), "x", "w"), parameters.__getitem__)
    assert again is gaps


def test_a_pack_of_the_same_parameters_in_another_order_is_not_shared() -> None:
    parameters = {name: nn.Parameter(torch.randn(3, 4)) for name in ("v", "w")}
    first, second = (
        tie(
            Pack(
                "p", (6, 4), tuple(Slice(n, Role.BASE, (3 * i, 3 * i + 3), None) for i, n in enumerate(order)), "x", "w"
            ),
            parameters.__getitem__,
        )
        for order in ("vw", "wv")
    )
    assert torch.equal(second, torch.cat([parameters["w"], parameters["v"]]))
    assert first is not second


@pytest.mark.parametrize(
    "config",
    [
        FuseConfig(),
        FuseConfig(layout="ahead", up="block_diagonal", accumulate="add", fold_scale=True),
        FuseConfig(layout="beside", up="block_diagonal", accumulate="add", fold_scale=True),
    ],
    ids=["default", "ahead", "beside"],
)
def test_packs_that_are_made_one_by_one_are_those_that_are_stored(config: FuseConfig) -> None:
    program = torch.export.export(siblings(), (X,))
    places = {name: value.data_ptr() for name, value in program.state_dict.items()}
    fused = fuse_unstored(program, config)
    packs = fused.packs()
    assert packs
    assert all(fused.state_dict[target].is_meta for target in packs)
    made = {target: assemble(pack, fused.resolve) for target, pack in packs.items()}
    assert {name: value.data_ptr() for name, value in program.state_dict.items()} == places, "nothing moved"
    assert fused.store() is fused
    moved = [name for name, value in program.state_dict.items() if value.data_ptr() != places[name]]
    assert moved, "stored, parameters are views"
    for target, pack in packs.items():
        stored = fused.state_dict[target]
        assert stored.dtype == made[target].dtype
        assert torch.equal(stored, made[target]), pack.name
    wanted = fuse(program, config=config)
    assert {target: value.shape for target, value in wanted.state_dict.items()} == {
        target: value.shape for target, value in fused.state_dict.items()
    }


def test_packs_of_a_config_that_is_none_are_refused() -> None:
    with pytest.raises(TypeError, match="config is a dict"):
        fuse_unstored(torch.export.export(siblings(), (X,)), {})  # type: ignore[arg-type]
