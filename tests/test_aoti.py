"""A fused program as AOTInductor's package: right, and each weight in it once."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import flora_fx


class Adapted(nn.Module):
    """Two projections of one read, each with an adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(512, 384, bias=False), nn.Linear(512, 256)
        self.qa, self.qb = nn.Linear(512, 3, bias=False), nn.Linear(3, 384, bias=False)
        self.ka, self.kb = nn.Linear(512, 5, bias=False), nn.Linear(5, 256, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.q(x) + self.qb(self.qa(x)) * 0.7, self.k(x) + self.kb(self.ka(x)) * 1.3


@pytest.mark.slow  # a C++ compiler runs
def test_a_package_of_a_fused_program(tmp_path: Path) -> None:
    model, x = Adapted().eval().requires_grad_(False), torch.randn(4, 512)
    fused = flora_fx.fuse(torch.export.export(model, (x,)))
    assert isinstance(fused, torch.export.ExportedProgram)
    assert len(flora_fx.report(fused).fused) == 2
    package = torch._inductor.aoti_compile_and_package(fused, package_path=str(tmp_path / "model.pt2"))
    for found, expected in zip(torch._inductor.aoti_load_package(package)(x), model(x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with zipfile.ZipFile(package) as archive:
        (library,) = (archive.read(name) for name in archive.namelist() if name.endswith(".so"))
    for layer in (model.q, model.k, model.qa, model.ka):
        assert library.count(layer.weight[1, :64].numpy().tobytes()) == 1
