"""A graph without memory is fused like any other: every adapter, and the same GEMMs in each layer."""

from __future__ import annotations

import pytest

from benchmarks.contenders.settings import Settings
from benchmarks.scaling import large

PER_LAYER = 7


@pytest.mark.parametrize(
    ("settings", "layers", "billions"),
    [
        (Settings("tiny", rank=4), 2, 0),
        pytest.param(Settings("llama-3.1-70b", dtype="bfloat16"), 80, 69, marks=pytest.mark.slow),
    ],
    ids=["tiny", "70B"],
)
def test_every_adapter_of_a_graph_on_meta_is_fused(settings: Settings, layers: int, billions: int) -> None:
    steps: list[tuple[int, int]] = []
    result = large.measure(settings, rounds=1, progress=lambda done, total: steps.append((done, total)))
    found = result["large"]
    assert found["parameters"] // 10**9 == billions
    assert (found["adapters"], found["declined"]) == (PER_LAYER * layers, 0)
    # Before, three a projection; after, four packs and their four accumulations; and the head.
    assert found["gemms"] == [3 * PER_LAYER * layers + 1, 8 * layers + 1]
    assert found["nodes"][1] < found["nodes"][0]
    assert steps == [(1, 2), (2, 2)]
    row, passes = large.sheets(result)
    assert row.rows[0][:2] == [settings.shape, str(layers)]
    assert {name for name, _ in passes.rows} == set(found["passes"])
