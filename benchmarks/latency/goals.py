"""What is asked of the exported decoder, beside what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..show.sheet import Sheet
from .view import METRICS, cell

__all__ = ["CONTENDERS", "GOALS", "Goal", "peers", "sheets"]


@dataclass(frozen=True)
class Goal:
    """A ratio of two contenders that must not be larger.

    Attributes:
        contender: whose it is.
        metric: ``ttft`` or ``tpot``.
        to: the contender that it is taken to.
        most: the ratio.
    """

    contender: str
    metric: Literal["ttft", "tpot"]
    to: str
    most: float


GOALS: dict[str, tuple[Goal, ...]] = {
    "cpu": (
        Goal("fused", "tpot", "base (genai)", 1.05),
        Goal("fused", "ttft", "base (genai)", 1.07),
        Goal("fused", "tpot", "PEFT (genai)", 1.0),
        Goal("fused", "ttft", "PEFT (genai)", 1.0),
        Goal("fused", "tpot", "PEFT (transformers, ort_fusions)", 1.0),
        Goal("fused", "ttft", "PEFT (transformers, ort_fusions)", 1.0),
    ),
    "cuda": (
        Goal("fused (custom ops)", "tpot", "base (genai)", 1.0),
        Goal("fused (custom ops)", "ttft", "base (genai)", 1.05),
        Goal("fused", "tpot", "base", 1.03),
        Goal("FFBA block (fused)", "tpot", "base", 1.01),
        Goal("FFBA shared (fused)", "tpot", "base", 1.01),
        Goal("fused", "tpot", "PEFT (genai)", 0.75),
        Goal("FFBA block (fused)", "tpot", "PEFT (genai)", 0.75),
        Goal("fused", "ttft", "PEFT (genai)", 0.82),
        Goal("fused", "ttft", "PEFT (eager)", 0.82),
        Goal("FFBA block (fused)", "ttft", "PEFT (genai)", 0.82),
        Goal("FFBA block (fused)", "ttft", "PEFT (eager)", 0.82),
    ),
}
"""By device."""

NODES = {
    "cpu": {"fused": 100, "fused (hot swap)": 100, "FFBA block (fused)": 64},
    "cuda": {"fused (custom ops)": 48, "fused": 84, "fused (hot swap)": 84, "FFBA block (fused)": 64},
}
"""By device: nodes that the whole graph of `LAYERS` layers may have, with adapters on all projections."""

LAYERS = 4

CONTENDERS = {
    "cpu": (
        *("base", "base (genai)", "fused", "fused (hot swap)"),
        *("PEFT (transformers, ort_fusions)", "PEFT (genai)", "FFBA block (fused)", "FFBA shared (fused)"),
    ),
    "cuda": (
        *("fused (custom ops)", "base", "base (genai)", "base (eager)", "fused", "PEFT (genai)", "PEFT (eager)"),
        *("FFBA block (fused)", "FFBA shared (fused)"),
    ),
}
"""By device: who takes turns."""


def peers(device: str) -> tuple[str, ...]:
    """The contenders that goals are relative to."""
    return tuple(dict.fromkeys(goal.to for goal in GOALS[device]))


def sheets(result: Mapping[str, Any]) -> list[Sheet]:
    """A sheet per prompt length of the decoder suite: goals whose contenders were both measured.

    Args:
        result: of `benchmarks.latency.measure`.
    """
    settings = result["settings"]
    found = []
    for prompt in dict.fromkeys(row["prompt"] for row in result["rows"]):
        rows = {row["variant"]: row for row in result["rows"] if row["prompt"] == prompt and "refused" not in row}
        body = [*_ratios(rows, settings["device"], result["reference"])]
        if settings["layers"] == LAYERS:
            body += _nodes(rows, settings["device"])
        if body:
            found.append(Sheet(f"Goals, prompt of {prompt}", ["", "at most", "measured", "reached"], body))
    return found


def _ratios(rows: Mapping[str, Mapping[str, Any]], device: str, reference: str) -> Iterable[list[str]]:
    for goal in GOALS[device]:
        timing = rows.get(goal.contender, {}).get(goal.metric, {})
        timing = timing if goal.to == reference else timing.get("against", {}).get(goal.to, {})
        if timing:
            verdict = _verdict(timing, goal.most)
            yield [f"{goal.contender}: {METRICS[goal.metric]} × {goal.to}", f"{goal.most:.2f}", cell(timing), verdict]


def _verdict(timing: Mapping[str, float], most: float) -> str:
    """Whether a ratio is small enough.

    >>> _verdict({"ratio": 1.02, "low": 1.0, "high": 1.06}, 1.05)
    'by the median, not by the whole interval'
    """
    if timing["high"] <= most:
        return "yes"
    return "by the median, not by the whole interval" if timing["ratio"] <= most else "no"


def _nodes(rows: Mapping[str, Mapping[str, Any]], device: str) -> Iterable[list[str]]:
    for name, most in NODES[device].items():
        if nodes := rows.get(name, {}).get("nodes"):
            yield [f"{name}: nodes", str(most), str(nodes), "yes" if nodes <= most else "no"]
