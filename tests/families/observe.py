"""What becomes of a family's adapters: captured and fused, or compiled by the backend."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import flora_fx
from flora_fx import CaptureError, FusionReport
from flora_fx.reporting.fusion_report import combined
from tests.variants.observe import Uncaptured, backend_reports

from .adapt import Case, adapters_of

__all__ = ["MODES", "Found", "Uncaptured", "effect", "observe"]

MODES = ("captured", "compiled")


class Found(NamedTuple):
    """What was done, and how far the outputs are from the unfused model's (relative to the largest)."""

    report: FusionReport
    error: float


def observe(case: Case, mode: str) -> Found:
    """Run a case in one of `MODES`.

    Raises:
        Uncaptured: torch.export refuses the unfused model.
    """
    with torch.no_grad():
        return {"captured": _captured, "compiled": _compiled}[mode](case)


def effect(case: Case) -> float:
    """How far the outputs are from those without adapters: what is not fused right would show."""
    without = copy.deepcopy(case.model)
    with torch.no_grad():
        for weight in adapters_of(without).values():
            weight.zero_()
        return _distance(_run(without, case), _run(case.model, case))


def _captured(case: Case) -> Found:
    try:
        graph = flora_fx.capture(case.model, **case.inputs)
    except CaptureError as error:
        raise Uncaptured(str(error)) from error
    fused = flora_fx.fuse(graph)
    return Found(flora_fx.report(fused), flora_fx.verify(case.model, fused, **case.inputs).max_rel)


def _compiled(case: Case) -> Found:
    expected = _run(case.model, case)
    with backend_reports() as reports:
        compiled = torch.compile(case.model, backend="flora", options={"flora.inner": "aot_eager"})
        error = _distance(_run(compiled, case), expected)
    return Found(combined(_once(reports)), error)


def _once(reports: Sequence[FusionReport]) -> list[FusionReport]:
    """Without those that repeat the one before: AOTAutograd had Dynamo begin anew (where floats are scaled)."""
    pairs = zip([None, *reports], reports, strict=False)
    return [report for before, report in pairs if before is None or _met(before) != _met(report)]


def _met(report: FusionReport) -> tuple[object, ...]:
    return report.fused or report, report.ops_before["gemm"]


def _run(call: nn.Module, case: Case) -> Tensor:
    output: Any = call(**case.inputs)
    found: Tensor = output if isinstance(output, Tensor) else output[0]
    return found


def _distance(found: Tensor, expected: Tensor) -> float:
    assert found.dtype == expected.dtype == torch.float64
    return float((found - expected).abs().max() / expected.abs().max())
