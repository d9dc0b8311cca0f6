"""The picture is of the code as it stands."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from flora_fx.checkout import checkout

from . import picture
from .rooms import HOUSES, Room

pytestmark = pytest.mark.skipif(checkout() is None, reason="passes/ and export/ lie elsewhere in an installation")


def _texts(drawn: str) -> list[str]:
    return [str(found.text) for found in ElementTree.fromstring(drawn).iter("{http://www.w3.org/2000/svg}text")]


def test_the_picture_is_of_the_code() -> None:
    assert picture.PICTURE.read_text(encoding="utf-8") == picture.svg(), "run `python -m tests.house.picture`"


def test_it_shows_every_house_and_room() -> None:
    texts = _texts(picture.svg())
    assert {house.name for house in HOUSES} <= set(texts)
    assert len(texts) == 1 + 2 * len(HOUSES) + sum(len(house.rooms) for house in HOUSES)


def test_another_import_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    before, drawn = picture.svg(), picture.edges()
    rooms = {str(room): room for house in HOUSES for room in house.rooms}
    monkeypatch.setattr(
        picture, "edges", lambda: drawn | {(rooms["flora_fx/measuring/"], rooms["flora_fx/checkpoint/"])}
    )
    assert "flora_fx/, imports checkpoint, graphs" in _texts(picture.svg())
    assert "flora_fx/, imports checkpoint, graphs" not in _texts(before)
    monkeypatch.setattr(picture, "edges", lambda: drawn - {(rooms["flora_fx/graph/"], rooms["flora_fx/storage/"])})
    assert picture.svg() != before


def test_an_arrow_that_others_say_is_left_out() -> None:
    low, middle, high = (Room(name, "") for name in ("low", "middle", "high"))
    pairs = {(middle, low), (high, middle), (high, low)}
    assert picture._drawn_once(pairs, (low, middle, high)) == [(middle, low), (high, middle)]
