"""How commands end: what was found is told, whatever stops them, and what they leave."""

from __future__ import annotations

import io
import json
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from typer.testing import CliRunner, Result

from flora_fx import export
from flora_fx.cli import build_app
from flora_fx.commands.ending import ending, left_of
from flora_fx.commands.stages import Stages, columns, staged_work
from flora_fx.errors import ExportError

FLAGS = {"hot_swap": "--hot-swap"}


class Scripted(Iterator[Tensor]):
    """A stream of three tokens that ends in something else than an end."""

    finish_reasons = ("length",)

    def __init__(self, end: BaseException) -> None:
        self.left: list[Tensor | BaseException] = [torch.tensor([token]) for token in (7, 8, 9)] + [end]

    def __next__(self) -> Tensor:
        found = self.left.pop(0)
        if isinstance(found, BaseException):
            raise found
        return found


class Decoder:
    """A decoder whose streams are scripted."""

    manifest = None

    def __init__(self, end: BaseException) -> None:
        self.end = end

    def stream(self, ids: Tensor, **_: Any) -> Scripted:
        return Scripted(self.end)


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[BaseException, str], Result]:
    def run(end: BaseException, *options: str) -> Result:
        monkeypatch.setattr(export, "load", lambda _: Decoder(end))
        command = ["generate", "-d", str(tmp_path), "--token-ids", "1,2", *options]
        return CliRunner().invoke(build_app(), command)

    return run


STUCK = "row 0 has 5 tokens, and no other may follow; loosen no_repeat_ngram_size"


@pytest.mark.parametrize(
    ("end", "code", "label", "kind", "message"),
    [
        (ValueError(STUCK), 1, "error", "FloraError", STUCK),
        (ExportError("ONNX Runtime failed"), 1, "error", "ExportError", "ONNX Runtime failed"),
        (KeyboardInterrupt(), 130, "interrupted", "KeyboardInterrupt", "3 new tokens came"),
    ],
)
def test_no_token_is_lost(
    ends: Callable[..., Result], end: BaseException, code: int, label: str, kind: str, message: str
) -> None:
    plain = ends(end)
    assert plain.exit_code == code
    assert plain.stdout == "7 8 9 \n"
    assert plain.stderr == f"{label}: {message}\n"
    told = ends(end, "--json")
    assert told.exit_code == code
    assert told.stderr == f"{label}: {message}\n"
    document = json.loads(told.stdout)
    assert (document["prompt_ids"], document["token_ids"], document["finish_reason"]) == ([1, 2], [7, 8, 9], None)
    assert document["error"] == {"type": kind, "message": message, "exit_code": code}


def test_a_bug_keeps_its_traceback_and_the_text(ends: Callable[..., Result]) -> None:
    result = ends(TypeError("a bug"))
    assert isinstance(result.exception, TypeError)
    assert result.stdout == "7 8 9 \n"


def test_an_empty_prompt(ends: Callable[..., Result]) -> None:
    result = ends(StopIteration(), "--token-ids", ",")
    assert result.exit_code == 1
    assert result.stderr == "error: --token-ids holds no token; give it at least one\n"


def test_a_warning_is_a_line_in_the_commands_words(capsys: pytest.CaptureFixture[str]) -> None:
    shown: list[object] = []
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_, **__: shown.append(message)
        with ending(FLAGS, as_json=False):
            warnings.warn("export it again\nwith hot_swap=True [odd]", RuntimeWarning, stacklevel=1)
            warnings.warn("a developer's concern", DeprecationWarning, stacklevel=1)
        warnings.warn("afterwards", stacklevel=1)
    assert capsys.readouterr().err == "warning: export it again with --hot-swap [odd]\n"
    assert [str(message) for message in shown] == ["a developer's concern", "afterwards"]


def test_a_reader_that_has_enough_is_no_error() -> None:
    with pytest.raises(BrokenPipeError), ending(FLAGS, as_json=False):
        raise BrokenPipeError


def test_what_was_found_is_printed_beside_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    def full() -> None:
        with ending(FLAGS, as_json=True) as outcome:
            outcome.document["found"] = 3
            raise OSError("no more space")

    with pytest.raises(typer.Exit) as stopped:
        full()
    assert stopped.value.exit_code == 1
    error = {"type": "OSError", "message": "no more space", "exit_code": 1}
    assert json.loads(capsys.readouterr().out) == {"found": 3, "error": error}


def test_what_an_interrupted_export_leaves(tmp_path: Path) -> None:
    place = tmp_path / "onnx"
    left = left_of(place)
    assert left() == f"nothing was written to {place}"
    place.mkdir()
    assert left() == f"{place} is written, and whole"
    left = left_of(place)
    assert left() == f"{place} is what it was"
    (tmp_path / "new").mkdir()
    place.rename(tmp_path / "old")
    (tmp_path / "new").rename(place)
    assert left() == f"{place} is written, and whole"


def test_stages_have_their_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    seconds: dict[str, float] = {}

    def full() -> None:
        nonlocal seconds
        with staged_work(2) as stages:
            seconds = stages.seconds
            stages.begin("load")
            stages.begin("write")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        full()
    assert list(seconds) == ["load"]
    assert capsys.readouterr().err.split() == ["load", f"{seconds['load']:.1f}", "s"]


def test_a_terminal_has_a_bar_of_all_stages_and_the_time_of_this_one() -> None:
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=60)
    with Progress(*columns(), console=console) as progress:
        stages = Stages(progress, 3)
        for done, name in enumerate(("load", "capture", "fuse")):
            stages.begin(name)
            (task,) = progress.tasks
            assert (task.description, task.completed, task.total) == (name, done, 3)
            progress.refresh()
        stages.end()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.getvalue())
    for line in ("load 0/3", "capture 1/3", "fuse 2/3", "0:00:00"):
        assert line in re.sub(r"[━╸╺ ]+", " ", plain)
    assert all(len(line) <= 60 for line in plain.replace("\r", "\n").splitlines())


def test_where_no_terminal_is_no_bar_begins(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """rich 14.0 ends one that shows nothing with an empty line."""
    begun: list[Progress] = []
    monkeypatch.setattr(Progress, "start", begun.append)
    with staged_work(1) as stages:
        stages.begin("load")
    assert [line.split()[0] for line in capsys.readouterr().err.splitlines()] == ["load"]
    assert begun == []
