"""What the report and its picture say of widened packs."""

from __future__ import annotations

import copy
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

import flora_fx
from flora_fx import FuseConfig
from tests.adapters import Adapted, Siblings
from tests.parallel import fuse_and_compare, x_like
from tests.test_forms import captured

from .free import (
    AHEAD,
    Free,
    frozen,
    one_for_both,
    others_alone,
    own_and_others,
    own_and_others_of_one_base,
    sibling_is_returned,
)


@pytest.mark.parametrize(
    "model",
    [
        Siblings((0.7, 0.7)),
        Siblings((0.7, 1.9)),
        *map(Free, [own_and_others, own_and_others_of_one_base, others_alone, one_for_both, sibling_is_returned]),
    ],
    ids=lambda model: model.form.__name__ if isinstance(model, Free) else str(model.scales),
)
def test_the_sketches_count_the_gemms_there_are(model: nn.Module) -> None:
    program = captured(frozen(model), x_like())
    for layout in ("joined", "beside", "ahead"):
        for up in ("block_diagonal", "per_projection"):
            for write in ("widened", "accumulated"):
                config = FuseConfig(layout=layout, up=up, write=write)
                report = flora_fx.report(flora_fx.fuse(copy.deepcopy(program), config=config))
                sketched = sum(sketch.gemms for sketch in report.sketches)
                onto_o = {"oa.weight", "oc.weight"} & set(report.fused)
                alone = 2 if onto_o and write == "accumulated" else 0  # o, and what is written onto it: in no group
                assert sketched + alone == report.ops_after["gemm"], config


@pytest.mark.parametrize("layout", ["joined", "beside", "ahead"])
def test_a_sketch_of_down_projections_alone(layout: Any) -> None:
    def form(m: Adapted, x: Tensor) -> Tensor:
        other = x * 0.3
        return m.w(x) + m.b(m.a(other)) + m.b2(m.a2(other))

    x = x_like()
    report = fuse_and_compare(captured(frozen(Adapted(form)), x), x, FuseConfig(layout=layout))
    assert [sketch.gemms for sketch in report.sketches] == [1]
    assert report.ops_after["gemm"] == 1 + 3  # w, and two that accumulate where they stand


def test_the_picture_shows_down_projections_of_their_own(tmp_path: Path) -> None:
    x = x_like()
    report = flora_fx.report(flora_fx.fuse(captured(frozen(Siblings()), x), config=AHEAD))
    path = report.draw(tmp_path / "packs.svg")
    texts = [element.text for element in ET.parse(path).getroot().iter("{http://www.w3.org/2000/svg}text")]
    assert "7 GEMMs, 4 elementwise  →  2 GEMMs" in texts
    assert {"W q", "A q_a", "B q_b", "z", "A q_a  [3]"} <= set(texts)
    assert "y" not in texts  # nothing accumulates
    assert [(sketch.apart, [path.down for path in sketch.widened]) for sketch in report.sketches] == [
        (2, [0, 1]),
        (1, [0]),
    ]
    report = flora_fx.report(flora_fx.fuse(captured(frozen(Free(own_and_others)), x), config=AHEAD))
    first, second = report.sketches
    assert ([name for name, _ in first.downs], first.apart) == (["a.weight", "c.weight"], 1)
    assert [path.down for path in (*first.widened, *second.widened)] == [0, None]
