"""Whether a contender computes what its model does, as far as its dtype can tell.

Two figures, each beside that of the same model run op by op in the same dtype, which is right by definition:

- how far its logits are from float64's, over a prompt and the tokens after it;
- how much stronger or weaker each layer acts. Rounding makes logits go anywhere; a wrong weight makes them go where
  that weight pulls. So a float64 model tells where each layer pulls, and least squares how much of every pull there is
  in a contender's error. In bfloat16, whose rounding hides 5% of a deep layer's adapter in the first figure, right
  contenders were seen to have at most 1.4% of a pull, and 5% to show as 4.6 to 5.5%.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flora_fx.measuring.method import difference

__all__ = ["Reference", "error", "strengths", "verdict"]

FACTOR = 5.0
"""A contender may be so many times as far from float64 as the model op by op: others round at other places."""

FLOOR = 1e-5
"""Or so far, whatever the model's own distance; anything wrong is farther off."""

STRENGTH = 0.025
"""A layer may act so much stronger or weaker, or `_STRENGTHS` times as much as one of the model op by op does."""

_STRENGTHS = 3.0

_TELLING = 0.045
"""A check that allows more tells nothing."""


@dataclass(frozen=True)
class Reference:
    """What is right, and how right a model in the dtype can be.

    Attributes:
        logits: float64, [batch, vocabulary] for the prompt and each token after it.
        pulls: by layer, what its adapters, made 1 + h times as strong, add to all these logits, over h: [layers,
            elements], each step's in units of its norm. Of the layer's output projections, where there are no adapters.
            None in float32, whose rounding hides nothing.
        error: `error` of the model op by op.
        strength: the largest of its `strengths`, by magnitude.
    """

    logits: Sequence[Tensor]
    pulls: Tensor | None = None
    error: float = 0.0
    strength: float = 0.0

    @property
    def allowed(self) -> float:
        """The `error` that a contender may have."""
        return max(FLOOR, FACTOR * self.error)

    @property
    def allowed_strength(self) -> float:
        """What one of its `strengths` may be, by magnitude.

        Raises:
            RuntimeError: rounding hides what is to be seen.
        """
        allowed = max(STRENGTH, _STRENGTHS * self.strength)
        if allowed > _TELLING:
            raise RuntimeError(
                f"rounding alone makes a layer of the model act {self.strength:.1%} stronger or weaker: a check could "
                "not tell a wrong contender from a right one"
            )
        return allowed


def verdict(found: Sequence[Tensor], reference: Reference) -> str | None:
    """Why logits are not those of a model; None if they are.

    Args:
        found: as the reference's, in any dtype.
        reference: of the model.

    Raises:
        RuntimeError: rounding hides what is to be seen.
    """
    off = error(found, reference.logits)
    if not off <= reference.allowed:  # NaN too
        return f"its logits are off by {off:.1e} of the float64 reference; {reference.allowed:.1e} is allowed"
    if reference.pulls is None:
        return None
    strength = strengths(found, reference)
    layer = int(strength.abs().argmax())
    if not abs(strength[layer]) <= reference.allowed_strength:
        how = "strongly" if strength[layer] > 0 else "weakly"
        return (
            f"layer {layer} acts {abs(strength[layer]):.1%} too {how} for the float64 reference; "
            f"{reference.allowed_strength:.1%} is allowed"
        )
    return None


def error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """‖found − expected‖ / ‖expected‖ of each step, and of these the root of the mean square.

    >>> ones = torch.ones(1, 4)
    >>> round(error([1.03 * ones, 1.04 * ones], [ones, ones]), 4)
    0.0354
    """
    each = [difference(*pair) for pair in zip(found, expected, strict=True)]
    return float(torch.tensor(each, dtype=torch.float64).square().mean().sqrt())


def strengths(found: Sequence[Tensor], reference: Reference) -> Tensor:
    """How much stronger (0.05: by 5%) or weaker each layer acts, by least squares: [layers], float64."""
    assert reference.pulls is not None
    away = in_units([one.detach().cpu().double() - right for one, right in zip(found, reference.logits, strict=True)],
                    reference.logits)  # fmt: skip
    pulls = reference.pulls.double()
    return torch.linalg.lstsq(pulls @ pulls.T, (pulls @ away)[:, None]).solution[:, 0]


def in_units(steps: Sequence[Tensor], logits: Sequence[Tensor]) -> Tensor:
    """What is added to the logits of each step, in units of their norm, as one vector."""
    return torch.cat([(step / right.norm()).flatten() for step, right in zip(steps, logits, strict=True)])
