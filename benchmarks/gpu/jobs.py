"""What both phases must agree on: the texts that contenders are checked on, and who they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..latency import goals
from ..latency.latency import Job
from .folder import Folder
from .plan import Plan

__all__ = ["decoder_jobs", "torch_job"]


def decoder_jobs(
    asked: Plan, place: Folder, graphs: Mapping[str, Path | str] | None = None, entries: Sequence[tuple[str, str]] = ()
) -> list[Job]:
    """ONNX Runtime's, by prompt length.

    Args:
        asked: the plan.
        place: of the references.
        graphs: by name, a folder, or why there is none.
        entries: of the sessions' configuration.
    """
    peers = tuple(name for name in goals.peers("cuda") if name in asked.graphs and name != asked.reference)
    return [
        Job(
            asked.onnx,
            "onnxruntime",
            prompt,
            asked.new,
            asked.passes,
            graphs or {},
            asked.graphs,
            asked.reference,
            peers,
            tuple(entries),
            place.references,
        )
        for prompt in asked.prompts
    ]


def torch_job(asked: Plan, place: Folder, runner: str, contenders: tuple[str, ...]) -> Job:
    """PyTorch's forms under one runner."""
    return Job(
        asked.torch, runner, asked.torch_prompt, asked.new, asked.passes, contenders=contenders, kept=place.references
    )
