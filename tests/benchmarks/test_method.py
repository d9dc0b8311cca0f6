"""The method pairs, refuses and draws as it says."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from benchmarks.contenders.settings import Settings
from benchmarks.measure.compiled import was_compiled
from benchmarks.measure.isolated import isolated
from flora_fx.measuring.bars import draw_bars
from flora_fx.measuring.method import Timing, compare, difference, paired


def test_compare_pairs_within_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    now = [0]
    monkeypatch.setattr(time, "perf_counter_ns", lambda: now[0])

    def wait(name: str, milliseconds: int) -> None:
        calls.append(name)
        drift = 1 + (len(calls) - 1) // 2 % 4  # the machine is slower from round to round
        now[0] += milliseconds * 10**6 * drift

    timings = compare(
        {"base": lambda: wait("base", 2), "slow": lambda: wait("slow", 6)},
        reference="base",
        rounds=8,
        warm_up=1,
    )
    assert timings["base"] == Timing(timings["base"].milliseconds, 1.0, 1.0, 1.0)
    slow = timings["slow"]
    assert (slow.ratio, slow.low, slow.high) == pytest.approx((3, 3, 3))
    rounds = [calls[2:][i : i + 2] for i in range(0, 16, 2)]
    assert all(sorted(order) == ["base", "slow"] for order in rounds)
    assert len({tuple(order) for order in rounds}) == 2  # shuffled


def test_picture_is_the_same_for_the_same_numbers(tmp_path: Path) -> None:
    row = {
        "base": Timing(3, 1, 1, 1),
        "fused": Timing(3.3, 1.1, 1.05, 1.12),
        "merged": Timing(2.9, 0.98, 0.97, 1),
    }
    timings = {
        "PyTorch": {"TTFT": row | {"unmerged": Timing(4, 1.3, 1.25, 1.4)}},
        "ONNX Runtime": {"TTFT": row},
    }
    colours = {"unmerged": "#999999", "fused": "#008800"}
    drawn = [draw_bars(timings, colours, tmp_path / name, title="t", note="n") for name in ("one", "two")]
    svg, png = drawn[0]
    assert svg.read_bytes() == drawn[1][0].read_bytes()
    assert png.read_bytes().startswith(b"\x89PNG")


def test_interval_is_wide_when_passes_disagree() -> None:
    """Rounds within a pass agree to the digit, so only a bootstrap over passes sees the spread."""
    ratios = [0.9, 1.0, 1.1, 1.2, 1.3]
    timing = paired([[ratio] * 50 for ratio in ratios], [[1.0] * 50] * 5)
    assert timing.ratio == pytest.approx(1.1)
    assert timing.low <= 1.0
    assert timing.high >= 1.2


def test_difference_tells_shapes_and_nan() -> None:
    expected = torch.ones(2, 3)
    assert difference(torch.ones(2, 4), expected) == float("inf")
    assert not difference(expected * float("nan"), expected) <= 1.0


def test_a_compiled_call_is_told_from_an_eager_one() -> None:
    layer = torch.nn.Linear(5, 3)
    x = torch.ones(2, 5)
    compiled = torch.compile(lambda value: layer(value).relu(), backend="eager")
    compiled(x)
    assert not was_compiled(lambda: compiled(x))  # backend eager: a region, but the model's own operators in it

    fused = torch.compile(lambda value: (layer(value) * 2).relu(), fullgraph=True)
    fused(x)
    assert was_compiled(lambda: fused(x))
    with torch.compiler.set_stance("force_eager"):
        assert not was_compiled(lambda: fused(x))


def _double(value: int, progress) -> int:  # type: ignore[no-untyped-def]
    progress(1, 2)
    if value < 0:
        raise ValueError(f"{value} is negative")
    if value > 100:
        raise SystemExit(3)
    return 2 * value


@pytest.mark.usefixtures("_spawned")
def test_isolated_work_answers_reports_and_fails() -> None:
    ticks: list[tuple[int, int]] = []
    tick = lambda done, total: ticks.append((done, total))  # noqa: E731
    assert isolated(_double, 21, threads=1, progress=tick) == 42
    assert ticks == [(1, 2)]
    with pytest.raises(RuntimeError, match="-1 is negative"):
        isolated(_double, -1, threads=1, progress=tick)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"shape": "llama-5"}, "unknown shape 'llama-5'; it must be one of smollm-135m"),
        ({"dtype": "int4"}, "unknown dtype 'int4'"),
        ({"targets": ("q_proj", "lm_head")}, "unknown target 'lm_head'"),
        ({"rank": 0}, "rank is 0; it must be at least 1"),
        ({"layers": -1}, "layers must not be negative"),
        ({"device": "tpu"}, "unknown device 'tpu'"),
    ],
)
def test_settings_name_what_is_wrong(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**wrong)  # type: ignore[arg-type]
