"""Times alone, one section after the other, in order of worth; what could be done before was done by ``prepare``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from flora_fx.measuring.method import bandwidth

from ..contenders.settings import Settings
from ..generation import loops as generation_loops
from ..generation.loops import Job, loops, related
from ..generation.swaps import Swaps, swap
from ..latency import goals, latency
from ..training import training
from .folder import Folder
from .jobs import decoder_jobs, torch_job
from .phase import Phase
from .plan import Plan
from .preparing import EXPORT, REFERENCES, SWAPS
from .preparing import PHASE as PREPARE
from .section import Section

__all__ = ["PHASE", "TUNED"]

Results = Iterator[dict[str, Any]]

TUNED = (("ep.cuda.enable_gemm_auto_tune", "1"),)
"""ONNX Runtime's kernels for few rows, chosen by trying them; off by default."""

_OPERATORS = ("fused (custom ops)", "base (genai)", "PEFT (genai)", "fused")
"""First of all: the operators of ``flora_ort`` beside what they are to beat, and beside ONNX Runtime's own."""


def _sections(asked: Plan) -> list[Section]:
    dtypes = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
    onnx = f"{asked.name}-{dtypes[asked.onnx.dtype]}"
    forms = f"{asked.name}-{dtypes[asked.torch.dtype]}"
    operators = f"decoder-{onnx}-operators"
    return [
        Section("operators", _operators, 60, True, operators),
        Section("operators, tuned", partial(_operators, entries=TUNED), 60, True, f"{operators}-tuned-gemms"),
        Section(
            "operators, not early", partial(_operators, early=False), 60, True, f"{operators}-without-early-launches"
        ),
        Section("decoder", _decoder, 120, needs_provider=True, record=f"decoder-{onnx}"),
        Section("latency", partial(_latency, asked.runner, asked.forms), 120, record=f"latency-{forms}"),
        Section("decoder, tuned", partial(_decoder, entries=TUNED), 100, True, f"decoder-{onnx}-tuned"),
        Section("generation", _generation, 75, needs_provider=True, record=f"generation-{onnx}"),
        Section("training", _training, 75, record=f"training-{forms}"),
        Section("latency, eager", partial(_latency, "eager", asked.eager), 60, record=f"latency-{forms}-eager"),
    ]


def _finish(asked: Plan, place: Folder) -> None:
    """What is asked of the exported decoder, beside what was measured."""
    for section in _sections(asked):
        result = place.found(PHASE.name, section.name)
        if result is not None and section.record.startswith("decoder"):
            for sheet in goals.sheets(result):
                print(f"{section.name}: {sheet.markdown()}", flush=True)


PHASE = Phase("measure", _sections, 6, finish=_finish)


def _setup(settings: Settings) -> dict[str, Any]:
    return {"settings": asdict(settings) | {"layers": settings.depth}}


def _quiet(done: int, total: int) -> None:
    """Nobody watches."""


def _turns(asked: Plan, settings: Settings, reference: str) -> dict[str, Any]:
    """What `latency_view` wants to know beside the rows."""
    return {
        **_setup(settings),
        "new": asked.new,
        "rounds": asked.passes,
        "processes": 1,
        "reference": reference,
        "bandwidth": bandwidth(settings.device, dtype=settings.torch_dtype),
        "rows": [],
    }


def _decoder(asked: Plan, place: Folder, entries: Sequence[tuple[str, str]] = ()) -> Results:
    """All exports in turns, with a prompt of each length."""
    found = {name: place.found(PREPARE.name, EXPORT.format(name)) for name in asked.graphs}
    graphs = {name: Path(one["folder"]) if one else "it was not exported" for name, one in found.items()}
    result = _turns(asked, asked.onnx, asked.reference) | {"entries": dict(entries)}
    jobs = decoder_jobs(asked, place, graphs, entries)
    for job, group in zip(jobs, latency.samples(jobs, 0, _quiet), strict=True):
        rows = latency.rows([group], job, result["bandwidth"])
        nodes = {name: {"nodes": one["nodes"]} for name, one in found.items() if one}
        result["rows"] += [row | nodes.get(row["variant"], {}) for row in rows]
        yield result


def _operators(asked: Plan, place: Folder, entries: Sequence[tuple[str, str]] = (), *, early: bool = True) -> Results:
    """The operators' graph alone with its peers; each of their kernels launched as the one before ends, or after it."""
    os.environ["FLORA_ORT_EARLY"] = str(int(early))
    graphs = tuple(name for name in _OPERATORS if name in asked.graphs)
    yield from _decoder(replace(asked, graphs=graphs, reference="base (genai)"), place, entries)


def _latency(runner: str, contenders: tuple[str, ...], asked: Plan, place: Folder) -> Results:
    """PyTorch's forms in turns; what is compiled a second time without guards."""
    result = _turns(asked, asked.torch, "base")
    job = torch_job(asked, place, runner, contenders)
    jobs = [job] if runner == "eager" else [job, replace(job, guards=False)]
    for one, group in zip(jobs, latency.samples(jobs, 0, _quiet), strict=True):
        result["rows"] += latency.rows([group], one, result["bandwidth"])
        yield result | {"caches": _caches()}


def _training(asked: Plan, place: Folder) -> Results:
    """Steps in turns, and the peak of memory."""
    rows = training.sample(
        asked.torch, asked.steps, asked.sequence, _quiet, variants=asked.training, kept=place.references
    )
    yield {
        **_setup(asked.torch),
        "sequence": asked.sequence,
        "rounds": asked.steps,
        "rows": rows,
        "caches": _caches(),
    }


def _caches() -> dict[str, int]:
    """How often something compiled was found in a cache, and how often not."""
    counted = torch._dynamo.utils.counters
    return {
        name: times
        for kind in ("inductor", "aot_autograd")
        for name, times in counted[kind].items()
        if name.startswith(("fxgraph_cache_", "autograd_cache_"))
    }


def _generation(asked: Plan, place: Folder) -> Results:
    """Our loop beside onnxruntime-genai's; what of a token is our Python; swaps of the adapter."""

    def job(name: str) -> Job:
        found = place.found(PREPARE.name, EXPORT.format(name))
        if found is None:
            raise RuntimeError(f"{name} was not exported")
        return Job(asked.onnx, Path(found["folder"]), asked.prompts[0], asked.new, asked.passes)

    def swaps() -> dict[str, Any]:
        what = (place.found(PREPARE.name, REFERENCES) or {}).get(SWAPS)
        if what is None:
            raise RuntimeError("its adapters were not prepared")
        adapters = tuple(Path(adapter) for adapter in what["adapters"])
        return swap(
            job("fused (hot swap)"), Swaps(adapters, what["prompt"], tuple(what["expected"]), what["count"]), _quiet
        )

    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "loops": lambda: related([loops(job(asked.loops), 0, _quiet)]),
        "python": lambda: generation_loops.python(job(asked.loops), _quiet),
        "swaps": swaps,
    }
    result = {**_setup(asked.onnx), "prompt": asked.prompts[0], "new": asked.new, "rounds": asked.passes}
    result |= {"processes": 1, **{name: {"refused": "no time was left"} for name in parts}}
    for name, work in parts.items():
        try:
            result[name] = work()
        except Exception as error:  # onnxruntime-genai raises errors of all kinds
            result[name] = {"refused": f"{type(error).__name__}: {error}"}
        yield result
