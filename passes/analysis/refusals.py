"""Why low-rank paths that were found must stay as they are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch.fx import Node

from flora_fx.graph.examples import same_sizes
from flora_fx.graph.program import Program
from flora_fx.ir import Decline, Factor, Projection, Reason, Select

from .factors import Factors
from .mutation import Effects
from .operations import ADDS, operation, readers
from .reshapes import leading_dimensions_given_by
from .selections import Selections
from .values import Values

__all__ = ["Part", "Refuser"]

CHANGED = "is changed in place, or may share memory with what is, or its memory layout is read"


@dataclass(frozen=True)
class Part:
    """One up-projection on the way to an add, with the factors met so far."""

    down: Projection
    up: Projection
    low: Node
    scale: float
    factors: tuple[Factor, ...]
    chain: tuple[Node, ...]
    dropout: Node | None
    select: Select | None = None


class Refuser:
    """Says of the paths of one add whether they may be rewritten."""

    def __init__(
        self,
        program: Program,
        values: Values,
        effects: Effects,
        by_node: dict[Node, Projection],
        regions: dict[Node, int],
        factors: Factors,
        selections: Selections,
    ) -> None:
        self.program = program
        self.values = values
        self.effects = effects
        self.by_node = by_node
        self.regions = regions
        self.factors = factors
        self.selections = selections

    def refusal(self, add: Node, onto: Node, parts: list[Part]) -> Decline | None:
        """Why the paths that end in an add must stay as they are; None if they need not."""
        for part in parts:
            if obstacle := part.down.obstacle or part.up.obstacle:
                return obstacle
            if len({self.regions[node] for node in (add, *part.chain, part.low, part.down.node)}) > 1:
                detail = f"{part.down.node.name} and {add.name} run in different modes"
                return Decline(Reason.OTHER_MODE, add.name, detail)
            if part.dropout is not None:
                detail = (
                    f"{part.down.weight.name} reads {part.dropout.name}, a random mask of its own; fuse in eval mode"
                )
                return Decline(Reason.DROPOUT_ACTIVE, add.name, detail)
            if not all(self._reaches_down(factor.node, part) for factor in part.factors):
                detail = f"a factor has one number per token, in another shape than {part.down.node.name}"
                return Decline(Reason.SCALE_NOT_SCALAR, add.name, detail)
            if (decline := self._groups_otherwise(add, onto, part)) is not None:
                return decline
            for inner in part.chain:
                names = [user.name for user in readers(inner)]
                if len(names) > 1:
                    detail = f"{inner.name} is also read elsewhere (readers: {', '.join(names)})"
                    return Decline(Reason.OTHER_READER, add.name, detail)
                if inner in self.effects.touched:
                    return Decline(Reason.MUTATED, add.name, f"{inner.name} {CHANGED}")
        for touched in (onto, add):
            if touched in self.effects.touched:
                return Decline(Reason.MUTATED, add.name, f"{touched.name} {CHANGED}")
        if not self._same_rows(onto, parts):
            shapes = self.program.shape(onto), self.program.shape(parts[0].chain[0])
            known = None not in shapes and all(isinstance(size, int) for shape in shapes for size in shape or ())
            has = "has another shape than" if known else "is not known to have the shape of"
            detail = f"{onto.name} {has} what is added to it"
            return Decline(Reason.SHAPE_UNKNOWN, add.name, detail)
        return None

    def _groups_otherwise(self, add: Node, onto: Node, part: Part) -> Decline | None:
        """A decline where the tokens that a path is for are not those of what it reads, or of what its bias is for."""
        if part.select is None:
            return None
        for value in (part.down.reads, onto) if part.up.bias else (part.down.reads,):
            if not self.selections.same_tokens(part.select, value):
                detail = f"{part.select.of.name} is selected by token, and {value.name} groups them otherwise"
                return Decline(Reason.NOT_BY_TOKEN, add.name, detail)
        return None

    def _reaches_down(self, factor: Node, part: Part) -> bool:
        """Whether a factor found behind the up-projection fits the down-projection's output as well."""
        if len(self.program.shape(factor) or ()) < 2:
            return True
        low, high = self.program.shape(part.down.node), self.program.shape(part.chain[0])
        return low is not None and high is not None and same_sizes(low[:-1], high[:-1])

    def _same_rows(self, onto: Node, parts: list[Part]) -> bool:
        """Whether the value that is added to has the paths' shape, so that neither operand is broadcast."""
        added = parts[0].chain[0]
        if self.program.shape(onto) is not None and self.program.shape(added) is not None:
            return self.program.same_shape(onto, added)
        if onto not in self._shapeless or added not in self._shapeless:
            return False
        (leading, features), (other, _) = self._shapeless[onto], self._shapeless[added]
        return leading is other and {features} == {part.up.out_features for part in parts}

    @cached_property
    def _shapeless(self) -> dict[Node, tuple[Node, int | None]]:
        """For a graph without shapes: the earliest node with the same leading dimensions, and the last dimension.

        In graph order, each from its operands: a recursion would walk a residual stream once per path through it.
        """
        known: dict[Node, tuple[Node, int | None]] = {}
        for node in self.program.graph.nodes:
            source, rows = self.values.earliest(node), self.values.earliest_rows(node)
            leading, features = known.get(source, (source, None)), known.get(rows, (rows, None))[1]
            operands = [known[operand] for operand in node.all_input_nodes]
            product = self.factors.product(node)
            if source in self.by_node:
                projection = self.by_node[source]
                leading, features = known[projection.operand], projection.out_features
            elif (restored := leading_dimensions_given_by(self.values, node)) is not None:
                leading = (restored, None)
            elif product is not None:
                features = known[product[0]][1]
                factor = product[2]
                if factor is None or self.program.shape(factor.node) in ((), (features,)):
                    leading = known[product[0]]
            elif operation(node) in ADDS and len({operand[0] for operand in operands}) == 1:
                leading = operands[0]
                features = operands[0][1] if len({operand[1] for operand in operands}) == 1 else None
            known[node] = (leading[0], features)
        return known
