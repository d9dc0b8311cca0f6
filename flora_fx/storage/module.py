"""Fused programs: a GraphModule and an ExportedProgram whose packs stay tied to their parameters."""

from __future__ import annotations

import copy
import types
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from flora_fx.errors import TieError
from flora_fx.internals import is_export_check, pytree
from flora_fx.ir import Derived, Pack
from flora_fx.reporting.fusion_report import FusionReport

from .attributes import share_ways
from .pack import TYING, Stamp, derive, guard_backward, stamp, stamp_derived, tie, version

__all__ = ["META", "PLAIN", "STORE", "FusedExportedProgram", "FusedGraphModule", "Fusion", "fusion_of"]

META = "flora_fx"
"""Where a fused graph module keeps its `Fusion`: ``graph_module.meta[META]``."""
PLAIN = "flora_fx_plain"
"""Set in the ``meta`` of a graph that was captured without autocast around it: what it says of dtypes holds."""
STORE = "_flora"
"""The submodule that holds the packs; they are non-persistent buffers, so `state_dict()` does not list them."""


@dataclass(frozen=True)
class Fusion:
    """What a fused program knows of its own making.

    Attributes:
        packs: the packed weights.
        eval_only: dropout modules that were seen through because they were in eval mode.
        report: what the user reads.
        derived: the values that are computed from parameters alone, and stored.
    """

    packs: tuple[Pack, ...]
    eval_only: tuple[str, ...]
    report: FusionReport
    derived: tuple[Derived, ...] = ()


