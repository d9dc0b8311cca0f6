"""Whether what was to be compiled runs compiled, and whether anything was compiled meanwhile."""

from __future__ import annotations

import torch

from flora_fx.measuring.method import Call

__all__ = ["compilations", "was_compiled"]


def was_compiled(call: Call) -> bool:
    """Whether a call runs one compiled region and no model code beside it, as a profile of it shows.

    Neither Dynamo's counters nor the callable's type tell: past its recompile limit a compiled function runs in eager
    mode without a word.

    >>> was_compiled(lambda: torch.nn.functional.linear(torch.ones(2, 3), torch.ones(4, 3)))
    False
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    names = [event.key for event in profile.key_averages()]
    regions = [name for name in names if name.startswith("Torch-Compiled Region")]
    return len(regions) == 1 and "aten::linear" not in names


def compilations() -> int:
    """How many graphs Dynamo has compiled in this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
