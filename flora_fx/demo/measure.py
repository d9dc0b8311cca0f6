"""Measure contenders side by side: shuffled rounds, ratios within a round, medians with an interval.

Two runs of one program on a shared machine easily differ by more than an adapter costs. What does not drift
is the ratio of two calls made a few milliseconds apart, so every round calls every contender once, in a new
order, and only ratios within a round are compared. The interval holds the median of the ratios with 95%
confidence and assumes nothing about how they are distributed (order statistics).
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Timing", "compare", "median_interval"]


@dataclass(frozen=True)
class Timing:
    """What one contender took.

    Attributes:
        milliseconds: the median of its calls.
        ratio: the median of its ratios to the reference in the same round.
        low: lower end of the ratio's 95% interval.
        high: upper end of the ratio's 95% interval.
    """

    milliseconds: float
    ratio: float
    low: float
    high: float


def compare(
    contenders: Mapping[str, Callable[[], object]],
    *,
    reference: str,
    rounds: int,
    seed: int = 0,
    warm_up: int = 3,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Timing]:
    """Time every contender once a round, in shuffled order, and relate it to the reference of that round.

    Args:
        contenders: what to call, by name.
        reference: the name of the one that ratios are taken to.
        rounds: how many times each is measured; the interval needs at least 6 to mean 95%.
        seed: of the order.
        warm_up: calls of each before the first measured one.
        progress: called after each round with the rounds done and in all.

    Returns:
        A `Timing` per contender, in their order.

    >>> add = {"few": lambda: sum(range(9)), "many": lambda: sum(range(99_999))}
    >>> timings = compare(add, reference="few", rounds=9)
    >>> timings["few"].ratio, timings["many"].ratio > 2
    (1.0, True)
    """
    order = random.Random(seed)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():
        for _ in range(warm_up):
            call()
    for done in range(rounds):
        for name in order.sample(list(contenders), len(contenders)):
            start = time.perf_counter()
            contenders[name]()
            seconds[name].append(time.perf_counter() - start)
        progress(done + 1, rounds)
    timings = {}
    for name, own in seconds.items():
        ratios = [a / b for a, b in zip(own, seconds[reference], strict=True)]
        low, high = median_interval(ratios)
        timings[name] = Timing(1e3 * statistics.median(own), statistics.median(ratios), low, high)
    return timings


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """The two order statistics between which the median lies with (at least about) 95% confidence.

    >>> median_interval(range(1, 101))
    (40, 61)
    """
    ordered, n = sorted(values), len(values)
    skip = max(0, math.floor(n / 2 - 0.98 * math.sqrt(n)) - 1)
    return ordered[skip], ordered[n - 1 - skip]
