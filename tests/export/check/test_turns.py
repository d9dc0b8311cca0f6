"""Functions that run in turns."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

from flora_fx.export.check.turns import Turns


def test_those_that_return_are_passed_over() -> None:
    turns, said = Turns(), list[str]()

    def counting(name: str, times: int) -> Callable[[], int]:
        def count() -> int:
            for number in range(times):
                said.append(f"{name}{number}")
                turns.pass_on()
            said.append(name)
            return times

        return count

    turns.pass_on()  # to nobody
    assert turns.run([]) == []
    assert turns.run([counting("a", 3), counting("b", 0), counting("c", 1)]) == [3, 0, 1]
    assert said == ["a0", "b", "c0", "a1", "c", "a2", "a"]


@pytest.mark.parametrize("enabled", [True, False])
def test_gradients_are_as_they_were(enabled: bool) -> None:
    with torch.set_grad_enabled(enabled):
        assert Turns().run([torch.is_grad_enabled] * 2) == [enabled] * 2


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_one_that_fails_ends_the_others(failing: int) -> None:
    turns, before, went_on = Turns(), threading.active_count(), list[int]()

    def step(number: int) -> None:
        turns.pass_on()
        if number == failing:
            raise LookupError(f"{number} has nothing")
        turns.pass_on()
        went_on.append(number)

    with pytest.raises(LookupError, match=f"{failing} has nothing"):
        turns.run([lambda number=number: step(number) for number in range(3)])  # type: ignore[misc]
    assert went_on == []
    assert threading.active_count() == before
    assert turns.run([lambda: 5]) == [5]
