"""An allocation fails, or Ctrl-C comes, anywhere inside fuse: the model and its graph are as they were, and run.

What may have changed is where a parameter lies: a pack that was complete is its home already. Its value, shape, dtype
and identity have not, nothing is stored twice, and the next attempt succeeds.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

import flora_fx
from flora_fx import FuseConfig
from flora_fx.compile import lifting
from flora_fx.storage import module, pack

from .test_threads import X, assert_equal, model

pytestmark = pytest.mark.usefixtures("uncollected")

ERRORS: dict[str, Callable[[], BaseException]] = {
    "CUDA": lambda: torch.OutOfMemoryError("CUDA out of memory"),
    "CPU": lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    "Python": MemoryError,
    "Ctrl-C": KeyboardInterrupt,
}
KINDS: dict[str, Callable[[nn.Module], Any]] = {
    "traced": fx.symbolic_trace,
    "captured": lambda own: flora_fx.capture(own, X),
    "exported": lambda own: torch.export.export(own, (X,)),
}


class Failing(TorchDispatchMode):
    """Each operation on tensors counts; the one with the number ``at`` fails."""

    def __init__(self, at: int, error: Callable[[], BaseException]) -> None:
        super().__init__()
        self.left, self.error = at, error

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left == -1:
            raise self.error()
        return func(*args, **(kwargs or {}))


@contextmanager
def interrupted(at: int, *files: str) -> Iterator[None]:
    """Raise KeyboardInterrupt before the line with the number ``at`` of those that are executed in some files."""
    left, before = [at], sys.gettrace()

    def local(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            left[0] -= 1
            if left[0] == -1:
                raise KeyboardInterrupt
        return local

    sys.settrace(lambda frame, event, _: local if frame.f_code.co_filename in files else None)
    try:
        yield
    finally:
        sys.settrace(before)


def run(graph: Any) -> Tensor:
    return (graph.module() if isinstance(graph, torch.export.ExportedProgram) else graph)(X)


def text_of(graph: Any) -> str:
    return str(graph.graph_module.graph if isinstance(graph, torch.export.ExportedProgram) else graph.graph)


def stored(own: nn.Module) -> int:
    """Bytes of all memory that the parameters lie in."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in own.parameters()}
    return sum(storages.values())


class Before:
    """A model and its graph as they are now, to be compared with what they are later."""

    def __init__(self, kind: str) -> None:
        self.own = model()
        self.graph = KINDS[kind](self.own)
        self.text = text_of(self.graph)
        self.parameters = dict(self.own.named_parameters())
        self.values = {name: value.clone() for name, value in self.parameters.items()}
        self.expected = self.own(X)
        self.bytes = stored(self.own)

    def unpack(self) -> None:
        """Give each parameter memory of its own again."""
        for name, parameter in self.parameters.items():
            parameter.data = self.values[name].clone()

    def assert_still_so(self) -> None:
        assert text_of(self.graph) == self.text
        now = dict(self.own.named_parameters())
        assert list(now) == list(self.parameters)
        for name, parameter in now.items():
            assert parameter is self.parameters[name]
            assert torch.equal(parameter, self.values[name])
            assert not parameter.requires_grad
        assert_equal(self.own(X), self.expected)
        assert_equal(run(self.graph), self.expected)

    def assert_fuses(self, config: FuseConfig) -> None:
        fused = flora_fx.fuse(self.graph, config=config)
        report = flora_fx.report(fused)
        assert len(report.fused) == 3
        assert_equal(run(fused), self.expected)
        packs = sum(8 * torch.Size(pack.shape).numel() for pack in report.packs)
        in_place = [piece.source for pack in report.packs for piece in pack.slices if piece.view]
        members = sum(self.parameters[str(source).removeprefix("p_")].nbytes for source in in_place)
        assert stored(self.own) <= self.bytes + packs - members, "nothing is stored twice"


