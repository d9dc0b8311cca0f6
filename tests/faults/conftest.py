"""Of tests in which something fails at a chosen place."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture
def uncollected() -> Iterator[None]:
    """No search for garbage: an error that comes amid one is printed and lost, so it would not be seen to come."""
    gc.disable()
    yield
    gc.enable()
