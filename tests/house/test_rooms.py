"""Rooms import one way, the core needs torch alone, and nobody imports `benchmarks/`."""

from __future__ import annotations

from pathlib import Path

import pytest

from flora_fx.checkout import checkout

from .rooms import HOUSES, OWN, Room, broken, edges, files, place

pytestmark = pytest.mark.skipif(checkout() is None, reason="passes/ and export/ lie elsewhere in an installation")


def test_every_import_is_one_that_the_table_allows() -> None:
    assert broken() == []


def test_every_file_stands_in_a_room_and_no_room_is_empty() -> None:
    standing = {place(file)[1] for file in files().values()}
    assert standing == {room for house in HOUSES for room in house.rooms}


def test_a_house_imports_only_those_below_it() -> None:
    names = [house.name for house in HOUSES]
    for index, house in enumerate(HOUSES):
        assert set(house.imports) <= set(names[:index])
    assert not [house.name for house in HOUSES if "benchmarks" in house.imports]
    [passes] = [house for house in HOUSES if house.name == "passes"]
    assert passes.imports == ("graphs",)
    assert {house.name for house in HOUSES if house.extras is not None} == {"graphs", "passes", "face"}
    assert {house.name for house in HOUSES if house.needs != {"torch"}} == {"adapters"}


def test_the_rooms_use_each_other() -> None:
    """The reading of imports finds them, however they are written."""
    found = {(str(one), str(other)) for one, other in edges()}
    assert ("flora_fx: face", "passes: pipeline") in found  # in a function
    assert ("passes/rewrite/", "passes/plan/") in found
    assert ("export: face", "export/check/") in found  # relative
    assert ("benchmarks/gpu/", "benchmarks/latency/") in found


@pytest.mark.parametrize(
    ("file", "line", "told"),
    [
        ("passes/plan/new.py", "from flora_fx.export import load", "passes may not import export"),
        ("passes/plan/new.py", "from ..rewrite import write", "passes/rewrite/ comes after passes/plan/"),
        ("passes/plan/new.py", "def late():\n    import onnx", "passes takes extras through flora_fx.errors.require"),
        ("flora_fx/new.py", "from .fusing import fuse", "graphs may not import face"),
        ("export/run/new.py", "import onnxruntime", "at the top, export may import torch alone"),
        ("export/run/new.py", "from benchmarks.show.page import PAGE", "export may not import benchmarks"),
        ("flora_fx/graph/new.py", "from . import nowhere\nfrom .nowhere import it", "which is no file"),
    ],
)
def test_what_the_table_does_not_allow_is_told(tmp_path: Path, file: str, line: str, told: str) -> None:
    for path in [*(one for name, one in files().items() if name.count(".") < 3), Path(file)]:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    (tmp_path / file).write_text(line)
    [found] = broken(tmp_path)
    assert found.startswith(f"{file}:")
    assert found.endswith(told)


def test_what_is_imported_in_a_function_alone_may_import_extras(tmp_path: Path) -> None:
    for path in [
        *files().values(),
        Path("export/run/late.py"),
        Path("export/run/later.py"),
        Path("passes/plan/late.py"),
    ]:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    (tmp_path / "export/run/late.py").write_text("import onnx\nfrom . import later")
    (tmp_path / "export/run/later.py").write_text("import numpy")
    (tmp_path / "export/run/session.py").write_text("def run():\n    from . import late")
    assert broken(tmp_path) == []
    (tmp_path / "export/run/decoder.py").write_text("from . import later")
    assert [one.partition(":")[0] for one in broken(tmp_path)] == ["export/run/later.py"]
    (tmp_path / "passes/plan/late.py").write_text("import onnx")
    (tmp_path / "flora_fx/fusing.py").write_text("def fuse():\n    from .passes.plan import late")
    assert broken(tmp_path)[-1].endswith("passes takes extras through flora_fx.errors.require")


def test_a_folder_without_a_room_is_told() -> None:
    with pytest.raises(LookupError, match=r"flora_fx/attic/old\.py stands in no room: give its folder one"):
        place(Path("flora_fx/attic/old.py"))
    assert isinstance(place(Path("flora_fx/fusing.py"))[1], Room)
    assert {room.path.partition("/")[0] for house in HOUSES for room in house.rooms} == set(OWN)
