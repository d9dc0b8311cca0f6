"""A disk that is full, a place that must not be written to: one error with the path and what to do, and no litter."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flora_fx.errors import ExportError
from flora_fx.export import export_onnx
from flora_fx.export.directory import staging as directory
from flora_fx.export.directory.staging import staged

from .models import adapted
from .processes import Forked
from .test_killed import content


def write(target: Path, size: int = 1000, *, overwrite: bool = True) -> None:
    with staged(target, overwrite=overwrite, marker="flora_fx.json") as place:
        (place / "flora_fx.json").write_text("whole", encoding="utf-8")
        (place / "model.onnx.data").write_bytes(b"x" * size)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 100 kB."""
    place = tmp_path / "small"
    place.mkdir()
    with mounted(place, "-t", "tmpfs", "-o", "size=100k", "tmpfs"):
        yield place


class mounted:  # noqa: N801
    """A mount, for the time of a block; skips the test where it is not permitted."""

    def __init__(self, place: Path, *options: str) -> None:
        self.place, self.options = str(place), options

    def __enter__(self) -> None:
        try:
            subprocess.run(["mount", *self.options, self.place], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("mounting is not permitted here")

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", "-l", self.place], check=True)


def test_a_full_disk(small: Path) -> None:
    target = small / "out"
    write(target)
    before = content(target)
    with pytest.raises(ExportError, match=r"small/out could not be written \(No space left on device\); free some spa"):
        write(target, 200_000)
    assert content(target) == before
    assert [path.name for path in small.iterdir()] == ["out"]
    write(target, 50_000)
    assert len((content(target) or {})["model.onnx.data"]) == 50_000


def test_a_read_only_file_system(tmp_path: Path) -> None:
    place = tmp_path / "place"
    write(place / "out")
    before = content(place / "out")
    with mounted(place, "--bind", str(place)):
        subprocess.run(["mount", "-o", "remount,bind,ro", str(place)], check=True)
        with pytest.raises(ExportError, match=r"place cannot be written to \(Read-only file system\); choose another"):
            write(place / "out", 7)
        assert content(place / "out") == before
        with pytest.raises(ExportError, match="Read-only file system"):
            write(place / "deep" / "er")
    assert [path.name for path in place.iterdir()] == ["out"]


class FromRust(Exception):  # noqa: N818
    """What the tokenizers library raises: its errors have no number."""


REFUSED: dict[str, tuple[Exception, str]] = {
    "full": (OSError(errno.ENOSPC, "?"), r"\(No space left on device\); free some space there, or choose another pla"),
    "quota": (OSError(errno.EDQUOT, "?"), r"\(Disk quota exceeded\); free some space"),
    "too large": (OSError(errno.EFBIG, "?"), r"\(File too large\); it does not take files so large \(see ulimit -f\)"),
    "read-only": (OSError(errno.EROFS, "?"), r"\(Read-only file system\); choose another place"),
    "permissions": (OSError(errno.EACCES, "?"), r"\(Permission denied\); choose another place"),
    "broken": (OSError(errno.EIO, "?"), r"\(Input/output error\); its disk or network fails"),
    "Rust": (FromRust("No space left on device (os error 28)"), r"\(No space left on device\); free some space"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("where", ["as it writes", "as it syncs", "as it renames"])
def test_what_the_system_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, where: str) -> None:
    error, message = REFUSED[case]
    write(tmp_path / "out")
    before = content(tmp_path / "out")

    def fail(*_: Any) -> None:
        raise error

    functions = {"as it syncs": "_sync", "as it renames": "_exchange"}
    if where in functions:
        monkeypatch.setattr(directory, functions[where], fail)

    def refused() -> None:
        with staged(tmp_path / "out", overwrite=True, marker="flora_fx.json") as place:
            (place / "half").write_text("half", encoding="utf-8")
            if where == "as it writes":
                fail()

    with pytest.raises(ExportError, match=f"out could not be written {message}") as caught:
        refused()
    assert caught.value.__cause__ is error
    assert content(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_error_of_the_program_stays_what_it_is(tmp_path: Path) -> None:
    for error in (OSError(errno.EBADF, "?"), RuntimeError("a bug"), KeyError(28)):
        with pytest.raises(type(error)), staged(tmp_path / "new", overwrite=True, marker="x"):
            raise error
    assert not [*tmp_path.iterdir()]


TAKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a file": (lambda place: place.write_text("mine"), "exists and is not a directory; choose another place"),
    "a link to a file": (lambda place: place.symlink_to(__file__), "exists and is not a directory"),
    "a link to a directory": (lambda place: place.symlink_to(Path(__file__).parent), "exists and is not a directory"),
    "a link to nowhere": (lambda place: place.symlink_to("nowhere"), "exists and is not a directory"),
    "someone's directory": (
        lambda place: (place.mkdir(), (place / "thesis.tex").write_text("mine")),
        "has no flora_fx.json, so it is not an export of flora_fx and is not overwritten; choose another place",
    ),
    "an empty directory": (lambda place: place.mkdir(), "has no flora_fx.json, so it is not an export"),
    "a directory with that name in it": (
        lambda place: (place / "flora_fx.json").mkdir(parents=True),
        "has no flora_fx.json",
    ),
}


@pytest.mark.parametrize("case", TAKEN)
def test_what_is_not_ours_is_never_overwritten(tmp_path: Path, case: str) -> None:
    make, message = TAKEN[case]
    make(tmp_path / "out")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ExportError, match=f"out {message}"):
        export_onnx(adapted(), tmp_path / "out", overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_place_that_was_taken_meanwhile(tmp_path: Path) -> None:
    def late() -> None:
        with staged(tmp_path / "out", overwrite=True, marker="flora_fx.json"):
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "thesis.tex").write_text("mine", encoding="utf-8")

    with pytest.raises(ExportError, match="is not an export of flora_fx and is not overwritten"):
        late()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "thesis.tex"]


