"""Whoever writes or copies a parameter that lies in a pack gets it alone, and it stays a view for all else."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import flora_fx
from flora_fx import FuseConfig
from tests.adapters import D_IN, Siblings
from tests.patience import LIMIT_S

WIDE = 96
"""Features; the base's bytes are most of a pack's."""


class Net(nn.Module):
    """q, k and v with adapters of ranks 3, 5 and 2; one bias."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDE, WIDE - 8 * i, bias=i == 1) for i in range(3))
        for name, rank, base in (("q", 3, self.q), ("k", 5, self.k), ("v", 2, self.v)):
            setattr(self, f"lora_a_{name}", nn.Linear(WIDE, rank, bias=False))
            setattr(self, f"lora_b_{name}", nn.Linear(rank, base.out_features, bias=False))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            getattr(self, n)(x) + getattr(self, f"lora_b_{n}")(getattr(self, f"lora_a_{n}")(x)) * 0.7 for n in "qkv"
        )


def by_compiling(model: Net, **_: Any) -> Any:
    call = torch.compile(model, backend="flora", options={"flora.inner": "aot_eager"})
    call(torch.randn(4, WIDE))
    return call


def by_fusing(model: Net, **choices: Any) -> Any:
    return flora_fx.fuse(flora_fx.capture(model, torch.randn(4, WIDE)), config=FuseConfig(**choices))


WAYS: dict[str, tuple[Callable[..., Any], bool, dict[str, Any]]] = {
    "compiled": (by_compiling, True, {}),
    "compiled frozen": (by_compiling, False, {}),
    "fused": (by_fusing, True, {}),
    "fused frozen": (by_fusing, False, {}),
    "columns beside W": (by_fusing, False, {"layout": "ahead", "up": "per_projection"}),
    "W in a pack of its own": (by_fusing, False, {"layout": "beside"}),
}


@pytest.fixture(params=list(WAYS))
def packed(request: pytest.FixtureRequest) -> tuple[Net, Any]:
    """A model whose parameters lie in packs, and what keeps these alive."""
    torch._dynamo.reset()
    model = Net()
    pack, trained, choices = WAYS[request.param]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained and "lora_" in name)
    keeper = pack(model, **choices)
    shared = {p.untyped_storage().data_ptr() for p in (model.q.weight, model.k.weight, model.v.weight)}
    assert len(shared) == 1
    return model, keeper


def adapter(state: Any) -> dict[str, Tensor]:
    return {name: value for name, value in dict(state).items() if "lora_" in name}


