"""What a model computes in float64, and how near the same model gets to that op by op in its own dtype.

Computing it costs more than what is timed: it is done once, and kept in a folder for whoever asks again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..measure.kept import once
from ..measure.tolerances import Reference, error, in_units, strengths
from .models import Adapted, adapters_of, make_model
from .settings import Settings
from .step import CachedStep, empty_cache

__all__ = ["known"]

_STEP = 1e-3  # of a finite difference in float64: its error is of the same order, and 5% of it is nothing


def known(
    settings: Settings, adapted: Adapted, prompt: Tensor, following: Sequence[Tensor], kept: Path | None = None
) -> Reference:
    """The reference of one model on one text.

    Args:
        settings: model and device.
        adapted: which model. A merged one is compared with the unmerged one, which no merge has rounded.
        prompt: tokens [batch, prompt].
        following: tokens [batch, 1] each.
        kept: folder of what was computed before, for these settings and this text; None to compute it now.
    """

    def compute() -> dict[str, Any]:
        return vars(_compute(settings, adapted, prompt, following, kept))

    text = torch.cat([prompt, *following], 1).tolist()
    model = replace(settings, layers=settings.depth, threads=1)
    return Reference(**once(kept, ("logits", model, adapted, text), compute))


@torch.no_grad()
def _compute(
    settings: Settings, adapted: Adapted, prompt: Tensor, following: Sequence[Tensor], kept: Path | None
) -> Reference:
    if adapted == "merged":
        exact = known(settings, "peft", prompt, following, kept)
    else:
        model = make_model(settings, adapted, dtype=torch.float64)
        logits = _logits(model, settings, prompt, following)
        exact = Reference(logits)
        if settings.dtype != "float32":
            pulls = [in_units(added, logits) for added in _pulls(model, settings, logits, prompt, following)]
            exact = Reference(logits, torch.stack(pulls).float())
        del model
    rounded = _logits(make_model(settings, adapted), settings, prompt, following)
    exact = replace(exact, error=error(rounded, exact.logits))
    if exact.pulls is None:
        return exact
    return replace(exact, strength=strengths(rounded, exact).abs().max().item())


def _pulls(
    model: nn.Module, settings: Settings, logits: Sequence[Tensor], prompt: Tensor, following: Sequence[Tensor]
) -> Iterator[list[Tensor]]:
    """Per layer, what it adds to the logits when it is made stronger, per unit of strength."""
    for layer in range(settings.depth):
        weights = _last_weights(model, layer)
        for weight in weights:
            weight.mul_(1 + _STEP)
        stronger = _logits(model, settings, prompt, following)
        for weight in weights:
            weight.div_(1 + _STEP)
        yield [(one - other) / _STEP for one, other in zip(stronger, logits, strict=True)]


def _last_weights(model: nn.Module, layer: int) -> list[nn.Parameter]:
    """What scales a layer's adapters; of a model without any, what it adds to the residual stream."""
    inside = f".layers.{layer}."
    ups = [weight for name, weight in adapters_of(model).items() if inside in name and "_B." in name]
    outputs = ("o_proj.weight", "down_proj.weight")
    return ups or [weight for name, weight in model.named_parameters() if inside in name and name.endswith(outputs)]


def _logits(model: nn.Module, settings: Settings, prompt: Tensor, following: Sequence[Tensor]) -> list[Tensor]:
    """Of the prompt and of each token after it, [batch, vocabulary], in float64 on the CPU."""
    step = CachedStep(model).eval()
    dtype = next(model.parameters()).dtype
    cache = empty_cache(settings, prompt.shape[1] + len(following), dtype=dtype)
    position = torch.zeros((), dtype=torch.int64, device=settings.device)
    found = [step(prompt, position, *cache).cpu().double()]
    for index, token in enumerate(following):
        found.append(step(token, position.fill_(prompt.shape[1] + index), *cache).cpu().double())
    return found
