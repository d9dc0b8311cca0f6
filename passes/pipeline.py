"""The passes, in the order they run. Those that look come first; only the last four touch the graph.

effects        what must not be touched: values changed in place or read by address
values         which nodes hold equal values; needs effects, since a changed value equals nothing
projections    the linear nodes; by value, so that equal reads are one read
magnitudes     DoRA becomes LoRA and a stored vector; what came before looks again where that is so
paths          the low-rank paths between them
unlike         adapters that are none, for the report
decide         which paths may be written, which weights may move
group          what reads one value goes together
write          packs, accumulations
rotary         rotations of what was written as a product and a sum
clean          what nothing reads any more; before strides, which would keep it alive
strides        readers of slices
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from flora_fx.config import FuseConfig
from flora_fx.graph.program import Program
from flora_fx.ir import Decline, Derived, Pack
from flora_fx.reporting.sketch import Sketch

from .analysis.modes import find_regions
from .analysis.mutation import find_effects
from .analysis.paths import find_paths
from .analysis.projections import find_projections
from .analysis.unlike import find_unlike
from .analysis.values import Values
from .plan.decide import decide
from .plan.group import group
from .rewrite.clean import clean
from .rewrite.magnitudes import rewrite_magnitudes
from .rewrite.rotary import find_rotations, write_rotations
from .rewrite.strides import soften
from .rewrite.write import Writer

__all__ = ["Outcome", "run"]


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
    seconds: dict[str, float]
    sketches: tuple[Sketch, ...]
    derived: tuple[Derived, ...]
    unrolled: int


def run(program: Program, config: FuseConfig) -> Outcome:
    """Rewrite a program's graph.

    Raises:
        AdapterError: an adapter weight holds NaN or infinity.
    """
    seconds: dict[str, float] = {}

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        seconds[name] = time.perf_counter() - start

    with timed("effects"):
        effects = find_effects(program.graph, program.root)
    with timed("values"):
        values = Values(program, effects)
    with timed("projections"):
        projections = find_projections(program, values, effects)
    with timed("magnitudes"):
        derived = rewrite_magnitudes(program, values, effects, projections)
        if derived:
            effects = find_effects(program.graph, program.root)
            values = Values(program, effects)
            projections = find_projections(program, values, effects)
    with timed("paths"):
        regions = find_regions(program.graph)
        paths, refused = find_paths(program, values, effects, projections, regions)
    with timed("unlike"):
        unlike = find_unlike(program, values, projections, paths, refused)
    with timed("decide"):
        decisions = decide(program, values, projections, paths, config)
    with timed("group"):
        grouping = group(program, values, projections, decisions, regions, config)
    ups = [path.up.weight for path in decisions.paths]
    if program.trains(ups):
        config = replace(config, fold_scale=False)  # a scaled copy would go stale with the next step
    if config.accumulate == "unrolled" or any(up.tensor.requires_grad for up in ups):
        # Unrolled, the zeros of a block-diagonal matrix would be loads and products. Its columns are strided, too, and
        # torch's fused optimizers write past strided parameters on a CPU (2.13): whoever trains it must find it dense.
        config = replace(config, up="per_projection")
    writer = Writer(program, values, config)
    with timed("write"):
        writer.write(grouping)
    replaced = writer.replaced
    with timed("rotary"):
        if not program.trains(ups):
            rotations = [*find_rotations(program, values, effects, writer.unrolled)]
            replaced = [*replaced, *write_rotations(program, rotations)]
    with timed("clean"):
        clean(program.graph, [*replaced, *writer.slices], effects.alone)
    with timed("strides"):
        alive = set(program.graph.nodes)
        soften(program, [node for node in writer.slices if node in alive])
        for node, label in writer.labels.items():
            if node in alive:
                program.rename(node, label)
    return Outcome(
        tuple(writer.packs),
        tuple(path.up.weight.name for path in decisions.paths),
        tuple(dict.fromkeys((*refused, *unlike, *decisions.declines, *grouping.declines))),
        tuple(sorted(values.eval_only)),
        seconds,
        tuple(writer.sketches),
        derived,
        max((unrolled.rank for unrolled in writer.unrolled), default=0),
    )
