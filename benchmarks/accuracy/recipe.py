"""What all runs of a plan share."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Recipe"]


@dataclass(frozen=True)
class Recipe:
    """What all runs share: AdamW without weight decay, a tenth of warm-up and half a cosine, gradients clipped at 1.

    Attributes:
        steps: of the optimizer.
        batch: examples.
        device: ``cpu`` or ``cuda``.
    """

    steps: int = 80
    batch: int = 16
    device: str = "cpu"
