"""Packed storage: parameters as views of one weight, and the ties between them.

    before   W_q [d_q, n]   W_k [d_k, n]   A_q [r, n]          three storages
    after    pack [d_q + d_k + r, n]                           one storage
             W_q.data = pack[:d_q]   W_k.data = pack[d_q:d_q + d_k]   A_q.data = pack[d_q + d_k:]

No second copy exists: an optimizer step or `load_state_dict` on a parameter is visible in the pack at once. A tie is
fragile, though (`deepcopy`, `.to()` and `p.data = …` break it), so `stamp` says cheaply whether it still holds.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from flora_fx.errors import TieError
from flora_fx.ir import Derived, Pack, Slice

from .alone import write_alone
from .optimizers import protect_from_fused_optimizers

__all__ = [
    "TYING",
    "Resolve",
    "Stamp",
    "assemble",
    "derive",
    "guard_backward",
    "stamp",
    "stamp_derived",
    "tie",
    "version",
]

Resolve = Callable[[str | int], Tensor]

TYING = threading.RLock()
"""Held while parameters are re-pointed and what they are tied to is written down: between the two another thread may
tie the same parameters to a pack of its own. (And while a graph is rewritten, whose copies share one fake tensor mode.)
Who holds it waits for no other lock."""


def _region(packed: Tensor, piece: Slice) -> Tensor:
    """The slice's place in the pack, in the shape of its parameter: a view."""
    region = packed[slice(*piece.rows)]
    if piece.columns is not None:
        region = region[:, slice(*piece.columns)]
    return region.t() if piece.transposed else region


def _same_place(a: Tensor, b: Tensor) -> bool:
    return (
        a.untyped_storage()._cdata == b.untyped_storage()._cdata
        and a.storage_offset() == b.storage_offset()
        and a.stride() == b.stride()
        and a.shape == b.shape
    )


# The packs that are alive, by their storage: a second capture of one model finds those of the first. Whether memory
# is a pack cannot be told from the parameters alone: a gap that happens to be zero may be somebody else's.
_alive: WeakValueDictionary[int, Tensor] = WeakValueDictionary()


# What each of them was made of. A pack that holds copies is its maker's alone: what is a copy to one may be the place
# of the parameter itself to another. Without copies whoever puts parameters in the same cells may share it: what is a
# gap to one, and has to be zero, may hold a parameter of the other.
_makers: dict[int, Pack] = {}


def _existing(pack: Pack, tensors: Sequence[Tensor]) -> Tensor | None:
    """The pack that the parameters are views of already, if they are."""
    views = [(piece, tensor) for piece, tensor in zip(pack.slices, tensors, strict=True) if piece.view]
    packed = _alive.get(views[0][1].untyped_storage()._cdata) if views else None
    if packed is None or packed.shape != pack.shape:
        return None
    maker = _makers.get(packed.untyped_storage()._cdata)
    if maker is not pack and (len(views) < len(tensors) or maker is None or _cells(maker) != _cells(pack)):
        return None
    in_place = all(_same_place(_region(packed, piece), tensor.detach()) for piece, tensor in views)
    return packed if in_place else None


def _cells(pack: Pack) -> set[tuple[Any, ...]]:
    return {(piece.rows, piece.columns) for piece in pack.slices}


def _covers(pack: Pack) -> bool:
    """Whether the slices fill the pack: then nothing of it has to be zero."""
    filled = 0
    for piece in pack.slices:
        first, last = piece.columns or (0, 1 if len(pack.shape) == 1 else pack.shape[1])
        filled += (piece.rows[1] - piece.rows[0]) * (last - first)
    return filled == torch.Size(pack.shape).numel()


def _check(pack: Pack, tensors: Sequence[Tensor], lead: Tensor) -> None:
    for piece, tensor in zip(pack.slices, tensors, strict=True):
        height, width = piece.rows[1] - piece.rows[0], piece.columns or (0, pack.shape[-1])
        expected: tuple[int, ...] = (height,) if len(pack.shape) == 1 else (height, width[1] - width[0])
        if piece.transposed:
            expected = expected[::-1]
        if tuple(tensor.shape) != expected:
            raise TieError(
                f"{piece.source} has shape {list(tensor.shape)} now; the graph was fused for {list(expected)}. "
                "Capture and fuse the model again."
            )
        if tensor.device != lead.device:
            raise TieError(
                f"{piece.source} is on {tensor.device} and its pack {pack.name} on {lead.device}. "
                "Move the whole fused module to one device."
            )
        if piece.view and tensor.dtype != lead.dtype:
            raise TieError(
                f"{piece.source} is {tensor.dtype} and its pack {pack.name} {lead.dtype}. "
                "Convert the whole fused module to one dtype."
            )


def _remember(packed: Tensor, pack: Pack) -> None:
    place = packed.untyped_storage()._cdata
    _alive[place], _makers[place] = packed, pack
    weakref.finalize(packed, _makers.pop, place, None)
    write_alone(packed, pack)


