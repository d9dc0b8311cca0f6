"""Peak memory of a call, in bytes of tensors.

On a GPU torch's caching allocator counts. On a CPU nothing does, so this adds up what is alive (the storages of all
tensors that Python knows) and what the profiler sees allocated and released during the call. That is exact and the same
in every run, which the resident memory of a process is not.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from .trace import trace

__all__ = ["added_bytes", "live_bytes", "resident_bytes", "tracked"]


def live_bytes(device: str) -> int:
    """Bytes of all tensors of this process; views of one storage count once.

    >>> before = live_bytes("cpu")
    >>> weight = torch.zeros(100, 30)
    >>> rows, columns = weight[:50], weight.t()
    >>> live_bytes("cpu") - before
    12000
    """
    with _frozen(False):  # what is frozen is not among `gc.get_objects()`
        for _ in range(3):  # what a finaliser lets go of is found the next time
            if not gc.collect():
                break
        if device == "cuda":
            torch.cuda.synchronize()
            return torch.cuda.memory_allocated()
        found = (one for one in gc.get_objects() if issubclass(type(one), Tensor) and one.layout is torch.strided)
        return sum(
            {_address(held): held.nbytes() for held in map(Tensor.untyped_storage, found) if _address(held)}.values()
        )


@contextmanager
def _frozen(meanwhile: bool) -> Iterator[None]:
    """All that there is is frozen, or nothing is; then again as before."""
    before = gc.get_freeze_count() > 0
    (gc.freeze if meanwhile else gc.unfreeze)()
    try:
        yield
    finally:
        if before != meanwhile:
            (gc.freeze if before else gc.unfreeze)()


def _address(storage: torch.UntypedStorage) -> int:
    """Where a storage is in the CPU's memory; 0 for what is not there, such as a compiler's fake tensors."""
    try:
        return storage.data_ptr() if storage.device.type == "cpu" else 0
    except RuntimeError:  # those of functional tensors say that they are, and have no memory
        return 0


def added_bytes(call: Callable[[], object], device: str) -> int:
    """The most bytes of tensors that are alive at any moment of a call, above those that were before it.

    Args:
        call: run once; warm it up first, if compiling or lazy states are not what is asked for.
        device: ``cpu`` or ``cuda``.

    On a CPU the release of memory that was allocated earlier is seen only if that happened in `tracked`. What was there
    before and is garbage by then is not collected meanwhile: when the collector runs is chance.

    >>> def call():
    ...     first = torch.empty(1000)
    ...     del first
    ...     second, third = torch.empty(2000), torch.empty(500)
    >>> added_bytes(call, "cpu")
    10000
    """
    with _frozen(True):  # old garbage stays
        if device == "cuda":
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            call()
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - before
        events = [event for event in trace(call, device, memory=True) if event["name"] == "[memory]"]
    changes = (int(event["args"]["Bytes"]) for event in sorted(events, key=lambda event: float(event["ts"])))
    return max(accumulate(changes, initial=0))


def resident_bytes() -> int:
    """Memory that this process holds, whatever is in it: a figure to see growth in, not to compare programs by.

    >>> resident_bytes() > 10e6
    True
    """
    import resource  # Windows has none

    statm = Path("/proc/self/statm")  # of Linux; elsewhere the most that there was
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@contextmanager
def tracked() -> Iterator[None]:
    """Have the CPU's allocator remember the size of what is allocated meanwhile, so that its release is seen later.

    >>> with tracked():
    ...     old = [torch.empty(1000)]
    >>> def replace():
    ...     old[:] = []
    ...     old[:] = [torch.empty(1500)]
    >>> added_bytes(replace, "cpu")
    2000
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True):
        yield
