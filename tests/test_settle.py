"""A captured graph that runs op by op does nothing twice, and still refuses what it was not captured with."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, fx, nn

import flora_fx
from flora_fx.errors import TieError
from flora_fx.ops import accumulate, autocasts, hold
from flora_fx.passes.rewrite.direct import FUNCTIONS, METHODS, directly
from tests.architectures import example_inputs, lora_model

aten = torch.ops.aten
ASSERT = aten._assert_tensor_metadata.default


class Step(nn.Module):
    """A Llama with a LoRA: embeddings [batch, tokens, 48] and positions -> logits."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        shape = {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 4, "num_key_value_heads": 2}
        config = transformers.LlamaConfig(**shape, num_hidden_layers=layers, vocab_size=97)
        adapters = peft.LoraConfig(r=4, lora_alpha=7, target_modules="all-linear", init_lora_weights=False)
        self.model = peft.get_peft_model(transformers.LlamaForCausalLM(config), adapters)

    def forward(self, embeddings: Tensor, positions: Tensor) -> Tensor:
        return self.model(inputs_embeds=embeddings, position_ids=positions, use_cache=False).logits


def step(layers: int, dtype: torch.dtype = torch.float32) -> tuple[fx.GraphModule, tuple[Tensor, Tensor]]:
    """It captured, and its inputs."""
    inputs = (torch.randn(2, 5, 48).to(dtype), torch.arange(5).expand(2, 5))
    return flora_fx.capture(Step(layers).to(dtype).eval().requires_grad_(False), *inputs), inputs


def layer(graphs: Callable[[int], fx.GraphModule]) -> Counter[str]:
    """The nodes that one more layer adds."""
    shallow, deep = (Counter(str(node.target) for node in graphs(depth).graph.nodes) for depth in (2, 3))
    return Counter({name: deep[name] - shallow[name] for name in deep if deep[name] > shallow[name]})


def test_a_fused_layer_has_no_node_that_does_nothing() -> None:
    captured = layer(lambda depth: step(depth)[0])
    fused = layer(lambda depth: flora_fx.fuse(step(depth)[0]))
    assert fused.total() <= captured.total() - 43
    if torch.__version__.startswith("2.13"):  # others trace a model into other nodes
        assert (captured.total(), fused.total()) == (128, 85)
    assert captured[str(ASSERT)] == captured["aten.to.dtype"] >= 11
    assert not {str(ASSERT), "aten.to.dtype", "to", "aten.slice.Tensor"} & set(fused)
    assert fused[str(accumulate)] == 4
    assert fused[str(torch.split_with_sizes)] == 4 + 2  # base and down of each pack; q, k, v and gate, up


def test_casts_that_change_a_dtype_stay() -> None:
    fused = layer(lambda depth: flora_fx.fuse(step(depth, torch.bfloat16)[0]))
    assert fused["to"] == 4  # of two norms, to float32 and back
    assert fused[str(ASSERT)] == 0


@torch.no_grad()
def test_what_settled_computes_the_same_bit_by_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, inputs = step(2, torch.bfloat16)
    settled = flora_fx.fuse(graph)
    monkeypatch.setitem(graph.meta, "flora_fx_plain", False)
    whole = flora_fx.fuse(graph)
    assert ASSERT in {node.target for node in whole.graph.nodes}
    assert torch.equal(settled(*inputs), whole(*inputs))


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "vit"])
def test_dropouts_of_eval_mode_are_gone_and_gradients_are_there(name: str) -> None:
    model, inputs = lora_model(name).double(), example_inputs(name)
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    adapters = [parameter.requires_grad_() for key, parameter in model.named_parameters() if "lora_" in key]
    graph = flora_fx.capture(model, **inputs)
    fused = flora_fx.fuse(graph)
    before, after = ({node.target for node in found.graph.nodes} for found in (graph, fused))
    assert aten.dropout.default in before
    assert aten.dropout.default not in after

    def gradients(call: Callable[..., Any]) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(call(**inputs)[0].square().mean(), adapters, allow_unused=True)  # a pooler's

    for found, expected in zip(gradients(fused), gradients(model), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@torch.no_grad()
def test_it_refuses_what_it_was_not_captured_with() -> None:
    graph, inputs = step(2)
    fused = flora_fx.fuse(graph)
    expected = fused(*inputs)
    compiled = torch.compile(fused, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*inputs), expected)
    with pytest.raises(TieError, match=r"an input .* is a tensor of torch.float64 and was a tensor of torch.float32"):
        fused(inputs[0].double(), inputs[1])
    with pytest.raises(TieError, match="is of a floating-point dtype and was not"):
        fused(inputs[0], inputs[1].float())
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TieError, match="autocast is on"):
        fused(*inputs)
    fused.to(torch.bfloat16)
    with pytest.raises(TieError, match=r"a weight .* is of torch.bfloat16 and was of torch.float32.*capture and fuse"):
        fused(*inputs)
    with pytest.raises(Exception, match="a weight of a captured graph"):
        compiled(*inputs)
    fused.float()
    torch.testing.assert_close(fused(*inputs), expected, rtol=0.05, atol=0.05)  # bfloat16 has rounded the weights


