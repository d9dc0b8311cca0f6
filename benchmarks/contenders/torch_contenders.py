"""The forms of the model in PyTorch: live, captured, fused; eager, compiled, as CUDA graphs."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import torch
from torch import Tensor, nn

import flora_fx
from flora_fx import FuseConfig
from flora_fx.backend import flora
from flora_fx.config import Accumulate
from flora_fx.passes.plan.choosing import accumulation

from .models import PLACEMENTS, Adapted, make_model
from .settings import Settings
from .step import CachedStep, empty_cache

__all__ = ["LIVE", "RUNNERS", "Form", "TorchContender", "available", "built", "cache_of", "make_contender"]

Way = Literal["eager", "inductor", "freezing", "reduce-overhead", "flora", "flora, reduce-overhead", "aot-inductor"]


@dataclass(frozen=True)
class Form:
    """How one contender comes about.

    Attributes:
        adapted: which model.
        way: op by op, compiled with defaults, with Inductor's ``freezing``, with CUDA graphs, by our backend, without
            CUDA graphs or with them, or by AOTInductor into a library.
        captured: as a graph from `flora_fx.capture`; otherwise the live model.
        fuse: how the captured graph is fused; None leaves it as it is, and ``"chosen"`` is what Inductor is fastest
            with on the device.
        accumulate: the form of up-projections that our backend is asked for; None for its own choice.
    """

    adapted: Adapted
    way: Way
    captured: bool = False
    fuse: FuseConfig | Literal["chosen"] | None = None
    accumulate: Accumulate | None = None

    def config(self, device: str) -> FuseConfig | None:
        """How the captured graph is fused on a device."""
        if self.fuse != "chosen":
            return self.fuse
        # A product with zeros costs what it weighs.
        return FuseConfig(up="per_projection", accumulate=accumulation(device))


def _forms(way: Way, fuse: FuseConfig | Literal["chosen"] = "chosen") -> dict[str, Form]:
    return {
        "base": Form("base", way),
        "base (captured)": Form("base", way, captured=True),
        "merged": Form("merged", way),
        "PEFT": Form("peft", way),
        "PEFT (captured)": Form("peft", way, captured=True),
        "fused": Form("peft", way, captured=True, fuse=fuse),
        **{f"FFBA {place}": Form(adapted, way) for adapted, place in PLACEMENTS.items()},
        **{f"FFBA {place} (fused)": Form(a, way, captured=True, fuse=fuse) for a, place in PLACEMENTS.items()},
    }


def _backend_forms() -> dict[str, Form]:
    """Our backend with every form of the up-projections, beside the live base and the live PEFT model."""
    forms = {"base": Form("base", "inductor"), "PEFT": Form("peft", "inductor")}
    return forms | {f"backend: {form}": Form("peft", "flora", accumulate=form) for form in get_args(Accumulate)}


def _all_forms(way: Way) -> dict[str, Form]:
    """Every form of a fused graph beside the captured base and the captured PEFT model."""
    forms = {"base": Form("base", way, captured=True), "PEFT": Form("peft", way, captured=True)}
    for layout, up, accumulate in itertools.product(*(get_args(get_type_hints(FuseConfig)[f]) for f in _CHOICES)):
        config = FuseConfig(layout=layout, up=up, accumulate=accumulate)
        forms[f"fused: {layout}, {up}, {accumulate}"] = Form("peft", way, captured=True, fuse=config)
    return forms


_CHOICES = ("layout", "up", "accumulate")
_UNROLLED = FuseConfig(up="per_projection", accumulate="unrolled")

RUNNERS: dict[str, dict[str, Form]] = {
    "eager": _forms("eager", FuseConfig()),
    "inductor": {
        **_forms("inductor"),
        "fused (flora backend)": Form("peft", "flora"),
        **{f"FFBA {place} (flora backend)": Form(adapted, "flora") for adapted, place in PLACEMENTS.items()},
        "base (freezing)": Form("base", "freezing"),
        "PEFT (freezing)": Form("peft", "freezing"),
        "fused (freezing)": Form("peft", "freezing", captured=True, fuse="chosen"),
    },
    "reduce-overhead": {
        **_forms("reduce-overhead"),
        "fused (flora backend)": Form("peft", "flora, reduce-overhead"),
    },
    "aot-inductor": {
        "base": Form("base", "aot-inductor", captured=True),
        "PEFT": Form("peft", "aot-inductor", captured=True),
        "fused": Form("peft", "aot-inductor", captured=True, fuse="chosen"),
        "fused (unrolled)": Form("peft", "aot-inductor", captured=True, fuse=_UNROLLED),
    },
    "forms-backend": _backend_forms(),
    "forms-eager": _all_forms("eager"),
    "forms-inductor": _all_forms("inductor"),
}
"""What takes turns under each runner; ``base`` is what ratios are taken to. CUDA graphs need a GPU, and AOTInductor
compiles C++."""

LIVE: dict[str, Form] = {f"{name} (eager)": RUNNERS["eager"][name] for name in ("base", "PEFT")}
"""Live models that may take turns with ONNX Runtime's."""


def available(form: Form, device: str) -> bool:
    """Whether this installation can run a form at all."""
    return form.way not in _CUDA_GRAPHS or device == "cuda"


