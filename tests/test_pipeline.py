"""The list of passes, what is written down between them, and what may be left out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import flora_fx
from flora_fx import FuseConfig, Reason
from flora_fx.graph.program import Program
from flora_fx.passes import pipeline
from flora_fx.passes.context import Context, Pass
from flora_fx.passes.debugging import DUMP, LEAVE_OUT
from flora_fx.passes.pipeline import PASSES
from tests.adapters import D_IN, Siblings


def captured(model: nn.Module, x: Tensor) -> Any:
    return flora_fx.capture(model.double().eval().requires_grad_(False), x)


def siblings() -> tuple[Any, Tensor]:
    x = torch.randn(2, 5, D_IN, dtype=torch.float64)
    return captured(Siblings(), x), x


class Decomposed(nn.Module):
    """DoRA, as PEFT writes it: the norm is computed at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.a, self.b = nn.Linear(D_IN, 10, bias=False), nn.Linear(D_IN, 3, bias=False), nn.Linear(3, 10)
        self.b.bias = None
        self.m = nn.Parameter(torch.rand(10) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        norm = (self.w.weight + 0.7 * self.b.weight @ self.a.weight).norm(dim=1)
        scale = self.m / norm
        y = self.w(x)
        return y + ((scale - 1) * y + scale * self.b(self.a(x)) * 0.7)


class Rotated(nn.Module):
    """A low-rank path into a rotary embedding's halves."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.a, self.b = nn.Linear(D_IN, 24), nn.Linear(D_IN, 3, bias=False), nn.Linear(3, 24, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q = (self.w(x) + self.b(self.a(x)) * 0.7).view(2, 5, 3, 8)
        return q * 0.3 + torch.cat((-q[..., 4:], q[..., :4]), -1)


def flips(graph: Any) -> int:
    return sum(node.target is torch.ops.aten.flip.default for node in graph.graph.nodes)


def test_each_pass_needs_what_an_earlier_one_gives() -> None:
    given: set[type] = set()
    for step in PASSES:
        assert given.issuperset(step.needs), step.name
        assert step.gives not in given, step.name
        given |= {step.gives} - {None}  # type: ignore[arg-type]
    assert len({step.name for step in PASSES}) == len(PASSES)


class Watched(Context):
    """A context that remembers which facts were read."""

    def __init__(self, program: Program, config: FuseConfig) -> None:
        super().__init__(program, config)
        self.read: set[type] = set()

    def __getitem__(self, kind: type[Any]) -> Any:
        self.read.add(kind)
        return super().__getitem__(kind)


@pytest.mark.parametrize("build", [Siblings, Decomposed, Rotated])
def test_each_pass_does_what_its_entry_says(build: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    def watch(step: Pass) -> Pass:
        def run(context: Watched) -> Any:
            context.read.clear()
            before = str(context.program.graph)
            fact = step.run(context)
            assert context.read == set(step.needs), step.name
            assert step.rewrites or str(context.program.graph) == before, step.name
            assert type(fact) is (step.gives or type(None)), step.name
            ran.append(step.name)
            return fact

        return replace(step, run=run)

    ran: list[str] = []
    watched = tuple(map(watch, PASSES))
    monkeypatch.setattr(pipeline, "PASSES", watched)
    monkeypatch.setattr(pipeline, "_GIVING", {step.gives: step for step in watched if step.gives})
    monkeypatch.setattr(pipeline, "Context", Watched)
    graph = captured(build(), torch.randn(2, 5, D_IN, dtype=torch.float64))
    flora_fx.fuse(graph, config=FuseConfig(accumulate="unrolled"))
    again = [name for name in ran if ran.count(name) > 1]
    assert set(again) == ({"effects", "modes", "values", "projections"} if build is Decomposed else set())
    assert set(ran) == {step.name for step in PASSES}


def test_what_stands_in_the_way_of_two_paths_is_told_once() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.v, self.w = nn.Linear(D_IN, 10), nn.Linear(D_IN, 8)
            self.a, self.b, self.c = nn.Linear(D_IN, 3, bias=False), nn.Linear(3, 10), nn.Linear(3, 8)
            self.a.weight = nn.Parameter(self.a.weight.detach().to_sparse(), requires_grad=False)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            z = self.a(x)
            return self.v(x) + self.b(z), self.w(x) + self.c(z)

    report = flora_fx.report(flora_fx.fuse(fx.symbolic_trace(Shared())))
    assert [(decline.node, decline.reason) for decline in report.declines] == [("a", Reason.WEIGHT_NOT_DENSE)]


def test_the_graph_is_written_down_whenever_a_pass_has_changed_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    graph, x = siblings()
    plain = flora_fx.fuse(copy.deepcopy(graph))
    monkeypatch.setenv(DUMP, str(tmp_path / "dump"))
    fused = flora_fx.fuse(graph)
    assert str(fused.graph) == str(plain.graph)
    files = {path.name: path.read_text() for path in (tmp_path / "dump" / "0").iterdir()}
    assert [name.split("-")[1] for name in sorted(files)] == [
        *("given.txt", "write.txt", "clean.txt", "direct.txt", "labels.txt")
    ]
    given, written, cleaned, _, labelled = (files[name] for name in sorted(files))
    assert (given.count("aten.linear.default"), given.count("_nn.linear")) == (10, 0)
    assert (written.count("aten.linear.default"), written.count("_nn.linear")) == (10, 2)
    assert (cleaned.count("aten.linear.default"), cleaned.count("_nn.linear")) == (0, 2)
    assert "o_adapted" in labelled
    assert "o_adapted" not in cleaned
    flora_fx.fuse(captured(Rotated(), x), config=FuseConfig(accumulate="unrolled"))
    names = {path.name.split("-")[1] for path in (tmp_path / "dump" / "1").iterdir()}
    assert names == {"given.txt", "write.txt", "rotary.txt", "clean.txt", "direct.txt", "labels.txt"}


def test_a_dump_that_cannot_be_written_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    graph, x = siblings()
    before, expected = str(graph.graph), graph(x)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(DUMP, str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"FLORA_FX_DUMP is '.*file', where no folder can be made: .*; name another"):
        flora_fx.fuse(graph)
    assert str(graph.graph) == before
    assert torch.equal(graph(x), expected)


def test_without_magnitudes_a_weight_decomposed_adapter_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 5, D_IN, dtype=torch.float64)
    graph = captured(Decomposed(), x)
    expected = graph(x)
    assert len(flora_fx.report(flora_fx.fuse(copy.deepcopy(graph))).fused) == 1
    monkeypatch.setenv(LEAVE_OUT, "magnitudes")
    fused = flora_fx.fuse(graph)
    assert flora_fx.report(fused).fused == ()
    torch.testing.assert_close(fused(x), expected, rtol=1e-12, atol=1e-12)


def test_without_rotary_and_labels_the_rest_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 5, D_IN, dtype=torch.float64)
    graph, config = captured(Rotated(), x), FuseConfig(accumulate="unrolled")
    expected = graph(x)
    assert flips(flora_fx.fuse(copy.deepcopy(graph), config=config)) > 0
    monkeypatch.setenv(LEAVE_OUT, "rotary, labels")
    fused = flora_fx.fuse(graph, config=config)
    assert flips(fused) == 0
    assert not [node.name for node in fused.graph.nodes if node.name.endswith("_adapted")]
    assert flora_fx.report(fused).unrolled == 3
    torch.testing.assert_close(fused(x), expected, rtol=1e-12, atol=1e-12)


def test_without_unlike_nothing_is_said_of_other_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    class Held(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_layer = nn.Linear(D_IN, 10, bias=False)
            self.a, self.e, self.b = (nn.Parameter(torch.randn(*s)) for s in ((D_IN, 3), (3,), (3, 10)))

        def forward(self, x: Tensor) -> Tensor:
            return self.base_layer(x) + 0.3 * F.linear(x, ((self.a * self.e) @ self.b).t())

    x = torch.randn(4, D_IN, dtype=torch.float64)
    graph = captured(nn.Sequential(Held()), x)
    assert flora_fx.report(flora_fx.fuse(copy.deepcopy(graph))).declines
    monkeypatch.setenv(LEAVE_OUT, "unlike")
    assert flora_fx.report(flora_fx.fuse(graph)).declines == ()


@pytest.mark.parametrize("name", ["write", "rotray", "clean"])
def test_what_cannot_be_left_out_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    graph, x = siblings()
    before, expected = str(graph.graph), graph(x)
    monkeypatch.setenv(LEAVE_OUT, f"unlike,{name}")
    known = "only these passes can be left out: magnitudes, unlike, rotary, settle, direct, labels"
    with pytest.raises(ValueError, match=f"FLORA_FX_LEAVE_OUT names '{name}'; {known}"):
        flora_fx.fuse(graph)
    assert str(graph.graph) == before
    assert torch.equal(graph(x), expected)
