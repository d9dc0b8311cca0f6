"""Peak memory is exact to the byte, and fuse needs little of it."""

from __future__ import annotations

import gc

import torch
from torch import nn

from benchmarks.contenders.settings import Settings
from benchmarks.measure.memory import added_bytes, live_bytes, tracked
from benchmarks.scaling import fusing

KIB = 1024


def block(kib: int) -> torch.Tensor:
    return torch.empty(kib * KIB, dtype=torch.uint8)


def test_peak_is_the_highest_sum_of_what_is_alive() -> None:
    kept = block(10)

    def call() -> torch.Tensor:
        first, second = block(100), block(50)  # 150
        del first  # 50
        third = block(30)  # 80
        return second[: third.numel()]

    assert added_bytes(call, "cpu") == 150 * KIB
    assert kept.numel() == 10 * KIB


def test_what_a_call_leaves_is_no_part_of_the_next_one() -> None:
    left: list[torch.Tensor] = []
    assert added_bytes(lambda: left.append(block(20)), "cpu") == 20 * KIB
    assert added_bytes(lambda: left.append(block(5)), "cpu") == 5 * KIB


def test_what_counts_is_memory() -> None:
    """Each storage once, also where it is frozen; no compiler's tensor without memory. (To count takes a second.)"""
    before = live_bytes("cpu")
    layer = nn.Linear(64, 32, bias=False)
    half, other = layer.weight.data[:16], nn.Parameter(layer.weight.data.t())
    with torch._subclasses.FakeTensorMode():
        fake = torch.empty(1000)
    real = torch.empty(1000)
    functional = torch._to_functional_tensor(real)
    gc.freeze()
    assert live_bytes("cpu") - before == layer.weight.nbytes + real.nbytes
    assert gc.get_freeze_count()
    assert half.numel() + other.numel() + fake.numel() + functional.numel() > 0


def test_backward_counts_activations_and_gradients() -> None:
    x, weight = torch.randn(64, 32), torch.randn(32, 16, requires_grad=True)

    def call() -> None:
        (x @ weight).sum().backward()
        weight.grad = None

    product, gradient, scalars = 64 * 16 * 4, 32 * 16 * 4, 2 * 4
    # The product is alive until its sum was taken; its gradient is one expanded scalar, which mm copies at most once.
    assert gradient + scalars <= added_bytes(call, "cpu") <= product + gradient + product + scalars


def test_release_of_what_was_tracked_is_seen() -> None:
    with tracked():
        seen = [block(100)]
    unseen = [block(100)]

    def replace(held: list[torch.Tensor]) -> None:
        held.clear()
        held.append(block(100))

    assert added_bytes(lambda: replace(seen), "cpu") == 0
    assert added_bytes(lambda: replace(unseen), "cpu") == 100 * KIB


def test_fuse_needs_no_second_copy_of_the_model() -> None:
    result = fusing.measure(Settings("tiny", rank=4), layers=(1, 2), rounds=1)
    shallow, deep = result["fuse"]["rows"]
    assert shallow["layers"] == 1
    assert shallow["model_bytes"] < deep["model_bytes"]
    assert 0 < deep["peak_bytes"] < deep["model_bytes"] / 2
    grown = deep["nodes"] - shallow["nodes"]
    assert grown > 0
    assert sum(deep["passes"].values()) <= deep["seconds"]
    [sheet] = fusing.sheets(result)
    assert [row[0] for row in sheet.rows] == ["1", "2"]
