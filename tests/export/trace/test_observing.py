"""A model is told by what each of its layers computes; what is no row of layers is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flora_fx.export.trace.observing import Observed, Tangled, observe

COUNT = 4
ARGS = (torch.ones(2, 3), torch.ones(2), tuple(torch.ones(2, 3) for _ in range(2 * COUNT)))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(3, 3)
        self.factor = 2.0
        self.past = 0

    def forward(self, x: Tensor, pairs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        key, value = pairs[2 * self.past], pairs[2 * self.past + 1]
        return self.inside(x) * self.factor + key, key + x, value + x


class Row(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer() for _ in range(COUNT)])
        for index, layer in enumerate(self.layers):
            layer.past = index
        self.order = [*range(COUNT)]
        self.extra: Callable[[Tensor], Tensor] = lambda x: x

    def forward(self, x: Tensor, y: Tensor, pairs: tuple[Tensor, ...]) -> Any:
        present: list[Tensor] = []
        for index in self.order:
            x, *two = self.layers[index](x, pairs)
            present += two
            x = self.extra(x)
        return (x + y[:, None], *present)


def seen(row: Row) -> Observed:
    return observe(row, ARGS, "layers")


def test_layers_that_compute_alike_look_alike() -> None:
    row = Row()
    row.layers[2].factor = 3.0
    _, one, two, three = seen(row).layers
    assert one == three != two
    assert seen(row) == seen(row)


def test_weights_of_other_shapes_or_dtypes_are_not_alike() -> None:
    row = Row()
    row.layers[3].inside = nn.Linear(3, 3, bias=False)
    _, one, two, three = seen(row).layers
    assert one == two != three


def skipping(row: Row) -> None:
    row.order = [0, 1, 2]


def backwards(row: Row) -> None:
    row.order = [1, 0, 2, 3]


def between(row: Row) -> None:
    row.extra = lambda x: x + 1


def caches_swapped(row: Row) -> None:
    row.layers[1].past, row.layers[2].past = 2, 1


def constants(row: Row) -> None:
    row.layers[1].factor = torch.ones(4097, 1, 3)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (skipping, "not all of its layers run"),
        (backwards, "do not run one behind the other"),
        (between, "do not run one behind the other"),
        (caches_swapped, "a layer reads the cache of another one"),
        (constants, "a layer reads a tensor that is no weight"),
    ],
)
def test_what_is_no_row_of_layers_is_refused(change: Callable[[Row], None], reason: str) -> None:
    row = Row()
    change(row)
    with pytest.raises(Tangled, match=reason):
        seen(row)