class FusedGraphModule(fx.GraphModule):
    """A `torch.fx.GraphModule` that keeps its packed weights and its parameters the same.

    `.to()`, `deepcopy`, `load_state_dict` (also with ``assign=True``) and pickling tie them anew; whatever else may
    have moved a parameter is noticed when the module is called.
    """

    _owners: dict[str, tuple[dict[str, Any], str]]
    _stamps: dict[str, Stamp]
    _places: list[tuple[Any, Any]]
    _untrained: list[tuple[Any, Any]]
    _copied: list[tuple[Any, Any]]
    _seen: list[int]
    _accepted: list[Any] | None
    _size_check: Callable[..., None]
    _loses_gradients: bool

    @classmethod
    def of(cls, source: fx.GraphModule, graph: fx.Graph, fusion: Fusion) -> FusedGraphModule:
        """A fused module over ``graph`` with ``source``'s parameters, submodules, hooks and metadata (shared)."""
        modules = {name: child for name, child in source._modules.items() if name != STORE}
        state = {
            # Containers are copied, what they hold is shared.
            key: copy.copy(value) if isinstance(value, dict | set) else value
            for key, value in source.__dict__.items()
            if key not in _OWN
        }
        root = nn.Module()
        root.__dict__.update(state)
        root._modules = {**modules, STORE: _empty_store(fusion)}
        share_ways(graph)
        module = cls(root, graph, class_name="FusedGraphModule")
        for key, value in state.items():
            if isinstance(value, types.MethodType) and value.__self__ is source:
                value = types.MethodType(value.__func__, module)
            module.__dict__[key] = value
        module._modules = root._modules
        module.meta[META] = fusion
        for kind, own in (("_forward_pre_hooks", _before_forward), ("_forward_hooks", _after_forward)):
            hooks = source.__dict__[kind]
            kept = []
            for key, hook in hooks.items():
                if is_export_check(hook):
                    module._size_check, hook = hook, _check_sizes
                if hook is not own:
                    kept.append((key, hook))
            module.__dict__[kind] = type(hooks)(kept)
        module.register_forward_pre_hook(_before_forward)
        module.register_forward_hook(_after_forward)
        module._watch()
        return module

    def __repr__(self) -> str:
        return f"FusedGraphModule({_told(self.fusion)})"

    @property
    def fusion(self) -> Fusion:
        """What was fused."""
        fusion: Fusion = self.meta[META]
        return fusion

    def retie(self, arguments: tuple[Any, ...] | None = None, packs: Iterable[Pack] | None = None) -> None:
        """Store packs anew from their parameters' present values, and what is derived from others than before.

        Args:
            arguments: the graph's inputs, for a graph whose parameters come in as inputs (Dynamo).
            packs: which; all by default.

        Raises:
            TieError: a parameter has changed its shape, or the members of a pack disagree in device or dtype.
        """
        with TYING:
            self._retie(arguments, self.fusion.packs if packs is None else packs, fresh=packs is None)

    def _retie(self, arguments: tuple[Any, ...] | None, packs: Iterable[Pack], *, fresh: bool) -> None:
        store = self._modules[STORE]
        assert store is not None
        resolve = self._resolver(arguments)
        for pack in packs:
            if arguments is None and any(isinstance(piece.source, int) for piece in pack.slices):
                continue  # tied at the next call, when the inputs are there
            store._buffers[pack.name] = tie(pack, resolve)
            self._stamps[pack.name] = stamp(pack, resolve)
        for derived in self.fusion.derived:
            present = stamp_derived(derived, resolve)
            if fresh or self._stamps.get(derived.name) != present:
                store._buffers[derived.name] = derive(derived, resolve)
                self._stamps[derived.name] = present
        self._seen = self._look(arguments)
        self._loses_gradients = bool(self._seen) and self._wants_gradients(arguments)

    def _resolver(self, arguments: tuple[Any, ...] | None) -> Callable[[str | int], Tensor]:
        owners = self._owners

        def resolve(source: str | int) -> Tensor:
            if isinstance(source, int):
                assert arguments is not None
                return arguments[source]
            holder, name = owners[source]
            return holder[name]

        return resolve

    def _watch(self) -> None:
        """Remember in which dictionary each packed parameter lives, so that a check per call is cheap."""
        owners: dict[str, tuple[dict[str, Any], str]] = {}
        packed = [source for pack in self.fusion.packs for source in (pack.like, *(p.source for p in pack.slices))]
        others = [source for derived in self.fusion.derived for source in derived.sources]
        for source in (*packed, *others):
            if isinstance(source, str):
                path, _, name = source.rpartition(".")
                module = self.get_submodule(path)
                owners[source] = next(
                    (d, name) for d in (module._parameters, module._buffers, module.__dict__) if name in d
                )
        self._owners = owners
        self._stamps = {}
        slices = [piece for pack in self.fusion.packs for piece in pack.slices]
        places = [owners.get(str(piece.source), (None, piece.source)) for piece in slices]
        trains = [pack.trains for pack in self.fusion.packs for _ in pack.slices]
        derived = [owners[source] for source in others]
        self._places = [*places, *derived]
        self._untrained = [*(place for place, trained in zip(places, trains, strict=True) if not trained), *derived]
        self._copied = [*(place for place, piece in zip(places, slices, strict=True) if not piece.view), *derived]
        self._seen = []
        self._accepted = None
        self._loses_gradients = False

    @staticmethod
    def _present(places: list[tuple[Any, Any]], arguments: Any) -> list[Tensor]:
        return [(arguments if holder is None else holder)[key] for holder, key in places]

    def _wants_gradients(self, arguments: Any) -> bool:
        return any(tensor.requires_grad for tensor in self._present(self._untrained, arguments))

    def _look(self, arguments: Any) -> list[int]:
        """All stamps at once: this runs before every call, so it does nothing else."""
        if arguments is None and any(holder is None for holder, _ in self._places):
            return []
        seen = [tensor.data_ptr() for tensor in self._present(self._places, arguments)]
        return seen + [version(tensor) for tensor in self._present(self._copied, arguments)]

    def check(self, arguments: tuple[Any, ...]) -> None:
        """Tie anew what was moved since the last call; refuse what this graph cannot do.

        Raises:
            TieError: the module is in training mode where it was fused in eval mode, gradients of packed
                parameters are asked for, or a pack cannot be tied any more.
        """
        for name in self.fusion.eval_only:
            if self.get_submodule(name).training:
                raise TieError(
                    f"{name} is in training mode, but the graph was fused in eval mode and has no dropout. "
                    "Call .eval(), or fuse the graph again in training mode."
                )
        if torch.is_grad_enabled() and self._wants_gradients(arguments):
            raise TieError(_NO_GRADIENTS)
        if self._look(arguments) == self._seen:
            return
        with TYING:
            lost = self._follow(arguments)
        if lost:
            warnings.warn(
                f"{len(lost)} pack(s) of a fused graph, {lost[0]} among them, had lost the tie to their parameters "
                "and were stored anew; outputs are right, the call was slow. Was the same model fused another way, "
                "or was param.data replaced?",
                stacklevel=2,
            )

    def _follow(self, arguments: tuple[Any, ...]) -> list[str]:
        """Tie anew what was moved or changed; the names of the packs that had lost their ties."""
        resolve = self._resolver(arguments)
        moved, stale = [], []
        for pack in self.fusion.packs:
            known, present = self._stamps.get(pack.name), stamp(pack, resolve)
            if known is None or known.places != present.places:
                moved.append(pack)
            elif known.versions != present.versions:
                stale.append(pack)
        lost = [pack.name for pack in moved if pack.name in self._stamps]
        self.retie(arguments, moved + stale)
        return lost

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedGraphModule:
        """`.to()`, `.half()`, `.cuda()`, …: convert the parameters, then tie them; packs are never converted."""
        store = self._modules.pop(STORE)
        try:
            super()._apply(fn, recurse)
        finally:
            self._modules[STORE] = store
        self.retie()  # not where it failed half-way: the next call notices, and this error is the one to tell
        return self

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As `torch.nn.Module.load_state_dict`; with ``assign=True`` the new tensors become views of the packs."""
        try:
            return super().load_state_dict(*args, **kwargs)
        finally:
            self.retie()

    def __deepcopy__(self, memo: dict[int, Any]) -> FusedGraphModule:
        store = self._modules[STORE]
        assert store is not None
        for packed in store._buffers.values():
            memo[id(packed)] = torch.empty(0)  # the copy makes its own from its own parameters
        plain = super().__deepcopy__(memo)
        return _revive(plain, self.fusion)

    def __reduce__(self) -> tuple[Any, ...]:
        rebuild, (body, imports) = super().__reduce__()
        body = {key: value for key, value in body.items() if key not in _WATCH}
        body["meta"] = {key: value for key, value in self.meta.items() if key != META}
        body["_modules"] = {**self._modules, STORE: _empty_store(self.fusion)}  # made anew of the parameters
        return _unpickle, (rebuild, body, imports, self.fusion)


_WATCH = ("_owners", "_stamps", "_places", "_untrained", "_copied", "_seen", "_accepted", "_loses_gradients")
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_OWN = ("_modules", "_graph", "_code", "_lineno_map", "_prologue_start", *_HOOKS, *_WATCH)


_NO_GRADIENTS = (
    "parameters packed in this graph require gradients, and it was fused without: it has none to give. Call it under "
    "torch.no_grad(), call requires_grad_(False) on the model, or fuse the graph again now that they do (of an "
    "ExportedProgram its module())."
)


def _empty_store(fusion: Fusion) -> nn.Module:
    store = nn.Module()
    for name in [*(pack.name for pack in fusion.packs), *(derived.name for derived in fusion.derived)]:
        store.register_buffer(name, torch.empty(0), persistent=False)
    return store


def _before_forward(module: FusedGraphModule, arguments: tuple[Any, ...]) -> None:
    if not torch.compiler.is_compiling():
        module.check(arguments)
    elif torch.is_grad_enabled() and module._loses_gradients:
        # Under a compiler the packs are inputs like any other, and `retie` keeps them right after .to() and the like;
        # only what would be missing without a word is asked for.
        raise TieError(_NO_GRADIENTS)  # pragma: no cover: Dynamo reads this line instead of Python


def _check_sizes(module: FusedGraphModule, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
    """torch.export's own check of sizes, as slow as a layer: not once more for sizes that it has accepted."""
    if torch.compiler.is_compiling():
        module._size_check(module, arguments, named)
        return
    values = (*arguments, *named.values())
    plain = all(type(value) is Tensor for value in values)
    sizes = [*named, *(value.shape for value in values)] if plain else None
    if sizes is None or sizes != module._accepted:
        module._size_check(module, arguments, named)
        module._accepted = sizes


