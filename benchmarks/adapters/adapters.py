"""Tokens per second of a batch whose rows have adapters of their own, by the number of adapters and of rows.

One point is one process: the contenders of a runtime take turns with a token each, after one prompt. Before they are
timed, what each computes is compared with PEFT's model in float64, row by row with its own adapter.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flora_fx.measuring.bars import PALE, STYLE, require_figures, write
from flora_fx.measuring.method import Timing, compare, difference

from ..contenders.contender import Contender
from ..contenders.settings import Settings
from ..contenders.torch_contenders import available
from ..measure.isolated import Progress, isolated, part
from ..show.sheet import Sheet
from .onnx_contenders import NAMES, OF_ONE, SESSIONS, onnx_contenders, writable, write_exports
from .torch_contenders import FORMS, PEFT, adapted, rows_of, torch_contenders

__all__ = ["ADAPTERS", "BATCHES", "MIDDLE", "RUNNER", "draw", "everyone", "measure", "points", "sample", "sheets"]

ADAPTERS = (1, 2, 4, 8, 16, 32)
BATCHES = (1, 4, 8, 16)
MIDDLE = 8
"""Of both: one is varied while the other is this."""

RUNNER = " (onnxruntime)"
"""Ends the names of the contenders under ONNX Runtime."""

SESSIONS_UP_TO = 8
"""Of sessions that stand beside each other: each holds the base once more."""

FACTOR, FLOOR = 4.0, 1e-6
"""How many times as far from float64 as PEFT's own model in the same dtype, or how far, a contender may be."""


def everyone(device: str) -> tuple[str, ...]:
    """The names of all contenders that there are on a device of this machine, in order."""
    forms = (name for name, form in FORMS.items() if available(form, device))
    return (*forms, *(name + RUNNER for name in writable(device)))


def points(adapters: Sequence[int], batches: Sequence[int], *, grid: bool) -> list[tuple[int, int]]:
    """(adapters, rows) to measure: each with the other's middle, or all.

    >>> points([1, 8], [4, 8], grid=False)
    [(1, 8), (8, 8), (8, 4)]
    """
    if grid:
        return [(count, batch) for batch in batches for count in adapters]
    return list(dict.fromkeys([*((count, MIDDLE) for count in adapters), *((MIDDLE, batch) for batch in batches)]))


def measure(
    settings: Settings,
    *,
    adapters: Sequence[int] = ADAPTERS,
    batches: Sequence[int] = BATCHES,
    grid: bool = False,
    prompt: int = 32,
    rounds: int = 30,
    contenders: Sequence[str] = (),
    progress: Any = lambda label: lambda done, total: None,
) -> dict[str, Any]:
    """Time a token at each point.

    Args:
        settings: model and device; its rank is every adapter's, its batch is not used.
        adapters, batches: see `points`.
        grid: all pairs of them.
        prompt: tokens before those that are timed.
        rounds: tokens of each contender.
        contenders: of `everyone`, PEFT's among them; empty for all.
        progress: makes a progress callback from a label.

    Returns:
        ``{"settings", "prompt", "rounds", "rows"}``. A row has ``adapters``, ``batch``, ``variant`` and either
        ``milliseconds``, ``ratio``, ``low``, ``high`` (to PEFT's), ``tokens_per_second``, or ``refused``, the reason.
    """
    rows: list[dict[str, Any]] = []
    wanted = tuple(contenders) or everyone(settings.device)
    with tempfile.TemporaryDirectory(prefix="flora-adapters-") as place:
        for count, batch in points(adapters, batches, grid=grid):
            asked = (replace(settings, batch=batch), count, prompt, rounds, wanted, Path(place, str(count)))
            label = f"{count} adapters, {batch} rows"
            rows += isolated(sample, *asked, threads=settings.threads, progress=progress(label))
    setup = asdict(settings) | {"layers": settings.depth}
    return {"settings": setup, "prompt": prompt, "rounds": rounds, "rows": rows}


@torch.no_grad()
def sample(
    settings: Settings, count: int, prompt: int, rounds: int, wanted: Sequence[str], place: Path, progress: Progress
) -> list[dict[str, Any]]:
    """The rows of one point, measured in this process; the exports in `place` are written if they are not there."""
    base, model, names = adapted(settings, count)
    drawn = torch.Generator().manual_seed(count)
    tokens = torch.randint(settings.vocabulary, (settings.batch, prompt + 1), generator=drawn).to(settings.device)
    given, token = tokens[:, :-1], tokens[:, -1:]
    room = 2 * rounds + 16
    found: dict[str, Contender] = dict(torch_contenders(settings, base, model, names, given, room, wanted))
    graphs = [name for name in NAMES if name + RUNNER in wanted and (name != SESSIONS or count <= SESSIONS_UP_TO)]
    if not place.exists():
        write_exports(settings, base, model, names, place, graphs)
    exported = onnx_contenders(settings, model, rows_of(settings, names), place, room, graphs)
    found |= {name + RUNNER: contender for name, contender in exported.items()}
    refused = _refused(settings, found, base, model, names, given, token)
    for contender in found.values():
        contender.prefill(given)
    timings = _timed(settings, found, token, rounds, progress)
    rows = []
    for name, timing in timings.items():
        told: dict[str, Any] = asdict(timing) | {"tokens_per_second": 1000 * settings.batch / timing.milliseconds}
        told = {"refused": refused[name]} if name in refused else told
        rows.append({"adapters": count, "batch": settings.batch, "variant": name} | told)
    return rows


