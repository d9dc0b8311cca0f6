"""The long run of `soak`, shortened; and the record of the last one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .soak import ALLOWED, soak, trend

RECORD = Path(__file__).with_name("soak.json")


def test_a_leak_is_told_from_a_cache() -> None:
    cache = [(float(at), 500_000_000 + (at > 3) * 10_000_000) for at in range(300)]
    assert trend(cache[100:]) == 0
    leak = [(float(at), 500_000_000 + at * 70 * 800) for at in range(300)]  # 800 bytes a swap, 70 swaps a second
    assert trend(leak[100:]) == pytest.approx(200 * 70 * 800, rel=0.01)
    assert trend(leak[100:]) > ALLOWED
    noise = [(float(at), 500_000_000 + (at * 7919) % 4096) for at in range(300)]
    assert abs(trend(noise[100:])) < 4096


def test_the_record_is_of_half_an_hour_without_a_fault() -> None:
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    assert record["seconds"] >= 1800
    assert record["wrong"] == 0
    assert record["tokens"] > record["swaps"] > 10_000
    assert record["flat"]
    assert abs(record["grown"]) < ALLOWED
    samples = [tuple(sample) for sample in record["samples"]]
    assert abs(trend(samples[len(samples) // 3 :])) < ALLOWED


@pytest.mark.slow
def test_a_short_soak() -> None:
    met = soak(60, seed=3)
    assert met.wrong == 0
    assert met.flat, met
    assert met.swaps > 100
