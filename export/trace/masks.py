"""What a decoder's masks let a token see: all before it, or a sliding window of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from flora_fx.internals import unset_fake_temporarily

from .refusals import Unsuited

__all__ = ["CausalMask", "classify_mask"]


@dataclass(frozen=True)
class CausalMask:
    """Stands for the mask that a layer gets.

    Attributes:
        window: how many tokens each token sees, itself included; -1 for all before it.
    """

    window: int


def classify_mask(*, mask_function: Callable[..., Any], **_: Any) -> CausalMask:
    """What the mask that transformers would make lets a token see; called as transformers' mask functions are.

    Args:
        mask_function: (batch, head, query, key) -> whether that query may attend to that key.

    Raises:
        Unsuited: it is neither causal nor causal with a window.
    """
    from transformers import masking_utils

    if mask_function is masking_utils.causal_mask_function:
        return CausalMask(-1)
    for window in _integers_in(mask_function):
        if _is_window(mask_function, window):
            return CausalMask(window)
    raise Unsuited("its mask is neither causal nor a sliding window")


def _is_window(mask_function: Callable[..., Any], window: int) -> bool:
    from transformers import masking_utils

    with unset_fake_temporarily():  # in what runs for its shapes, too
        reference = masking_utils.sliding_window_causal_mask_function(window)
        at = torch.cat([torch.arange(8), torch.arange(max(window - 3, 0), window + 5)])
        zero = torch.tensor(0)
        pairs = [(zero, zero, q, k) for q in at for k in at]
        return all(bool(mask_function(*pair)) == bool(reference(*pair)) for pair in pairs)


def _integers_in(function: Any) -> Iterator[int]:
    """Whole numbers in a function's closure, and in those of the functions in there: a window is one of them."""
    for cell in function.__closure__ or ():
        for found in cell.cell_contents if isinstance(cell.cell_contents, tuple) else (cell.cell_contents,):
            if isinstance(found, int) and not isinstance(found, bool):
                yield found
            elif callable(found):
                yield from _integers_in(found)
