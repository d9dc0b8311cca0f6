"""Rotary embeddings behind an unrolled up-projection: none is left that reads the sum shifted, and each is exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import flora_fx
from flora_fx import FuseConfig

IN, HEADS, WIDTH, RANK, SCALE = 10, 3, 8, 4, 0.7
UNROLLED = FuseConfig(accumulate="unrolled")

Rotate = Callable[[Tensor], Tensor]


def halves(q: Tensor) -> Tensor:
    """transformers' rotate_half."""
    return torch.cat((-q[..., WIDTH // 2 :], q[..., : WIDTH // 2]), dim=-1)


def halves_by_chunk(q: Tensor) -> Tensor:
    first, second = q.chunk(2, -1)
    return torch.cat([-second, first], -1)


def halves_by_split(q: Tensor) -> Tensor:
    first, second = q.split([WIDTH // 2, WIDTH // 2], dim=-1)
    return torch.cat([second, -first], -1)


def halves_plain(q: Tensor) -> Tensor:
    return torch.cat([q[:, :, :, 4:8], q[:, :, :, :4]], 3)


def halves_negative(q: Tensor) -> Tensor:
    return torch.cat([q[..., 4:].neg(), torch.neg(q[..., :4])], -1)


def neighbours(q: Tensor) -> Tensor:
    """GPT-J's rotate_every_two."""
    return torch.stack((-q[..., 1::2], q[..., ::2]), dim=-1).flatten(-2)


def neighbours_by_reshape(q: Tensor) -> Tensor:
    return torch.stack((q[..., 1::2], -q[..., ::2]), dim=-1).reshape(q.shape)


def part(q: Tensor) -> Tensor:
    """GPT-NeoX, Phi: the first features of each head."""
    rotated, kept = q[..., :6], q[..., 6:]
    return torch.cat([torch.cat([-rotated[..., 3:], rotated[..., :3]], -1) * 3, kept], -1)


def part_in_the_middle(q: Tensor) -> Tensor:
    middle = q[..., 2:6]
    swapped = torch.stack([-middle[..., 1::2], middle[..., ::2]], -1).flatten(-2)
    return torch.cat([q[..., :2], swapped, q[..., 6:]], -1)


ROTATIONS = [
    *(halves, halves_by_chunk, halves_by_split, halves_plain, halves_negative),
    *(neighbours, neighbours_by_reshape, part, part_in_the_middle),
]


def in_place(q: Tensor) -> Tensor:
    first, second = q[..., :4] * 1, q[..., 4:] * 1
    second.neg_()
    return torch.cat([second, first], -1)


def unequal(q: Tensor) -> Tensor:
    return torch.cat([-q[..., 3:], q[..., :3]], -1)


def in_order(q: Tensor) -> Tensor:
    return torch.cat([-q[..., :4], q[..., 4:]], -1)


def of_two(q: Tensor) -> Tensor:
    return torch.cat([-q[..., 4:], (q * 2)[..., :4]], -1)


def normed(q: Tensor) -> Tensor:
    return halves(nn.functional.rms_norm(q, (WIDTH,)))


class Attention(nn.Module):
    """q with an adapter, in heads, then q · cos + rotate(q) · sin."""

    def __init__(self, rotate: Rotate, *, transposed: bool = True) -> None:
        super().__init__()
        self.w = nn.Linear(IN, HEADS * WIDTH)
        self.a, self.b = nn.Linear(IN, RANK, bias=False), nn.Linear(RANK, HEADS * WIDTH, bias=False)
        self.cos, self.sin = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.randn(WIDTH))
        self.rotate, self.transposed = rotate, transposed

    def forward(self, x: Tensor) -> Tensor:
        q = self.w(x) + SCALE * self.b(self.a(x))
        q = q.view(*x.shape[:-1], HEADS, WIDTH)
        if self.transposed:
            q = q.transpose(1, 2)
        return q * self.cos + self.rotate(q) * self.sin


def exported(model: nn.Module, x: Tensor) -> Any:
    return torch.export.export(model, (x,), strict=False)


def dynamic(model: nn.Module, x: Tensor) -> Any:
    dims = {0: torch.export.Dim("batch", min=2, max=64), 1: torch.export.Dim("length", min=2, max=64)}
    return torch.export.export(model, (x,), dynamic_shapes=(dims,), strict=False)


def module(model: nn.Module, x: Tensor) -> Any:
    return exported(model, x).module()


def shifted_reads(graph: fx.Graph) -> int:
    """Joins of pieces of which one is negated."""
    joins = {torch.cat, torch.stack, torch.ops.aten.cat.default, torch.ops.aten.stack.default}
    found = 0
    for node in graph.nodes:
        if node.target in joins:
            signs = {torch.neg, torch.ops.aten.neg.default}
            found += any(operand.target in signs for operand in node.all_input_nodes)
    return found


def made(rotate: Rotate, **given: bool) -> tuple[Attention, Tensor, Tensor]:
    model = Attention(rotate, **given).double().eval().requires_grad_(False)
    x = torch.randn(2, 5, IN, dtype=torch.float64)
    return model, x, model(x)


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("capture", [exported, dynamic, module])
@pytest.mark.parametrize("rotate", ROTATIONS, ids=lambda f: f.__name__)
def test_a_rotation_reads_nothing_shifted(rotate: Rotate, capture: Any, transposed: bool) -> None:
    model, x, expected = made(rotate, transposed=transposed)
    fused = flora_fx.fuse(capture(model, x), config=UNROLLED)
    flips = [n for n in fused.graph.nodes if n.target is torch.ops.aten.flip.default]
    assert len(flips) == 2  # of y and of B
    assert shifted_reads(fused.graph) == 0
    run = fused if isinstance(fused, fx.GraphModule) else fused.module()
    torch.testing.assert_close(run(x), expected, rtol=0, atol=1e-13)
    if capture is dynamic:
        other = torch.randn(3, 7, IN, dtype=torch.float64)
        torch.testing.assert_close(run(other), model(other), rtol=0, atol=1e-13)
    model.b.weight.mul_(-2)  # the weights stay live
    torch.testing.assert_close(run(x), model(x), rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rotate", [halves, neighbours], ids=lambda f: f.__name__)
def test_it_is_the_rotation_of_the_very_sum(rotate: Rotate, dtype: torch.dtype) -> None:
    """In its own dtype, too: the halves of a rounded sum are the rounded sums of the halves."""
    model = Attention(rotate).to(dtype).eval().requires_grad_(False)
    x = torch.randn(2, 5, IN, dtype=dtype)
    fused = flora_fx.fuse(module(model, x), config=UNROLLED)
    found = []
    for cos, sin in ((1, 0), (0, 1)):
        model.cos.fill_(cos)
        model.sin.fill_(sin)
        found.append(fused(x))
    assert found[0].dtype == dtype
    last_place = torch.finfo(dtype).eps
    torch.testing.assert_close(found[1], rotate(found[0]), rtol=2 * last_place, atol=last_place)


@pytest.mark.parametrize("rotate", [in_place, unequal, in_order, of_two, normed], ids=lambda f: f.__name__)
def test_other_joins_stay_as_they_are(rotate: Rotate) -> None:
    model, x, expected = made(rotate)
    fused = flora_fx.fuse(module(model, x), config=UNROLLED)
    assert not [n for n in fused.graph.nodes if n.target is torch.ops.aten.flip.default]
    assert flora_fx.report(fused).fused == ("b.weight",)
    torch.testing.assert_close(fused(x), expected, rtol=0, atol=1e-13)


class AcrossTokens(nn.Module):
    """The heads of all tokens in one dimension: a head's features are one token's, but a token is no row of heads."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(IN, HEADS * WIDTH)
        self.a, self.b = nn.Linear(IN, RANK, bias=False), nn.Linear(RANK, HEADS * WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q = (self.w(x) + SCALE * self.b(self.a(x))).view(x.shape[0], x.shape[1] * HEADS, WIDTH)
        return q + 2 * halves(q)


def test_heads_of_several_tokens_in_one_dimension_are_no_heads_of_a_token() -> None:
    model = AcrossTokens().double().eval().requires_grad_(False)
    x = torch.randn(2, 5, IN, dtype=torch.float64)
    fused = flora_fx.fuse(module(model, x), config=UNROLLED)
    assert not [n for n in fused.graph.nodes if n.target is torch.ops.aten.flip.default]
    assert flora_fx.report(fused).fused == ("b.weight",)
    torch.testing.assert_close(fused(x), model(x), rtol=0, atol=1e-13)


def test_a_piece_that_is_changed_after_it_was_negated_is_no_half() -> None:
    """Dynamo's graphs read the negated piece, and change it beside that."""

    def changed(q: Tensor) -> Tensor:
        second = -q[..., 4:]
        second.mul_(3)
        return torch.cat([second, q[..., :4]], -1)

    model, x, expected = made(changed)
    options = {"flora.inner": "aot_eager", "flora.accumulate": "unrolled"}
    compiled = torch.compile(model, backend="flora", options=options, fullgraph=True)
    torch.testing.assert_close(compiled(x), expected, rtol=0, atol=1e-13)
    assert flora_fx.backend.last_report().fused == ("b.weight",)


def test_only_a_product_and_a_sum_is_pushed_through() -> None:
    model, x, expected = made(halves)
    for config in (FuseConfig(), FuseConfig(accumulate="add")):
        fused = flora_fx.fuse(module(model, x), config=config)
        assert not [n for n in fused.graph.nodes if n.target is torch.ops.aten.flip.default]
        torch.testing.assert_close(fused(x), expected, rtol=0, atol=1e-13)


def test_a_graph_that_trains_keeps_its_rotation() -> None:
    model = Attention(halves).double()
    x = torch.randn(2, 5, IN, dtype=torch.float64)
    expected = model(x)
    expected.square().sum().backward()
    wanted = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    model.zero_grad()
    fused = flora_fx.fuse(module(model, x), config=UNROLLED)
    assert not [n for n in fused.graph.nodes if n.target is torch.ops.aten.flip.default]
    found = fused(x)
    found.square().sum().backward()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == set(wanted)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-12, atol=1e-12)


class Gradual(nn.Module):
    """Several projections of one z, which stand under each other, each with heads of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(IN, 3 * WIDTH), nn.Linear(IN, 2 * WIDTH, bias=False)
        self.a = nn.Linear(IN, RANK, bias=False)
        self.qb, self.kb = nn.Linear(RANK, 3 * WIDTH, bias=False), nn.Linear(RANK, 2 * WIDTH, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.a(x)
        q, k = self.q(x) + SCALE * self.qb(z), self.k(x) + SCALE * self.kb(z)
        q, k = (v.view(*x.shape[:-1], -1, WIDTH).transpose(1, 2) for v in (q, k))
        return q + halves(q) * 2, k + halves(k) * 3


@pytest.mark.parametrize("capture", [exported, dynamic, module])
def test_up_projections_that_share_a_matrix(capture: Any) -> None:
    model = Gradual().double().eval().requires_grad_(False)
    x = torch.randn(2, 5, IN, dtype=torch.float64)
    fused = flora_fx.fuse(capture(model, x), config=UNROLLED)
    assert len([n for n in fused.graph.nodes if n.target is torch.ops.aten.flip.default]) == 4
    run = fused if isinstance(fused, fx.GraphModule) else fused.module()
    for found, expected in zip(run(x), model(x), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
