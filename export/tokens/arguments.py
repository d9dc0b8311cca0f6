"""What callers pass, checked and in one form."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["integers", "padding_mask", "token_ids", "tokens"]

_SINGLE = ("pad_token_id", "forced_bos_token_id")
"""The arguments that are one token id."""


def integers(name: str, value: Any) -> Tensor:
    """A tensor of integers as int64 on the CPU.

    Raises:
        TypeError: something else.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; it must be a torch.Tensor of integers")
    if value.is_floating_point() or value.is_complex():
        raise TypeError(f"{name} has dtype {value.dtype}; it must hold integers")
    return value.detach().to("cpu", torch.int64)


def tokens(name: str, value: Any, vocab_size: int) -> Tensor:
    """Prompts [batch, prompt] as int64 on the CPU.

    Args:
        name: of the argument.
        value: what was passed for it.
        vocab_size: its tokens are below; 0 where that is not known.

    Raises:
        TypeError, ValueError: of the wrong type or shape, empty, or tokens outside of the vocabulary.
    """
    ids = integers(name, value)
    if ids.dim() != 2:
        raise ValueError(f"{name} has shape {list(ids.shape)}; it must be [batch, prompt]")
    if ids.numel() == 0:
        raise ValueError(f"{name} has shape {list(ids.shape)}; the prompt must hold at least one token")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (vocab_size and high >= vocab_size):
        raise ValueError(f"{name} holds {low if low < 0 else high}; the tokens of this model are 0 to {vocab_size - 1}")
    return ids


def padding_mask(value: Any, ids: Tensor, of: str = "input_ids") -> Tensor:
    """The ``attention_mask`` of ``input_ids`` [batch, prompt] as int64 on the CPU; all ones for None.

    Args:
        value: what was passed for it.
        ids: of the shape that it must have.
        of: what it is the mask of.

    Raises:
        TypeError, ValueError: of the wrong type or shape, or other values than 0 and 1.
    """
    if value is None:
        return torch.ones_like(ids)
    mask = integers("attention_mask", value)
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask has shape {list(mask.shape)}; it must be that of {of}, {list(ids.shape)}")
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError("attention_mask holds other values than 0 and 1")
    return mask


def token_ids(name: str, value: Any, vocab_size: int = 0) -> list[int]:
    """One token id or several, as a list.

    Args:
        name: of the argument.
        value: what was passed for it.
        vocab_size: they must be below; 0 where that does not matter.

    Raises:
        TypeError, ValueError: something else, or a token outside of the vocabulary.
    """
    ids = [value] if isinstance(value, int) or not isinstance(value, Iterable) else list(value)
    if any(isinstance(token, bool) or not isinstance(token, int) for token in ids):
        several = "" if name in _SINGLE else " or a list of them"
        raise TypeError(f"{name} is {value!r}; it must be a token id{several}")
    for token in ids:
        if vocab_size and not 0 <= token < vocab_size:
            raise ValueError(f"{name} holds {token}; the tokens of this model are 0 to {vocab_size - 1}")
    return ids