class TorchContender:
    """One form, ready to generate; implements `Contender`.

    Args:
        prefill: called as ``(tokens, position, *cache)``, as `CachedStep` is.
        decode: the same, for one token.
        cache: see `empty_cache`.
        compiled: whether Dynamo compiled both.

    Attributes:
        guards: whether Dynamo looks at each call whether the model is still as it was compiled.
    """

    note = ""
    guards = True

    def __init__(
        self,
        prefill: Callable[..., Tensor],
        decode: Callable[..., Tensor],
        cache: list[Tensor],
        *,
        compiled: bool,
    ) -> None:
        self._prefill, self._decode, self._cache = prefill, decode, cache
        self._position = torch.zeros((), dtype=torch.int64, device=cache[0].device)
        self.compiled = compiled

    @torch.no_grad()
    def prefill(self, prompt: Tensor) -> Tensor:
        """Start a new sequence: tokens [batch, prompt] -> logits [batch, vocabulary]."""
        torch.compiler.cudagraph_mark_step_begin()
        with self._stance():
            logits = self._prefill(prompt, self._position.zero_(), *self._cache)
        self._position.fill_(prompt.shape[1])
        return logits

    @torch.no_grad()
    def decode(self, token: Tensor) -> Tensor:
        """Go on by one token, [batch, 1] -> logits [batch, vocabulary]."""
        torch.compiler.cudagraph_mark_step_begin()
        with self._stance():
            logits = self._decode(token, self._position, *self._cache)
        self._position.add_(1)
        return logits

    def _stance(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if self.guards else torch.compiler.set_stance(skip_guard_eval_unsafe=True)


def make_contender(form: Form, settings: Settings, prompt: Tensor, capacity: int) -> TorchContender:
    """Build a form with weights of its own and run it once, so that what has to be compiled is.

    Args:
        form: a value of `RUNNERS`.
        settings: model and device.
        prompt: example tokens, [batch, prompt]; graphs are captured for this length.
        capacity: of the KV cache, in tokens.

    Raises:
        torch._dynamo.exc.Unsupported: the model does not compile as one graph.
    """
    step = CachedStep(make_model(settings, form.adapted)).eval()
    cache = cache_of(form, settings, capacity)
    token = prompt[:, :1]
    position = torch.zeros((), dtype=torch.int64, device=prompt.device)
    with torch.no_grad():
        prefill, decode = (built(form, step, tokens, position, *cache) for tokens in (prompt, token))
    contender = TorchContender(prefill, decode, cache, compiled=form.way not in ("eager", "aot-inductor"))
    freezing = torch._inductor.config.patch(freezing=True) if form.way == "freezing" else contextlib.nullcontext()
    with freezing:
        contender.prefill(prompt)
        contender.decode(token)
    return contender


def cache_of(form: Form, settings: Settings, capacity: int) -> list[Tensor]:
    """What `empty_cache` gives; it stays where it is, if a CUDA graph writes in it."""
    cache = empty_cache(settings, capacity)
    if form.way in _CUDA_GRAPHS:
        for tensor in cache:
            torch._dynamo.mark_static_address(tensor)
    return cache


def built(form: Form, module: nn.Module, *inputs: Tensor) -> Callable[..., Tensor]:
    """Any module in a form: live, or captured on example inputs and fused; compiled at its first call.

    Args:
        form: its ``adapted`` is what the module is already.
        module: called as ``module(*inputs)``.
        inputs: an example.
    """
    if form.way == "aot-inductor":
        return _library(form, module, *inputs)
    if not form.captured:
        options = {} if form.accumulate is None else {"flora.accumulate": form.accumulate}
        return _compiled(module, form.way, options)
    graph = flora_fx.capture(module, *inputs)
    if (config := form.config(inputs[0].device.type)) is None:
        return _compiled(graph, form.way)
    fused = flora_fx.fuse(graph, config=config)
    return _compiled(fused, form.way, flora_fx.report(fused).inductor_options)


def _library(form: Form, module: nn.Module, *inputs: Tensor) -> Callable[..., Tensor]:
    """Compiled ahead of time and loaded, as who deploys without Python does; its weights are in it."""
    program = torch.export.export(module, inputs, strict=False)
    options: dict[str, Any] = {}
    if (config := form.config(inputs[0].device.type)) is not None:
        program = flora_fx.fuse(program, config=config)
        options = flora_fx.report(program).inductor_options
    with tempfile.TemporaryDirectory() as place:
        package = torch._inductor.aoti_compile_and_package(
            program, package_path=str(Path(place, "step.pt2")), inductor_configs=options
        )
        loaded: Callable[..., Tensor] = torch._inductor.aoti_load_package(package)
    return loaded


_COMPILE: dict[Way, dict[str, Any]] = {
    "inductor": {"backend": "inductor"},
    "freezing": {"backend": "inductor"},
    "reduce-overhead": {"backend": "inductor", "mode": "reduce-overhead"},
    "flora": {"backend": flora},  # not by its name: that takes an installation
    "flora, reduce-overhead": {"backend": flora, "mode": "reduce-overhead"},
}

_CUDA_GRAPHS = ("reduce-overhead", "flora, reduce-overhead")


def _compiled(step: Callable[..., Tensor], way: Way, options: Mapping[str, Any] | None = None) -> Callable[..., Tensor]:
    if way == "eager":
        return step
    how = _COMPILE[way]
    if options:  # torch.compile takes a mode or options: a mode is options that have a name
        mode = torch._inductor.list_mode_options(how["mode"]) if "mode" in how else {}
        how = {"backend": how["backend"], "options": {**mode, **options}}

    def call(*args: Tensor) -> Tensor:
        return step(*args)

    # A code object of its own: callables that share one share Dynamo's cache and its recompile limit.
    own = types.FunctionType(call.__code__.replace(), call.__globals__, "call", None, call.__closure__)
    compiled: Callable[..., Tensor] = torch.compile(own, fullgraph=True, dynamic=False, **how)
    return compiled