def test_another_process_that_takes_a_new_one_for_abandoned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between being made and being locked it looks so."""
    open_staging, taken = directory._open_staging, []

    def opened(target: Path, made: list[Path]) -> Path:
        place = open_staging(target, made)
        if len(taken) < 3:
            directory._remove_abandoned(target)
            assert not place.exists()
            taken.append(place)
        return place

    monkeypatch.setattr(directory, "_open_staging", opened)
    handles = len([*Path("/proc/self/fd").iterdir()])
    write(tmp_path / "out")
    assert len([*Path("/proc/self/fd").iterdir()]) == handles
    assert len(taken) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_file_systems_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then nobody knows who lives, and nothing is removed."""
    (tmp_path / ".out.1234.partial").mkdir()

    def unsupported(*_: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, "?")

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", unsupported)
        write(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "win32")
        write(tmp_path / "out", 7)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.1234.partial", "out"]


@pytest.mark.slow
@pytest.mark.parametrize("limit", [4_000, 12_000, 100_000, 170_000])
def test_an_export_that_is_too_large(tmp_path: Path, limit: int) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "flora_fx.json").write_text("old", encoding="utf-8")

    def work(say: Callable[[str], None]) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        export_onnx(adapted(), tmp_path / "out", overwrite=True)

    process = Forked(work)
    assert process.end() == 1
    wanted = f"{tmp_path}/out could not be written ({os.strerror(errno.EFBIG)})"
    assert any(said.startswith(f"ExportError: {wanted}") for said in process.said), process.said
    assert content(tmp_path / "out") == {"flora_fx.json": b"old"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
@pytest.mark.parametrize("size", ["20k", "120k", "180k"])
def test_an_export_to_a_full_disk(tmp_path: Path, size: str) -> None:
    place = tmp_path / "small"
    place.mkdir()
    with mounted(place, "-t", "tmpfs", "-o", f"size={size}", "tmpfs"):
        with pytest.raises(ExportError, match=r"out could not be written \(No space left on device\)"):
            export_onnx(adapted(), place / "out")
        assert not [*place.iterdir()]
    shutil.rmtree(place)
