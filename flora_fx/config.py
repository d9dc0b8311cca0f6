"""What `flora_fx.fuse` may choose, and the measured defaults."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args, get_type_hints

__all__ = ["FuseConfig"]

Layout = Literal["joined", "beside", "ahead"]
Up = Literal["block_diagonal", "per_projection"]
Accumulate = Literal["addmm", "add", "unrolled"]
Write = Literal["widened", "accumulated"]


@dataclass(frozen=True, kw_only=True)
class FuseConfig:
    """The forms a fused graph may take. All of them compute the same; they cost differently per runner.

    The defaults need the fewest launches. ``python -m benchmarks layouts`` measures the forms beside each other, and
    docs/benchmarks.md says which is fastest where.

    Attributes:
        layout: where the down-projections of a pack stand. ``"joined"``: as rows under the base weights, one GEMM for
            both. ``"beside"``: in a pack of their own, two GEMMs and no slice between base and down rows.
            ``"ahead"``: beside, and run first, so that with ``write="widened"`` LoRA's up-projections are further input
            columns of their bases, ``[W, B] [x; z]``, too: no accumulation at all. Down-projections that only others
            wait for (FFBA) join the rows of several bases, which are sliced anyway.
        up: ``"block_diagonal"``: the up-projections that write into one pack are one block-diagonal GEMM (fewer
            launches, some zero work). ``"per_projection"``: one GEMM each (no zero work); always so where an
            up-projection requires gradients.
        accumulate: ``"addmm"``: ``y + s·B z`` as one accumulating GEMM, nothing elementwise left in the graph.
            ``"add"``: a GEMM and an add, for runners that fuse the add with what follows or before. ``"unrolled"``: a
            product and a sum over the rank, in float32 where the dtype is smaller: for Inductor, which makes it a part
            of the kernel that reads the sum, so that it is no launch at all (with ``unroll_reductions_threshold`` above
            the rank); every other runner stores the product first. Each B is apart, as with ``up="per_projection"``,
            and stands transposed, [rank, out], unless it requires gradients. Ranks above 32, with up to 16 rows above
            64, take ``"add"``.
        write: how an up-projection joins a projection that computes what it is added to, where its low-rank value is
            there before that projection runs (FFBA; LoRA with ``layout="ahead"``). ``"widened"``: as further input
            columns, ``[W, B] [u; z]``, one GEMM; not where one of them requires gradients, since columns of a wider
            matrix are strided. ``"accumulated"``: a GEMM of its own.
        fold_scale: multiply a constant scale into a copy of B instead of keeping it beside the GEMM; the copy is
            refreshed whenever B changes. Where a B requires gradients nothing is folded.
        pack_base: also pack projections that read one value where no adapter sits.
        allow_cast: join adapters of another dtype than their base by casting copies of them to the base's dtype.
            This changes rounding; without it, and where they require gradients, such adapters pack among themselves
            only.

    >>> FuseConfig(layout="beside").layout
    'beside'
    """

    layout: Layout = "joined"
    up: Up = "block_diagonal"
    accumulate: Accumulate = "addmm"
    write: Write = "widened"
    fold_scale: bool = False
    pack_base: bool = False
    allow_cast: bool = False

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in fields(self):
            value, hint = getattr(self, field.name), hints[field.name]
            allowed = get_args(hint) or (True, False)
            if value not in allowed or type(value) is not type(allowed[0]):
                choices = ", ".join(map(repr, allowed))
                raise ValueError(f"FuseConfig.{field.name} is {value!r}; it must be one of {choices}")