@torch.inference_mode(False)  # a pack outlives the call that makes it
@torch.no_grad()
def tie(pack: Pack, resolve: Resolve) -> Tensor:
    """Store a pack's parameters in one tensor and make each of them a view of its slice.

    Parameters that are in place already are left there; scaled and cast slices are copied in afresh.

    Args:
        pack: what goes where.
        resolve: gives the parameter that a slice's source names, as it is now.

    Returns:
        the packed weight, `pack.shape`, dtype and device of the base members.

    Raises:
        TieError: a parameter has changed its shape, or the members disagree in device or dtype.
    """
    tensors = [resolve(piece.source) for piece in pack.slices]
    lead = resolve(pack.like)
    _check(pack, tensors, lead)
    packed = _existing(pack, tensors)
    if packed is None:
        packed = _empty(pack, lead)
        for piece, tensor in zip(pack.slices, tensors, strict=True):
            _region(packed, piece).copy_(tensor)
        _remember(packed, pack)
    # Only now, when nothing can fail any more, are the parameters re-pointed.
    for piece, tensor in zip(pack.slices, tensors, strict=True):
        region = _region(packed, piece)
        if piece.view:
            if not region.is_contiguous():
                protect_from_fused_optimizers()
            tensor.data = region
        else:
            region.copy_(tensor * piece.factor)
    return packed


@torch.no_grad()
def assemble(pack: Pack, resolve: Resolve) -> Tensor:
    """What `tie` stores, in memory of its own: the parameters stay where they are.

    Args:
        pack: what goes where.
        resolve: gives the live tensor of a slice's source.

    Returns:
        the packed weight, `pack.shape`, dtype and device of the base members.

    Raises:
        TieError: as `tie`.
    """
    tensors = [resolve(piece.source).detach() for piece in pack.slices]
    lead = resolve(pack.like).detach()
    _check(pack, tensors, lead)
    packed = _empty(pack, lead)
    for piece, tensor in zip(pack.slices, tensors, strict=True):
        _region(packed, piece).copy_(tensor if piece.view else tensor * piece.factor)
    return packed


def _empty(pack: Pack, like: Tensor) -> Tensor:
    make = torch.empty if _covers(pack) else torch.zeros
    return make(pack.shape, dtype=like.dtype, device=like.device)


@dataclass(frozen=True)
class Stamp:
    """What stays the same as long as a tie holds: where the parameters are, and the versions of those copied."""

    places: tuple[int, ...]
    versions: tuple[int, ...]


def stamp(pack: Pack, resolve: Resolve) -> Stamp:
    """The present stamp of a pack's parameters; some 100 ns for each (2 CPU cores, torch 2.13)."""
    tensors = [resolve(piece.source) for piece in pack.slices]
    copied = (tensor for piece, tensor in zip(pack.slices, tensors, strict=True) if not piece.view)
    return Stamp(
        tuple([tensor.data_ptr() for tensor in tensors]),
        tuple([version(tensor) for tensor in copied]),
    )


@torch.inference_mode(False)
@torch.no_grad()
def derive(derived: Derived, resolve: Resolve) -> Tensor:
    """Compute a derived value from its parameters' present values, as the graph computed it.

    Args:
        derived: what is computed.
        resolve: gives the parameter that a source names, as it is now.

    Returns:
        the value, with the dtype and device of the parameter that ``derived.like`` names.
    """
    lead = resolve(derived.like)
    pairs = zip(derived.sources, derived.given, strict=True)
    tensors = [_as_given(resolve(source).detach(), lead, *given) for source, given in pairs]
    with torch.autocast(lead.device.type, enabled=False):
        value: Tensor = derived.recipe(*tensors)
    return value.to(lead.device, lead.dtype).clone(memory_format=torch.contiguous_format)


def _as_given(tensor: Tensor, lead: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    return tensor.to(lead.device if lead.device.type == "meta" else device, dtype)


def stamp_derived(derived: Derived, resolve: Resolve) -> Stamp:
    """The present stamp of a derived value's parameters."""
    tensors = [resolve(source) for source in derived.sources]
    return Stamp(tuple([tensor.data_ptr() for tensor in tensors]), tuple(map(version, tensors)))


def guard_backward(outputs: Iterable[Tensor], parameters: Sequence[Tensor]) -> None:
    """Refuse a backward through packs whose parameters were changed since the forward.

    Autograd does so for the weights that it saved. Here it saved packs, whose versions do not count what is done to
    their parameters.

    Args:
        outputs: of the forward.
        parameters: the packs' members.
    """
    functions = {output.grad_fn for output in outputs if output.grad_fn is not None}
    if not functions:
        return
    versions = [*map(version, parameters)]

    def check(_: Any) -> None:
        if [*map(version, parameters)] != versions:
            raise TieError(
                "a parameter that the backward needs was changed in place after the forward. "
                "Call backward() before the optimizer's step()."
            )

    for function in functions:
        function.register_prehook(check)


def version(tensor: Tensor) -> int:
    """Counts the changes in place; tensors made in inference mode do not count them."""
    return 0 if tensor.is_inference() else tensor._version
