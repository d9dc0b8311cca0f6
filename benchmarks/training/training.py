"""Time and peak memory of an adapter's training step: forward, backward, AdamW on A and B, all else frozen.

Every variant has weights of its own and trains on the same tokens. Before it is timed its gradients and its losses are
compared with its adapter's in float64; one that disagrees, or that was to be compiled and is not, has no figures.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flora_fx.errors import AdapterError
from flora_fx.measuring.method import Timing, compare, difference

from ..contenders import ffba
from ..contenders.models import Adapted, adapters_of, ffba_of, make_model
from ..contenders.settings import Settings
from ..contenders.torch_contenders import RUNNERS, Form, available, built
from ..latency.view import cell
from ..measure.compiled import compilations, was_compiled
from ..measure.isolated import Progress, isolated
from ..measure.kept import once
from ..measure.memory import added_bytes, live_bytes
from ..show.sheet import Sheet

__all__ = [
    "DTYPES",
    "VARIANTS",
    "Expected",
    "Training",
    "check",
    "disagreement",
    "measure",
    "reference",
    "references",
    "sample",
    "sheets",
    "text",
]

VARIANTS: dict[str, Form] = {
    "PEFT": RUNNERS["eager"]["PEFT"],
    "PEFT (inductor)": RUNNERS["inductor"]["PEFT"],
    "fused": RUNNERS["eager"]["fused"],
    "fused (inductor)": RUNNERS["inductor"]["fused"],
    "fused (flora backend)": RUNNERS["inductor"]["fused (flora backend)"],
    "fused (flora backend, unrolled)": RUNNERS["forms-backend"]["backend: unrolled"],
    "FFBA block": RUNNERS["eager"]["FFBA block"],
    "FFBA block (flora backend)": RUNNERS["inductor"]["FFBA block (flora backend)"],
    "FFBA shared": RUNNERS["eager"]["FFBA shared"],
    "FFBA shared (flora backend)": RUNNERS["inductor"]["FFBA shared (flora backend)"],
}
"""What takes turns; ratios are to ``PEFT``, a LoRA."""

DTYPES = ("float32", "bfloat16")
"""What a LoRA trains in, all of it in one dtype."""

FACTOR = 4.0
"""A variant may be so many times as far from float64 as the live model in its own dtype is."""

GRADIENT_FLOOR, LOSS_FLOOR = 1e-4, 1e-5
"""Or so far, whatever the model's own distance; what a scale or a factor of two gets wrong is far outside."""

_TELLING = 0.5  # of a gradient; a check that allows more tells nothing

STEPS = 3
"""How many are checked."""

LEARNING_RATE = 1e-3


Gradients = dict[str, Tensor | None]


