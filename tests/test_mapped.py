"""Weights in mapped files: what was read of them is given back, and nothing that anybody wrote."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flora_fx.storage.mapped import give_back, giving_back

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="mappings of Linux")

ROWS, COLUMNS = 512, 1031  # 2 MiB


class Loaded(nn.Module):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.weight = nn.Parameter(load_file(path)["weight"], requires_grad=False)


@pytest.fixture
def model(tmp_path: Path) -> Loaded:
    weight = torch.arange(ROWS * COLUMNS, dtype=torch.float32).reshape(ROWS, COLUMNS)
    save_file({"weight": weight}, tmp_path / "model.safetensors")
    return Loaded(tmp_path / "model.safetensors")


def in_memory(tensor: Tensor) -> int:
    """How many bytes of the mapping that a tensor is in take memory."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if (found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)) is not None:
            inside = int(found[1], 16) <= tensor.data_ptr() < int(found[2], 16)
        elif inside and line.startswith("Rss:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the tensor is in no mapping")


def test_what_was_read_is_given_back_and_can_be_read_again(model: Loaded) -> None:
    total = model.weight.sum()
    assert in_memory(model.weight) >= model.weight.nbytes
    with giving_back(model):
        give_back()
        assert in_memory(model.weight) == 0
        assert torch.equal(model.weight.sum(), total)
        assert in_memory(model.weight) >= model.weight.nbytes


def test_what_was_written_stays(model: Loaded) -> None:
    """One number, and the mapping is no longer what its file is."""
    with giving_back(model):
        model.weight[7, 11] = -1.0
        expected = model.weight.clone()
        give_back()
        assert model.weight[7, 11] == -1.0
        assert torch.equal(model.weight, expected)


def test_what_was_written_before_stays(model: Loaded) -> None:
    model.weight[7, 11] = -1.0
    with giving_back(model):
        give_back()
        assert model.weight[7, 11] == -1.0


def test_only_meanwhile_and_only_of_that_model(model: Loaded, tmp_path: Path) -> None:
    save_file({"weight": torch.ones(ROWS, COLUMNS)}, tmp_path / "other.safetensors")
    other = Loaded(tmp_path / "other.safetensors")
    with giving_back(model):
        with giving_back(other):
            model.weight.sum(), other.weight.sum()
            give_back()
            assert (in_memory(model.weight), in_memory(other.weight)) == (0, 0)
        model.weight.sum(), other.weight.sum()
        give_back()
        assert in_memory(model.weight) == 0
        assert in_memory(other.weight) >= other.weight.nbytes
    model.weight.sum()
    give_back()
    assert in_memory(model.weight) >= model.weight.nbytes


def test_weights_in_no_file_are_left() -> None:
    model = nn.Linear(COLUMNS, ROWS)
    expected = model.weight.detach().clone()
    with giving_back(model):
        give_back()
        assert torch.equal(model.weight, expected)


def test_it_ends_with_what_it_is_around(model: Loaded) -> None:
    with pytest.raises(KeyError), giving_back(model):
        raise KeyError
    model.weight.sum()
    give_back()
    assert in_memory(model.weight) >= model.weight.nbytes
