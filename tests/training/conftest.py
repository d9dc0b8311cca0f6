"""One thread, for the models are so small that a second one only waits; counts and reports of no earlier test."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo

from flora_fx import backend


@pytest.fixture(autouse=True)
def _prepare(_seed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(backend, "_last", None)