def _timed(
    settings: Settings, found: Mapping[str, Contender], token: Tensor, rounds: int, progress: Progress
) -> dict[str, Timing]:
    """PyTorch's contenders in turns; then ONNX Runtime's, and PEFT's among them for its ratio.

    PyTorch's threads wait actively for milliseconds after a call, on cores that who comes next wants: a session of ONNX
    Runtime took 60% more behind one of PyTorch's contenders than behind another session (2 cores).
    """
    sessions = [name for name in found if name.endswith(RUNNER)]
    groups = [[name for name in found if name not in sessions], *([[PEFT, *sessions]] if sessions else [])]
    timings: dict[str, Timing] = {}
    for number, group in enumerate(groups):
        calls = {name: partial(found[name].decode, token) for name in group}
        done = part(progress, number, len(groups))
        timings = compare(calls, reference=PEFT, rounds=rounds, device=settings.device, progress=done) | timings
    return {name: timings[name] for name in found}


def _refused(
    settings: Settings,
    found: Mapping[str, Contender],
    base: Any,
    model: Any,
    names: Sequence[str],
    prompt: Tensor,
    token: Tensor,
) -> dict[str, str]:
    """Contenders that are farther from float64 than their dtype is."""
    double = copy.deepcopy(model).double()
    nobodys = _logits(copy.deepcopy(base).double(), prompt, token)
    mixed, alike = (
        _logits(double, prompt, token, adapter_names=rows)
        for rows in (rows_of(settings, names), [names[0]] * settings.batch)
    )
    of_one = [name + RUNNER for name in OF_ONE]
    errors = {}
    for name, contender in found.items():
        contender.prefill(prompt)
        expected = nobodys if name.startswith("base") else alike if name in of_one else mixed
        errors[name] = difference(contender.decode(token).to(expected.device), expected)
    allowed = max(FACTOR * errors[PEFT], FLOOR)
    return {
        name: f"{error:.1e} off float64, {allowed:.1e} allowed" for name, error in errors.items() if error > allowed
    }


def _logits(model: Any, prompt: Tensor, token: Tensor, **options: Any) -> Tensor:
    """Of the token behind the prompt, by a live model."""
    whole = torch.cat([prompt, token], 1)
    logits: Tensor = model(input_ids=whole, use_cache=False, **options).logits[:, -1]
    return logits


def sheets(result: Mapping[str, Any]) -> list[Sheet]:
    """Tokens per second, a row per point, a column per contender; then how many times PEFT's that is."""
    rows = result["rows"]
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    found: dict[tuple[int, int], dict[str, Any]] = {}
    for row in rows:
        found.setdefault((row["adapters"], row["batch"]), {})[row["variant"]] = row
    notes = [f"{name}: {row['refused']}." for name, row in ((r["variant"], r) for r in rows) if "refused" in row]
    sheet = []
    for title, cell in (
        ("Tokens per second", lambda row: f"{row['tokens_per_second']:.0f}"),
        ("× PEFT's adapter_names", lambda row: f"{1 / row['ratio']:.2f}"),
    ):
        cells = [
            [f"{count}", f"{batch}", *(_cell(at.get(name), cell) for name in variants)]
            for (count, batch), at in found.items()
        ]
        sheet.append(Sheet(title, ["adapters", "rows", *variants], cells, list(dict.fromkeys(notes))))
    return sheet


def _cell(row: Mapping[str, Any] | None, told: Callable[[Mapping[str, Any]], str]) -> str:
    if row is None:
        return ""  # not measured: too many sessions
    return "refused" if "refused" in row else told(row)


def draw(result: Mapping[str, Any], path: Path) -> Sequence[Path]:
    """Lines of tokens per second against the adapters, and against the rows.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    matplotlib, figures = require_figures()
    rows = [row for row in result["rows"] if "refused" not in row]
    with matplotlib.rc_context(STYLE):
        figure = figures.Figure(figsize=(11.0, 4.2), facecolor="white", layout="constrained")
        panels = figure.subplots(1, 2, squeeze=False)[0]
        for panel, axis, other in zip(panels, ("adapters", "batch"), ("batch", "adapters"), strict=True):
            for name in dict.fromkeys(row["variant"] for row in rows):
                seen = sorted(
                    (row[axis], row["tokens_per_second"])
                    for row in rows
                    if row["variant"] == name and row[other] == MIDDLE
                )
                panel.plot(*zip(*seen, strict=True), marker="o", label=name) if seen else None
            panel.set_xscale("log", base=2)
            panel.set_xlabel(f"{axis} ({MIDDLE} {'rows' if other == 'batch' else other})", color=PALE)
        panels[0].set_ylabel("tokens a second", color=PALE)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
        setup = result["settings"]
        note = (
            f"{setup['shape']} shape, {setup['layers']} layers, {setup['dtype']}, rank {setup['rank']}, "
            f"{setup['device']}, after a prompt of {result['prompt']}; medians of {result['rounds']} tokens"
        )
        return write(figure, path, title="Many adapters in one batch", note=note, caption="")
