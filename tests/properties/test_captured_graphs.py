"""Random programs with adapters in them, through torch.export and through the backend."""

from __future__ import annotations

from .searching import assert_met, search_all


def test_graphs_that_torch_exports() -> None:
    assert_met(search_all("exported"), "step: Branch", "with gradients")


def test_graphs_that_dynamo_compiles() -> None:
    assert_met(search_all("compiled"), "with gradients", "compiled with symbols")
