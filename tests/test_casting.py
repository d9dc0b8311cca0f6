"""Weights that are cast when they are read: what a cast gives, without its memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from flora_fx.export.trace.model import private_copy
from flora_fx.internals import FakeTensor
from flora_fx.storage.casting import cast_later, is_cast_later, numbers, read_all

HALF, SINGLE, DOUBLE = torch.float16, torch.float32, torch.float64


def drawn(*shape: int, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=DOUBLE).to(dtype)


LAYOUTS = {
    "rows": drawn(3, 5),
    "columns": drawn(5, 3).t(),
    "with gaps": drawn(6, 10)[::2, ::2],
    "one row for all": drawn(1, 5).expand(3, 5),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_is_what_a_cast_gives(layout: str) -> None:
    stored = LAYOUTS[layout]
    later, cast = cast_later(stored, HALF), stored.to(HALF)
    told = [(x.shape, x.stride(), x.dtype, x.device, x.nbytes, x.requires_grad) for x in (later, cast)]
    assert told[0] == told[1]
    assert torch.equal(numbers(later), cast)
    assert numbers(later).stride() == cast.stride()
    x = drawn(2, 5, dtype=HALF)
    assert torch.equal(nn.functional.linear(x, later), nn.functional.linear(x, cast))
    assert torch.equal(torch.cat([later, later])[1:, 2:], torch.cat([cast, cast])[1:, 2:])
    assert str(later) == "cast_later([3, 5], torch.float64 to torch.float16)"


def test_it_has_no_memory_and_reads_what_is_stored_then() -> None:
    stored = drawn(3, 5)
    later = nn.Parameter(cast_later(stored, HALF), requires_grad=False)
    assert is_cast_later(later)
    assert isinstance(later, nn.Parameter)
    assert is_cast_later(later.detach())
    assert later.data_ptr() == 0
    stored[1, 2] = 17.0
    assert later[1, 2] == 17.0


def test_in_its_own_dtype_it_is_the_tensor() -> None:
    stored = drawn(3, 5)
    assert cast_later(stored, DOUBLE) is stored
    assert numbers(stored) is stored
    assert not is_cast_later(stored)


def test_one_cast_after_the_other() -> None:
    """Half precision rounds, whatever it is cast to then."""
    stored = drawn(3, 5)
    twice = cast_later(cast_later(stored, HALF), SINGLE)
    assert torch.equal(numbers(twice), stored.half().float())
    assert not torch.equal(numbers(twice), stored.float())
    assert is_cast_later(cast_later(cast_later(stored, HALF), HALF))


@pytest.mark.parametrize(
    "write",
    [
        lambda later: later.mul_(2),
        lambda later: later.copy_(drawn(3, 5)),
        lambda later: torch.add(drawn(3, 5, dtype=HALF), 1, out=later),
        lambda later: later.set_(drawn(3, 5, dtype=HALF)),
    ],
    ids=["in place", "copied to", "as out", "another tensor's memory"],
)
def test_nobody_writes_to_it(write: Any) -> None:
    """Silently it would be lost."""
    stored = drawn(3, 5)
    later = cast_later(stored, HALF)
    with torch.no_grad(), pytest.raises(RuntimeError, match="writes to a weight that is cast when it is read"):
        write(later)
    assert torch.equal(stored, drawn(3, 5))


def test_it_takes_the_place_of_another() -> None:
    """torch's parametrizations, by which PEFT adapts a parameter that is no layer's, put it back so."""
    later = cast_later(drawn(3, 5), HALF)
    other = drawn(3, 5) * 2
    later.set_(cast_later(other, HALF))
    assert torch.equal(numbers(later), other.half())


def layer() -> nn.Linear:
    made = nn.Linear(5, 3, bias=False)
    made.weight = nn.Parameter(cast_later(drawn(3, 5), SINGLE), requires_grad=False)
    return made


def test_a_program_has_it_as_any_other_weight() -> None:
    model, x = layer(), drawn(2, 5, dtype=SINGLE)
    shapes = ({0: Dim("rows")},)
    cast = nn.Linear(5, 3, bias=False)
    cast.weight = nn.Parameter(drawn(3, 5, dtype=SINGLE), requires_grad=False)
    program, wanted = (torch.export.export(each, (x,), strict=False, dynamic_shapes=shapes) for each in (model, cast))
    weight = program.state_dict["weight"]
    assert is_cast_later(weight)
    assert type(program.graph.find_nodes(op="placeholder")[0].meta["val"]) is FakeTensor
    assert program.graph_module.code == wanted.graph_module.code
    assert torch.equal(model(x), cast(x))
    read_all(program)
    assert torch.equal(program.module()(x), cast(x))
    assert is_cast_later(weight)


def test_all_are_read_and_one_stays_one() -> None:
    model = nn.Sequential(layer(), nn.Linear(3, 5), layer())
    model[2].weight = model[0].weight
    plain = model[1].weight
    private = private_copy(model)
    read_all(private)
    weights = [part.weight for part in private]  # type: ignore[union-attr]
    assert not any(map(is_cast_later, weights))
    assert weights[0] is weights[2]
    assert isinstance(weights[0], nn.Parameter)
    assert torch.equal(weights[0], drawn(3, 5, dtype=SINGLE))
    assert weights[1].data_ptr() == plain.data_ptr()
    assert is_cast_later(model[0].weight)