class Loss(nn.Module):
    """The mean cross-entropy of each token after the ones before it: tokens [batch, sequence] -> scalar."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        loss: Tensor = self.model(input_ids=tokens, labels=tokens, use_cache=False).loss
        return loss


class Training:
    """A model with an adapter, in one form, and the optimizer of its A and B.

    Args:
        form: a value of `VARIANTS`.
        settings: model and device.
        tokens: what is trained on, [batch, sequence].
        dtype: other than the settings', for a reference.

    Raises:
        RuntimeError: the form cannot be built.
    """

    def __init__(self, form: Form, settings: Settings, tokens: Tensor, *, dtype: torch.dtype | None = None) -> None:
        model = make_model(settings, form.adapted, dtype=dtype).train()
        self.adapters = adapters_of(model)
        for weight in self.adapters.values():
            weight.requires_grad_()
        self.optimizer = torch.optim.AdamW(self.adapters.values(), lr=LEARNING_RATE, fused=True)
        self.compiled = form.way != "eager"
        self._tokens = tokens
        self._loss = built(form, Loss(model), tokens)

    def forward(self) -> Tensor:
        """The loss, ready for its backward."""
        return self._loss(self._tokens)

    def gradients(self) -> Gradients:
        """The gradients of all A and B, by name, at the present weights."""
        self.forward().backward()
        found = {
            name: None if weight.grad is None else weight.grad.detach().cpu() for name, weight in self.adapters.items()
        }
        self.optimizer.zero_grad(set_to_none=True)
        return found

    def step(self) -> Tensor:
        """One step of training; the loss before it."""
        loss = self.forward()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


class Expected(NamedTuple):
    """What training must give.

    Attributes:
        gradients: of all A and B at the first step, by name, in float64.
        losses: of `STEPS` steps, in float64.
        allowed: ‖gradient − float64 gradient‖ / ‖float64 gradient‖ that each A and B may have.
        allowed_loss: |loss − float64 loss| / float64 loss that each step may have.
    """

    gradients: Gradients
    losses: list[float]
    allowed: float = GRADIENT_FLOOR
    allowed_loss: float = LOSS_FLOOR


def reference(settings: Settings, tokens: Tensor, adapted: Adapted = "peft") -> Expected:
    """What the live model gives in float64, and how near to it the live model in its own dtype is.

    Raises:
        RuntimeError: rounding hides what is to be seen.
    """
    form = Form(adapted, "eager")
    exact, rounded = (_trained(Training(form, settings, tokens, dtype=dtype)) for dtype in (torch.float64, None))
    (gradients, losses), (own, own_losses) = exact, rounded
    allowed = max(GRADIENT_FLOOR, FACTOR * max(_errors(own, gradients).values()))
    allowed_loss = max(LOSS_FLOOR, FACTOR * max(_loss_error(*pair) for pair in zip(own_losses, losses, strict=True)))
    moved = _loss_error(losses[-1], losses[0])
    if not (allowed <= _TELLING and moved >= 2 * allowed_loss):  # NaN too
        raise RuntimeError(
            f"{STEPS - 1} steps change the loss by {moved:.1e}, and rounding alone puts it off by up to "
            f"{allowed_loss / FACTOR:.1e} and a gradient by {allowed / FACTOR:.1e}: a check could not tell whether a "
            "variant trains"
        )
    return Expected(gradients, losses, allowed, allowed_loss)


def _trained(training: Training) -> tuple[Gradients, list[float]]:
    return training.gradients(), [training.step().item() for _ in range(STEPS)]


def _errors(found: Gradients, expected: Gradients) -> dict[str, float]:
    return {name: difference(found[name], gradient) for name, gradient in expected.items()}  # type: ignore[arg-type]


def _loss_error(found: float, expected: float) -> float:
    return abs(found - expected) / expected


def disagreement(training: Training, expected: Expected) -> str | None:
    """Why a variant does not train as the float64 reference does; None if it does. It takes `STEPS` steps.

    Args:
        training: a variant at its first step.
        expected: from `reference`, of the same adapter.
    """
    gradients = expected.gradients
    found = training.gradients()
    if missing := [name for name in gradients if found[name] is None]:
        return f"{len(missing)} of {len(gradients)} A and B get no gradient, {missing[0]} among them"
    errors = _errors(found, gradients)
    worst = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))  # NaN first
    if not errors[worst] <= expected.allowed:
        return f"the gradient of {worst} is off by {errors[worst]:.1e} of float64's; {expected.allowed:.0e} is allowed"
    for index, loss in enumerate(expected.losses):
        own = training.step().item()
        if not _loss_error(own, loss) <= expected.allowed_loss:
            return f"its loss at step {index + 1} is {own:.6f}; float64's is {loss:.6f}"
    return None


def check(settings: Settings) -> None:
    """Refuse what cannot be trained.

    Raises:
        ValueError: a dtype that a LoRA does not train in.
    """
    if settings.dtype not in DTYPES:
        raise ValueError(
            f"a LoRA does not train in pure {settings.dtype}: Adam's second moments underflow, and nothing here scales "
            f"gradients; --dtype must be one of {', '.join(DTYPES)}"
        )


def measure(
    settings: Settings,
    *,
    rounds: int = 30,
    sequence: int = 128,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """Measure every variant that there is, in a process of its own.

    Args:
        settings: model and device.
        rounds: steps of each variant, in turns.
        sequence: tokens per sequence.
        progress: called with the variants built and the rounds done, and how many of both there are.

    Returns:
        ``{"settings", "sequence", "rounds", "rows"}``. A row has ``variant`` and either ``milliseconds``, ``ratio``,
        ``low``, ``high`` (see `method.Timing`) and ``peak_bytes`` (weights, gradients, optimizer state, activations),
        or ``unavailable`` or ``refused``, the reason; FFBA's have ``ffba``, placement and rank.

    Raises:
        ValueError: a dtype that a LoRA does not train in.
    """
    check(settings)
    rows = isolated(sample, settings, rounds, sequence, threads=settings.threads, progress=progress)
    setup = asdict(settings) | {"layers": settings.depth}
    return {"settings": setup, "sequence": sequence, "rounds": rounds, "rows": rows}


def sample(
    settings: Settings,
    rounds: int,
    sequence: int,
    progress: Progress,
    *,
    variants: Sequence[str] = (),
    kept: Path | None = None,
) -> list[dict[str, Any]]:
    """What `measure` does, in this process; returns its rows.

    Args:
        settings, rounds, sequence, progress: as for `measure`.
        variants: of `VARIANTS`, PEFT among them; empty for all.
        kept: folder of references that were computed before, or None.
    """
    tokens = text(settings, sequence)
    chosen = {name: form for name, form in VARIANTS.items() if name in variants or not variants}
    expected = references(settings, tokens, chosen, kept)
    rows: dict[str, dict[str, Any]] = {}
    agreed: dict[str, Training] = {}
    total = len(chosen) + rounds
    for name, form in chosen.items():
        row, training = _build(form, settings, tokens, expected)
        rows[name] = {"variant": name} | row
        if training is not None:
            agreed[name] = training
        progress(len(rows), total)
    timings = _take_turns(agreed, settings, rounds, lambda done, _: progress(len(chosen) + done, total))
    for name, timing in timings.items():
        rows[name] |= {"refused": timing} if isinstance(timing, str) else asdict(timing)
    return list(rows.values())


def text(settings: Settings, sequence: int) -> Tensor:
    """What is trained on: random tokens, [batch, sequence]."""
    drawn = torch.Generator().manual_seed(0)
    return torch.randint(settings.vocabulary, (settings.batch, sequence), generator=drawn).to(settings.device)


def references(
    settings: Settings, tokens: Tensor, variants: Mapping[str, Form], kept: Path | None = None
) -> dict[Adapted, Expected]:
    """The `reference` of each adapter that there is, from the folder where it was kept."""
    found = {}
    model = replace(settings, layers=settings.depth, threads=1)
    for adapted in dict.fromkeys(form.adapted for form in variants.values()):
        compute = partial(_reference, settings, tokens, adapted)
        with contextlib.suppress(AdapterError):  # building the variant says so, too
            found[adapted] = Expected(**once(kept, ("training", model, adapted, tokens.tolist()), compute))
    return found


def _reference(settings: Settings, tokens: Tensor, adapted: Adapted) -> dict[str, Any]:
    return reference(settings, tokens, adapted)._asdict()


def _build(
    form: Form, settings: Settings, tokens: Tensor, expected: Mapping[Adapted, Expected]
) -> tuple[dict[str, Any], Training | None]:
    """What can be said of a variant before it is timed; the variant, if it may be."""
    if not available(form, settings.device):
        return {"unavailable": f"this version of flora_fx has no torch.compile backend {form.way!r}"}, None
    before = live_bytes(settings.device)
    try:
        training = Training(form, settings, tokens)
        why = disagreement(training, expected[form.adapted])
    except (RuntimeError, AdapterError) as error:  # flora_fx, Dynamo and CUDA (out of memory) raise the first
        return {"unavailable": _reason(error)}, None
    if why is None and training.compiled and not was_compiled(training.forward):
        why = "a profile shows that it did not run compiled"
    if why is not None:
        return {"refused": why}, None
    held = live_bytes(settings.device) - before
    peak = held + added_bytes(training.step, settings.device)
    return {"peak_bytes": peak, **ffba_of(settings, form.adapted)}, training


def _reason(error: Exception) -> str:
    """What an error says, without what Dynamo writes around an error of the code that it traces.

    >>> _reason(RuntimeError("Observed exception\\n  Debug context: raised exception TieError('no gradients')\\n"))
    "TieError('no gradients')"
    """
    traced = re.search(r"raised exception (.+)", str(error))
    return traced[1] if traced else f"{type(error).__name__}: {error}"


def _take_turns(
    agreed: Mapping[str, Training], settings: Settings, rounds: int, progress: Progress
) -> Mapping[str, Timing | str]:
    """Each variant's timing, or why it has none."""
    if "PEFT" not in agreed:
        return dict.fromkeys(agreed, "PEFT, which ratios are taken to, has no figures itself")
    calls: dict[str, Callable[[], object]] = {name: training.step for name, training in agreed.items()}
    graphs = compilations()
    timings = compare(calls, reference="PEFT", rounds=rounds, device=settings.device, progress=progress)
    if compilations() != graphs:
        return dict.fromkeys(agreed, "something was compiled while the clock ran")
    return timings


def sheets(result: Mapping[str, Any]) -> list[Sheet]:
    """One sheet: milliseconds and peak memory, both also relative to PEFT."""
    rows: Sequence[Mapping[str, Any]] = result["rows"]
    peaks = {row["variant"]: row["peak_bytes"] for row in rows if "ratio" in row}
    body = []
    for row in rows:
        if "ratio" not in row:
            body.append([row["variant"], "refused" if "refused" in row else "not available"])
            continue
        peak = row["peak_bytes"]
        body.append(
            [
                row["variant"],
                f"{row['milliseconds']:.1f}",
                cell(row),
                f"{peak / 2**20:.1f}",
                f"{peak / peaks['PEFT']:.3f}",
            ]
        )
    notes = [
        f"{row['variant']} {kind}: {row[kind].splitlines()[0]}"
        for row in rows
        for kind in ("refused", "unavailable")
        if kind in row
    ]
    notes += ffba.note(rows)
    title = f"Training step, {result['settings']['batch']} × {result['sequence']} tokens"
    return [Sheet(title, ["", "ms", "× PEFT", "peak MiB", "× PEFT's"], body, notes)]