def saved(what: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(what, file, **options)
    return file.getvalue()


def held(tensors: Iterable[Tensor]) -> int:
    """The bytes of all storages behind tensors, each counted once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def assert_alone(written: bytes, tensors: Iterable[Tensor], model: Net) -> None:
    """As large as its tensors, and without a row of any base weight."""
    tensors = list(tensors)
    assert len(written) < sum(t.nbytes for t in tensors) + 2000 * len(tensors)
    for base in (model.q.weight, model.k.weight, model.v.weight):
        for row in (0, 1, -1):
            assert base.detach()[row].clone().numpy().tobytes()[:64] not in written


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert type(found[name]) is type(value), name
        assert found[name].requires_grad == value.requires_grad, name
        assert torch.equal(found[name], value), name


def test_what_torch_saves_of_an_adapter(packed: tuple[Net, Any]) -> None:
    model, _ = packed
    for state in (adapter(model.state_dict()), adapter(model.named_parameters())):
        for options in ({}, {"_use_new_zipfile_serialization": False}):
            written = saved(state, **options)
            assert_alone(written, state.values(), model)
            assert_same(torch.load(io.BytesIO(written), weights_only=True), state)
    one = model.lora_a_k.weight
    assert_alone(saved(one), [one], model)
    assert_alone(saved(one[1:3].detach()), [one], model)


def test_what_pickle_writes_of_an_adapter(packed: tuple[Net, Any]) -> None:
    model, _ = packed
    for state in (adapter(model.state_dict()), adapter(model.named_parameters())):
        for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
            written = pickle.dumps(state, protocol)
            assert_alone(written, state.values(), model)
            assert_same(pickle.loads(written), state)


def test_copies_of_an_adapter(packed: tuple[Net, Any]) -> None:
    model, _ = packed
    for state in (adapter(model.state_dict()), adapter(model.named_parameters())):
        best = copy.deepcopy(state)
        assert_same(best, state)
        assert held(best.values()) == sum(value.nbytes for value in state.values())
        with torch.no_grad():
            model.lora_a_q.weight.add_(1)
        assert not torch.equal(best["lora_a_q.weight"], model.lora_a_q.weight)
        assert torch.equal(state["lora_a_q.weight"], model.lora_a_q.weight)  # what is given out is still a view


def test_optimizers(packed: tuple[Net, Any]) -> None:
    model, _ = packed
    parameters = adapter(model.named_parameters())
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
    assert_alone(saved(optimizer), parameters.values(), model)
    (group,) = copy.deepcopy(optimizer).param_groups
    assert held(group["params"]) == sum(p.nbytes for p in parameters.values())


def test_a_whole_model_is_written_once_and_loads(packed: tuple[Net, Any]) -> None:
    model, _ = packed
    everything = sum(p.nbytes for p in model.parameters())
    written = saved(model)
    # Beside W, whose rows go on, stand the columns of B.
    assert len(written) < 1.1 * everything + 20_000
    loaded = torch.load(io.BytesIO(written), weights_only=False)
    assert_same(dict(loaded.named_parameters()), dict(model.named_parameters()))
    x = torch.randn(4, WIDE)
    for found, expected in zip(loaded(x), model(x), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("choices", [{}, {"layout": "ahead", "up": "per_projection"}], ids=str)
def test_a_fused_graph_is_written_once(choices: dict[str, Any]) -> None:
    model, x = Net().requires_grad_(False), torch.randn(4, WIDE)
    everything = sum(p.nbytes for p in model.parameters())
    fused = flora_fx.fuse(fx.symbolic_trace(model), config=FuseConfig(**choices))
    written = saved(fused)
    assert len(written) < 1.1 * everything + 50_000  # the code
    for again in (torch.load(io.BytesIO(written), weights_only=False), copy.deepcopy(fused)):
        for found, expected in zip(again(x), model(x), strict=True):
            torch.testing.assert_close(found, expected)
        with torch.no_grad():
            again.lora_a_q.weight.mul_(2)  # in place: tied still, or anew
        assert not torch.equal(again(x)[0], fused(x)[0])


def test_what_is_given_out_stays_a_view(packed: tuple[Net, Any]) -> None:
    model, _ = packed
    for name, value in model.state_dict().items():
        parameter = model.get_parameter(name)
        for view in (value, copy.copy(value), copy.copy(parameter)):
            assert view.data_ptr() == parameter.data_ptr(), name
            assert view.untyped_storage()._cdata == parameter.untyped_storage()._cdata, name
        value.copy_(torch.full_like(value, 0.5))
        assert (parameter == 0.5).all(), name


def test_parameters_outlive_their_packs() -> None:
    model = Net()
    keeper = by_fusing(model)
    assert_alone(saved(adapter(model.state_dict())), adapter(model.state_dict()).values(), model)
    del keeper
    gc.collect()
    assert_alone(saved(adapter(model.state_dict())), adapter(model.state_dict()).values(), model)


def test_views_of_one_weight_stay_views_of_one_weight() -> None:
    """A weight that stands under two names is one in the file, and after loading."""
    model = Net().requires_grad_(False)
    by_fusing(model)
    weight = model.q.weight
    state = {"head": weight.detach(), "embed": weight.detach(), "rows": weight[2:4]}
    written = saved(state)
    assert len(written) < weight.nbytes + 3000
    for again in (torch.load(io.BytesIO(written)), copy.deepcopy(state)):
        assert held(again.values()) == weight.nbytes
        again["head"].zero_()
        assert not again["embed"].any()
        assert not again["rows"].any()
    assert weight.all()


def test_a_view_of_several_members_is_written_as_it_is() -> None:
    """It is nobody's alone: rows of one member and of the next."""
    model = Net().requires_grad_(False)
    fused = by_fusing(model)
    pack = next(p for p in flora_fx.report(fused).packs if "q.weight" in p.members)
    whole = torch.as_strided(model.q.weight, pack.shape, (WIDE, 1), 0)
    (_, first), (_, second) = (piece.rows for piece in pack.slices[:2])
    for view in (whole, whole[:second], whole[first - 1 : first + 1], whole[first + 1 : second + 1]):
        expected = view.clone()
        loaded = pickle.loads(pickle.dumps(view))
        assert torch.equal(loaded, expected)
        assert loaded.untyped_storage().nbytes() == whole.untyped_storage().nbytes()


def test_other_tensors_are_written_as_ever() -> None:
    by_fusing(Net().requires_grad_(False))  # from here on each tensor is looked at
    whole = torch.randn(100, 10)
    views = {"a": whole[:2], "b": whole[1:3]}
    assert len(saved(views)) > whole.nbytes  # torch's rule: the storage, once
    for again in (torch.load(io.BytesIO(saved(views))), copy.deepcopy(views)):
        again["a"][1] = 5
        assert (again["b"][0] == 5).all()
    leaf = torch.randn(3, requires_grad=True)
    leaf.grad = torch.ones(3)
    leaf.note = "kept"  # type: ignore[attr-defined]
    copied = copy.deepcopy(leaf)
    assert copied.requires_grad
    assert torch.equal(copied.grad, leaf.grad)  # type: ignore[arg-type]
    assert copied.note == "kept"  # type: ignore[attr-defined]
    for odd in (torch.eye(3).to_sparse(), torch.empty(2, device="meta"), torch.empty(0), torch.tensor(True)):
        assert pickle.loads(pickle.dumps(odd)).shape == odd.shape
        assert copy.deepcopy(odd).shape == odd.shape
    with pytest.raises(RuntimeError, match="graph leaves"):
        copy.deepcopy(leaf * 2)


def test_a_view_that_is_no_leaf_is_refused_as_ever() -> None:
    model = Net()
    by_fusing(model)
    with pytest.raises(RuntimeError, match="graph leaves"):
        copy.deepcopy(model.lora_a_q.weight[:2])


def test_attributes_and_gradients_of_a_parameter_come_along() -> None:
    model = Net()
    by_fusing(model)
    weight = model.lora_a_q.weight
    weight.note = "kept"
    state = {"plain": weight.detach().requires_grad_()}
    state["plain"].grad = torch.ones_like(weight)
    state["plain"].note = "kept, too"  # type: ignore[attr-defined]
    assert torch.load(io.BytesIO(saved(weight)), weights_only=False).note == "kept"
    copied = copy.deepcopy(state)["plain"]
    assert (copied.grad == 1).all()  # type: ignore[union-attr]
    assert copied.note == "kept, too"  # type: ignore[attr-defined]
    assert copied.grad is not state["plain"].grad


def _send(queue: Any, weights: dict[str, Tensor]) -> None:
    queue.put({name: value.sum().item() for name, value in weights.items()})


def test_another_process_is_given_the_values() -> None:
    model = Net().requires_grad_(False)
    call = by_fusing(model)
    x = torch.randn(4, WIDE)
    expected = model(x)
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    weights = adapter(model.named_parameters())
    process = context.Process(target=_send, args=(queue, weights))
    process.start()
    sums = queue.get(timeout=LIMIT_S)
    process.join(LIMIT_S)
    assert process.exitcode == 0
    assert sums == pytest.approx({name: value.sum().item() for name, value in weights.items()}, rel=1e-5, abs=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the pack has moved into shared memory
        for found, wanted in zip(call(x), expected, strict=True):
            torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("choices", [{}, {"layout": "ahead"}, {"fold_scale": True}], ids=str)
def test_an_exported_program_is_written_once(choices: dict[str, Any], tmp_path: Path) -> None:
    model, x = Net().requires_grad_(False), torch.randn(4, WIDE)
    program = torch.export.export(model, (x,))
    torch.export.save(program, tmp_path / "plain.pt2")
    fused = flora_fx.fuse(program, config=FuseConfig(**choices))
    torch.export.save(fused, tmp_path / "fused.pt2")
    plain, small = ((tmp_path / name).stat().st_size for name in ("plain.pt2", "fused.pt2"))
    everything = sum(p.nbytes for p in model.parameters())
    added = 0.2 * everything  # rows and columns that fill up; scaled copies of the B's
    assert small < plain + added
    loaded = torch.export.load(tmp_path / "fused.pt2")
    for state in (loaded.state_dict, loaded.module().state_dict()):
        assert held(state.values()) < everything + added
    assert not loaded.constants
    decomposed = fused.run_decompositions()
    assert held([*decomposed.state_dict.values(), *decomposed.constants.values()]) < everything + added
    for found, expected in zip(decomposed.module()(x), model(x), strict=True):
        torch.testing.assert_close(found, expected)
    for found, expected in zip(loaded.module()(x), model(x), strict=True):
        torch.testing.assert_close(found, expected)
    if choices.get("fold_scale"):
        return
    # The parameters are views still: another adapter is loaded into them as into the model.
    other = loaded.module()
    weights = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    assert set(other.load_state_dict(weights, strict=False).missing_keys) == {
        name for name in other.state_dict() if name.startswith("_flora.")
    }
    model.load_state_dict(weights)
    for found, expected in zip(other(x), model(x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_biases_and_transposed_weights() -> None:
    model = Siblings((0.7, 1.3)).requires_grad_(False)
    keeper = flora_fx.fuse(fx.symbolic_trace(model))
    keeper(torch.randn(2, 3, D_IN))
    for name, parameter in model.named_parameters():
        again = pickle.loads(pickle.dumps(parameter))
        assert torch.equal(again, parameter), name
        assert again.untyped_storage().nbytes() == parameter.nbytes or "_b" not in name, name