def _after_forward(module: FusedGraphModule, arguments: tuple[Any, ...], outputs: Any) -> None:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        tensors = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
        guard_backward(tensors, module._present(module._untrained, arguments))


def _revive(plain: fx.GraphModule, fusion: Fusion) -> FusedGraphModule:
    module = FusedGraphModule.of(plain, plain.graph, fusion)
    module.retie()
    return module


def _unpickle(
    rebuild: Callable[..., fx.GraphModule], body: dict[str, Any], imports: str, fusion: Fusion
) -> FusedGraphModule:
    tracer: Any = body.get("_tracer_cls") or fx.Tracer
    # torch traces the code anew, and what is computed of buffers alone it computes then and there: of packs that are
    # still empty. Here they are traced, too.
    whole = type(tracer.__name__, (tracer,), {"proxy_buffer_attributes": True})
    plain = rebuild({**body, "_tracer_cls": whole}, imports)
    plain._tracer_cls = plain.graph._tracer_cls = tracer
    return _revive(plain, fusion)


class FusedExportedProgram(ExportedProgram):
    """A `torch.export.ExportedProgram` whose `module()` is a `FusedGraphModule`.

    Its `state_dict` is the one of the program it was made from, and the packs that the parameters are views of: so
    `torch.export.save` writes each weight once, and `torch.export.load` holds it once.
    """

    def __repr__(self) -> str:
        return f"FusedExportedProgram({_told(self.graph_module.meta[META])})"

    def store(self) -> FusedExportedProgram:
        """Store the packs that are not, and make the parameters views of them.

        Returns:
            the program itself.

        Raises:
            TieError: see `tie`.
        """
        # Packs stand where the parameters are that are views of them: `torch.export.save` writes each dictionary's
        # memory once.
        for target, pack in self.packs().items():
            if self.state_dict[target].is_meta:
                self.state_dict[target] = tie(pack, self.resolve)
        return self

    def packs(self) -> dict[str, Pack]:
        """The packs, by their names in the state dict."""
        fusion: Fusion = self.graph_module.meta[META]
        return {f"{STORE}.{pack.name}": pack for pack in fusion.packs}

    def resolve(self, source: str | int) -> Tensor:
        """A parameter, buffer or constant that a pack is made of."""
        found = self.state_dict.get(str(source), self.constants.get(str(source)))
        assert isinstance(found, Tensor)
        return found

    def module(self, check_guards: bool = True) -> fx.GraphModule:
        """As `ExportedProgram.module`, with packs that stay tied to the parameters."""
        plain = super().module(check_guards)
        return _revive(plain, plain.meta[META])

    def run_decompositions(self, *args: Any, **kwargs: Any) -> ExportedProgram:
        """As `ExportedProgram.run_decompositions`: a program in which the packs are buffers like others."""
        plain = ExportedProgram.__new__(ExportedProgram)
        plain.__dict__.update(self.__dict__)
        return plain.run_decompositions(*args, **kwargs)


def fusion_of(program: fx.GraphModule | ExportedProgram) -> Fusion | None:
    """The `Fusion` of a fused program; None for any other."""
    module = program.graph_module if isinstance(program, ExportedProgram) else program
    found = getattr(module, "meta", {}).get(META)
    return found if isinstance(found, Fusion) else None


def _told(fusion: Fusion) -> str:
    return f"{fusion.report.summary}; flora_fx.report() tells all"
