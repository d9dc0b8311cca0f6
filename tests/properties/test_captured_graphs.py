"""Random programs with adapters in them, through torch.export and through the backend."""

from __future__ import annotations

from .searching import assert_all_right


def test_graphs_that_torch_exports() -> None:
    assert_all_right("exported", "step: Branch", "with gradients")


def test_graphs_that_dynamo_compiles() -> None:
    assert_all_right("compiled", "with gradients", "compiled with symbols")