@pytest.mark.parametrize(
    ("kind", "name", "step"),
    [
        *(("traced", name, 7) for name in ERRORS),
        *(("exported", "CUDA", 41), ("captured", "Ctrl-C", 41)),
        *(pytest.param(kind, name, 1, marks=pytest.mark.slow) for kind in KINDS for name in ERRORS),
    ],
)
def test_an_operation_fails(kind: str, name: str, step: int) -> None:
    before, config = Before(kind), FuseConfig(layout="ahead", fold_scale=name == "CPU")
    failed = 0
    for at in range([*ERRORS].index(name) % step, 10_000, step):
        before.unpack()
        try:
            with Failing(at, ERRORS[name]):
                flora_fx.fuse(before.graph, config=config)
        except type(ERRORS[name]()):
            failed += 1
        else:
            break
        before.assert_still_so()
        before.assert_fuses(config)
    assert failed > 2


@pytest.mark.parametrize(
    ("kind", "step"), [("traced", 23), *(pytest.param(kind, 11, marks=pytest.mark.slow) for kind in KINDS)]
)
def test_an_interrupt_while_weights_are_packed(kind: str, step: int) -> None:
    before, config = Before(kind), FuseConfig()
    failed = 0
    for at in range(3, 10_000, step):
        before.unpack()
        try:
            with interrupted(at, pack.__file__, module.__file__):
                flora_fx.fuse(before.graph)
        except KeyboardInterrupt:
            failed += 1
        else:
            break
        before.assert_still_so()
        before.assert_fuses(config)
    assert failed > 5


class Nth:
    """A function whose call with the number ``at`` fails, before or after its work."""

    def __init__(self, function: Callable[..., Any], at: int, late: bool) -> None:
        self.function, self.left, self.late = function, at, late

    def __call__(self, *args: Any) -> Any:
        self.left -= 1
        if self.left == -1 and not self.late:
            raise torch.OutOfMemoryError
        result = self.function(*args)
        if self.left == -1:
            raise torch.OutOfMemoryError
        return result


@pytest.mark.parametrize("late", [False, True])
def test_a_compiled_model(late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    own = model()
    expected = own(X)
    compiled = torch.compile(own, backend="flora", options={"flora.inner": "eager"})
    compiled(X)
    for at in range(2):
        for parameter in own.parameters():
            parameter.data = parameter.detach().clone()
        with monkeypatch.context() as patch:
            patch.setattr(lifting, "tie", Nth(lifting.tie, at, late))
            with pytest.raises(torch.OutOfMemoryError):
                compiled(X)
        assert_equal(own(X), expected)
        assert_equal(compiled(X), expected)
    own.k_b.weight.mul_(2)
    assert_equal(compiled(X), own(X))


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("what", ["call", "to", "load"])
def test_a_fused_graph(what: str, late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    own = model()
    expected = own(X)
    fused: Any = flora_fx.fuse(fx.symbolic_trace(own))
    state = {name: value.clone() for name, value in own.state_dict().items()}
    attempts: dict[str, Callable[[], Any]] = {
        "call": lambda: fused(X),
        "to": lambda: fused.to(torch.float32).to(torch.float64),
        "load": lambda: fused.load_state_dict(state, assign=True),
    }
    for at in range(2):
        if what == "call":
            own.q.weight.data = own.q.weight.detach().clone()
            own.o.weight.data = own.o.weight.detach().clone()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a tie was lost, as it says
            with monkeypatch.context() as patch:
                patch.setattr(module, "tie", Nth(module.tie, at, late))
                with pytest.raises(torch.OutOfMemoryError):
                    attempts[what]()
            fused.double().load_state_dict(state)
            assert_equal(fused(X), expected)
    fused.get_submodule("k_b").weight.mul_(2)
    own.load_state_dict(fused.state_dict())
    assert_equal(fused(X), own(X))


def test_a_conversion_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the parameters are float32 then, and what is reported is not that."""
    fused: Any = flora_fx.fuse(fx.symbolic_trace(model()))
    with pytest.raises(torch.OutOfMemoryError):
        fused._apply(Nth(lambda tensor: tensor.float(), 4, late=False))
    with pytest.raises(flora_fx.TieError, match="Convert the whole fused module to one dtype"):
        fused(X)
    fused.double()
    assert fused(X).dtype == torch.float64
