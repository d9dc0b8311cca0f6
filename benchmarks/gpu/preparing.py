"""What the CPU bounds, side by side: it is done before anything is timed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from flora_fx.export.directory.manifest import MANIFEST, read_manifest

from ..contenders.models import Adapted
from ..contenders.onnx_exports import count_nodes, write_graph
from ..contenders.references import known
from ..contenders.torch_contenders import RUNNERS, make_contender
from ..generation.loops import Job
from ..generation.swaps import references
from ..kernels import kernels
from ..latency import latency
from ..show.results import RECORD, save
from ..training import training
from ..training.training import Training
from .folder import Folder
from .jobs import decoder_jobs, torch_job
from .phase import Phase
from .plan import Plan
from .section import Section

__all__ = ["EXPORT", "PHASE", "REFERENCES", "SWAPS"]

Results = Iterator[dict[str, Any]]

EXPORT, REFERENCES = "export {}", "references"
"""Sections whose results the other phase reads."""

SWAPS = "swaps"
"""In those of `REFERENCES`."""

_COUNT = "kernels {}, {}"


def _sections(asked: Plan) -> list[Section]:
    """The longest ones first."""
    forms = [name for name in asked.training if training.VARIANTS[name].way != "eager"]
    counted = [(runner, variant) for runner, variants in asked.counted.items() for variant in variants]
    return [
        *(Section(EXPORT.format(name), partial(_export, name), 280) for name in asked.graphs),
        Section(REFERENCES, _references, 240),
        *(Section(f"compile {name}", partial(_compile, name), 180) for name in asked.forms),
        *(Section(f"compile training {name}", partial(_compile_training, name), 180) for name in forms),
        Section("tests", _tests, 150, needs_provider=True),
        *(Section(_COUNT.format(*which), partial(_count, *which), 120) for which in counted),
    ]


def _finish(asked: Plan, place: Folder) -> None:
    """All counts in one file of record."""
    found = [
        result
        for runner, variants in asked.counted.items()
        for variant in variants
        if (result := place.found(PHASE.name, _COUNT.format(runner, variant))) is not None
    ]
    if found:
        rows = [row for result in found for row in result["rows"]]
        whole = {name: value for name, value in found[0].items() if name != "environment"} | {"rows": rows}
        save(f"gpu-kernels-{asked.name}", whole, place.record, f"python -m benchmarks gpu {PHASE.name}")


PHASE = Phase("prepare", _sections, 5, side_by_side=True, resumes=True, finish=_finish)


def _export(name: str, asked: Plan, place: Folder) -> Results:
    written = write_graph(asked.onnx, name, place.graph(name))
    checked = read_manifest(written, verify=False).check if (written / MANIFEST).exists() else {}
    yield {"folder": str(written), "nodes": sum(count_nodes(written).values()), **(checked or {})}


def _references(asked: Plan, place: Folder) -> Results:
    """What is right, in float64: of the exported decoders, of swaps of their adapter, of PyTorch's forms, of training.

    One after the other: each fills a good part of a GPU's memory.
    """
    found: dict[str, Any] = {}
    jobs = [
        *decoder_jobs(asked, place),
        torch_job(asked, place, asked.runner, asked.forms),
        torch_job(asked, place, "eager", asked.eager),
    ]
    for job in jobs:
        for adapted in _models(job):
            reference = known(job.settings, adapted, *latency.checked_text(job, 0), job.kept)
            about = f"{adapted}, {job.runner}, prompt of {job.prompt}"
            found[about] = {"error": reference.error, "strength": reference.strength}
            yield found
    swapped = Job(asked.onnx, Path(), asked.prompts[0], asked.new, asked.passes)
    what = references(swapped, place.path / "adapters", asked.swaps, lambda done, total: None)
    found[SWAPS] = {**vars(what), "adapters": [str(adapter) for adapter in what.adapters]}
    yield found
    variants = {name: training.VARIANTS[name] for name in asked.training}
    tokens = training.text(asked.torch, asked.sequence)
    for adapted, one in training.references(asked.torch, tokens, variants, place.references).items():
        found[f"training {adapted}"] = {"allowed": one.allowed, "allowed_loss": one.allowed_loss}
    yield found


def _models(job: latency.Job) -> list[Adapted]:
    """Whose logits a check needs."""
    return sorted({"base", "peft", *(job.models[name] for name in job.contenders)})


def _compile(name: str, asked: Plan, place: Folder) -> Results:
    job = torch_job(asked, place, asked.runner, (name,))
    prompt, _ = latency.checked_text(job, 0)
    make_contender(RUNNERS[asked.runner][name], asked.torch, prompt, job.prompt + job.new)
    yield {}


def _compile_training(name: str, asked: Plan, place: Folder) -> Results:
    Training(training.VARIANTS[name], asked.torch, training.text(asked.torch, asked.sequence)).step()
    yield {}


def _count(runner: str, variant: str, asked: Plan, place: Folder) -> Results:
    yield kernels.measure(asked.kernels, runners=[runner], variants=[variant], prompt=asked.torch_prompt)


def _tests(asked: Plan, place: Folder) -> Results:
    """The GPU's tests, in a process of pytest.

    Raises:
        RuntimeError: one of them failed.
    """
    report = place.path / "tests.xml"
    report.unlink(missing_ok=True)
    options = ["-q", "-p", "no:cacheprovider", f"--junitxml={report}", *asked.tests]
    line = [sys.executable, "-m", "pytest", *options, "tests/gpu"]
    ended = subprocess.run(line, cwd=RECORD.parent.parent, check=False)
    if not report.exists():
        raise RuntimeError(f"pytest ended with {ended.returncode} and left no report")
    cases = [*ElementTree.parse(report).iter("testcase")]
    failed = [case.get("name") for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    yield {"tests": len(cases), "skipped": skipped, "failed": failed}
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(cases)} tests failed: {', '.join(map(str, failed))}")
