"""FFBA adapters beside the LoRA: each of the largest rank that has no more parameters than the LoRA."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from torch import nn

__all__ = ["Placement", "adapter", "largest_rank", "note"]

Placement = Literal["block", "shared"]
"""See `flora_fx.adapters.FloraConfig`; on attention and MLP of every layer, without an activation."""


def adapter(placement: Placement, rank: int) -> Any:
    """The `FloraConfig` of a model: scaled by 2 and with a B that is not zero, as the LoRA's."""
    from flora_fx.adapters import FloraConfig

    return FloraConfig(r=rank, alpha=2 * rank, placement=placement, init="random", task_type="CAUSAL_LM")


def largest_rank(placement: Placement, base: nn.Module, parameters: int) -> int:
    """The largest rank that a budget buys.

    Args:
        placement: of the adapter.
        base: the model without one; the meta device will do.
        parameters: the budget.

    Raises:
        AdapterError: the budget does not buy rank 1.
    """
    from flora_fx.adapters import rank_for_budget

    return rank_for_budget(base, adapter(placement, 1), parameters=parameters)


def note(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """A sentence with the ranks in rows of results, each under ``ffba``; none where no row has one.

    >>> note([{"variant": "base"}, {"variant": "FFBA block", "ffba": {"placement": "block", "rank": 70}}])
    ['FFBA block has rank 70: the largest with no more parameters than the LoRA.']
    """
    ranks = {row["ffba"]["placement"]: row["ffba"]["rank"] for row in rows if "ffba" in row}
    if not ranks:
        return []
    said = ", ".join(f"{placement} has rank {rank}" for placement, rank in ranks.items())
    return [f"FFBA {said}: the largest with no more parameters than the LoRA."]
