"""Settle in which forms the accepted paths are written: those asked for, where weights that train allow them.

fold_scale    not where an up-projection trains: a scaled copy would go stale with the next step
up            per projection where one requires gradients, and for ``"unrolled"``
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from flora_fx.config import FuseConfig
from flora_fx.passes.context import Context

from .decide import Decisions

__all__ = ["Forms", "settle_forms"]


@dataclass(frozen=True)
class Forms:
    """The forms that are written.

    Attributes:
        config: the forms.
        trains: whether gradients of an up-projection are wanted.
    """

    config: FuseConfig
    trains: bool


def settle_forms(context: Context) -> Forms:
    """The forms for the paths that were accepted."""
    config = context.config
    ups = [path.up.weight for path in context[Decisions].paths]
    trains = context.program.trains(ups)
    if trains:
        config = replace(config, fold_scale=False)
    if config.accumulate == "unrolled" or any(up.tensor.requires_grad for up in ups):
        # Unrolled, the zeros of a block-diagonal matrix would be loads and products. Its columns are strided, too, and
        # torch's fused optimizers write past strided parameters on a CPU (2.13): whoever trains it must find it dense.
        config = replace(config, up="per_projection")
    return Forms(config, trains)
