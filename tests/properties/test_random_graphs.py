"""Random programs with adapters in them, whatever is shared, reused, reshaped or overwritten, as symbolic traces.

Of each: the outputs and gradients of the graph, in float64, also after its weights have changed and in a copy of it;
every adapter fused or declined with a reason; the graph given left as it was.
"""

from __future__ import annotations

from .meanings import ACTIVATIONS, CHANGES, MAPS, SCALES, VIEWS
from .searching import assert_all_right


def test_graphs_as_symbolic_trace_makes_them() -> None:
    forms = {*MAPS, *VIEWS, *CHANGES, *ACTIVATIONS} - {""}
    assert_all_right(
        "quick",
        *(f"declined: {reason}" for reason in REASONS),
        *(f"step: {step}" for step in STEPS),
        *(f"scale: {scale}" for scale in SCALES),
        *(f"form: {form}" for form in forms),
        *("packs widened", "with gradients"),
    )


REASONS = ["WEIGHT_SHARED", "DTYPE_DIFFERS", "SCALE_NOT_SCALAR", "OTHER_READER", "READS_ANOTHER_VALUE", "MUTATED"]
REASONS += ["SHAPE_UNKNOWN"]
STEPS = ["Project", "Down", "Up", "Map", "Join", "View", "Change"]
