"""The report: for readers, for programs, and as a picture."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

import flora_fx
from tests.adapters import D_IN, Siblings


class Stack(nn.Module):
    """Three like layers, and one decline: a delta that is returned as well."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Siblings() for _ in range(3))
        self.w, self.a, self.b = nn.Linear(D_IN, 5), nn.Linear(D_IN, 2), nn.Linear(2, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for layer in self.layers:
            x = layer(x)
        delta = self.b(self.a(x)) * 0.5
        return self.w(x) + delta, delta


@pytest.fixture(scope="module")
def fused() -> fx.GraphModule:
    return flora_fx.fuse(flora_fx.capture(Stack().eval().requires_grad_(False), torch.randn(4, D_IN)))


@pytest.fixture
def report(fused: fx.GraphModule) -> flora_fx.FusionReport:
    return flora_fx.report(fused)


def test_the_table_names_packs_declines_and_counts(report: flora_fx.FusionReport) -> None:
    text = str(report)
    assert "9 adapters fused, 1 declined" in text
    assert "layers_*_qvk " in text
    assert "×3" in text
    assert "3 base + 2 down" in text
    assert "an intermediate value has another reader" in text
    assert f"{report.ops_before['gemm']:>6}{report.ops_after['gemm']:>8}" in text


def test_the_json_holds_everything(report: flora_fx.FusionReport) -> None:
    data = json.loads(report.to_json())
    assert data["ops_before"]["gemm"] == 3 * 10 + 3
    assert data["ops_after"]["gemm"] == 3 * 4 + 3
    assert data["declines"][0]["reason"] == "OTHER_READER"
    pack = next(pack for pack in data["packs"] if pack["name"] == "layers_0_qvk")
    assert [piece["role"] for piece in pack["slices"]] == ["base", "base", "base", "down", "down"]
    assert [piece["rows"] for piece in pack["slices"]] == [[0, 10], [10, 18], [18, 24], [24, 27], [27, 32]]
    passes = (
        "effects modes values projections magnitudes paths unlike decide forms group write rotary clean strides "
        "settle direct labels"
    )
    assert set(data["seconds"]) == set(passes.split())
    assert data["unrolled"] == 0


def test_the_highest_rank_that_is_unrolled_is_what_inductor_is_told() -> None:
    graph = fx.symbolic_trace(Siblings().double().eval().requires_grad_(False))
    report = flora_fx.report(flora_fx.fuse(graph, config=flora_fx.FuseConfig(accumulate="unrolled")))
    assert report.unrolled == 5
    assert report.inductor_options == {"unroll_reductions_threshold": 6}
    assert flora_fx.report(flora_fx.fuse(graph)).inductor_options == {}


def test_the_picture_is_svg_and_draws_like_layers_once(report: flora_fx.FusionReport, tmp_path: Path) -> None:
    path = report.draw(tmp_path / "packs.svg")
    root = ET.parse(path).getroot()
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "layers_*_qvk ×3" in texts
    assert "7 GEMMs, 4 elementwise  →  2 GEMMs" in texts
    assert {"W q", "A q_a", "B q_b", "×0.7"} <= set(texts)


def test_a_graph_without_adapters_has_a_report_and_a_picture_too(tmp_path: Path) -> None:
    report = flora_fx.report(flora_fx.fuse(fx.symbolic_trace(nn.Sequential(nn.Linear(3, 2)))))
    assert "0 adapters fused, 0 declined" in str(report)
    assert "nothing was fused" in report.draw(tmp_path / "empty.svg").read_text()


def test_names_that_are_markup_are_escaped(tmp_path: Path) -> None:
    from flora_fx.reporting.sketch import Sketch, draw

    sketch = Sketch("<&>", "x", (("<w>", 3), ("v", 2)), (), (), (), 1, 0)
    ET.fromstring(draw([sketch], lambda name: name))


def test_a_picture_that_cannot_be_written_raises(report: flora_fx.FusionReport, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"nowhere"):
        report.draw(tmp_path / "nowhere" / "packs.svg")


# --- in a terminal and in a notebook ----------------------------------------------------------------------

SUMMARY = "9 adapters fused, 1 declined, 33 GEMMs before, 15 after"


def test_each_shows_itself_in_one_line(fused: fx.GraphModule, report: flora_fx.FusionReport) -> None:
    assert repr(report) == f"FusionReport({SUMMARY})"
    assert repr(fused) == f"FusedGraphModule({SUMMARY}; flora_fx.report() tells all)"
    assert repr(flora_fx.verify(fused, fused, torch.ones(4, D_IN))) == (
        "Verification(max_abs=0.0e+00, max_rel=0.0e+00, outputs=2)"
    )
    assert f"(inner): FusedGraphModule({SUMMARY}" in repr(nn.ModuleDict({"inner": fused}))
    assert "def forward(self" in str(fused)  # its code is what print() is for


def test_an_exported_program_says_that_it_is_fused() -> None:
    model = Siblings().eval().requires_grad_(False)
    fused = flora_fx.fuse(torch.export.export(model, (torch.randn(4, D_IN),)))
    assert repr(fused).startswith("FusedExportedProgram(3 adapters fused, 0 declined, 10 GEMMs before, ")


def test_a_notebook_shows_text_and_picture(report: flora_fx.FusionReport, tmp_path: Path) -> None:
    page = ET.fromstring(f"<body>{report._repr_html_()}</body>")
    [text] = page.iter("pre")
    assert text.text == str(report)
    assert len(list(page.iter("{http://www.w3.org/2000/svg}svg"))) == 1
    picture = report.draw()
    assert picture._repr_svg_() == str(picture) == report._repr_svg_() == report.draw(tmp_path / "a.svg").read_text()
    assert repr(picture) == f"Picture(SVG, {len(str(picture)):,} characters)"
    assert ET.fromstring(picture.svg).tag == "{http://www.w3.org/2000/svg}svg"


def test_a_notebook_shows_a_verification_as_it_is_printed(fused: fx.GraphModule) -> None:
    same = flora_fx.verify(fused, fused, torch.ones(4, D_IN))
    assert same._repr_html_() == f"<pre>{same}</pre>"
