"""FFBA adapters fused: from a captured graph, in `torch.compile`, in ONNX, from a checkpoint."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn

import flora_fx
from flora_fx import AdapterError, FuseConfig, FusionReport, Reason
from flora_fx.adapters import FloraLayer
from flora_fx.backend import last_report
from flora_fx.checkpoint import load_model
from flora_fx.export import Decoder, export_onnx, load
from flora_fx.ir import Pack, Role
from flora_fx.passes.layout import ALIGNED

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

FIRST = (3, 2)
"""How many projections read the input of a Llama block: q, k, v; gate, up."""
CONFIGS: dict[str, FuseConfig] = {
    "default": FuseConfig(),
    "beside": FuseConfig(layout="beside"),
    "accumulated": FuseConfig(write="accumulated"),
    "folded": FuseConfig(fold_scale=True),
    "per projection": FuseConfig(up="per_projection"),
    "all else": FuseConfig(
        layout="beside", write="accumulated", accumulate="add", fold_scale=True, up="per_projection", pack_base=True
    ),
}


def gemms(
    place: str,
    *,
    layers: int = LAYERS,
    beside: bool = False,
    widened: bool = True,
    stacked: bool = True,
) -> int:
    """The GEMMs of a fused Llama, counted from the equations.

    Args:
        place: a key of `PLACES`.
        layers: how many there are.
        beside: whether A's stand beside the projections that read the same.
        widened: whether a B becomes columns of the projection that it writes onto where its z is there before.
        stacked: whether B's of one z that is computed with their projections are one GEMM.
    """
    joined, onto = (2 if beside else 1), (0 if widened else 1)
    total = 1  # the head
    blocks = FIRST * layers
    for index, first in enumerate(blocks):
        together = 1 if stacked else first
        match place:
            case "block":
                total += joined + 1 + onto
            case "forward":
                total += joined + together + 1
            case "shared":
                total += joined + together + 1 + onto
            case "backward":  # nothing joins the first projections, and nothing A
                total += first + 1 + 1 + onto
            case "cross":
                written, read = index > 0, index < len(blocks) - 1
                if written and widened:
                    total += 1
                else:
                    total += 2 * first if written else first
                total += joined if read else 1
    return total


def ups_of(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters() if ".flora_B." in name}


def assert_all_fused(report: FusionReport, model: nn.Module, place: str = "block") -> None:
    """Every up-projection, and nothing declined but what reads a block's input before its norm."""
    assert set(report.fused) == ups_of(model)
    assert len(report.fused) == len(ups_of(model)) > 0
    found = [decline.reason for decline in report.declines]
    assert found == [Reason.READS_ANOTHER_VALUE] * (len(report.fused) if place == "backward" else 0)


def widened(report: FusionReport) -> list[Pack]:
    """Packs in which an up-projection stands beside a base."""
    return [pack for pack in report.packs if {Role.BASE, Role.UP} <= {piece.role for piece in pack.slices}]


# Captured graphs


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
    assert bool(widened(report)) == (config.write == "widened" and place != "forward")
    if form != "all else":
        assert report.ops_after["gemm"] == gemms(
            place, beside=config.layout == "beside", widened=config.write == "widened", stacked=linear
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


# torch.compile


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


# ONNX


@pytest.mark.parametrize(
    "place", ["block", pytest.param("shared", marks=pytest.mark.slow), pytest.param("cross", marks=pytest.mark.slow)]
)
def test_exported_to_onnx(place: str, tmp_path: Path) -> None:
    base = base_model("llama", torch.float32)
    if place != "cross":  # which reaches into the next layer
        base.model.layers, base.config.num_hidden_layers = base.model.layers[:1], 1
    model = attach(base, activation="silu" if place == "shared" else None, **PLACES[place])
    layers = base.config.num_hidden_layers

    def state() -> dict[str, tuple[Any, ...]]:
        return {
            name: (p.data_ptr(), p.stride(), p.storage_offset(), p.dtype, p.requires_grad)
            for name, p in model.named_parameters()
        }

    places, values = state(), {name: p.detach().clone() for name, p in model.named_parameters()}
    result = export_onnx(model, tmp_path / "out")
    assert state() == places
    assert all(torch.equal(p, values[name]) for name, p in model.named_parameters())
    assert len(result.report.fused) == len(ups_of(model))
    assert not result.report.declines
    assert len(widened(result.report)) == (3 if place == "cross" else 2 * layers)

    ids = torch.tensor([[11, 23, 5, 40], [3, 61, 8, 9]])
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    decoder = load(tmp_path / "out")
    assert isinstance(decoder, Decoder)
    mask = torch.ones_like(ids)
    expected = model.get_base_model().generate(ids, attention_mask=mask, **options)
    assert torch.equal(decoder.generate(ids, max_new_tokens=24, eos_token_id=[]), expected)
    with model.disable_adapter():
        plain = model.get_base_model().generate(ids, attention_mask=mask, **options)
    assert not torch.equal(plain, expected), "tokens that the base alone gives prove nothing"

    if place == "block":
        graph = onnx.load(str(tmp_path / "out" / "model.onnx"), load_external_data=False).graph
        # Per block: first projections, A (beside), last projection with B; per layer q·kᵀ and weights·v; the head.
        assert sum(node.op_type in ("MatMul", "Gemm") for node in graph.node) == layers * (2 * 3 + 2) + 1
        made = {name: node for node in graph.node for name in node.output}
        wide = [
            made[node.input[0]].op_type
            for node in graph.node
            if node.op_type == "MatMul" and node.input[1].startswith("_flora.") and node.input[0] in made
        ]
        assert wide.count("Concat") == 2 * layers
        weights = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 2}
        assert not [n.op_type for n in graph.node for i in n.input if i in weights and n.op_type in ("Concat", "Mul")]


