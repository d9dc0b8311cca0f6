"""A directory appears whole or not at all; one that was changed is not loaded."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from flora_fx.errors import ExportError
from flora_fx.export import load
from flora_fx.export.directory import staging as writing
from flora_fx.export.directory.staging import staged
from tests.export.exported_models import Exported, edit_manifest


def write(target: Path, content: str, *, overwrite: bool = False) -> None:
    with staged(target, overwrite=overwrite, marker="mark") as place:
        (place / "mark").write_text(content)


@pytest.mark.parametrize("exchange", [True, False])
def test_replacing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
    if not exchange:
        monkeypatch.setattr(writing, "_exchange", lambda a, b: False)
    write(tmp_path / "x", "old")
    with pytest.raises(ExportError, match="exists"):
        write(tmp_path / "x", "new")
    write(tmp_path / "x", "new", overwrite=True)
    assert (tmp_path / "x" / "mark").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_the_old_one_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    write(tmp_path / "x", "old")
    with staged(tmp_path / "x", overwrite=True, marker="mark") as place:
        assert (tmp_path / "x" / "mark").read_text() == "old"
        (place / "mark").write_text("new")
        assert (tmp_path / "x" / "mark").read_text() == "old"
    assert (tmp_path / "x" / "mark").read_text() == "new"


def test_an_interrupt_leaves_the_old_one(tmp_path: Path) -> None:
    write(tmp_path / "x", "old")

    def interrupted() -> None:
        with staged(tmp_path / "x", overwrite=True, marker="mark") as place:
            (place / "mark").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (tmp_path / "x" / "mark").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_failing_rename_puts_the_old_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "_exchange", lambda a, b: False)
    write(tmp_path / "x", "old")
    rename = Path.rename

    def sometimes(self: Path, target: Path) -> Path:
        if self.suffix == ".partial":
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", sometimes)
    with pytest.raises(OSError, match="no"):
        write(tmp_path / "x", "new", overwrite=True)
    assert (tmp_path / "x" / "mark").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_someone_else_was_faster(tmp_path: Path) -> None:
    def late() -> None:
        with staged(tmp_path / "x", overwrite=False, marker="mark") as place:
            (place / "mark").write_text("late")
            write(tmp_path / "x", "early")

    with pytest.raises(ExportError, match="exists"):
        late()
    assert (tmp_path / "x" / "mark").read_text() == "early"


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="cannot be written to"):
        write(tmp_path / "file" / "x" / "y", "")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# --- loading ----------------------------------------------------------------------------------------------


def truncate(directory: Path) -> None:
    data = directory / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-100])


def flip_a_bit(directory: Path) -> None:
    data = directory / "model.onnx.data"
    content = bytearray(data.read_bytes())
    content[1000] ^= 1
    data.write_bytes(bytes(content))


def no_format(directory: Path) -> None:
    edit_manifest(directory, format=99)


def point_the_manifest_outside(directory: Path) -> None:
    edit_manifest(directory, files={"../../secret": {"bytes": 1, "sha256": ""}})


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, r"model\.onnx\.data has \d+ bytes instead of \d+; .* copy it again"),
    "tampered": (flip_a_bit, r"model\.onnx\.data is not what was exported .*SHA-256"),
    "no weights": (lambda d: (d / "model.onnx.data").unlink(), r"model\.onnx\.data is missing"),
    "no graph": (lambda d: (d / "model.onnx").unlink(), r"model\.onnx is missing"),
    "no manifest": (lambda d: (d / "flora_fx.json").unlink(), r"has no flora_fx\.json, so it is not an export"),
    "half a manifest": (lambda d: (d / "flora_fx.json").write_text('{"format": 1, "ki'), "cannot be read"),
    "manifest of another kind": (lambda d: edit_manifest(d, kind="unicorn"), "cannot be read"),
    "later format": (no_format, "has format 99, this flora_fx reads 1"),
    "manifest points outside": (point_the_manifest_outside, "outside the directory|does not list"),
    "nothing": (shutil.rmtree, "no directory"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_named(llama: Exported, tmp_path: Path, damage: tuple[Callable[[Path], object], str]) -> None:
    break_it, message = damage
    shutil.copytree(llama.directory, tmp_path / "out")
    break_it(tmp_path / "out")
    with pytest.raises(ExportError, match=message):
        load(tmp_path / "out")


def test_checksums_can_be_left_out(llama: Exported, tmp_path: Path) -> None:
    shutil.copytree(llama.directory, tmp_path / "out")
    flip_a_bit(tmp_path / "out")
    load(tmp_path / "out", verify=False)
    truncate(tmp_path / "out")
    with pytest.raises(ExportError, match="bytes instead of"):
        load(tmp_path / "out", verify=False)


@pytest.mark.parametrize("location", ["/etc/passwd", "../model.onnx.data", "sub/../../x", "other.data"])
def test_weights_from_elsewhere_are_refused(llama: Exported, tmp_path: Path, location: str) -> None:
    out = tmp_path / "out"
    shutil.copytree(llama.directory, out)
    model = onnx.load(str(out / "model.onnx"), load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.external_data)
    next(entry for entry in tensor.external_data if entry.key == "location").value = location
    onnx.save(model, str(out / "model.onnx"))
    content = json.loads((out / "flora_fx.json").read_text())
    written = (out / "model.onnx").read_bytes()
    # Who can change the graph can change its checksum too.
    content["files"]["model.onnx"] = {"bytes": len(written), "sha256": hashlib.sha256(written).hexdigest()}
    edit_manifest(out, files=content["files"])
    for verify in (True, False):
        with pytest.raises(ExportError, match="reads its weights from"):
            load(out, verify=verify)


def test_a_link_is_not_followed(llama: Exported, tmp_path: Path) -> None:
    shutil.copytree(llama.directory, tmp_path / "out")
    data = tmp_path / "out" / "model.onnx.data"
    data.rename(tmp_path / "elsewhere")
    data.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ExportError, match="missing"):
        load(tmp_path / "out")


def test_providers_that_are_not_there(llama: Exported) -> None:
    with pytest.raises(ExportError, match="none of the providers"):
        load(llama.directory, providers=["NoSuchProvider"])
