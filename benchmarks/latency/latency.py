"""TTFT, TPOT and total latency of every form of a model under every runner.

A pass is one generation by every contender: the prompt, then token after token, and all take turns at each of them. So
a pass gives one paired TTFT, one paired total and as many paired TPOTs as there are new tokens. All are fed the same
random tokens: what they would have chosen themselves does not matter, that their logits agree with float64 does.
"""

from __future__ import annotations

import itertools
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flora_fx.errors import AdapterError
from flora_fx.measuring.method import Clock, Timing, bandwidth, difference, paired, take_turns

from ..contenders.contender import Contender
from ..contenders.models import Adapted, ffba_of, weights_of
from ..contenders.references import known
from ..contenders.settings import Settings
from ..contenders.torch_contenders import LIVE, RUNNERS, Form, TorchContender, available, make_contender
from ..measure.compiled import compilations, was_compiled
from ..measure.isolated import Progress, isolated, part
from ..measure.tolerances import verdict
from ..measure.trace import busy, trace

__all__ = ["CHECKED", "METRICS", "Job", "checked_text", "measure", "rows", "sample", "samples"]

CHECKED = 4
"""Tokens after the prompt whose logits are compared."""

METRICS = ("ttft", "tpot", "total")

Samples = dict[str, list[list[float]]]


