"""Checksums that are made while something else is done are those of the files, and what fails is told."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from flora_fx.errors import ExportError
from flora_fx.export import export_onnx
from flora_fx.export.directory import sealing as module
from flora_fx.export.directory.sealing import Sealing
from tests.export.exported_models import build
from tests.patience import LIMIT_S

CONTENT = bytes(range(251)) * 4099


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx.data"
    path.write_bytes(CONTENT)
    return path


def working() -> set[threading.Thread]:
    """The threads of pools."""
    return {thread for thread in threading.enumerate() if thread.name.startswith("ThreadPoolExecutor")}


def sealed(path: Path) -> str:
    with Sealing() as sealing:
        sealing.begin(path)
        return sealing.sha256(path)


def test_of_a_file_that_was_begun_and_of_another(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "model.onnx"
    other.write_bytes(b"other")
    with Sealing() as sealing:
        sealing.begin(file)
        assert sealing.sha256(file) == hashlib.sha256(CONTENT).hexdigest()
        assert sealing.sha256(other) == hashlib.sha256(b"other").hexdigest()


def test_it_is_read_while_something_else_is_done(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began, go_on = threading.Event(), threading.Event()

    def slow(path: Path) -> str:
        began.set()
        assert go_on.wait(LIMIT_S)
        return f"of {path.name}"

    monkeypatch.setattr(module, "sha256", slow)
    with Sealing() as sealing:
        sealing.begin(file)
        assert began.wait(LIMIT_S)  # and this thread is here
        go_on.set()
        assert sealing.sha256(file) == "of model.onnx.data"


def failing(error: Exception) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise error

    return fail


def test_a_file_that_does_not_reach_the_disk(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = working()
    monkeypatch.setattr(os, "fsync", failing(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        sealed(file)
    assert working() == before


def test_a_file_that_cannot_be_read(file: Path) -> None:
    with pytest.raises(FileNotFoundError):
        sealed(file.with_name("another"))


def test_nothing_runs_on_after_an_error(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever removes the directory then removes a file that nobody reads."""
    before = working()
    began, ended = threading.Event(), threading.Event()

    def slow(path: Path) -> str:
        began.set()
        ended.wait(0.2)
        ended.set()
        return ""

    monkeypatch.setattr(module, "sha256", slow)

    def fail() -> None:
        with Sealing() as sealing:
            sealing.begin(file)
            assert began.wait(LIMIT_S)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert ended.is_set()
    assert working() == before


def test_an_export_whose_weights_do_not_reach_the_disk_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = working()
    monkeypatch.setattr(module, "_sync", failing(OSError(5, "Input/output error")))
    with pytest.raises(ExportError, match=r"could not be written \(Input/output error\)"):
        export_onnx(build("tiny"), tmp_path / "out", verify="none")
    assert list(tmp_path.iterdir()) == []
    assert working() == before


def test_the_manifest_has_the_checksums(tmp_path: Path) -> None:
    export_onnx(build("tiny"), tmp_path / "out", verify="none")
    told = json.loads((tmp_path / "out" / "flora_fx.json").read_text())["files"]
    assert "model.onnx.data" in told
    for name, entry in told.items():
        assert entry["sha256"] == hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest()
