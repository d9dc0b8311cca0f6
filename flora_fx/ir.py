"""The vocabulary of the passes: what is looked for, what is decided, what is written.

A *projection* is a linear node. A *low-rank path* reads a value, goes down through one projection and up through
another, and is added onto a third value. A *pack* stores projections that read one value as one weight; a *slice* is
the part of a pack that one parameter owns. A *decline* is a refusal with its reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum

import torch
from torch.fx import GraphModule, Node

__all__ = [
    "Choice",
    "Decline",
    "Derived",
    "Factor",
    "Held",
    "LowRankPath",
    "Pack",
    "Projection",
    "Reason",
    "Role",
    "Select",
    "Slice",
    "Weight",
]


class Role(Enum):
    """What a slice of a pack is."""

    BASE = "base"
    DOWN = "down"
    UP = "up"


class Reason(Enum):
    """Why a candidate was not fused, or not fused all the way."""

    WEIGHT_SHARED = "the weight is shared with another use"
    WEIGHT_NOT_DENSE = "the weight is quantized, sparse or a tensor subclass"
    MEMORY_MANAGED = "the weight's memory is managed elsewhere"
    DTYPE_DIFFERS = "the adapter has another dtype than what it is added to"
    DROPOUT_ACTIVE = "dropout is active"
    SCALE_NOT_SCALAR = "the scale is not known to be one number per token"
    NOT_BY_TOKEN = "the adapter is not known to be selected by token, with zeros elsewhere"
    OTHER_READER = "an intermediate value has another reader"
    READS_ANOTHER_VALUE = "no base that could share a pack reads what the adapter reads"
    MUTATED = "a value is changed in place, or its memory layout is read"
    OTHER_MODE = "autocast or the recording of gradients is switched in between"
    SHAPE_UNKNOWN = "the shapes are not known to agree"
    WEIGHT_COMPUTED = "the weight is computed at each call"
    NOT_LOW_RANK = "what is added to a layer is no pair of linear layers"


@dataclass(frozen=True)
class Decline:
    """A refusal: why, at which node, and a sentence for the reader."""

    reason: Reason
    node: str
    detail: str

    def __str__(self) -> str:
        return f"{self.node}: {self.reason.value}: {self.detail}"


@dataclass(frozen=True, eq=False)
class Weight:
    """A parameter or buffer as the graph sees it.

    Attributes:
        source: its fully qualified name in the graph module or exported program, or the index of the graph input that
            brings it (Dynamo).
        tensor: the parameter or buffer itself, not a copy.
        node: the node that reads it in the graph; None while it is hidden in a module that the graph calls.
        transposed: stored as [in, out] (transformers' Conv1D) instead of [out, in].
        label: its name for readers, where the source is no name.
        manager: who fills its memory anew for each forward (FSDP), so that it must not move.
    """

    source: str | int
    tensor: torch.Tensor
    node: Node | None
    transposed: bool = False
    label: str = ""
    manager: str = ""

    @property
    def name(self) -> str:
        """How readers know it."""
        return self.label or str(self.source)

    @property
    def matrix(self) -> torch.Tensor:
        """The weight as [out, in], a view."""
        return self.tensor.t() if self.transposed else self.tensor


@dataclass(frozen=True, eq=False)
class Held:
    """How a projection's weight is held quantized: what its operator takes beside the codes.

    Attributes:
        scales, zeros, order, kind, bits, block: as `flora_fx.quantized.QuantizedWeight` has them.
        shape: of the weight, (out, in).
        dtype: that it computes in.
    """

    scales: Weight
    zeros: Weight | None
    order: Weight | None
    kind: str
    bits: int
    block: int
    shape: tuple[int, int]
    dtype: torch.dtype

    @property
    def stored(self) -> tuple[Weight, ...]:
        """What stands in packs beside the codes; an order is the same for all."""
        return (self.scales,) if self.zeros is None else (self.scales, self.zeros)


@dataclass(frozen=True, eq=False)
class Projection:
    """A linear node: ``node = reads @ weightᵀ + bias``.

    Attributes:
        node: the node whose value is the projection's output, [..., out].
        reads: the value read, [..., in]: the earliest node that equals it, up to flattening of leading dimensions.
        operand: the node actually given to the linear.
        cast_to: where the user allowed a cast, the weight whose dtype its own is copied in.
        obstacle: why its weight may not move and its node may not be rewritten.
        held: how its weight is held quantized; ``weight`` is its codes then.
    """

    node: Node
    reads: Node
    operand: Node
    weight: Weight
    bias: Weight | None
    cast_to: Weight | None = None
    obstacle: Decline | None = None
    held: Held | None = None

    @property
    def out_features(self) -> int:
        return self.held.shape[0] if self.held else int(self.weight.matrix.shape[0])

    @property
    def in_features(self) -> int:
        return self.held.shape[1] if self.held else int(self.weight.matrix.shape[1])

    @property
    def stored_like(self) -> Weight:
        """The weight whose dtype and device its own is stored in."""
        return self.cast_to or self.weight

    @property
    def dtype(self) -> torch.dtype:
        """The dtype it computes in."""
        return self.held.dtype if self.held else self.stored_like.tensor.dtype


@dataclass(frozen=True)
class Factor:
    """What a path is multiplied by and no constant: a symbolic number, or a tensor with at most one number per token.

    Attributes:
        node: its value.
        divides: whether the path is divided by it.
    """

    node: Node
    divides: bool = False


@dataclass(frozen=True)
class Choice:
    """``ids == number``: tokens say which adapter they have.

    Attributes:
        ids: the value that says it, int64, before it was given the shape of a mask.
        number: the adapter's.
    """

    ids: Node
    number: int


@dataclass(frozen=True)
class Select:
    """The tokens that a path is for; it adds nothing to the others.

    Attributes:
        mask: bool, at most one number per token.
        of: a value with these tokens, which was selected from.
        kept: whether it is true for the path's tokens; otherwise for the others.
        choice: what the mask is made of, where that is known.
    """

    mask: Node
    of: Node = field(compare=False)
    kept: bool = True
    choice: Choice | None = None


@dataclass(frozen=True, eq=False)
class LowRankPath:
    """``add = onto + scale · up(low)``, where ``low`` is ``down(reads)``, or an elementwise function of it.

    Attributes:
        down, up: the two projections.
        low: the value that the up-projection multiplies, up to flattening of leading dimensions.
        scale: the product of the constant factors on the path.
        numbers: the factors that are symbolic numbers, known before anything is computed (Dynamo's floats and sizes).
        factors: all other factors: those that are tensors, and numbers that are computed from tensors.
        onto: the value that it is added to.
        add: the node that adds it.
        select: the tokens that it is for, the bias of its up-projection too; None for all.
    """

    down: Projection
    up: Projection
    low: Node
    scale: float
    numbers: tuple[Factor, ...]
    factors: tuple[Factor, ...]
    onto: Node
    add: Node
    select: Select | None = None


@dataclass(frozen=True)
class Slice:
    """The part of a pack that one parameter owns: ``pack[rows, columns] = factor · parameter``.

    A slice is a view (the parameter's storage is the pack's) unless it is scaled or cast: then it is a copy that is
    refreshed when the parameter changes. The label is what readers know the parameter by, where its source is no name.
    """

    source: str | int
    role: Role
    rows: tuple[int, int]
    columns: tuple[int, int] | None = None
    transposed: bool = False
    factor: float = 1.0
    cast: bool = False
    label: str = ""

    @property
    def view(self) -> bool:
        """Whether the parameter lives in the pack."""
        return self.factor == 1.0 and not self.cast


@dataclass(frozen=True)
class Pack:
    """One stored weight [rows, columns] (or bias [rows]) made of slices; what no slice owns is zero.

    Attributes:
        name: its name under ``_flora`` in the fused graph.
        reads: the name of the value that all members read.
        like: the source of the parameter whose dtype and device the pack has.
        trains: whether gradients reach the parameters (those that require them) through the nodes that read it.
        held: how the members are held quantized, for readers: ``"4 bits"``; ``""`` where they are not.
    """

    name: str
    shape: tuple[int, ...]
    slices: tuple[Slice, ...]
    reads: str
    like: str | int
    trains: bool = False
    held: str = ""

    def across(self) -> Pack:
        """The same matrix, stored transposed."""
        rows, columns = self.shape
        slices = tuple(
            replace(piece, rows=piece.columns or (0, columns), columns=piece.rows, transposed=not piece.transposed)
            for piece in self.slices
        )
        return replace(self, shape=(columns, rows), slices=slices)

    @property
    def members(self) -> tuple[str, ...]:
        """The names of the parameters stored here, in order."""
        return tuple(piece.label or str(piece.source) for piece in self.slices)


@dataclass(frozen=True, eq=False)
class Derived:
    """A stored value that is computed from parameters alone, anew whenever one of them changes.

    Attributes:
        name: its name under ``_flora`` in the fused graph.
        shape: of the value.
        sources: the parameters.
        given: the dtype and device that each of them had in the graph; it is computed with these.
        recipe: the part of the graph that computes it, called with the parameters.
        like: the source of the parameter whose dtype and device the value has.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    given: tuple[tuple[torch.dtype, torch.device], ...]
    recipe: GraphModule
    like: str
