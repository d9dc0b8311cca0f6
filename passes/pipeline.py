"""The passes, in the order they run: those that look (`analysis`), that decide (`plan`), that rewrite (`rewrite`).

A pass that rewrites early, as ``magnitudes`` does, forgets the facts that it made untrue; they are found again where
the next pass needs them. From ``write`` on nothing is found again: what was known of the old nodes, which still stand
there, is what ``rotary`` and ``clean`` ask for.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from flora_fx.config import FuseConfig
from flora_fx.graph.program import Program
from flora_fx.ir import Decline, Derived, Pack
from flora_fx.reporting.sketch import Sketch

from .analysis.modes import Regions, find_regions
from .analysis.mutation import Effects, find_effects
from .analysis.paths import Paths, find_paths
from .analysis.projections import Projections, find_projections
from .analysis.unlike import decline_unlike
from .analysis.values import Values, find_values
from .context import Context, Pass
from .debugging import names_left_out, open_dump
from .plan.decide import Decisions, decide
from .plan.forms import Forms, settle_forms
from .plan.group import Grouping, form_groups
from .rewrite.clean import clean
from .rewrite.direct import call_directly
from .rewrite.labels import name_new_nodes
from .rewrite.magnitudes import Magnitudes, rewrite_magnitudes
from .rewrite.rotary import Rotations, rewrite_rotations
from .rewrite.settle import settle
from .rewrite.strides import soften
from .rewrite.write import write
from .rewrite.written import Written

__all__ = ["PASSES", "Outcome", "run"]

PASSES = (
    # What must not be touched: values changed in place, or whose memory layout is read.
    Pass("effects", find_effects, gives=Effects),
    # Between which switches of a mode (autocast, say) each node stands.
    Pass("modes", find_regions, gives=Regions),
    # Which nodes hold equal values. A value that is changed in place equals nothing.
    Pass("values", find_values, needs=(Effects,), gives=Values),
    # The linear nodes. By value, so that two nodes that hold one value are one read.
    Pass("projections", find_projections, needs=(Effects, Values), gives=Projections),
    # DoRA becomes a LoRA and a stored vector, before the LoRA is looked for.
    Pass(
        "magnitudes",
        rewrite_magnitudes,
        needs=(Effects, Regions, Values, Projections),
        gives=Magnitudes,
        rewrites=True,
        optional=True,
    ),
    # The low-rank paths between projections.
    Pass("paths", find_paths, needs=(Effects, Regions, Values, Projections), gives=Paths),
    # For the report: adapters that are no low-rank path.
    Pass("unlike", decline_unlike, needs=(Values, Projections, Paths), optional=True),
    # Which paths may be written, which weights may move.
    Pass("decide", decide, needs=(Values, Projections, Paths), gives=Decisions),
    # In which forms.
    Pass("forms", settle_forms, needs=(Decisions,), gives=Forms),
    # What reads one value goes together.
    Pass("group", form_groups, needs=(Regions, Values, Projections, Decisions), gives=Grouping),
    # Packs, accumulations.
    Pass("write", write, needs=(Values, Forms, Grouping), gives=Written, rewrites=True),
    # Rotations of what was written as a product and a sum.
    Pass(
        "rotary",
        rewrite_rotations,
        needs=(Effects, Values, Forms, Written),
        gives=Rotations,
        rewrites=True,
        optional=True,
    ),
    # What nothing reads any more. Before strides, which would give dead readers a copy to read.
    Pass("clean", clean, needs=(Effects, Written, Rotations), rewrites=True),
    # Readers of slices cope with their strides.
    Pass("strides", soften, needs=(Written,), rewrites=True),
    # What does nothing in a captured graph, and the checks of that.
    Pass("settle", settle, needs=(Values,), rewrites=True, optional=True),
    # torch's own functions instead of overloads. After all that looks for overloads.
    Pass("direct", call_directly, rewrites=True, optional=True),
    # Names for new nodes. Last, since the old ones may have them.
    Pass("labels", name_new_nodes, needs=(Written,), rewrites=True, optional=True),
)
_GIVING = {step.gives: step for step in PASSES if step.gives is not None}


@dataclass(frozen=True)
class Outcome:
    """What the passes did.

    Attributes:
        packs: the packs that were made.
        fused: the adapters (their up-projections' weights) that were written.
        declines: what was refused.
        eval_only: dropout modules that were seen through because they were in eval mode.
        seconds: time per pass.
        sketches: what stood around each read and what stands there now.
        derived: the values that are computed from parameters alone, and stored.
        unrolled: the highest rank of an up-projection that was written as a product and a sum; 0 for none.
    """

    packs: tuple[Pack, ...]
    fused: tuple[str, ...]
    declines: tuple[Decline, ...]
    eval_only: tuple[str, ...]
    seconds: Mapping[str, float]
    sketches: tuple[Sketch, ...]
    derived: tuple[Derived, ...]
    unrolled: int


def run(program: Program, config: FuseConfig) -> Outcome:
    """Rewrite a program's graph.

    Raises:
        AdapterError: an adapter weight holds NaN or infinity.
        ValueError: what `debugging` reads from the environment cannot be done.
    """
    context = Context(program, config)
    seconds = _run_all(context)
    written = context[Written]
    return Outcome(
        tuple(written.packs),
        tuple(path.up.weight.name for path in context[Decisions].paths),
        tuple(dict.fromkeys(context.declines)),
        context[Values].eval_dropouts(),
        seconds,
        tuple(written.sketches),
        tuple(context[Magnitudes]),
        max((unrolled.rank for unrolled in written.unrolled), default=0),
    )


def _run_all(context: Context) -> dict[str, float]:
    """Run the passes; the seconds that each took."""
    seconds: dict[str, float] = defaultdict(float)
    left_out, dump = names_left_out(PASSES), open_dump()

    def run_one(step: Pass) -> None:
        for kind in step.needs:
            if kind not in context:
                run_one(_GIVING[kind])  # again: a rewrite made it forgotten
        start = time.perf_counter()
        fact = step.empty() if step.name in left_out else step.run(context)
        seconds[step.name] += time.perf_counter() - start
        if fact is not None:
            context.keep(fact)

    if dump:
        dump.write(0, "given", context.program.graph)
    for position, step in enumerate(PASSES, 1):
        run_one(step)
        if dump and step.rewrites:
            dump.write(position, step.name, context.program.graph)
    return dict(seconds)
