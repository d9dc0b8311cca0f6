"""What carries z from where it is read to where it is written: within one forward, one thread and one model only."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flora_fx.adapters import FloraConfig, FloraLayer
from flora_fx.adapters.link import Link
from flora_fx.errors import AdapterError
from tests.patience import LIMIT_S

from .reference import PLACES, assert_close, assert_differ, attach, base_model, output, tokens


def ends(model: nn.Module) -> list[Link]:
    """The link of every end, as often as it has ends."""
    layers = [module for module in model.modules() if isinstance(module, FloraLayer)]
    return [link for layer in layers for link in (*layer.reads.values(), *layer.writes.values())]


def held(model: nn.Module) -> list[str]:
    """The readers whose values are still there."""
    return sorted({link.reader for link in ends(model) if link._held or link._traced is not None})


def last_of(model: Any) -> nn.Module:
    """What writes the output of the first layer's MLP."""
    down = model.get_submodule("base_model.model.model.layers.0.mlp.down_proj")
    return down.base_layer if isinstance(down, FloraLayer) else down


def fail(*_: Any) -> None:
    raise ZeroDivisionError


def fail_between(model: Any, inputs: dict[str, Tensor]) -> None:
    """A forward that ends after the first MLP's input was read and before its output is written."""
    hook = last_of(model).register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        model(**inputs)
    hook.remove()


@pytest.mark.parametrize("place", ["block", "shared", "cross"])
def test_two_threads_at_once(place: str) -> None:
    """Both have read before either writes, in each block."""
    model = attach(base_model("llama"), activation="tanh", **PLACES[place])
    inputs = [tokens(), tokens()]
    with torch.no_grad():
        alone = [output(model, each) for each in inputs]
        assert_differ(*alone)
        barrier, meetings = threading.Barrier(2), []
        for name, module in model.named_modules():  # something in the middle of every path
            inner = name.removesuffix(".base_layer") if not isinstance(module, FloraLayer) else ""
            if inner.endswith((".o_proj", ".down_proj", "layernorm")):
                module.register_forward_pre_hook(lambda *_: meetings.append(barrier.wait(LIMIT_S)))

        def forward(each: dict[str, Tensor]) -> Tensor:
            with torch.no_grad():
                return output(model, each)

        with ThreadPoolExecutor(2) as threads:
            together = list(threads.map(forward, inputs))
    assert len(meetings) == 2 * 2 * 4
    assert all(map(torch.equal, together, alone))
    assert held(model) == []


def test_replicas_in_threads() -> None:
    """As nn.DataParallel runs them: shallow copies that share everything but their parameters."""

    def replica_of(module: nn.Module) -> nn.Module:
        replica = module._replicate_for_data_parallel()
        for name, child in module.named_children():
            setattr(replica, name, replica_of(child))
        for name, parameter in module._parameters.items():
            setattr(replica, name, parameter if parameter is None else parameter.detach())
        return replica

    model, inputs = attach(base_model("llama"), placement="shared").base_model.model.model, [tokens(), tokens()]
    alone = [output(model, each) for each in inputs]
    barrier, meetings = threading.Barrier(2), []
    last = model.get_submodule("layers.0.mlp.down_proj.base_layer")
    last.register_forward_pre_hook(lambda *_: meetings.append(barrier.wait(LIMIT_S)))
    replicas = [replica_of(model), replica_of(model)]
    with ThreadPoolExecutor(2) as threads:
        together = list(threads.map(output, replicas, inputs))
    assert len(meetings) == 2
    assert all(map(torch.equal, together, alone))


@pytest.mark.parametrize("place", PLACES)
def test_nothing_is_held_after_a_forward(place: str) -> None:
    model = attach(base_model("llama"), **PLACES[place]).train()
    values: list[weakref.ref[Tensor]] = []
    during: list[str] = []
    for name, module in model.named_modules():
        if name.endswith(".flora_A.default"):
            module.register_forward_hook(lambda _, args, z: values.append(weakref.ref(z)))
    last_of(model).register_forward_pre_hook(lambda *_: during.extend(held(model)))
    with torch.no_grad():
        output(model, tokens())
    gc.collect()
    assert len(values) == (3 if place == "cross" else 4)
    assert held(model) == []
    assert [value() for value in values] == [None] * len(values)
    if place in ("block", "shared", "backward"):  # otherwise all is written before an MLP's last projection
        assert during == [f"model.layers.0.{'post_attention_layernorm' if place == 'backward' else 'mlp.gate_proj'}"]


