"""Peak memory is exact to the byte, and fuse needs little of it."""

from __future__ import annotations

import gc

import torch
from torch import nn

from benchmarks.contenders.settings import Settings
from benchmarks.measure.memory import live_bytes, peak_bytes, tracked
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

    before = live_bytes("cpu")
    assert peak_bytes(call, "cpu") - before == 150 * KIB
    assert kept.numel() == 10 * KIB


def test_what_a_call_leaves_is_alive_before_the_next_one() -> None:
    left: list[torch.Tensor] = []
    before = live_bytes("cpu")
    first = peak_bytes(lambda: left.append(block(20)), "cpu") - before
    second = peak_bytes(lambda: left.append(block(5)), "cpu") - before
    assert (first, second, live_bytes("cpu") - before) == (20 * KIB, 25 * KIB, 25 * KIB)


def test_compilers_tensors_without_memory_do_not_count() -> None:
    before = live_bytes("cpu")
    with torch._subclasses.FakeTensorMode():
        fake = torch.empty(1000)
    real = torch.empty(1000)
    functional = torch._to_functional_tensor(real)
    assert fake.numel() == functional.numel()
    assert live_bytes("cpu") - before == real.nbytes


def test_views_and_parameters_of_one_storage_count_once() -> None:
    before = live_bytes("cpu")
    layer = nn.Linear(64, 32, bias=False)
    half, other = layer.weight.data[:16], nn.Parameter(layer.weight.data.t())
    assert live_bytes("cpu") - before == layer.weight.nbytes
    assert half.numel() + other.numel() > 0


def test_what_is_frozen_counts_too() -> None:
    before = live_bytes("cpu")
    weight = torch.zeros(100, 30)
    gc.freeze()
    assert live_bytes("cpu") - before == weight.nbytes


def test_backward_counts_activations_and_gradients() -> None:
    x, weight = torch.randn(64, 32), torch.randn(32, 16, requires_grad=True)

    def call() -> None:
        (x @ weight).sum().backward()
        weight.grad = None

    product, gradient, scalars = 64 * 16 * 4, 32 * 16 * 4, 2 * 4
    # The product is alive until its sum was taken; its gradient is one expanded scalar, which mm copies at most once.
    assert gradient + scalars <= peak_bytes(call, "cpu") - live_bytes("cpu") <= product + gradient + product + scalars


def test_release_of_what_was_tracked_is_seen() -> None:
    with tracked():
        seen = [block(100)]
    unseen = [block(100)]

    def replace(held: list[torch.Tensor]) -> None:
        held.clear()
        held.append(block(100))

    before = live_bytes("cpu")
    assert peak_bytes(lambda: replace(seen), "cpu") == before
    assert peak_bytes(lambda: replace(unseen), "cpu") == before + 100 * KIB


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
