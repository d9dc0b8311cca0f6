"""What a search may try, written down before it runs.

The rule. A suite's tasks are two halves: the first, third, … are for the choice, the others for the report. On the
first half every method below is tuned at every budget, and of each family the one with the best mean on the validation
splits is chosen, per budget. On the second half those chosen, plain LoRA and plain `shared` run every seed at every
learning rate, are tuned anew by all of them, and reported on the test splits. Published are two differences: of the
chosen FFBA to the chosen LoRA, which had the same freedom, and to plain LoRA. Tasks that are left out of a suite are
left out of their half. Nothing is chosen on the second half but learning rates, and by its validation splits.
"""

from __future__ import annotations

import inspect

from .methods import LORA, VARIANTS

__all__ = ["PLAIN", "REGISTERED", "rule"]

PLAIN = (LORA, "shared")
"""What each family is without a variation."""

REGISTERED = (*PLAIN, "shared, silu", *VARIANTS)
"""Every method that a search tries."""


def rule() -> str:
    """The rule above in one paragraph, for the record."""
    text = inspect.cleandoc(__doc__).partition("The rule. ")[2]
    return " ".join(text.split())