def test_the_default_dtype_is_a_part_of_what_was_captured() -> None:
    x = torch.ones(2, 3)
    with pytest.raises(TieError, match=r"default dtype is torch.float32 and was torch.float64"):
        hold([], [], [x], [torch.float32], [], torch.float64)
    with pytest.raises(TieError, match=r"an input .* is a tensor of torch.float32 and was a number of torch.float32"):
        hold([x], [(torch.float32, True)], [], [], [], torch.float32)
    assert hold([x, x[0, 0]], [(x.dtype, False), (x.dtype, True)], [x], [x.dtype], [x.long()], x.dtype) is None


class Cast(nn.Module):
    """A projection with an adapter whose delta is cast to the dtype that is there, as PEFT does."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.a, self.b = (nn.Linear(i, o, bias=False) for i, o in [(6, 5), (6, 2), (2, 5)])

    def forward(self, x: Tensor) -> Tensor:
        y = self.w(x)
        return (y + 0.5 * self.b(self.a(x))).to(y.dtype).tanh()


class Embedded(Cast):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 6)

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(self.table(ids))


def test_integers_of_any_kind_are_taken() -> None:
    model, ids = Embedded().eval().requires_grad_(False), torch.tensor([1, 6, 2])
    fused = flora_fx.fuse(flora_fx.capture(model, ids))
    assert hold in {node.target for node in fused.graph.nodes}
    assert torch.equal(fused(ids.int()), fused(ids))


class CastOfARegion(Cast):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            largest = x.abs().max()
        return super().forward(x / largest)


def test_a_body_of_its_own_in_front_is_no_hindrance() -> None:
    model, x = CastOfARegion().double().eval().requires_grad_(False), torch.randn(3, 6, dtype=torch.float64)
    graph = flora_fx.capture(model, x)
    assert any(isinstance(node.target, torch._ops.HigherOrderOperator) for node in graph.graph.nodes)
    fused = flora_fx.fuse(graph)
    targets = {node.target for node in fused.graph.nodes}
    assert hold in targets
    assert ASSERT not in targets
    torch.testing.assert_close(fused(x), model(x), rtol=0, atol=1e-12)


def test_a_graph_captured_under_autocast_is_left_as_it_is() -> None:
    model, x = Cast().eval().requires_grad_(False), torch.randn(3, 6)
    with torch.autocast("cpu", torch.bfloat16):
        graph = flora_fx.capture(model, x)
        fused = flora_fx.fuse(graph)
        assert ASSERT in {node.target for node in fused.graph.nodes}
        torch.testing.assert_close(fused(x), model(x), rtol=0.05, atol=0.05)


def test_a_model_converted_between_capture_and_fuse_is_refused_as_before() -> None:
    model, x = Cast().eval().requires_grad_(False), torch.randn(3, 6)
    graph = flora_fx.capture(model, x).double()
    fused = flora_fx.fuse(graph)
    assert ASSERT in {node.target for node in fused.graph.nodes}
    with pytest.raises(RuntimeError, match="dtype mismatch"):
        fused(x.double())


def test_sizes_are_checked_once_and_again_where_they_change() -> None:
    model, x = Cast().eval().requires_grad_(False), torch.randn(3, 6)
    fused = flora_fx.fuse(flora_fx.capture(model, x))
    for _ in range(2):
        torch.testing.assert_close(fused(x), model(x))
        for others in (torch.randn(4, 6), torch.randn(3, 6, 1)):
            with pytest.raises((RuntimeError, AssertionError)):
                fused(others)


def test_code_goes_through_each_submodule_once() -> None:
    fused = flora_fx.fuse(step(2)[0])
    for code in (fused.code, copy.deepcopy(fused).code):
        assert len(re.findall(r"\.layers\b", code)) == 1
        assert code.count('"0"') == code.count('"1"') == 1


SAMPLES: dict[Any, tuple[Any, ...]] = {
    aten.bmm.default: (torch.randn(2, 3, 4), torch.randn(2, 4, 5)),
    aten.cat.default: ([torch.randn(2, 3), torch.randn(2, 4)], -1),
    aten.embedding.default: (torch.randn(7, 3), torch.tensor([[1, 6]]), 0),
    aten.expand.default: (torch.randn(2, 1), [2, 5]),
    aten.index_copy_.default: (torch.zeros(3, 4), 1, torch.tensor([2]), torch.randn(3, 1)),
    aten.linear.default: (torch.randn(2, 3), torch.randn(4, 3), torch.randn(4)),
    aten.matmul.default: (torch.randn(2, 3), torch.randn(3)),
    aten.mean.dim: (torch.randn(2, 3), [-1], True),
    aten.permute.default: (torch.randn(2, 3, 4), [2, 0, 1]),
    aten.pow.Tensor_Scalar: (torch.randn(2, 3), 3),
    aten.reshape.default: (torch.randn(2, 6), [2, -1, 2]),
    aten.scaled_dot_product_attention.default: tuple(torch.randn(1, 2, 3, 4) for _ in range(3)),
    aten.select.int: (torch.randn(2, 3), 1, -1),
    aten.softmax.int: (torch.randn(2, 3), -1, torch.float64),
    aten.split_with_sizes.default: (torch.randn(2, 5), [3, 2], -1),
    aten.to.dtype: (torch.randn(2, 3), torch.bfloat16),
    aten.transpose.int: (torch.randn(2, 3), 0, 1),
    aten.unsqueeze.default: (torch.randn(2, 3), -2),
    aten.view.default: (torch.randn(2, 6), [3, -1]),
}
"""Arguments, where they are not one or two tensors of one shape."""


@pytest.mark.parametrize("overload", [*FUNCTIONS, *METHODS], ids=str)
def test_functions_and_methods_compute_what_the_overload_computes(overload: Any) -> None:
    tensors = sum(str(argument.type) == "Tensor" for argument in overload._schema.arguments)
    given = SAMPLES.get(overload, tuple(torch.rand(2, 3) + 0.5 for _ in range(tensors)))
    expected = overload(*copy.deepcopy(given))
    first, *others = copy.deepcopy(given)
    direct = FUNCTIONS.get(overload)
    found = direct(first, *others) if direct else getattr(first, METHODS[overload])(*others)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    alike = found if isinstance(found, tuple | list) else [found]
    wanted = expected if isinstance(expected, tuple | list) else [expected]
    assert [(t.dtype, t.stride()) for t in alike] == [(t.dtype, t.stride()) for t in wanted]


@pytest.mark.parametrize("overload", [*FUNCTIONS, *METHODS], ids=str)
def test_they_take_all_that_the_overload_takes_by_place(overload: Any) -> None:
    """torch.export writes every argument down that a model gave, wherever Python takes it by name alone."""
    arguments = [argument for argument in overload._schema.arguments if not argument.kwarg_only]
    tensors = sum(str(argument.type) == "Tensor" for argument in arguments)
    given = SAMPLES.get(overload, tuple(torch.rand(2, 3) + 0.5 for _ in range(tensors)))
    given += tuple(argument.default_value for argument in arguments[len(given) :])
    graph = fx.Graph()
    tensors_given: list[Tensor] = []

    def placed(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        tensors_given.append(value)
        return graph.placeholder(f"x{len(tensors_given)}")

    node = graph.call_function(overload, fx.node.map_aggregate(given, placed))
    graph.output(node)
    directly(node)
    assert node.target is not overload
    expected = overload(*copy.deepcopy(given))
    found = fx.GraphModule({}, graph)(*copy.deepcopy(tensors_given))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_autocast_is_asked_about_in_words_that_every_dynamo_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of torch 2.11 cannot trace `torch.amp.is_autocast_available`."""

    def unknown(*_: object) -> bool:
        raise AssertionError("Dynamo of torch 2.11 stops here")

    monkeypatch.setattr(torch.amp, "is_autocast_available", unknown)
    assert not autocasts("cpu")
    assert not autocasts("meta")
    with torch.autocast("cpu", torch.bfloat16):
        assert autocasts("cpu")
