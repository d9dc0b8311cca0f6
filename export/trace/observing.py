"""What a model computes, layer by layer, seen by running it: every operator, with what it is given.

    before      the operators in front of the first layer
    layers      of each, told so that layers that compute alike look alike: a weight by its name in the layer, the
                stream by its place behind the layer before
    after       the operators behind the last layer

Python runs for this as it does for a capture, but with numbers in place of symbols: a thousandth of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flora_fx.internals import TorchDispatchMode, pytree

__all__ = ["Observed", "Tangled", "observe"]

_BEFORE, _AFTER = -1, -2
_SMALL = 4096
"""Constants of at most so many numbers are compared, number by number."""


class Tangled(Exception):  # noqa: N818
    """Layers that are not one behind the other, each with no more than the one before."""


@dataclass(frozen=True)
class Observed:
    """A run. Two are equal where they compute the same.

    Attributes:
        before, after: of the model.
        layers: one each, in order.
    """

    before: Hashable
    layers: tuple[Hashable, ...]
    after: Hashable


def observe(module: nn.Module, args: tuple[Any, ...], path: str) -> Observed:
    """Run a module.

    Args:
        module: returns its logits, then two tensors a layer.
        args: tensors, and at last a tuple of two tensors a layer.
        path: where its layers are.

    Raises:
        Tangled: a layer reads what neither it, nor the one before, nor the beginning of the model has made.
    """
    layers = module.get_submodule(path)
    assert isinstance(layers, nn.ModuleList)
    recorder = _Recorder(path, len(layers))
    recorder.know(module, args)
    with ExitStack() as hooks:
        for index, layer in enumerate(layers):
            hooks.callback(layer.register_forward_pre_hook(recorder.enters(index)).remove)
            hooks.callback(layer.register_forward_hook(recorder.leaves(index)).remove)
        hooks.enter_context(torch.no_grad())
        hooks.enter_context(recorder)
        logits, *present = module(*args)
    return recorder.observed(logits, present)


@dataclass(frozen=True)
class _Made:
    """The n-th value of an operator: by where it stands, and which one it is there."""

    region: int
    step: int
    value: int


@dataclass(frozen=True)
class _Weight:
    name: str
    layout: Hashable


@dataclass(frozen=True)
class _Given:
    """An input: which one; of those that come in pairs, one pair a layer."""

    index: int
    paired: bool


class _Recorder(TorchDispatchMode):
    def __init__(self, path: str, count: int) -> None:
        super().__init__()
        self.path = path
        self.regions: dict[int, list[tuple[Any, list[Any]]]] = {i: [] for i in (_BEFORE, *range(count), _AFTER)}
        self.count = count
        self.region = _BEFORE
        self.passed = -1
        self._labels: dict[int, Any] = {}
        self._kept: list[Any] = []  # so that no other tensor gets the same id

    def know(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Learn the names of what is there before."""
        *single, pairs = args
        for index, tensor in enumerate(single):
            self._label(tensor, _Given(index, False))
        for index, tensor in enumerate(pairs):
            self._label(tensor, _Given(index, True))
        for named in (module.named_parameters, module.named_buffers):
            for name, tensor in named(remove_duplicate=False):
                if id(tensor) not in self._labels:
                    self._label(tensor, _Weight(name, _layout(tensor)))

    def enters(self, index: int) -> Callable[..., None]:
        """A hook in front of a layer."""

        def hook(*_: Any) -> None:
            if self.region not in (_BEFORE, _AFTER) or self.passed != index - 1 or self.regions[_AFTER]:
                raise Tangled("its layers do not run one behind the other")
            self.region = index

        return hook

    def leaves(self, index: int) -> Callable[..., None]:
        """A hook behind a layer."""

        def hook(*_: Any) -> None:
            self.passed, self.region = index, _AFTER

        return hook

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        flat, spec = pytree.tree_flatten((args, kwargs or {}))
        operands = [self._operand(leaf) for leaf in flat]
        result = func(*args, **(kwargs or {}))
        steps = self.regions[self.region]
        values = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        for index, value in enumerate(values):
            self._label(value, _Made(self.region, len(steps), index))
        steps.append(((str(func), str(spec), tuple(map(_layout, values))), operands))
        return result

    def _label(self, tensor: Tensor, label: Any) -> None:
        self._labels[id(tensor)] = label
        self._kept.append(tensor)

    def _operand(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return repr(leaf)
        if (found := self._labels.get(id(leaf))) is not None:
            return found
        if leaf.numel() > _SMALL:
            raise Tangled("a layer reads a tensor that is no weight")
        return ("constant", _layout(leaf), str(leaf.tolist()))

    def observed(self, logits: Tensor, present: Iterable[Tensor]) -> Observed:
        """All of it, told relatively."""
        if self.passed != self.count - 1:
            raise Tangled("not all of its layers run")
        ends = [self._labels.get(id(tensor)) for tensor in present]
        layers = []
        for index in range(self.count):
            own = ends[2 * index : 2 * index + 2]
            layers.append((self._told(index), tuple(self._relative(label, index) for label in own)))
        end = self._relative(self._labels.get(id(logits)), _AFTER)
        return Observed(self._told(_BEFORE), tuple(layers), (self._told(_AFTER), end))

    def _told(self, region: int) -> Hashable:
        return tuple(
            (what, tuple(self._relative(operand, region) for operand in operands))
            for what, operands in self.regions[region]
        )

    def _relative(self, label: Any, region: int) -> Hashable:
        if isinstance(label, _Made):
            before = self.count - 1 if region == _AFTER else region - 1
            if label.region in (region, _BEFORE):
                return ("own" if label.region == region else "before", label.step, label.value)
            if label.region != before or region == _BEFORE:
                raise Tangled("a layer reads what a layer before the last one has made")
            return ("previous", label.step - len(self.regions[before]), label.value)
        if isinstance(label, _Given) and label.paired:
            if label.index // 2 != region:
                raise Tangled("a layer reads the cache of another one")
            return ("past", label.index % 2)
        if isinstance(label, _Weight):
            inside = f"{self.path}.{region}."
            if region >= 0 and label.name.startswith(inside):
                return ("weight of its own", label.name.removeprefix(inside), label.layout)
        return label


def _layout(tensor: Tensor) -> Hashable:
    return (tensor.dtype, tensor.device, tuple(tensor.shape), tensor.stride())
