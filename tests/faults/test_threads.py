"""Eight threads capture, fuse, call and compile at once: every result is right, and none is another thread's.

torch's tracers patch ``nn.Module.__call__`` for all threads (2.13), so nothing is called while graphs are captured.
"""

from __future__ import annotations

import copy
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import flora_fx
from flora_fx import FuseConfig
from flora_fx.compile import lifting
from flora_fx.storage.module import FusedGraphModule

THREADS = 8
X = torch.linspace(-1, 1, 2 * 5 * 12, dtype=torch.float64).reshape(2, 5, 12)
CONFIGS = (
    FuseConfig(),
    FuseConfig(layout="ahead"),
    FuseConfig(layout="beside", up="per_projection"),
    FuseConfig(layout="ahead", fold_scale=True),
)


class Siblings(nn.Module):
    """Two adapters of ranks 3 and 5 on one read, and one on what they make."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.o = nn.Linear(12, 10), nn.Linear(12, 6, bias=False), nn.Linear(16, 12)
        self.q_a, self.q_b = nn.Linear(12, 3, bias=False), nn.Linear(3, 10, bias=False)
        self.k_a, self.k_b = nn.Linear(12, 5, bias=False), nn.Linear(5, 6, bias=False)
        self.o_a, self.o_b = nn.Linear(16, 4, bias=False), nn.Linear(4, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.q(x) + self.q_b(self.q_a(x)) * 0.7, self.k(x) + 1.7 * self.k_b(self.k_a(x))
        h = torch.cat([torch.tanh(q), k], -1)
        return x + (self.o(h) + self.o_b(self.o_a(h)) * 1.3)


def model() -> Siblings:
    return Siblings().double().eval().requires_grad_(False)


def assert_equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.fixture(autouse=True)
def _hurried() -> Iterator[None]:
    """Threads take turns after each few instructions; a lost tie is stored anew with a warning, as it should be."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*had lost the tie")
        yield
    sys.setswitchinterval(before)


def at_once(work: Callable[[int], Any]) -> list[Any]:
    """What ``work`` returns in each of the threads, which begin together; the first error of any."""
    results: list[Any] = [None] * THREADS
    errors: list[BaseException] = []
    ready = threading.Barrier(THREADS)

    def run(index: int) -> None:
        ready.wait()
        try:
            results[index] = work(index)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def test_captures_of_one_model() -> None:
    one = model()
    expected = one(X)
    for graph in at_once(lambda index: flora_fx.capture(one, X)):
        assert_equal(flora_fx.fuse(graph)(X), expected)
    assert "forward" not in vars(one)
    assert_equal(one(X), expected)


def test_captures_of_eight_models() -> None:
    models = [model() for _ in range(THREADS)]
    graphs = at_once(lambda index: flora_fx.capture(models[index], X))
    fused = at_once(lambda index: flora_fx.fuse(graphs[index]))
    for found, own in zip(at_once(lambda index: fused[index](X)), models, strict=True):
        assert_equal(found, own(X))


@pytest.mark.parametrize("configs", [CONFIGS[:1], CONFIGS], ids=["alike", "in four ways"])
@pytest.mark.parametrize("kind", ["graph", "program"])
def test_fuses_of_one_graph(kind: str, configs: tuple[FuseConfig, ...]) -> None:
    one = model()
    program = torch.export.export(one, (X,))
    graph: Any = program if kind == "program" else program.module(check_guards=False)

    def work(index: int) -> FusedGraphModule:
        fused = flora_fx.fuse(graph, config=configs[index % len(configs)])
        module: Any = fused.module() if kind == "program" else fused
        for _ in range(3):
            assert_equal(module(X), expected)
        return module

    for _ in range(2):
        expected = one(X)
        everything = at_once(work)
        for parameter in one.parameters():
            parameter.mul_(1.25)
        for fused in everything:  # no pack was left behind by its parameters unnoticed
            assert_equal(fused(X), one(X))
        state = fused.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in one.state_dict().items())


def test_fuses_and_calls_of_copies() -> None:
    graph = fx.symbolic_trace(model())

    def work(index: int) -> tuple[FusedGraphModule, nn.Module]:
        own = copy.deepcopy(graph)
        for parameter in own.parameters():
            parameter.mul_(1 + index / 8)
        expected = own(X)
        fused: Any = flora_fx.fuse(own)
        for twin in (fused, copy.deepcopy(fused)):
            for _ in range(4):
                assert_equal(twin(X), expected)
        return fused, own

    for fused, own in at_once(work):
        assert_equal(fused(X), own(X))


def test_calls_of_one_fused_graph_while_its_ties_are_broken() -> None:
    one = model()
    fused = flora_fx.fuse(fx.symbolic_trace(one))
    expected = one(X)

    def work(index: int) -> None:
        for _ in range(20):
            assert_equal(fused(X), expected)
            one.q.weight.data = one.q.weight.detach().clone()

    at_once(work)
    one.q.weight.mul_(2)
    assert_equal(fused(X), one(X))


def test_models_of_one_class_compiled_by_the_backend() -> None:
    """Dynamo compiles the code of a class once: models of it share one compiled graph, each with weights of its own."""
    models = [model() for _ in range(THREADS)]
    expected = [own(X) for own in models]
    compiled = [torch.compile(own, backend="flora", options={"flora.inner": "eager"}) for own in models]
    compiled[0](X)

    def slowly(choose: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def chosen(arguments: Any) -> Any:
            time.sleep(1e-3)  # between tying and computing, so that the others tie meanwhile
            return choose(arguments)

        return chosen

    calls = [*lifting._calls]
    assert len(calls) < THREADS, "shared"
    for call in calls:
        call._kept = slowly(call._kept)

    def work(index: int) -> None:
        for _ in range(5):
            assert_equal(compiled[index](X), expected[index])

    at_once(work)
    for own, call in zip(models, compiled, strict=True):
        own.q_b.weight.mul_(3)
        assert_equal(call(X), own(X))


@pytest.mark.slow
def test_models_that_are_compiled_at_once() -> None:
    models = [model() for _ in range(THREADS)]
    expected = [own(X) for own in models]
    compiled = [torch.compile(own, backend="flora", options={"flora.inner": "aot_eager"}) for own in models]
    for _ in range(3):
        for found, wanted in zip(at_once(lambda index: compiled[index](X)), expected, strict=True):
            assert_equal(found, wanted)
