"""What becomes of a model's adapters: captured and fused, compiled by the backend, trained under it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import flora_fx
from flora_fx import CaptureError, FusionReport
from flora_fx.reporting.fusion_report import combined

from .build import Case

__all__ = ["MODES", "Found", "Uncaptured", "backend_reports", "observe"]

MODES = ("captured", "compiled", "trained")


class Uncaptured(Exception):  # noqa: N818 - a finding
    """PEFT or torch refuse the unfused model."""


class Found(NamedTuple):
    """What was done, and how far outputs and gradients are from the unfused model's (relative to the largest)."""

    report: FusionReport | None
    error: float


def observe(case: Case, mode: str) -> Found:
    """Run a case in one of `MODES`.

    Raises:
        Uncaptured: PEFT or torch refuse the unfused model.
    """
    return {"captured": _captured, "compiled": _compiled, "trained": _trained}[mode](case)


def _captured(case: Case) -> Found:
    model = case.model.eval().requires_grad_(False)
    with torch.no_grad():
        expected = _run(model, case)
        try:
            graph = flora_fx.capture(model, *case.args, **case.kwargs)
        except CaptureError as error:
            raise Uncaptured(str(error)) from error
        fused = flora_fx.fuse(graph)
        return Found(flora_fx.report(fused), _distance(_run(fused, case), expected))


def _compiled(case: Case) -> Found:
    model = case.model.eval().requires_grad_(False)
    with torch.no_grad(), backend_reports() as reports:
        expected = _run(model, case)
        compiled = torch.compile(model, backend="flora", options={"flora.inner": "aot_eager"})
        error = _distance(_run(compiled, case), expected)
    return Found(combined(reports) if reports else None, error)


def _trained(case: Case) -> Found:
    model = case.model.train()
    twin = copy.deepcopy(model)
    try:
        expected = _step(twin, twin, case)
    except (RuntimeError, ValueError) as error:
        raise Uncaptured(str(error)) from error
    with backend_reports() as reports:
        compiled = torch.compile(model, backend="flora", options={"flora.inner": "aot_eager"})
        try:
            found = _step(compiled, model, case)
        except Exception as error:
            torch._dynamo.reset()
            again = copy.deepcopy(twin)
            try:
                _step(torch.compile(again, backend="aot_eager"), again, case)
            except Exception as theirs:
                raise Uncaptured(str(theirs)) from error
            raise
    assert found.keys() == expected.keys()
    return Found(combined(reports) if reports else None, max(_distance(found[key], expected[key]) for key in expected))


def _run(call: Any, case: Case) -> Tensor:
    torch.manual_seed(7)  # dropout, sampled adapters
    output = call(*case.args, **case.kwargs)
    return output if isinstance(output, Tensor) else output[0]


def _step(call: Any, model: nn.Module, case: Case) -> dict[str, Tensor]:
    """The output of one step and its gradients, those that are not zero."""
    model.zero_grad()
    output = _run(call, case)
    output.square().sum().backward()
    gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    return {"": output.detach(), **gradients}


def _distance(found: Tensor, expected: Tensor) -> float:
    assert found.dtype == expected.dtype
    return float((found - expected).abs().max() / expected.abs().max())


@contextmanager
def backend_reports() -> Iterator[list[FusionReport]]:
    """The backend's reports of all graphs that Dynamo makes of a model."""
    found: list[FusionReport] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if isinstance(record.args, tuple) and record.args and isinstance(record.args[0], FusionReport):
                found.append(record.args[0])

    logger, handler = logging.getLogger("flora_fx.backend"), Handler()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield found
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