@pytest.mark.parametrize("place", ["block", "shared", "backward"])
def test_exception_in_between_does_not_poison_the_next_forward(place: str) -> None:
    model, inputs = attach(base_model("llama"), **PLACES[place]), tokens()
    expected = output(model, inputs)
    fail_between(model, tokens(rows=3))
    assert torch.equal(output(model, inputs), expected)
    assert held(model) == []


def test_value_of_a_forward_that_failed_is_not_taken_without_a_read() -> None:
    """The other adapter's value, by the way, is another one's link."""
    model, inputs = attach(base_model("llama"), "one"), tokens()
    model.add_adapter("two", FloraConfig(r=5, init="random"))
    two = copy.deepcopy(model)
    two.set_adapter("two")
    expected = output(two, inputs)
    fail_between(model, inputs)
    model.set_adapter("two")
    assert torch.equal(output(model, inputs), expected)


def test_deep_copy_after_an_exception() -> None:
    model, inputs = attach(base_model("llama")), tokens()
    fail_between(model, inputs)
    assert torch.equal(output(copy.deepcopy(model), inputs), output(model, inputs))


def test_pickle_after_an_exception() -> None:
    model, inputs = attach(base_model("llama")), tokens()
    clean = len(pickle.dumps(model))
    with torch.no_grad():
        fail_between(model, inputs)
    assert len(pickle.dumps(model)) == clean


@pytest.mark.parametrize("place", PLACES)
def test_deep_copy_has_links_of_its_own(place: str) -> None:
    model, inputs = attach(base_model("llama"), **PLACES[place]), tokens()
    copied = copy.deepcopy(model)
    ours, theirs = ends(model), ends(copied)
    assert len(ours) == len(theirs)
    assert not {id(link) for link in ours} & {id(link) for link in theirs}
    # Ends that had one link have one in the copy.
    assert [ours.index(link) for link in ours] == [theirs.index(link) for link in theirs]
    expected = output(model, inputs)
    assert torch.equal(output(copied, inputs), expected)

    def run_the_copy(*_: Any) -> None:
        with torch.no_grad():
            output(copied, tokens())

    last_of(model).register_forward_pre_hook(run_the_copy)  # in the same thread, between the read and the write
    assert torch.equal(output(model, inputs), expected)


def test_pickled_model(tmp_path: Path) -> None:
    model, inputs = attach(base_model("llama"), placement="shared", activation="relu"), tokens()
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(output(loaded, inputs), output(model, inputs))
    assert not {id(link) for link in ends(model)} & {id(link) for link in ends(loaded)}


def test_write_without_a_read_says_what_is_missing() -> None:
    model = attach(base_model("llama"))
    down = model.get_submodule("base_model.model.model.layers.1.mlp.down_proj")
    said = r"^model\.layers\.1\.mlp\.down_proj adds what model\.layers\.1\.mlp\.gate_proj reads, which has not run"
    with pytest.raises(AdapterError, match=said):
        down(torch.randn(1, 80, dtype=torch.float64))


def test_reads_of_two_adapters_do_not_mix() -> None:
    model, inputs = attach(base_model("llama"), "one"), tokens()
    model.add_adapter("two", FloraConfig(r=3, alpha=7, init="random"))
    twice = output(model, inputs)
    for name, parameter in model.named_parameters():  # two becomes what one is, with −B
        if ".two." in name:
            sign = -1 if "flora_B" in name else 1
            parameter.data = sign * model.get_parameter(name.replace(".two.", ".one.")).data
    model.base_model.set_adapter(["one", "two"])
    with model.disable_adapter():
        base = output(model, inputs)
    assert_differ(twice, base)
    assert_close(output(model, inputs), base)
