"""A run of a model for its shapes: weights are not read, nothing is computed.

A model that was loaded from a file is a mapping of that file: what no one reads takes no memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from flora_fx.internals import FakeTensor, FakeTensorMode

from .refusals import first_line

__all__ = ["for_shapes", "is_large"]

T = TypeVar("T")

log = logging.getLogger(__name__)


_LARGE = 2**30


def is_large(model: nn.Module, dtype: torch.dtype | None = None) -> bool:
    """Whether a model is run for its shapes alone: from 1 GiB of parameters on, in its dtype or another one."""
    return sum(p.numel() * (dtype or p.dtype).itemsize for p in model.parameters()) >= _LARGE


def for_shapes(model: nn.Module, run: Callable[[], T]) -> T:
    """What a run gives that looks at no number.

    It is run with its numbers, where it looks at some, or the model is small: that is a few times faster, and a model
    of 1 GiB is no longer small.

    Args:
        model: whose weights are not read.
        run: runs it, and may be called twice.
    """
    if not is_large(model):
        return run()
    try:
        with _nothing_left(model), FakeTensorMode(allow_non_fake_inputs=True):
            return run()
    except Exception as error:  # whatever comes of numbers that are not there; what comes of anything else comes again
        log.debug("run with its numbers: %s", first_line(error))
    return run()


@contextmanager
def _nothing_left(model: nn.Module) -> Iterator[None]:
    """What a run without numbers keeps in the model for the next one, such as frequencies, has none either."""
    holders: list[dict[str, Any]] = [holder for part in model.modules() for holder in (part._buffers, vars(part))]
    before = [dict(holder) for holder in holders]
    try:
        yield
    finally:
        for holder, old in zip(holders, before, strict=True):
            for name in [name for name, value in holder.items() if isinstance(value, FakeTensor)]:
                if name in old:
                    holder[name] = old[name]
                else:
                    del holder[name]
