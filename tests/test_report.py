"""The report: for readers, for programs, and as a picture."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

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


def texts_of(svg: str) -> list[str | None]:
    return [element.text for element in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_the_picture_says_what_is_where_and_what_it_does_not_say(report: flora_fx.FusionReport) -> None:
    svg = str(report.draw())
    root, texts = ET.fromstring(svg), texts_of(svg)
    title, told = root[0], root[1]
    assert root.get("role") == "img"
    assert root.get("aria-labelledby") == f"{title.get('id')} {told.get('id')}"
    assert "layers_*_qvk ×3: 7 GEMMs, 4 elementwise  →  2 GEMMs" in (told.text or "")
    assert {"before: a GEMM for each W, A and B", "after: a GEMM for each frame"} <= set(texts)
    assert any("not to scale" in (text or "") for text in texts)
    assert "@media (prefers-color-scheme: dark)" in svg
    assert [element.tag for element in root.iter() if "fill" in element.attrib] == []  # colours are the reader's


def sketched(**changes: Any) -> str:
    """The picture of two projections with an adapter each: what differs is given."""
    from flora_fx.reporting.sketch import Sketch, SketchPath, draw

    paths = (SketchPath(0, 0, "q", 2.0), SketchPath(1, 1, "k", 2.0))
    usual = {"bases": (("q", 8), ("k", 6)), "downs": (("q", 3), ("k", 2)), "accumulated": paths, "widened": ()}
    sketch = Sketch(name="pack", reads="x", **({**usual, "gemms": 2, "apart": 0} | changes))
    return draw([sketch], lambda name: name)


def frames(svg: str) -> int:
    return svg.count('class="fx-frame"')


def test_y_goes_past_the_up_projections_to_the_sum() -> None:
    texts = texts_of(sketched())
    assert {"y", "z", "2·B z"} <= set(texts)
    assert texts.count("+") == 2 + 1  # before, and after
    assert "s·B z" in texts_of(sketched(accumulated=(_path(0, 0, 2.0), _path(1, 1, 0.5))))


def test_a_shared_down_projection_has_a_wire_to_each_that_reads_it() -> None:
    shared = sketched(downs=(("q", 3),), accumulated=(_path(0, 0, 2.0), _path(1, 0, 2.0)))
    assert texts_of(shared).count("A shared") == 1
    assert "A shared [3]" in [" ".join((text or "").split()) for text in texts_of(shared)]
    assert "240,93 240,161 254,161" in shared  # from behind A, past W k, to B k
    assert "A z without a wire" not in shared
    elsewhere = sketched(downs=(), accumulated=(_path(0, None, 2.0), _path(1, None, 2.0)))
    assert texts_of(elsewhere).count("z") == 2 + 1
    assert "A z without a wire" in elsewhere


def test_a_down_projection_that_only_others_read_is_drawn_too() -> None:
    texts = texts_of(sketched(accumulated=(), gemms=1))
    assert {"A q", "A k"} <= set(texts)
    assert texts.count("z") == 4  # two before, two after


def test_a_frame_is_a_gemm() -> None:
    assert frames(sketched()) == 2
    assert frames(sketched(gemms=3)) == 3  # each B is one
    assert frames(sketched(apart=2, gemms=3)) == 3  # the A's are one, the B's another
    widened = sketched(accumulated=(), widened=(_path(0, 0, 2.0), _path(1, 1, 2.0)), apart=2, gemms=2)
    assert frames(widened) == 2
    assert "x, z" not in texts_of(widened)  # z comes from the A's below


def _path(base: int, down: int | None, scale: float) -> Any:
    from flora_fx.reporting.sketch import SketchPath

    return SketchPath(base, down, "qk"[base], scale)


def test_the_pictures_of_the_pages_are_drawn_as_pictures_are_now() -> None:
    style = str(sketched()).partition("<style>")[2].partition("</style>")[0]
    docs = Path(__file__).parent.parent / "docs"
    assert len(style) > 500
    assert all(style in (docs / f"{name}.svg").read_text(encoding="utf-8") for name in ("llama-layer", "ffba-shared"))


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
