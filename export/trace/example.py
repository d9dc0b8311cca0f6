"""What a model can be captured with: inputs whose sizes tell its dimensions apart, found by running it.

given          input_ids [2, 7], attention_mask [2, 7], pixel_values [2, 3, 32, 32]
one row more   input_ids alone: fails; with attention_mask: runs; pixel_values alone: runs
so             input_ids [2, 7], attention_mask [2, 7], pixel_values [3, 3, 32, 32]    two batches
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from .text_config import text_config

__all__ = ["Run", "grown", "linked", "other_sizes", "padded", "resized", "runs", "tell_apart", "token_ids", "varied"]

Run = Callable[[Mapping[str, Tensor]], object]
"""Runs a model on inputs by name."""


def token_ids(model: nn.Module, rows: int, length: int) -> Tensor:
    """Token ids [rows, length] on a model's device, each another one as far as the vocabulary goes.

    To torch.export sizes 0 and 1 are special, and sizes that are equal are one: pass others.
    """
    device = next(model.parameters()).device
    return torch.arange(rows * length, device=device).reshape(rows, length) % text_config(model).vocab_size


def linked(run: Run, inputs: Mapping[str, Tensor]) -> list[tuple[str, ...]]:
    """The names of inputs whose batches must be equal, in the inputs' order.

    A group may have other numbers of rows than the rest where the model runs with more rows of it, and with more of the
    rest: a mask that has rows too many may go unnoticed. Inputs [batch, sequence] of one shape are of the same texts.

    Args:
        run: the model.
        inputs: that it runs on; none has a batch of 1, which would be broadcast.
    """
    left: list[tuple[str, ...]] = []
    texts: dict[tuple[int, ...], list[str]] = {}
    for name, value in inputs.items():
        texts.setdefault(tuple(value.shape) if value.dim() == 2 else (id(value),), []).append(name)
    left = [tuple(names) for names in texts.values()]
    groups: list[tuple[str, ...]] = []
    while left:
        groups.append(next(group for group in _unions(left) if _stands_alone(run, inputs, group, left)))
        left = [names for names in left if not set(names) <= set(groups[-1])]
    return groups


def _unions(parts: Sequence[tuple[str, ...]]) -> Iterable[tuple[str, ...]]:
    """Of the first part with others, smaller ones first."""
    for count in range(len(parts)):
        for chosen in itertools.combinations(parts[1:], count):
            yield tuple(itertools.chain(parts[0], *chosen))


def _stands_alone(
    run: Run, inputs: Mapping[str, Tensor], group: tuple[str, ...], left: Sequence[tuple[str, ...]]
) -> bool:
    if set(group) == set(itertools.chain(*left)):
        return True
    return all(runs(run, grown(inputs, names)) for names in (group, inputs.keys() - set(group)))


def runs(run: Run, inputs: Mapping[str, Tensor]) -> bool:
    """Whether a model takes inputs of such sizes."""
    try:
        with torch.no_grad():
            run(inputs)
    except Exception:  # whatever a model raises
        return False
    return True


def grown(inputs: Mapping[str, Tensor], names: Iterable[str], rows: int = 1) -> dict[str, Tensor]:
    """Inputs, some of them with more rows."""
    return {name: resized(value, 0, len(value) + rows) if name in names else value for name, value in inputs.items()}


def resized(value: Tensor, axis: int, size: int) -> Tensor:
    """The entries along an axis, as often as it takes.

    >>> resized(torch.tensor([[1, 2, 3]]), 1, 5)
    tensor([[1, 2, 3, 1, 2]])
    """
    return value.index_select(axis, torch.arange(size, device=value.device) % value.shape[axis])


def tell_apart(run: Run, inputs: Mapping[str, Tensor], groups: Sequence[tuple[str, ...]]) -> dict[str, Tensor]:
    """Inputs with as many rows as no other group has, and texts of lengths that no other group has, where that runs."""
    rows: set[int] = set()
    lengths: dict[int, int] = {}  # the group that each length is of
    found = dict(inputs)
    for index, group in enumerate(groups):
        size = len(found[group[0]])
        more = next(count for count in itertools.count() if size + count not in rows)
        found = grown(found, group, more)
        rows.add(size + more)
        for length in dict.fromkeys(found[name].shape[1] for name in group if found[name].dim() == 2):
            if lengths.setdefault(length, index) == index:
                continue
            other = next(size for size in itertools.count(length + 2) if size not in lengths)
            longer = with_length(found, group, length, other)
            if runs(run, longer):
                found = longer
                lengths[other] = index
    return found


def with_length(inputs: Mapping[str, Tensor], group: Iterable[str], length: int, other: int) -> dict[str, Tensor]:
    """Inputs, those of a group that are so long with another length."""
    return {
        name: resized(value, 1, other) if name in group and value.dim() > 1 and value.shape[1] == length else value
        for name, value in inputs.items()
    }


def other_sizes(run: Run, inputs: Mapping[str, Tensor], groups: Sequence[tuple[str, ...]]) -> dict[str, Tensor]:
    """Inputs of other sizes than these, so that a check finds what a capture took for constant: rows, and lengths."""
    found = dict(inputs)
    for group in groups:
        found = grown(found, group)
        for length in dict.fromkeys(found[name].shape[1] for name in group if found[name].dim() == 2):
            for other in (length + max(length // 3, 2), length - 1):
                if other > 1 and runs(run, changed := with_length(found, group, length, other)):
                    found = changed
                    break
    return found


def padded(run: Run, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inputs whose second row is shorter, if an attention mask may say so: one that is all ones may not be read."""
    mask = inputs.get("attention_mask")
    if mask is None or mask.dim() != 2 or not bool(mask.all()):
        return dict(inputs)
    mask = mask.clone()
    mask[1, -(mask.shape[1] * 4 // 9) :] = 0
    return shorter if runs(run, shorter := {**inputs, "attention_mask": mask}) else dict(inputs)


def varied(run: Run, inputs: Mapping[str, Tensor], vocab_size: int) -> dict[str, Tensor]:
    """Inputs with other values, as far as the model takes them: random numbers and tokens, rows that are padded."""
    random = torch.Generator().manual_seed(0)

    def noisy(name: str, value: Tensor) -> Tensor:
        noise = torch.randn(value.shape, generator=random, dtype=torch.float32)
        return noise.to(value) if value.is_floating_point() else value

    def reworded(name: str, value: Tensor) -> Tensor:
        if name != "input_ids" or not vocab_size:
            return value
        return torch.randint(0, vocab_size, value.shape, generator=random).to(value)

    found = padded(run, inputs)
    for change in (noisy, reworded):
        changed = {name: change(name, value) for name, value in found.items()}
        found = changed if runs(run, changed) else found
    return found
