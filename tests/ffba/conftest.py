"""One thread: the models are tiny, and threads that wait for each other cost more than they bring."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread(_seed: None) -> None:
    torch.set_num_threads(1)
