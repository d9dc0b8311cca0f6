"""Programs as hypothesis draws them: what usually stands in a model made likely, and everything else possible."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from math import prod
from typing import Any, get_args, get_type_hints

from hypothesis import strategies as st

from flora_fx import FuseConfig

from .meanings import ACTIVATIONS, CHANGES, MAPS, NO_OPS, SCALES, VIEWS
from .programs import Branch, Change, Down, Join, Map, Matrix, Program, Project, Step, Up, Use, Value, View
from .shapes import State

__all__ = ["configs", "programs"]

ROWS = [(3,), (2, 3), (3,), (2, 3), (1,), (1, 1), (2, 1, 3), (), (0,), (2, 0)]
LENGTHS = [1, 1, 2, 2, 3, 3, 4, 5, 7]
MACROS = [
    *("adapted", "adapted", "adapted", "siblings", "siblings", "siblings", "low", "written", "written", "late"),
    *("map", "join", "view", "project"),
]
TRAINS = ["nothing", "nothing", "nothing", "adapters", "adapters", "everything", "some"]
PLAIN = ["number", "number first", "another number", "none"]


def configs() -> st.SearchStrategy[FuseConfig]:
    """Every value of every field."""
    hints = get_type_hints(FuseConfig)
    fields = {name: st.sampled_from(get_args(hint) or (False, True)) for name, hint in hints.items()}
    return st.builds(FuseConfig, **fields)


@st.composite
def programs(draw: Callable[..., Any], *, branches: bool = False) -> Program:
    """A program; ``branches`` where what captures it takes `torch.cond`."""
    drawing = _Drawing(draw, branches=branches)
    for _ in range(drawing.pick(LENGTHS)):
        drawing.macro()
    return drawing.finish()


@cache
def _between(first: int, last: int) -> st.SearchStrategy[int]:
    """Made once: making strategies takes longer than drawing from them."""
    return st.integers(first, last)


class _Drawing:
    def __init__(self, draw: Callable[..., Any], *, branches: bool) -> None:
        self.draw = draw
        self.rows = self.pick(ROWS)
        self.sizes = [self.number(1, 9), self.number(4, 9), self.number(4, 9)]
        # What would make most programs alike if it were anywhere: in a few of them only.
        self.in_place, self.mixed, self.decorated = (self.odds(1, 3), self.odds(1, 8), self.odds(1, 2))
        self.shared, self.odd_scales = self.odds(1, 4), self.odds(1, 2)
        self.trains = self.pick(TRAINS)
        self.scale = self.pick(PLAIN) if self.odds(2, 3) else ""  # of most adapters, as in a model
        self.training = self.odds(1, 8)
        self.branches = branches
        self.matrices: list[Matrix] = []
        self.steps: list[Step] = []
        start = Program(self.rows, self.sizes[self.number(0, 2)], (), (), ())
        self.width = start.width
        self.state = State(start)
        self.strided = len(self.rows) > 1 and self.odds(1, 5)
        # Values that a view of may be impossible: of a permuted one, what is computed from it is permuted, too.
        self.viewed: set[int] = set()
        self.permuted = self.strided

    def pick(self, options: Sequence[Any]) -> Any:
        return options[self.number(0, len(options) - 1)]

    def number(self, first: int, last: int) -> int:
        return first if first == last else int(self.draw(_between(first, last)))

    def odds(self, chances: int, of: int) -> bool:
        return self.number(1, of) > of - chances

    @property
    def values(self) -> list[Value]:
        return self.state.values

    def step(self, step: Step) -> int:
        """Add a step; the index of the value that it gives."""
        self.state.follow(step, self.matrices)
        self.steps.append(step)
        return len(self.values) - 1

    def matrix(self, out: int, into: int, role: str, *, narrow: bool = False) -> int:
        """A matrix of this shape: a new one, or one that is used already."""
        over = None
        if self.shared:
            alike = [i for i, m in enumerate(self.matrices) if (m.out, m.into, m.narrow) == (out, into, narrow)]
            if alike and self.odds(1, 4):
                return int(self.pick(alike))
            alike = [i for i in alike if not self.matrices[i].columns]
            if alike and self.odds(1, 5):
                over = self.pick(alike)
        columns = over is None and self.odds(1, 5)
        wanted = {"nothing": False, "everything": True, "adapters": role == "adapter"}.get(self.trains)
        trains = self.odds(1, 2) if wanted is None else wanted
        bias = self.odds(1, 3 if role == "base" else 6)
        self.matrices.append(Matrix(out, into, bias, columns, narrow, trains, over))
        return len(self.matrices) - 1

    def use(self, matrix: int, read: Value, *, fresh: bool = False) -> Use:
        found = self.matrices[matrix]
        forms = ["@", "matmul"] if found.columns else ["module", "module", "linear", "linear", "@", "matmul"]
        if found.bias and len(read.rows) == 1:
            forms.append("addmm")
        if found.bias and found.columns and fresh:
            forms += ["Conv1D", "Conv1D"]
        return Use(matrix, self.pick(forms), self.no_ops())

    def no_ops(self) -> tuple[str, ...]:
        if not self.decorated or not self.odds(1, 3):
            return ()
        return tuple(self.pick(list(NO_OPS)) for _ in range(self.number(1, 2)))

    def any(self) -> int:
        """A value, the last ones most often."""
        if self.odds(1, 2):
            return len(self.values) - 1
        return self.number(0, len(self.values) - 1)

    def alike(self, value: int, *, width: int | None = None) -> list[int]:
        """The values with as many rows, and a width."""
        rows, wanted = prod(self.values[value].rows), width or self.values[value].width
        return [i for i, v in enumerate(self.values) if prod(v.rows) == rows and v.width == wanted]

    # Steps, a few at a time.

    def macro(self) -> None:
        kinds = [*MACROS, *(["change", "change"] if self.in_place else []), *(["branch"] * 4 if self.branches else [])]
        getattr(self, self.pick(kinds))()

    def base(self, read: int) -> int:
        value = self.values[read]
        matrix = self.matrix(self.pick(self.sizes), value.width, "base", narrow=self.mixed and self.odds(1, 3))
        return self.step(Project(read, self.use(matrix, value, fresh=read not in self.viewed and not self.permuted)))

    def low(self, read: int | None = None) -> int:
        read = self.any() if read is None else read
        value = self.values[read]
        matrix = self.matrix(self.number(1, 3), value.width, "adapter", narrow=self.mixed and self.odds(2, 3))
        activation = self.pick(list(ACTIVATIONS)) if self.odds(1, 6) else ""
        self.step(Down(read, self.use(matrix, value), activation))
        return len(self.state.lows) - 1

    def up(self, target: int, low: int) -> int:
        value, z = self.values[target], self.state.lows[low]
        matrix = self.matrix(value.width, z.width, "adapter", narrow=z.narrow)
        scales = list(SCALES) if self.odd_scales else PLAIN
        if not self.in_place:
            scales = [scale for scale in scales if "in place" not in scale]
        if prod(z.rows) != prod(self.rows):
            scales = [scale for scale in scales if not scale.startswith("token")]
        scale = self.scale if self.scale and not self.odds(1, 4) else self.pick(scales)
        return self.step(Up(target, low, self.use(matrix, z), scale, self.no_ops()))

    def adapted(self) -> None:
        self.siblings(1)

    def siblings(self, count: int = 0) -> None:
        """Projections of one value, each with adapters of its own or with one that is there."""
        read, targets, writes = self.any(), [], []
        for _ in range(count or self.number(2, 3)):
            early = self.odds(1, 4)
            lows = []
            if early:
                lows = self.lows_for(read)
            targets.append(self.base(read))
            if not early:
                lows = self.lows_for(read)
            writes.append((targets[-1], lows))
            if self.odds(1, 2):
                self.write(*writes.pop())
        for target, lows in writes:
            self.write(target, lows)

    def lows_for(self, read: int) -> list[int]:
        found = []
        for _ in range(self.pick([1, 1, 1, 1, 0, 2])):
            rows = prod(self.values[read].rows)
            known = [i for i, z in enumerate(self.state.lows) if prod(z.rows) == rows]
            if known and self.odds(1, 4):
                found.append(self.pick(known))
            else:
                found.append(self.low(self.pick(self.alike(read)) if self.odds(1, 5) else read))
        return found

    def write(self, target: int, lows: Sequence[int]) -> None:
        for low in lows:
            target = self.up(target, low)

    def written(self) -> None:
        """A projection that low-rank values of before are written onto."""
        read = self.any()
        rows = prod(self.values[read].rows)
        lows = [i for i, z in enumerate(self.state.lows) if prod(z.rows) == rows]
        target = self.base(read)
        for _ in range(self.number(1, 2) if lows else 0):
            target = self.up(target, self.pick(lows))

    def late(self) -> None:
        """An adapter from any value onto any other."""
        target, read = self.any(), self.any()
        if prod(self.values[target].rows) == prod(self.values[read].rows):
            self.up(target, self.low(read))

    def project(self) -> None:
        self.base(self.any())

    def map(self) -> None:
        read = self.any()
        functions = list(MAPS)
        if prod(self.values[read].rows) != prod(self.rows):
            functions.remove("gate")
        self.step(Map(read, self.pick(functions)))

    def join(self) -> None:
        read = self.any()
        value = self.values[read]
        same = [i for i, v in enumerate(self.values) if v.shape == value.shape]
        function = self.pick(["add", "add", "add", "sub", "mul", "cat"])
        if function != "cat" or value.width < 10:
            self.step(Join(read, self.pick(same), function))

    def view(self) -> None:
        read = self.any()
        forms = [form for form, (shape, _) in VIEWS.items() if shape(self.values[read]) is not None]
        if len(self.values[read].rows) > 3:
            forms.remove("one more")
        form = self.pick(forms)
        self.viewed.add(self.step(View(read, form)))
        self.permuted = self.permuted or form == "transposed"

    def change(self) -> None:
        forms = [form for form in CHANGES if form != "out" or self.trains == "nothing"]  # autograd takes no out=
        self.step(Change(self.any(), self.pick(forms)))

    def branch(self) -> None:
        read = self.any()
        width, out = self.values[read].width, self.pick(self.sizes)
        if not self.values[read].narrow:
            shapes = [(out, width), (2, width), (out, 2)]
            base, down, up = (self.matrix(*shape, "adapter") for shape in shapes)
            if not any(self.matrices[i].columns for i in (base, down, up)):
                self.step(Branch(read, base, down, up))

    def finish(self) -> Program:
        last = len(self.values) - 1
        more = (self.number(0, last) for _ in range(self.number(0, 3)))
        lows, deltas = len(self.state.lows), len(self.state.deltas)
        trains = any(matrix.trains for matrix in self.matrices)
        return Program(
            self.rows,
            self.width,
            tuple(self.matrices),
            tuple(self.steps),
            tuple(dict.fromkeys((last, *more))),
            (self.number(0, lows - 1),) if lows and self.odds(1, 6) else (),
            (self.number(0, deltas - 1),) if deltas and self.odds(1, 10) else (),
            strided=self.strided,
            input_trains=trains and self.odds(1, 2),
            training=self.training,
        )
