"""docs/architecture.md names files that are there; docs/glossary.md has each word once."""

from __future__ import annotations

import re

import pytest

from flora_fx.checkout import checkout

from . import page
from .rooms import ROOT

pytestmark = pytest.mark.skipif(checkout() is None, reason="passes/ and export/ lie elsewhere in an installation")

TEXT = page.PAGE.read_text(encoding="utf-8")
GLOSSARY = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")


def test_the_table_of_rooms_is_that_of_the_tests() -> None:
    assert page.written(TEXT) == TEXT, "run `python -m tests.house.page`"


def test_every_file_that_it_names_is_there() -> None:
    named = set(re.findall(r"`([\w./]+(?:\.py|\.toml|/))`", TEXT))
    assert len(named) > 60
    assert sorted(name for name in named if not (ROOT / name).exists()) == []


def test_every_word_is_told_once() -> None:
    for table in GLOSSARY.split("\n## ")[1:]:
        words = re.findall(r"^\| ([^|]+) \|", table, re.MULTILINE)[1:]
        assert len(words) > 10
        assert words == sorted(set(words), key=str.lower)
