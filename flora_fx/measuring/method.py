"""How everything is measured.

- Contenders run in one process and take turns: every round calls each of them once, in a new order. What drifts (other
  users of the machine, clocks, caches) hits all of them; only ratios within a round are compared.
- A figure is the median of those ratios. Its interval is a bootstrap over *passes* (a pass is one prompt and the tokens
  after it), since neighbouring rounds are not independent, and over processes where there are several: another process
  means other addresses for all weights, which alone moves a ratio by some percent, so each makes its contenders in an
  order of its own.
- A ratio is refused, not printed, when a contender's outputs differ from a float64 reference by more than its dtype
  explains (see `benchmarks/measure/tolerances.py`), when it was to be compiled and a profile shows that it was not, or
  when something was compiled while the clock ran.
- Threads of ONNX Runtime's sessions stop waiting when a run is over (see `sessions`). PyTorch's go on for milliseconds:
  where both runtimes are compared, each has turns of its own.
- On a GPU the time is between two CUDA events, and the L2 cache is overwritten before each call. On a CPU the turns do
  the same for models that exceed the last cache together.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "Call",
    "Clock",
    "Timing",
    "bandwidth",
    "compare",
    "difference",
    "interval",
    "paired",
    "pinned",
    "take_turns",
]

Call = Callable[[], object]


class Clock:
    """Milliseconds of a call on a device.

    Args:
        device: ``cpu`` or ``cuda``.

    >>> Clock("cpu")(lambda: sum(range(1000))) > 0
    True
    """

    def __init__(self, device: str) -> None:
        self._flush: Tensor | None = None
        if device == "cuda":
            size = 2 * torch.cuda.get_device_properties(0).L2_cache_size
            self._flush = torch.empty(size, dtype=torch.int8, device="cuda")

    def __call__(self, call: Call) -> float:
        if self._flush is None:
            start = time.perf_counter_ns()
            call()
            return (time.perf_counter_ns() - start) / 1e6
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        torch.cuda.synchronize()
        before.record()
        call()
        after.record()
        torch.cuda.synchronize()
        return before.elapsed_time(after)


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


def take_turns(calls: Mapping[str, Call], clock: Clock, order: random.Random) -> dict[str, float]:
    """One round: each call once, in a new order; milliseconds by name."""
    names = list(calls)
    order.shuffle(names)
    taken = {name: clock(calls[name]) for name in names}
    return {name: taken[name] for name in calls}


def interval(draws: Tensor) -> tuple[float, float]:
    """The ends of the 95% interval of a bootstrap.

    Args:
        draws: what the statistic was in each draw, float64.

    >>> interval(torch.arange(1001, dtype=torch.float64))
    (25.0, 975.0)
    """
    low, high = draws.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def paired(
    samples: Sequence[Sequence[float]], reference: Sequence[Sequence[float]], *, processes: int = 1, seed: int = 0
) -> Timing:
    """Relate a contender to the reference, round by round.

    Args:
        samples: milliseconds, a list of rounds per pass. The bootstrap draws processes, then passes of each.
        reference: the same rounds of the reference.
        processes: from how many the passes come, in equal parts, one after the other.
        seed: of the bootstrap.

    >>> paired([[2.0, 4.0], [6.0, 8.0]], [[1.0, 2.0], [3.0, 4.0]])
    Timing(milliseconds=5.0, ratio=2.0, low=2.0, high=2.0)
    """
    ratios = torch.tensor(samples, dtype=torch.float64) / torch.tensor(reference, dtype=torch.float64)
    draws = torch.Generator().manual_seed(seed)
    passes = len(ratios) // processes
    process = torch.randint(processes, (1000, processes, 1), generator=draws)
    chosen = process * passes + torch.randint(passes, (1000, processes, passes), generator=draws)
    medians = torch.stack([ratios[rows.flatten()].flatten().quantile(0.5) for rows in chosen])
    low, high = interval(medians)
    middle = statistics.median(value for row in samples for value in row)
    return Timing(middle, ratios.flatten().quantile(0.5).item(), low, high)


def compare(
    contenders: Mapping[str, Call],
    *,
    reference: str,
    rounds: int,
    device: str = "cpu",
    seed: int = 0,
    warm_up: int = 3,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Timing]:
    """Time calls that do the same in every round; each round is a pass of its own.

    Args:
        contenders: what to call, by name.
        reference: the name of the one that ratios are taken to.
        rounds: how many times each is measured.
        device: ``cpu`` or ``cuda``.
        seed: of the order.
        warm_up: calls of each before the first measured one.
        progress: called after each round with the rounds done and in all.

    Returns:
        A `Timing` per contender, in their order.

    >>> sums = {"few": lambda: sum(range(9)), "many": lambda: sum(range(99_999))}
    >>> timings = compare(sums, reference="few", rounds=9)
    >>> timings["few"].ratio, timings["many"].ratio > 2
    (1.0, True)
    """
    clock, order = Clock(device), random.Random(seed)
    for call in contenders.values():
        for _ in range(warm_up):
            call()
    samples: dict[str, list[list[float]]] = {name: [] for name in contenders}
    for done in range(rounds):
        for name, taken in take_turns(contenders, clock, order).items():
            samples[name].append([taken])
        progress(done + 1, rounds)
    return {name: paired(taken, samples[reference]) for name, taken in samples.items()}


@contextmanager
def pinned(threads: int) -> Iterator[None]:
    """So many CPU threads in torch, for the time being."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def difference(output: Tensor, expected: Tensor) -> float:
    """‖output − expected‖ / ‖expected‖ in float64.

    >>> difference(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5]))  # doctest: +ELLIPSIS
    0.0924...
    """
    output, expected = output.detach().cpu().double(), expected.cpu().double()
    if output.shape != expected.shape:
        return float("inf")
    return (torch.linalg.vector_norm(output - expected) / torch.linalg.vector_norm(expected)).item()


def bandwidth(device: str, *, dtype: torch.dtype = torch.float32) -> float:
    """Bytes per second that weights can be streamed at, measured: the best of several ways to read 512 MiB.

    Args:
        device: ``cpu`` or ``cuda``.
        dtype: of the weights.
    """
    rows = 2**29 // dtype.itemsize // 4096
    weights = torch.ones(rows, 4096, dtype=dtype, device=device)
    vector = torch.ones(4096, dtype=dtype, device=device)
    clock = Clock(device)
    ways: list[Any] = [lambda: torch.mv(weights, vector), lambda: weights.sum()]
    best = min(clock(way) for _ in range(8) for way in ways)
    return weights.numel() * dtype.itemsize / best * 1e3
