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


def unrolled(model: Adapted, x: Tensor) -> torch.export.ExportedProgram:
    """The form that a GPU gets."""
    return flora_fx.fuse(torch.export.export(model, (x,)), config=flora_fx.FuseConfig(accumulate="unrolled"))


def test_an_unrolled_program_is_exact_and_says_what_inductor_is_told() -> None:
    model, x = Adapted().double().eval().requires_grad_(False), torch.randn(4, 512, dtype=torch.float64)
    program = unrolled(model, x)
    assert flora_fx.report(program).inductor_options == {"unroll_reductions_threshold": 6}
    assert not program.graph.find_nodes(op="call_function", target=torch.ops.aten.addmm.default)
    with torch.no_grad():
        model.kb.weight.mul_(-2)  # stays live, transposed as it stands
    for found, expected in zip(program.module()(x), model(x), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.slow  # a C++ compiler runs
@pytest.mark.parametrize("form", ["addmm", "unrolled"])
def test_a_package_of_a_fused_program(tmp_path: Path, form: str) -> None:
    model, x = Adapted().eval().requires_grad_(False), torch.randn(4, 512)
    fused = unrolled(model, x) if form == "unrolled" else flora_fx.fuse(torch.export.export(model, (x,)))
    assert isinstance(fused, torch.export.ExportedProgram)
    assert len(flora_fx.report(fused).fused) == 2
    options = flora_fx.report(fused).inductor_options
    package = torch._inductor.aoti_compile_and_package(
        fused, package_path=str(tmp_path / "model.pt2"), inductor_configs=options
    )
    for found, expected in zip(torch._inductor.aoti_load_package(package)(x), model(x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with zipfile.ZipFile(package) as archive:
        (library,) = (archive.read(name) for name in archive.namelist() if name.endswith(".so"))
    for layer in (model.q, model.k, model.qa, model.ka):
        assert library.count(layer.weight[1, :64].numpy().tobytes()) == 1