# Checkpoints


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and an FFBA adapter, as PEFT saves it."""
    torch.manual_seed(4321)
    directory = tmp_path_factory.mktemp("checkpoint")
    base = base_model("llama", torch.float32)
    base.save_pretrained(directory / "base")
    attach(base, placement="shared", activation="silu").save_pretrained(directory / "adapter")
    return directory


def spoiled(saved: Path, directory: Path, change: Callable[[Tensor], Tensor], end: str) -> Path:
    """The adapter with one of its tensors changed."""
    attach(base_model("llama", torch.float32), placement="shared", activation="silu").save_pretrained(directory)
    tensors = load_file(saved / "adapter" / "adapter_model.safetensors")
    key = next(name for name in tensors if f".flora_{end}." in name)
    tensors[key] = change(tensors[key]).contiguous()
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


def test_a_saved_adapter_loads_and_fuses(saved: Path) -> None:
    inputs = tokens()
    model = load_model(saved / "base", saved / "adapter")
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert any(isinstance(module, FloraLayer) for module in model.modules())
    tensors = load_file(saved / "adapter" / "adapter_model.safetensors")
    weights = {
        key.removeprefix("base_model.model.").replace(".flora_", ".").removesuffix(".weight"): value
        for key, value in tensors.items()
    }
    assert all(torch.equal(value, weights[name]) for name, value in weights_of(model).items())
    base = load_model(saved / "base")
    with by_hand(base, "llama", weights, SCALE, "shared", "silu"), torch.no_grad():
        expected = output(base, inputs)
    assert_close(output(model, inputs), expected, 1e-5)
    fused = flora_fx.fuse(flora_fx.capture(model, **inputs))
    assert_all_fused(flora_fx.report(fused), model)
    assert_close(output(fused, inputs), expected, 1e-5)
    assert_differ(output(fused, inputs), output(base, inputs))


@pytest.mark.parametrize("end", ["A", "B"])
@pytest.mark.parametrize(
    "change",
    [lambda t: t[:-1], lambda t: t[:, :-1], lambda t: torch.cat([t, t]), lambda t: t.t()],
    ids=["fewer rows", "fewer columns", "more rows", "transposed"],
)
def test_an_adapter_of_another_shape_is_refused(
    saved: Path, tmp_path: Path, change: Callable[[Tensor], Tensor], end: str
) -> None:
    adapter = spoiled(saved, tmp_path / "adapter", change, end)
    with pytest.raises(AdapterError, match=r"does not fit LlamaForCausalLM|is the adapter of another model"):
        load_model(saved / "base", adapter)


@pytest.mark.parametrize("end", ["A", "B"])
@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_an_adapter_with_nan_is_refused(saved: Path, tmp_path: Path, bad: float, end: str) -> None:
    def change(tensor: Tensor) -> Tensor:
        tensor[-1, -1] = bad
        return tensor

    adapter = spoiled(saved, tmp_path / "adapter", change, end)
    with pytest.raises(AdapterError, match=rf"flora_{end}\.weight holds NaN or Inf"):
        load_model(saved / "base", adapter)
    model, inputs = attach(base_model("llama"), placement="shared").requires_grad_(False), tokens()
    next(iter(weights_of(model).values()))[0, 0] = bad
    with pytest.raises(AdapterError, match=r"flora_.\.default\.weight holds NaN or infinity"):
        flora_fx.fuse(flora_fx.capture(model, **inputs))
