"""An export that is killed leaves the old directory, byte for byte, or the whole new one, or none where there was none.

Killed is SIGKILL: nothing can be put in order any more. What it leaves beside, the next export removes.
"""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from flora_fx.export import Decoder, export_onnx, load
from flora_fx.export.directory import staging as directory
from flora_fx.export.directory.staging import staged

from .models import adapted
from .processes import Forked, die_before_line

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")

STAGES = ("capture", "fuse", "translate", "write", "check", "seal")


def content(place: Path) -> dict[str, bytes] | None:
    """All files of a directory; None if there is none."""
    if not place.exists():
        return None
    return {path.relative_to(place).as_posix(): path.read_bytes() for path in place.rglob("*") if path.is_file()}


@pytest.fixture
def exports(tmp_path: Path) -> tuple[Path, Path]:
    """What stands for an old export and a new one."""
    for name, size in (("old", 100), ("new", 200)):
        (tmp_path / "exports" / name).mkdir(parents=True)
        for file in ("model.onnx", "model.onnx.data", "flora_fx.json"):
            (tmp_path / "exports" / name / file).write_text(f"{name} {file}" * size, encoding="utf-8")
    return tmp_path / "exports" / "old", tmp_path / "exports" / "new"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """Where to export to, in a directory of its own."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place" / "out[1]"  # no pattern of names


def write(source: Path, target: Path) -> None:
    with staged(target, overwrite=True, marker="flora_fx.json") as place:
        shutil.copytree(source, place, dirs_exist_ok=True)


@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
@pytest.mark.parametrize("there", ["old", "none"])
def test_killed_at_the_lines_of_the_writer(
    exports: tuple[Path, Path], target: Path, monkeypatch: pytest.MonkeyPatch, there: str, exchange: bool, step: int
) -> None:
    if not exchange:
        monkeypatch.setattr(directory, "_exchange", lambda a, b: False)
    old, new = exports
    before, after = content(old) if there == "old" else None, content(new)
    met, litter, code = set(), 0, -1
    for line in range(0, 2000, step):
        for path in target.parent.iterdir():
            shutil.rmtree(path)
        if there == "old":
            shutil.copytree(old, target)

        def work(_: Callable[[str], None], line: int = line) -> None:
            die_before_line(line, directory.__file__)
            write(new, target)

        code = Forked(work).end()
        found = content(target)
        if not exchange and there == "old" and found is None:
            # Between the two renames there is none; the old one is beside it, whole.
            (beside,) = target.parent.glob(".*.old")
            assert content(beside / "export") == before
        else:
            assert found in (before, after)
            met.add("new" if found == after else "old")
        if code == 0:
            break
        assert code == -signal.SIGKILL
        litter += len([*target.parent.iterdir()]) - target.exists()
    assert code == 0, "the last one was not killed"
    assert met == {"old", "new"}
    assert litter, "some were killed as they wrote"


def test_what_killed_processes_left_does_not_confuse_the_next(exports: tuple[Path, Path], target: Path) -> None:
    _, new = exports

    def work(say: Callable[[str], None]) -> None:
        with staged(target, overwrite=False, marker="flora_fx.json") as place:
            (place / "model.onnx").write_bytes(b"half")
            say("half")
            time.sleep(60)

    processes = [Forked(work) for _ in range(3)]
    assert all(process.wait_for("half") for process in processes)
    for process in processes[:2]:
        process.signal(signal.SIGKILL)
        assert process.end() == -signal.SIGKILL
    place = target.parent
    (place / ".other.1234.partial").mkdir()  # of another target
    assert len([*place.iterdir()]) == 4
    write(new, target)
    assert content(target) == content(new)
    names = {path.name for path in place.iterdir()}
    assert {".other.1234.partial", target.name} < names
    assert len(names) == 3, "the one that is still written to"
    processes[2].signal(signal.SIGKILL)
    assert processes[2].end() == -signal.SIGKILL
    write(new, target)
    assert {path.name for path in place.iterdir()} == {".other.1234.partial", target.name}


@pytest.fixture
def _one_thread() -> Iterator[None]:
    """A forked process has none of its parent's threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def moments(count: int) -> list[tuple[str, float]]:
    """Seeded: a stage, and seconds after its beginning."""
    draw = random.Random(count)
    return [(STAGES[index % len(STAGES)], draw.random() * 0.3) for index in range(count)]


@pytest.mark.parametrize(
    ("stage", "delay"),
    [("write", 0.0), *(pytest.param(*moment, marks=pytest.mark.slow) for moment in moments(24))],
)
@pytest.mark.parametrize("there", ["old", pytest.param("none", marks=pytest.mark.slow)])
@pytest.mark.usefixtures("_one_thread")
def test_a_killed_export(exports: tuple[Path, Path], target: Path, there: str, stage: str, delay: float) -> None:
    if there == "old":
        shutil.copytree(exports[0], target)
    before = content(target)
    process = Forked(lambda say: (export_onnx(adapted("same"), target, overwrite=True, progress=say), None)[1])
    assert process.wait_for(stage)
    time.sleep(delay)
    process.signal(signal.SIGKILL)
    assert process.end() in (0, -signal.SIGKILL)
    if content(target) != before:
        assert isinstance(load(target), Decoder)
    write(exports[1], target)
    assert [path.name for path in target.parent.iterdir()] == [target.name]


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.usefixtures("_one_thread")
def test_ctrl_c(target: Path, stage: str) -> None:
    def work(say: Callable[[str], None]) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)

        def progress(name: str) -> None:
            say(name)
            if name == stage:
                time.sleep(60)  # it is in there that the signal comes

        export_onnx(adapted("same"), target / "further" / "out", progress=progress)

    process = Forked(work)
    assert process.wait_for(stage)
    process.signal(signal.SIGINT)
    assert process.end() == 130
    assert not [*target.parent.iterdir()]
