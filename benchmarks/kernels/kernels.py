"""GEMMs and kernel launches per decoder layer of each runner: counted, not timed.

The count of a layer is the difference between a model of three layers and one of two, so that embedding, head and masks
are out of it. What the whole model launches follows from it: the layers are alike.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from flora_fx import FuseConfig
from flora_fx.errors import AdapterError, MissingExtraError

from ..contenders import ffba
from ..contenders.models import ffba_of, make_model, outline, targets_of
from ..contenders.settings import Settings
from ..contenders.step import CachedStep, empty_cache
from ..contenders.torch_contenders import RUNNERS as FORMS
from ..contenders.torch_contenders import Form, available, built
from ..measure.isolated import Progress
from ..show.sheet import Sheet
from .launches import Count, cuda_launches, device_kernels, dispatched, generated, graph_nodes, onnx_nodes

__all__ = ["RUNNERS", "measure", "sheets"]

DEPTHS = (2, 3)


@dataclass(frozen=True)
class Runner:
    """How PyTorch runs a step, and what is counted of it.

    Attributes:
        count: counts one call, given what is called and its inputs.
        variants: what is run, by the name that is shown.
        devices: where it applies.
        weights: whether what is counted takes weights, or their shapes alone.
    """

    count: Callable[[Callable[..., Tensor], tuple[Tensor, ...]], Count]
    variants: Mapping[str, Form]
    devices: tuple[str, ...] = ("cpu", "cuda")
    weights: bool = True


def _nodes(graph: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Count:
    assert isinstance(graph, fx.GraphModule)
    return graph_nodes(graph)


def _call(
    count: Callable[[Callable[[], object]], Count],
) -> Callable[[Callable[..., Tensor], tuple[Tensor, ...]], Count]:
    return lambda step, inputs: count(partial(step, *inputs))


_EACH = ("base", "PEFT", "fused", "FFBA block", "FFBA block (fused)", "FFBA shared", "FFBA shared (fused)")
_BACKEND = ("fused (flora backend)", "FFBA block (flora backend)", "FFBA shared (flora backend)")

_EAGER = {name: FORMS["eager"][name] for name in _EACH}
_CAPTURED = {name: replace(form, captured=True) for name, form in _EAGER.items()}
_COMPILED = {name: FORMS["inductor"][name] for name in (*_EACH, *_BACKEND)}
_ON_CUDA = {
    **{name: FORMS["inductor"][name] for name in ("base", "PEFT", "FFBA block", "FFBA shared", *_BACKEND)},
    "base (packed)": Form("base", "inductor", captured=True, fuse=FuseConfig(pack_base=True)),
}

RUNNERS: dict[str, Runner] = {
    "graph": Runner(_nodes, _CAPTURED),
    "eager": Runner(_call(dispatched), _EAGER),
    "inductor": Runner(_call(generated), _COMPILED),
    "eager-profiled": Runner(_call(device_kernels), _EAGER, ("cuda",)),
    "cuda-code": Runner(_call(cuda_launches), _ON_CUDA, weights=False),
    "inductor-profiled": Runner(_call(device_kernels), _COMPILED, ("cuda",)),
}
"""``graph``: nodes as captured; ``eager``: operators that are dispatched; ``inductor``: calls in the generated code;
``cuda-code``: calls in the code that would be generated for a GPU; ``-profiled``: kernels that the GPU ran."""


def measure(
    settings: Settings,
    *,
    runners: Sequence[str] = (*RUNNERS, "onnxruntime"),
    variants: Sequence[str] = (),
    prompt: int = 128,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """Count what base, PEFT, FFBA and what is fused of them launch per decoder layer, in prefill and in decode.

    Args:
        settings: model and device.
        runners: keys of `RUNNERS`, or ``onnxruntime``. Those that profile a GPU are left out without one.
        variants: names of PyTorch's to count; empty for all.
        prompt: length, in tokens.
        progress: called with the counts done and in all.

    Returns:
        ``{"settings", "prompt", "rows"}``. A row has ``runner``, ``phase``, ``variant``, ``per_layer`` and ``total``
        (counts by kind, see `launches`; the latter at the settings' depth), ``names`` (per layer, by name), and FFBA's
        ``ffba``, placement and rank. One that could not be counted has ``unavailable``, the reason, instead.
    """
    torch_runners = {name: RUNNERS[name] for name in runners if name in RUNNERS}
    todo = [
        (name, runner, phase, variant)
        for name, runner in torch_runners.items()
        if settings.device in runner.devices
        for phase in ("prefill", "decode")
        for variant, form in runner.variants.items()
        if available(form, settings.device) and (variant in variants or not variants)
    ]
    total = len(todo) + len(DEPTHS) * ("onnxruntime" in runners)
    rows = []
    for done, (name, runner, phase, variant) in enumerate(todo):
        row: dict[str, Any] = {"runner": name, "phase": phase, "variant": variant}
        try:
            counts = [_count(runner, variant, phase, replace(settings, layers=depth), prompt) for depth in DEPTHS]
            row |= ffba_of(settings, runner.variants[variant].adapted) | _row(counts, settings.depth)
        except (AdapterError, MissingExtraError) as error:  # a LoRA's few parameters buy no rank of another adapter
            row["unavailable"] = str(error)
        rows.append(row)
        progress(done + 1, total)
    if "onnxruntime" in runners:
        rows += _onnx_rows(settings, lambda done: progress(len(todo) + done, total))
    setup = asdict(settings) | {"layers": settings.depth, "targets": targets_of(settings)}
    return {"settings": setup, "prompt": prompt, "rows": rows}


@torch.no_grad()
def _count(runner: Runner, variant: str, phase: str, settings: Settings, prompt: int) -> Count:
    form = runner.variants[variant]
    length, past = (prompt, 0) if phase == "prefill" else (1, prompt)
    device = settings.device if runner.weights else "meta"
    inputs = (
        torch.zeros(settings.batch, length, dtype=torch.int64, device=device),
        torch.tensor(past, device=device),
        *(tensor.to(device) for tensor in empty_cache(settings, prompt + 1)),
    )
    model = (make_model if runner.weights else outline)(settings, form.adapted)
    step = built(form, CachedStep(model).eval(), *inputs)
    try:
        return runner.count(step, inputs)
    finally:
        torch._dynamo.reset()


def _row(counts: Sequence[Count], depth: int) -> dict[str, Any]:
    """The counts at `DEPTHS` as a layer's and as a model's."""
    shallow, deep = counts
    layer = Counter({key: deep[key] - shallow[key] for key in {**shallow, **deep} if deep[key] != shallow[key]})
    model = Counter(shallow)
    for key, times in layer.items():
        model[key] += (depth - DEPTHS[0]) * times
    names: Counter[str] = Counter()
    for (_, name), times in layer.items():
        names[name] += times
    return {"per_layer": _kinds(layer), "total": _kinds(model), "names": dict(names.most_common())}


def _kinds(count: Count) -> dict[str, int]:
    found: Counter[str] = Counter()
    for (kind, _), times in count.items():
        found[kind] += times
    return {kind: found[kind] for kind in KINDS if found[kind]}


KINDS = {
    "gemm": "GEMMs",
    "elementwise": "elementwise",
    "generated": "generated",
    "other": "other",
    "launch": "launches",
}


def _onnx_rows(settings: Settings, progress: Callable[[int], None]) -> Iterator[dict[str, Any]]:
    """Nodes of the exported decode graphs, ours and the peers'."""
    from ..contenders.onnx_exports import GRAPHS, count_nodes, write_graphs

    counts: list[dict[str, Count | str]] = []
    for depth in DEPTHS:
        with tempfile.TemporaryDirectory() as place:
            graphs = write_graphs(replace(settings, layers=depth), Path(place))
            counts.append(
                {
                    name: graph if isinstance(graph, str) else onnx_nodes(count_nodes(graph))
                    for name, graph in graphs.items()
                }
            )
        progress(len(counts))
    for name in counts[0]:
        row = {"runner": "onnxruntime", "phase": "decode", "variant": name}
        found = [count[name] for count in counts]
        reason = next((count for count in found if isinstance(count, str)), None)
        exact = [count for count in found if not isinstance(count, str)]
        if reason is not None:
            yield row | {"unavailable": reason}
        else:
            yield row | ffba_of(settings, GRAPHS[name]) | _row(exact, settings.depth)


def sheets(result: Mapping[str, Any]) -> list[Sheet]:
    """One sheet per runner and phase: launches per decoder layer, and of the whole model."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in result["rows"]:
        groups.setdefault((row["runner"], row["phase"]), []).append(row)
    return [_sheet(*key, rows, result["settings"]) for key, rows in groups.items()]


_REASONS = {
    "gpt2": "GPT-2 rotates nothing: the sum that q, k and v read is a kernel of its own. Its base has them in one "
    "projection already, so there is nothing to save.",
    "qwen3-0.6b": "Qwen3 normalizes q and k before it rotates them: each is written once more in between.",
}
"""Why the backend launches more than the packed base, by shape."""


def _sheet(runner: str, phase: str, rows: Sequence[Mapping[str, Any]], setup: Mapping[str, Any]) -> Sheet:
    depth = setup["layers"]
    counted = [row for row in rows if "unavailable" not in row]
    kinds = [kind for kind in KINDS if any(kind in row["total"] for row in counted)]
    body = []
    for row in rows:
        if "unavailable" in row:
            body.append([row["variant"], "not available"])
            continue
        layer, model = row["per_layer"], row["total"]
        cells = [str(layer.get(kind, 0)) for kind in kinds]
        body.append([row["variant"], *cells, str(_all(layer)), str(_all(model))])
    header = ["", *(KINDS[kind] for kind in kinds), "all", f"all, {depth} layers"]
    notes = [f"{row['variant']}: {row['unavailable']}" for row in rows if "unavailable" in row]
    notes += ffba.note(rows)
    if runner == "cuda-code" and setup["shape"] in _REASONS:
        notes.append(_REASONS[setup["shape"]])
    return Sheet(f"{runner}, {phase}: per decoder layer", header, body, notes)


def _all(kinds: Mapping[str, int]) -> int:
    """Kernels; the runtime calls that launch them are not counted again."""
    return sum(times for kind, times in kinds.items() if kind != "launch")
