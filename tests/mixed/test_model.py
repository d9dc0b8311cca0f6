"""A model whose rows each have an adapter of their own: what each row gives, what it learns, what is refused."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import peft
import pytest
import torch
from torch import nn

import flora_fx
from flora_fx import AdapterError, MixedAdapters
from tests.variants.models import WIDTH, Convolutions, Linears, Tokens

from .models import ADAPTERS, adapted, alone, assert_exact, batch, ffba, moved

NAMES = list(ADAPTERS)
MIX = ["code", None, "sql", "chat", "math", "sql", None]


def test_each_row_is_what_its_adapter_alone_gives() -> None:
    model, x = adapted(), batch(len(MIX))
    mixed = MixedAdapters(model, NAMES)
    with torch.no_grad():
        found = mixed(x, adapter_ids=mixed.ids(MIX))
        assert_exact(found, alone(model, x, MIX))
        assert_exact(found, model(x, adapter_names=["__base__" if name is None else name for name in MIX]))


def test_ids_follow_the_order_of_the_names_given() -> None:
    model, x = adapted(), batch(2)
    mixed = MixedAdapters(model, ["math", "sql"])
    assert mixed.ids(["sql", None, "math"]).tolist() == [1, -1, 0]
    with torch.no_grad():
        assert_exact(mixed(x, adapter_ids=torch.tensor([1, 0])), alone(model, x, ["sql", "math"]))


def test_the_model_stays_as_it_was_and_shares_its_weights() -> None:
    model, x = adapted(), batch(2)
    model.set_adapter("chat")
    before, modules = model(x), [type(module) for module in model.modules()]
    mixed = MixedAdapters(model, NAMES)
    assert [type(module) for module in model.modules()] == modules
    assert torch.equal(model(x), before)
    assert {id(p) for p in mixed.parameters()} == {id(p) for p in model.parameters()}
    assert {name.removeprefix("model.") for name in mixed.state_dict()} == set(model.state_dict())
    with torch.no_grad():
        model.base_model.model.layers[0].q.lora_B["sql"].weight.mul_(3)
        assert_exact(mixed(x, adapter_ids=mixed.ids(["sql", "chat"])), alone(model, x, ["sql", "chat"]))


def test_gradients_reach_each_adapter_from_its_own_rows() -> None:
    model, x, names = adapted(), batch(4), ["sql", "chat", "sql", None]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    mixed, weight = MixedAdapters(model, NAMES), batch(4, 7)
    (mixed(x, adapter_ids=mixed.ids(names)) * weight).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    every = dict(model.named_parameters())
    for name in ("sql", "chat"):
        rows = [index for index, own in enumerate(names) if own == name]
        model.set_adapter(name)
        (model(x[rows]) * weight[rows]).sum().backward()
    for name, gradient in found.items():
        expected = every[name].grad
        assert_exact(gradient, torch.zeros_like(gradient) if expected is None else expected)
    assert any(gradient.abs().max() > 0 for name, gradient in found.items() if ".chat." in name)


@pytest.mark.parametrize("where", ["lora_A", "lora_B"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_in_one_adapter_reaches_no_other_row(where: str, value: float) -> None:
    model, x = adapted(), batch(3)
    expected = alone(model, x, ["sql", "chat", None])
    mixed = MixedAdapters(model, NAMES)
    with torch.no_grad():
        getattr(model.base_model.model.layers[0].o, where)["chat"].weight[0, 0] = value
        found = mixed(x, adapter_ids=mixed.ids(["sql", "chat", None]))
    assert_exact(found[[0, 2]], expected[[0, 2]])
    assert not found[1].isfinite().all()


@pytest.mark.parametrize("options", [{"placement": "shared"}, {"placement": "block", "activation": "silu"}], ids=str)
def test_ffba_adapters_mix_as_well(options: dict[str, Any]) -> None:
    model, ids = ffba(**options), torch.randint(40, (3, 6))
    mixed = MixedAdapters(model, ["one", "two"])
    with torch.no_grad():
        found = mixed(ids, adapter_ids=mixed.ids(["two", None, "one"])).logits
        for row, name in enumerate(["two", None, "one"]):
            model.base_model.enable_adapter_layers() if name else model.base_model.disable_adapter_layers()
            if name:
                model.set_adapter(name)
            assert_exact(found[row : row + 1], model(ids[row : row + 1]).logits)


def test_a_captured_graph_has_one_input_more_and_any_batch() -> None:
    model, auto = adapted(), torch.export.Dim.AUTO
    graph = flora_fx.capture(model, batch(3), adapters=NAMES, dynamic_shapes={"args_0": {0: auto, 1: auto}})
    inputs = [node.name for node in graph.graph.find_nodes(op="placeholder")]
    assert inputs == ["args_0", "adapter_ids"]
    assert set(graph.state_dict()) == set(model.state_dict())
    mixed = MixedAdapters(model, NAMES)
    for names in (MIX, ["chat", "chat"]):
        x = batch(len(names))
        with torch.no_grad():
            assert_exact(graph(x, adapter_ids=mixed.ids(names)), alone(model, x, names))


def test_other_ids_do_not_compile_anew() -> None:
    model, x = adapted(), batch(3)
    mixed, counter = MixedAdapters(model, NAMES), torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(mixed, backend=counter, fullgraph=True)
    mixes: list[list[str | None]] = [["sql", None, "chat"], ["code", "code", "math"], [None, None, None]]
    with torch.no_grad():
        for names in mixes:
            assert_exact(compiled(x, adapter_ids=mixed.ids(names)), alone(model, x, names))
    assert counter.frame_count == 1


def test_threads_have_ids_of_their_own() -> None:
    mixed = MixedAdapters(adapted(), NAMES)
    x, names = batch(2), [["sql", None], ["chat", "math"]]
    expected = [mixed(x, adapter_ids=mixed.ids(own)) for own in names]
    barrier, found = threading.Barrier(2), {}

    def run(index: int) -> None:
        layer: Any = mixed.model.base_model.model.layers[0]
        barrier.wait()
        for _ in range(20):
            found[index] = mixed(x, adapter_ids=mixed.ids(names[index]))
        assert layer is mixed.model.base_model.model.layers[0]

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(2):
        assert torch.equal(found[index], expected[index])


def test_copies_and_pickles_compute_the_same() -> None:
    mixed, x = MixedAdapters(adapted(), NAMES), batch(2)
    ids = mixed.ids(["sql", "code"])
    for other in (copy.deepcopy(mixed), pickle.loads(pickle.dumps(mixed))):
        assert torch.equal(other(x, adapter_ids=ids), mixed(x, adapter_ids=ids))
        with torch.no_grad():
            next(p for name, p in other.named_parameters() if "lora_B" in name).zero_()
        assert not torch.equal(other(x, adapter_ids=ids), mixed(x, adapter_ids=ids))


def test_layers_of_convolutions_mix_as_well() -> None:
    options = {"target_modules": ["conv", "o"], "r": 3}
    model = adapted(Convolutions(1), {"a": {**options, "lora_alpha": 4}, "b": {**options, "lora_alpha": 7}})
    x = torch.randn(3, 6, 5, dtype=torch.float64)
    mixed = MixedAdapters(model, ["a", "b"])
    with torch.no_grad():
        assert_exact(mixed(x, adapter_ids=mixed.ids(["b", None, "a"])), alone(model, x, ["b", None, "a"]))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["sql", "sqk"], r"no adapter 'sqk'; it has 'chat', 'code', 'math', 'sql'"),
        (["sql", "sql"], r"different names among"),
        ([], r"different names among"),
        ("sql", r"different names among"),
    ],
)
def test_names_that_are_not_there(names: Any, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        MixedAdapters(adapted(), names)


def test_ids_that_are_none() -> None:
    mixed, x = MixedAdapters(adapted(), NAMES), batch(2)
    with pytest.raises(AdapterError, match="no adapter 'sqk' here; it must be None or 'sql'"):
        mixed.ids(["sqk"])
    for ids, message in [
        (torch.tensor([0, 4]), r"holds 0 to 4; there are 4 adapters, whose ids are 0 to 3, and -1 for none"),
        (torch.tensor([-2, 0]), r"holds -2 to 0"),
        (torch.tensor([0, 1], dtype=torch.int32), r"a torch.int32 of 1 dimensions; it must be a tensor \[batch\]"),
        (torch.tensor([[0, 1]]), r"of 2 dimensions"),
        ([0, 1], r"adapter_ids is a list"),
        (torch.tensor([0]), r"has 1 entries, and a layer with adapters reads 2 rows"),
    ]:
        with pytest.raises(AdapterError, match=message):
            mixed(x, adapter_ids=ids)
    with pytest.raises(AdapterError, match="no forward that was given adapter_ids does"):
        mixed.model(x)


def _variant(**options: Any) -> Any:
    return lambda: adapted(Linears(), {"a": {"r": 3, "target_modules": ["q", "o"], **options}})


def _merged() -> Any:
    model = adapted()
    model.merge_adapter(["sql"])
    return model


def _other_method() -> Any:
    return peft.get_peft_model(Linears(), peft.LoHaConfig(target_modules=["q"]), adapter_name="a")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (_variant(use_dora=True), r"adapter 'a' is a DoraLinearVariant at base_model.model.layers.0.q"),
        (_variant(modules_to_save=["head"]), r"adapter 'a' has a base_model.model.head of its own \(modules_to_save"),
        (lambda: adapted(Tokens(), {"a": {"r": 3, "target_modules": ["table"]}}), r"adapter 'a' is a Embedding at"),
        (_merged, r"q has the adapter sql merged into it; call unmerge_adapter\(\) first"),
        (_other_method, r"q has adapters of peft.tuners.loha.layer; rows of one batch can have LoRA or FFBA"),
        (Linears, r"Linears has no adapters; give it those first"),
    ],
)
def test_what_rows_of_one_batch_cannot_have(model: Any, message: str) -> None:
    given = model()
    before = [(name, type(module)) for name, module in given.named_modules()]
    for ask in (MixedAdapters, lambda m, names: flora_fx.capture(m, batch(2), adapters=names)):
        with pytest.raises(AdapterError, match=message):
            ask(given, ["sql" if model is _merged else "a"])
    assert [(name, type(module)) for name, module in given.named_modules()] == before


def test_not_a_model() -> None:
    with pytest.raises(TypeError, match="needs a PEFT model, not str"):
        MixedAdapters("model", ["a"])  # type: ignore[arg-type]


def test_an_adapter_that_is_left_out_makes_no_trouble() -> None:
    """DoRA beside a LoRA: it is not among those that rows may have."""
    model = adapted(Linears(), {"a": {"r": 3, "target_modules": ["q"]}})
    model.add_adapter("b", peft.LoraConfig(r=2, target_modules=["k", "q"], use_dora=True, modules_to_save=["head"]))
    moved(model)
    x = batch(2)
    mixed = MixedAdapters(model, ["a"])
    with torch.no_grad():
        assert_exact(mixed(x, adapter_ids=mixed.ids([None, "a"])), alone(model, x, [None, "a"]))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_that_is_not_compiled(use_reentrant: bool) -> None:
    """Its layers run again in the backward, when nobody says any more which row has which adapter."""
    model = ffba()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    mixed = MixedAdapters(model, ["one", "two"]).train()
    loss = mixed(
        input_ids=torch.randint(40, (2, 6)), use_cache=False, adapter_ids=mixed.ids(["two", "one"])
    ).logits.sum()
    with pytest.raises(AdapterError, match="gradient checkpointing, which runs layers again when the forward is over"):
        loss.backward()


def test_no_tensor_with_a_batch() -> None:
    class Scalars(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(WIDTH, 3)

        def forward(self, scale: float) -> Any:
            return self.q(torch.ones(2, WIDTH, dtype=torch.float64)) * scale

    model = adapted(Scalars(), {"a": {"r": 2, "target_modules": ["q"]}})
    with pytest.raises(flora_fx.CaptureError, match="give an example of adapter_ids, too"):
        flora_fx.capture(model, 2.0, adapters=["a"])
    graph = flora_fx.capture(model, 2.0, adapters=["a"], adapter_ids=torch.tensor([0, -1]))
    assert graph(2.0, adapter_ids=torch.tensor([0, -1])).shape == (2, 3)
