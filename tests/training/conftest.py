"""Counts and reports of no earlier test."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo

from flora_fx import backend


@pytest.fixture(autouse=True)
def _prepare(_seed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(backend, "_last", None)
