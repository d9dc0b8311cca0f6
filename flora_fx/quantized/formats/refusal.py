"""`InexactError`: a quantized weight that cannot be taken over as it is."""

from __future__ import annotations

__all__ = ["InexactError"]


class InexactError(ValueError):
    """Why a weight cannot be held as codes, scales and integer zero points without changing a number.

    Whoever knows the layer's name, and the way out, raises the error that a user sees.
    """
