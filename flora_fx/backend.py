"""``torch.compile(model, backend="flora")``: Dynamo's graphs, fused, then compiled by Inductor.

    model (PEFT) ── Dynamo ── graph ── flora_fx ── fused graph ── AOTAutograd, Inductor
                       └ guards: requires_grad, train/eval, active adapters, merged or not; a change compiles anew

Found by its name through the entry point ``torch_dynamo_backends``; nothing of this package has to be imported.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from torch import Tensor, fx

from .compile.checkpointed import bodies
from .compile.lifting import LiftedView, PackedCall
from .config import FuseConfig
from .errors import AdapterError
from .fusing import rewrite
from .internals import compiler, guard_requires_grad, inductor
from .reporting.fusion_report import FusionReport, combined

__all__ = ["INNER", "flora", "last_report"]

log = logging.getLogger(__name__)

INNER = ("inductor", "aot_eager", "eager")
"""What may compile the fused graph; the last two are for debugging."""

_DEFAULTS: dict[str, Any] = {"up": "per_projection"}
"""Other than `FuseConfig`'s: B's stay their own parameters, dense and in place, and no zeros are multiplied (prefill
under Inductor on 2 CPU cores: 1.084 of the base, block-diagonal 1.103)."""

_CHOICES = {field.name for field in fields(FuseConfig)} - {"fold_scale", "allow_cast"}

_last: FusionReport | None = None


def flora(
    graph: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """A backend of `torch.compile` that fuses low-rank adapters, for inference and for training.

    Args:
        graph: from Dynamo.
        example_inputs: from Dynamo.
        mode: of `torch.compile`, for Inductor.
        options: of `torch.compile`: ``"flora.inner"``, one of `INNER`; ``"flora.layout"``, ``"flora.up"``,
            ``"flora.accumulate"``, ``"flora.pack_base"`` as in `flora_fx.FuseConfig`; all others go to Inductor.

    Returns:
        what Dynamo calls instead of the graph.

    Raises:
        ValueError: an unknown option, or Inductor's ``freezing``, under which weights are constants.

    >>> import torch
    >>> class Lora(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.w, self.a, self.b = (torch.nn.Linear(i, o, bias=False) for i, o in [(6, 5), (6, 2), (2, 5)])
    ...     def forward(self, x):
    ...         return self.w(x) + 0.5 * self.b(self.a(x))
    >>> model, x = Lora(), torch.randn(3, 6)
    >>> compiled = torch.compile(model, backend="flora", options={"flora.inner": "aot_eager"})
    >>> torch.testing.assert_close(compiled(x), model(x))
    >>> last_report().fused
    ('b.weight',)
    """
    inner, config, passed = _read(options or {}, example_inputs)
    view = LiftedView(graph, generates=inner == "inductor")
    if view.records:
        guard_requires_grad()
    views = [*bodies(view), view]
    try:
        fusions = [rewrite(part, config) for part in views]
    except AdapterError as error:
        log.warning("compiled without fusing: %s", error)
        return _compiler(inner, mode, passed)(graph, example_inputs)
    report = combined([fusion.report for fusion in fusions])
    _tell(report)
    generates = inner == "inductor" and not any(pack.trains for pack in report.packs)
    compile_ = _compiler(inner, mode, (report.inductor_options if generates else {}) | passed)
    if not report.packs and not report.fused:
        return compile_(graph, example_inputs)
    for part, fusion in zip(views, fusions, strict=True):
        part.finish(fusion)
    kept = view.drop_unread()
    return PackedCall(compile_(graph, view.example_inputs(example_inputs, kept)), report.packs, kept)


def last_report() -> FusionReport | None:
    """What was fused and declined in the last graph with adapters that this backend saw; None before the first one.

    Every report is logged, too, those of graphs without adapters among them: ``TORCH_LOGS="flora_fx"`` shows them.
    """
    return _last


def _tell(report: FusionReport) -> None:
    global _last
    if report.fused or report.declines:
        _last = report
    log.info("%s", report)


def _read(options: Mapping[str, Any], example_inputs: Sequence[Any]) -> tuple[str, FuseConfig, dict[str, Any]]:
    """(what compiles behind, how to fuse, the options of what compiles behind)."""
    own = {name.removeprefix("flora."): value for name, value in options.items() if name.startswith("flora.")}
    passed = {name: value for name, value in options.items() if not name.startswith("flora.")}
    inner = own.pop("inner", "inductor")
    if inner not in INNER:
        raise ValueError(f"option 'flora.inner' is {inner!r}; it must be one of {', '.join(INNER)}")
    for name in own:
        if name not in _CHOICES:
            known = ", ".join(f"flora.{choice}" for choice in ("inner", *sorted(_CHOICES)))
            raise ValueError(f"unknown option 'flora.{name}'; it must be one of {known}")
    if passed.get("freezing"):
        raise ValueError(
            "Inductor's 'freezing' turns weights into constants, and this backend keeps them live. Leave it out, or "
            "capture, fuse and freeze: torch.compile(flora_fx.fuse(flora_fx.capture(model, *inputs)), "
            "options={'freezing': True})."
        )
    if passed and inner != "inductor":
        raise ValueError(f"options {', '.join(sorted(passed))} are Inductor's, and 'flora.inner' is {inner!r}")
    from .passes.plan.choosing import accumulation  # the passes import this package's vocabulary

    form = accumulation(_device(example_inputs) if inner == "inductor" else "cpu")
    return inner, FuseConfig(**(_DEFAULTS | {"accumulate": form} | own)), passed


def _device(inputs: Sequence[Any]) -> str:
    """The kind of device that a graph computes on: one number may be on a CPU."""
    kinds = {value.device.type for value in inputs if isinstance(value, Tensor)}
    return next(iter(kinds - {"cpu"}), "cpu")


def _compiler(inner: str, mode: str | None, options: dict[str, Any]) -> Callable[..., Any]:
    if inner != "inductor":
        return compiler(inner)
    return inductor(mode, options)