def measure(
    settings: Settings,
    *,
    runners: Sequence[str] = ("eager", "inductor", "onnxruntime"),
    prompts: Sequence[int] = (128, 1024),
    new: int = 64,
    rounds: int = 30,
    processes: int = 3,
    contenders: Sequence[str] = (),
    reference: str = "base",
    peers: Sequence[str] = (),
    progress: Any = lambda label: lambda done, total: None,
) -> dict[str, Any]:
    """Measure every contender of every runner.

    Args:
        settings: model and device.
        runners: keys of `RUNNERS`, or ``onnxruntime``.
        prompts: lengths, in tokens.
        new: tokens after the prompt.
        rounds: passes in all, over the processes.
        processes: how many times everything is built anew, in a process of its own.
        contenders: names to measure, the reference among them; empty for all of a runner's. ``onnxruntime`` also has
            those of `LIVE`, if they are named.
        reference: the contender that ratios are taken to.
        peers: contenders that ratios are taken to as well.
        progress: makes a progress callback from a label.

    Returns:
        ``{"settings", "reference", "bandwidth", "rows"}`` and more; see `rows`. A runner that fails has one row that
        says why. Rows of ``onnxruntime`` have the ``nodes`` of their graph, too.
    """
    ceiling = bandwidth(settings.device, dtype=settings.torch_dtype)
    result: dict[str, Any] = {
        "settings": asdict(settings) | {"layers": settings.depth},
        "new": new,
        "rounds": rounds,
        "processes": processes,
        "reference": reference,
        "bandwidth": ceiling,
        "rows": [],
    }
    with tempfile.TemporaryDirectory() as place:
        graphs: Mapping[str, Path | str] = {}
        nodes: dict[str, int] = {}
        if "onnxruntime" in runners:
            from ..contenders.onnx_exports import count_nodes, write_graphs

            graphs = write_graphs(settings, Path(place), progress("export to ONNX"), names=contenders)
            written = {name: graph for name, graph in graphs.items() if isinstance(graph, Path)}
            nodes = {name: sum(count_nodes(graph).values()) for name, graph in written.items()}
        for runner, prompt in itertools.product(runners, prompts):
            tick = progress(f"{runner}, prompt of {prompt}")
            passes = max(1, rounds // processes)
            named = (tuple(contenders), reference, tuple(peers))
            job = Job(settings, runner, prompt, new, passes, graphs, *named, kept=Path(place, "references"))
            try:
                groups = [
                    isolated(sample, job, index, threads=settings.threads, progress=part(tick, index, processes))
                    for index in range(processes)
                ]
            except RuntimeError as error:
                result["rows"].append({"runner": runner, "prompt": prompt, "variant": "all", "refused": str(error)})
                continue
            found = rows(groups, job, ceiling)
            if runner == "onnxruntime":
                found = [row | {"nodes": nodes[name]} if (name := row["variant"]) in nodes else row for row in found]
            result["rows"] += found
    return result


@dataclass(frozen=True)
class Job:
    """What one process measures.

    Attributes:
        settings: model and device.
        runner: a key of `RUNNERS`, or ``onnxruntime``.
        prompt: length in tokens.
        new: tokens after it.
        passes: generations that are measured.
        graphs: for ``onnxruntime``, what `write_graphs` returned.
        contenders: which; empty for all.
        reference: the one that ratios are taken to.
        peers: others that they are taken to as well.
        entries: of the configuration of ONNX Runtime's sessions, beside those that all have.
        kept: folder of float64 references, see `references.known`.
        guards: whether Dynamo looks at each call whether the model is still as it was compiled. A server whose models
            do not change may do without: ``torch.compiler.set_stance(skip_guard_eval_unsafe=True)``.
    """

    settings: Settings
    runner: str
    prompt: int
    new: int
    passes: int
    graphs: Mapping[str, Path | str] = field(default_factory=dict)
    contenders: tuple[str, ...] = ()
    reference: str = "base"
    peers: tuple[str, ...] = ()
    entries: tuple[tuple[str, str], ...] = ()
    kept: Path | None = None
    guards: bool = True

    @property
    def label(self) -> str:
        """The runner, in a row."""
        return self.runner if self.guards else f"{self.runner}, guards skipped"

    @property
    def models(self) -> Mapping[str, Adapted]:
        """Which model each contender of the runner is a form of."""
        if self.runner == "onnxruntime":
            from ..contenders.onnx_exports import GRAPHS

            return GRAPHS | {name: form.adapted for name, form in LIVE.items()}
        return {name: form.adapted for name, form in RUNNERS[self.runner].items()}


def sample(job: Job, seed: int, progress: Progress) -> dict[str, Any]:
    """Build the contenders of a runner in an order of this process, check them and let them take turns.

    Returns:
        ``samples``: metric -> contender -> milliseconds, a list of rounds per pass; ``refused``: contender -> why its
        ratios must not be shown; ``unavailable``: contender -> why it could not be built; ``notes``: contender -> what
        readers should know; ``device``: contender -> ``ttft`` and ``tpot`` -> `busy` of one call, on a GPU.
    """
    return next(samples([job], seed, progress))


def samples(jobs: Sequence[Job], seed: int, progress: Progress) -> Iterator[dict[str, Any]]:
    """`sample` of several jobs by the contenders of the first one: ONNX Runtime's serve prompts of any length.

    Where a job skips guards, one before it has compiled all that it needs.
    """
    order = random.Random(seed)
    built = _build(jobs[0], checked_text(jobs[0], seed)[0], order)
    for index, job in enumerate(jobs):
        yield _sample(job, built, seed, order, part(progress, index, len(jobs)))


def _sample(
    job: Job, built: Mapping[str, Contender | str], seed: int, order: random.Random, progress: Progress
) -> dict[str, Any]:
    drawn = torch.Generator().manual_seed(seed)
    prompt, following = _text(job, drawn)
    contenders = {name: found for name, found in built.items() if not isinstance(found, str)}
    for contender in contenders.values():
        if isinstance(contender, TorchContender):
            contender.guards = job.guards
    refused = _disagreements(contenders, job, prompt, following[:CHECKED])
    refused |= _not_compiled(contenders, prompt, following[0])
    compiled_before = compilations()

    clock = Clock(job.settings.device)
    samples: dict[str, Samples] = {metric: {name: [] for name in contenders} for metric in METRICS}
    _generate(contenders, prompt, following, clock, order)  # warms up
    for done in range(job.passes):
        turns = _generate(contenders, *_text(job, drawn), clock, order)
        for name in contenders:
            first, *steps = (turn[name] for turn in turns)
            samples["ttft"][name].append([first])
            samples["tpot"][name].append(steps)
            samples["total"][name].append([first + sum(steps)])
        progress(done + 1, job.passes)
    if compilations() != compiled_before:
        refused |= {name: "something was compiled while the clock ran" for name, c in contenders.items() if c.compiled}
    unavailable = {name: why for name, why in built.items() if isinstance(why, str)}
    notes = {name: contender.note for name, contender in contenders.items() if contender.note}
    device = {name: _on_device(contender, prompt, following[0], job) for name, contender in contenders.items()}
    found = {"samples": samples, "refused": refused, "unavailable": unavailable, "notes": notes}
    return found | ({"device": device} if job.settings.device == "cuda" else {})


def _on_device(contender: Contender, prompt: Tensor, token: Tensor, job: Job) -> dict[str, dict[str, float]]:
    """What the GPU takes of a prompt and of a token; what else a call takes is the host's."""
    if job.settings.device != "cuda":
        return {}
    calls = {"ttft": partial(contender.prefill, prompt), "tpot": partial(contender.decode, token)}
    return {metric: busy(trace(call, "cuda")) for metric, call in calls.items()}


def _text(job: Job, drawn: torch.Generator) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Random tokens: a prompt [batch, prompt], and those after it, [batch, 1] each."""
    size = (job.settings.batch, job.prompt + job.new)
    tokens = torch.randint(job.settings.vocabulary, size, generator=drawn).to(job.settings.device)
    return tokens[:, : job.prompt].contiguous(), tokens[:, job.prompt :].split(1, dim=1)


def checked_text(job: Job, seed: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The prompt and the tokens after it that contenders are checked on."""
    prompt, following = _text(job, torch.Generator().manual_seed(seed))
    return prompt, following[:CHECKED]


def _generate(
    contenders: Mapping[str, Contender],
    prompt: Tensor,
    following: Sequence[Tensor],
    clock: Clock,
    order: random.Random,
) -> list[dict[str, float]]:
    """One generation by all contenders, in turns: milliseconds of the prompt, then of each token."""
    return [
        take_turns({name: partial(c.prefill, prompt) for name, c in contenders.items()}, clock, order),
        *(
            take_turns({name: partial(c.decode, token) for name, c in contenders.items()}, clock, order)
            for token in following
        ),
    ]


def _build(job: Job, prompt: Tensor, order: random.Random) -> Mapping[str, Contender | str]:
    """The contenders by name, or why there is none.

    They are made in any order: who comes first gets other addresses, which alone moves a token by some percent.
    """
    onnx = job.runner == "onnxruntime"
    graphs = job.graphs if onnx else {}
    forms = {
        name: form
        for name, form in (LIVE if onnx else RUNNERS[job.runner]).items()
        if (name in job.contenders or not (job.contenders or onnx)) and available(form, job.settings.device)
    }
    names = [*graphs, *forms]
    built: dict[str, Contender | str] = {}
    for name in order.sample(names, len(names)):
        if name in forms:
            built[name] = _build_one(forms[name], job, prompt)
        else:
            from ..contenders.onnx_contenders import onnx_contenders

            built |= onnx_contenders(job.settings, {name: graphs[name]}, job.new, job.entries)
    return {name: built[name] for name in names}


def _build_one(form: Form, job: Job, prompt: Tensor) -> Contender | str:
    try:
        return make_contender(form, job.settings, prompt, job.prompt + job.new)
    except AdapterError as error:  # the LoRA's few parameters buy no rank of another adapter
        return str(error)


def _kind(name: str) -> str:
    """`` (genai)`` of ``PEFT (genai)``: what ``base`` and ``PEFT`` of its own kind end with."""
    _, opened, way = name.partition(" (")
    return opened + way


@torch.no_grad()
def _disagreements(
    contenders: Mapping[str, Contender], job: Job, prompt: Tensor, following: Sequence[Tensor]
) -> dict[str, str]:
    """Contenders whose logits, of the prompt and of the tokens after it, are not those of their model in float64."""
    models: list[Adapted] = sorted({"base", "peft", *(job.models[name] for name in contenders)})
    expected = {model: known(job.settings, model, prompt, following, job.kept) for model in models}
    for one, other in itertools.combinations(sorted(expected.keys() - {"merged"}), 2):
        least = 4 * max(expected[one].allowed, expected[other].allowed)
        if difference(expected[one].logits[0], expected[other].logits[0]) < least:
            raise RuntimeError(f"the logits of {one} and {other} differ too little for a check to tell them apart")
    found = {}
    for name, contender in contenders.items():
        steps = [_copied(contender.prefill(prompt)), *(_copied(contender.decode(token)) for token in following)]
        if why := verdict(steps, expected[job.models[name]]):
            found[name] = why
    return found


def _copied(logits: Tensor) -> Tensor:
    return logits.to("cpu", copy=True)


def _not_compiled(contenders: Mapping[str, Contender], prompt: Tensor, token: Tensor) -> dict[str, str]:
    return {
        name: "a profile shows that it did not run compiled"
        for name, contender in contenders.items()
        if contender.compiled
        and not all(
            was_compiled(call) for call in (partial(contender.prefill, prompt), partial(contender.decode, token))
        )
    }


def rows(groups: Sequence[Mapping[str, Any]], job: Job, ceiling: float) -> list[dict[str, Any]]:
    """What `sample` found in one or several processes, as one row per contender.

    A row has, per metric (``ttft``, ``tpot``, ``total``), the milliseconds, the ratio to the reference with its
    interval, the same to each peer (``against``), on a GPU what of them is the GPU's (``device``, see `busy`), the
    arithmetic floor of that ratio, the share of PEFT's overhead that is left, the ratio to the base of its own kind
    (``own``: ``base (genai)`` for ``PEFT (genai)``; what is left is among a kind too, if it has a PEFT), and for TPOT
    the fraction of the weight-streaming limit. FFBA's rows have ``ffba``, placement and rank, and what they leave is of
    the overhead of PEFT's LoRA. A contender that was refused has the reason instead; ``note`` is what readers should
    know.
    """
    batch = job.settings.batch
    refused = {name: why for group in groups for name, why in group["refused"].items()}
    unavailable = {name: why for group in groups for name, why in group["unavailable"].items()}
    notes = {name: note for group in groups for name, note in group["notes"].items()}
    found: list[dict[str, Any]] = []

    def related(name: str, metric: str, to: str = job.reference) -> Timing:
        passes = {n: [p for group in groups for p in group["samples"][metric][n]] for n in (name, to)}
        return paired(passes[name], passes[to], processes=len(groups))

    for name in groups[0]["samples"]["ttft"]:
        model = job.models[name]
        weights = weights_of(job.settings, model)
        row: dict[str, Any] = {"runner": job.label, "prompt": job.prompt, "variant": name}
        row |= ffba_of(job.settings, model)
        if name in notes:
            row["note"] = notes[name]
        if why := refused.get(name) or refused.get(job.reference) or unavailable.get(job.reference):
            found.append(row | {"refused": why})
            continue
        for metric in METRICS:
            timing = related(name, metric)
            row[metric] = asdict(timing)
            if metric in (device := groups[0].get("device", {}).get(name, {})):
                row[metric]["device"] = device[metric]
            shown = groups[0]["samples"][metric].keys() - refused.keys()
            if peers := {peer: asdict(related(name, metric, peer)) for peer in job.peers if peer in shown - {name}}:
                row[metric]["against"] = peers
            if (base := f"base{_kind(name)}") in shown - {name, job.reference}:
                row[metric]["own"] = related(name, metric, base).ratio
            if {(peft := f"PEFT{_kind(name)}"), base} - shown:
                peft, base = "PEFT", "base"
            if weights.adapter and name != peft and peft in shown:
                row[metric]["left"] = (related(name, metric, base).ratio - 1) / (related(peft, metric, base).ratio - 1)
        if weights.adapter:
            floors = {"ttft": weights.floor(job.prompt * batch), "tpot": weights.floor(batch)}
            once, each = (related(job.reference, metric).milliseconds for metric in ("ttft", "tpot"))
            parts = {"ttft": once, "tpot": job.new * each}
            floors["total"] = sum(floors[part] * taken for part, taken in parts.items()) / sum(parts.values())
            for metric, floor in floors.items():
                row[metric]["floor"] = floor
        limit = weights.bytes(job.settings.torch_dtype) / ceiling * 1e3
        row["tpot"]["of_streaming_limit"] = limit / row["tpot"]["milliseconds"]
        found.append(row)
    found += [
        {"runner": job.label, "prompt": job.prompt, "variant": n, "refused": why} for n, why in unavailable.items()
    ]
    return found
