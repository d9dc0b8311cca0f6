"""Which form of an up-projection is fastest through the backend, by rank and by rows: what `choosing` is set from.

All run live under Inductor, beside the base and PEFT. A rank has a process of its own, and all its contenders take
turns there. A second run takes its compiled graphs from Inductor's cache, so a first one with ``--rounds 1`` prepares a
short one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from flora_fx.measuring.method import compare

from ..contenders.models import Adapted, make_model
from ..contenders.references import known
from ..contenders.settings import Settings
from ..contenders.step import CachedStep, empty_cache
from ..contenders.torch_contenders import RUNNERS, Form, built
from ..latency.view import cell
from ..measure.compiled import compilations, was_compiled
from ..measure.isolated import Progress, isolated
from ..measure.tolerances import verdict
from ..show.sheet import Sheet
from ..training import training

__all__ = ["RANKS", "TOKENS", "measure", "sample", "sheets"]

RANKS = (8, 16, 32, 64)
TOKENS = (1, 128, 512)
FORMS = RUNNERS["forms-backend"]
TRAINED = ("PEFT", "PEFT (inductor)", "fused (flora backend)", "fused (flora backend, unrolled)")


def measure(
    settings: Settings,
    *,
    ranks: Sequence[int] = RANKS,
    tokens: Sequence[int] = TOKENS,
    rounds: int = 20,
    sequence: int = 128,
    progress: Any = lambda label: lambda done, total: None,
) -> dict[str, Any]:
    """Time one forward of so many tokens at each rank, then a training step at the settings' own.

    Args:
        settings: model and device; its rank is that of the training step.
        ranks: of the LoRA.
        tokens: of a forward.
        rounds: forwards, and steps, of each contender.
        sequence: tokens of a training step; 0 for none.
        progress: makes a progress callback from a label.

    Returns:
        ``{"settings", "rounds", "rows", "sequence", "training"}``. A row has ``rank``, ``tokens``, ``variant`` and
        either ``milliseconds``, ``ratio``, ``low``, ``high`` (to the base) or ``refused``, the reason; those of
        ``training`` are `training.measure`'s.
    """
    rows: list[dict[str, Any]] = []
    for rank in ranks:
        asked = (replace(settings, rank=rank), tuple(tokens), rounds)
        rows += isolated(sample, *asked, threads=settings.threads, progress=progress(f"rank {rank}"))
    steps: list[dict[str, Any]] = []
    if sequence:
        asked_step = (settings, rounds, sequence)
        steps = isolated(_steps, *asked_step, threads=settings.threads, progress=progress("training step"))
    setup = asdict(settings) | {"layers": settings.depth}
    return {"settings": setup, "rounds": rounds, "rows": rows, "sequence": sequence, "training": steps}


def _steps(settings: Settings, rounds: int, sequence: int, progress: Progress) -> list[dict[str, Any]]:
    return training.sample(settings, rounds, sequence, progress, variants=TRAINED)


@torch.no_grad()
def sample(settings: Settings, tokens: Sequence[int], rounds: int, progress: Progress) -> list[dict[str, Any]]:
    """The rows of one rank, measured in this process."""
    steps = {name: CachedStep(make_model(settings, form.adapted)).eval() for name, form in FORMS.items()}
    rows = []
    for index, count in enumerate(tokens):
        drawn = torch.Generator().manual_seed(count)
        prompt = torch.randint(settings.vocabulary, (settings.batch, count), generator=drawn).to(settings.device)
        calls = {name: _call(form, steps[name], settings, prompt, max(tokens)) for name, form in FORMS.items()}
        refused = _refused(calls, settings, prompt)
        before = compilations()
        timings = compare(
            calls,
            reference="base",
            rounds=rounds,
            device=settings.device,
            seed=count,
            progress=lambda done, _, index=index: progress(index * rounds + done, len(tokens) * rounds),  # type: ignore[misc]
        )
        if compilations() != before:
            refused = dict.fromkeys(calls, "something was compiled while the clock ran")
        for name, timing in timings.items():
            why = refused.get(name) or refused.get("base")
            found = asdict(timing) if why is None else {"refused": why}
            rows.append({"rank": settings.rank, "tokens": count, "variant": name} | found)
    return rows


def _call(form: Form, step: CachedStep, settings: Settings, prompt: Tensor, capacity: int) -> Callable[[], Tensor]:
    """A forward of a prompt by one form, compiled and tied: its first calls move weights."""
    position = torch.zeros((), dtype=torch.int64, device=settings.device)
    cache = empty_cache(settings, capacity)
    compiled = built(form, step, prompt, position, *cache)

    @torch.no_grad()
    def call() -> Tensor:
        return compiled(prompt, position, *cache)

    for _ in range(2):
        call()
    return call


def _refused(calls: Mapping[str, Callable[[], Tensor]], settings: Settings, prompt: Tensor) -> dict[str, str]:
    """Contenders that do not compute what their model does in float64, or did not run compiled."""
    models: set[Adapted] = {form.adapted for form in FORMS.values()}
    expected = {adapted: known(settings, adapted, prompt, ()) for adapted in models}
    found = {}
    for name, call in calls.items():
        if why := verdict([call().to("cpu", copy=True)], expected[FORMS[name].adapted]):
            found[name] = why
        elif not was_compiled(call):
            found[name] = "a profile shows that it did not run compiled"
    return found


def sheets(result: Mapping[str, Any]) -> list[Sheet]:
    """A sheet per number of tokens, a row per rank; then the training step."""
    found = [_sheet(count, result) for count in dict.fromkeys(row["tokens"] for row in result["rows"])]
    if result["training"]:
        step = {"settings": result["settings"], "sequence": result["sequence"], "rows": result["training"]}
        found += training.sheets(step)
    return found


def _sheet(tokens: int, result: Mapping[str, Any]) -> Sheet:
    rows = [row for row in result["rows"] if row["tokens"] == tokens]
    names = [name for name in dict.fromkeys(row["variant"] for row in rows) if name != "base"]
    body, notes = [], []
    for rank in dict.fromkeys(row["rank"] for row in rows):
        own = {row["variant"]: row for row in rows if row["rank"] == rank}
        base = own["base"]
        cells = [f"{base['milliseconds']:.2f}" if "milliseconds" in base else "refused"]
        cells += [cell(own[name]) if "ratio" in own[name] else "refused" for name in names]
        body.append([str(rank), *cells])
        notes += [f"{name}, rank {rank}: {own[name]['refused']}" for name in own if "refused" in own[name]]
    title = f"A forward of {tokens} token{'' if tokens == 1 else 's'}, × base"
    return Sheet(title, ["rank", "base, ms", *names], body, notes)
