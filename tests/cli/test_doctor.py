"""`flora-fx doctor`: what is there is told as it is, what is missing or broken, too."""

from __future__ import annotations

import importlib
import json
import platform
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from flora_fx.cli import build_app
from flora_fx.commands import doctor
from tests.house.rooms import ROOT


def test_it_can_be_pasted_and_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    plain = CliRunner().invoke(build_app(), ["doctor"])
    told = json.loads(CliRunner().invoke(build_app(), ["doctor", "--json"]).stdout)
    assert plain.exit_code == 0
    assert plain.stdout == doctor.as_text(told) + "\n"
    assert plain.stderr == ""
    assert max(len(line) for line in plain.stdout.splitlines()) <= 120
    assert told["versions"]["python"] == platform.python_version()
    assert told["versions"]["torch"] == version("torch")  # which names the build in some wheels alone
    assert told["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert told["versions"]["peft"] == version("peft")
    assert told["environment"]["OMP_NUM_THREADS"] == "3"
    assert "CPUExecutionProvider" in told["machine"]["ONNX Runtime has"]


def test_it_looks_for_what_the_extras_bring() -> None:
    extras: dict[str, list[str]] = tomllib.loads(Path(ROOT, "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "optional-dependencies"
    ]
    for extra, modules in doctor.PACKAGES.items():
        names = {name for one_of in modules for name in one_of}
        assert names == {entry.split(">=")[0] for entry in extras[extra]}


def test_what_is_missing_says_what_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", {"hf": (("no-such-package", "nor-such"),)})
    assert doctor.examine()["versions"]["no-such-package"] == "not installed: pip install 'flora-fx[hf]'"


def test_a_package_that_is_broken_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise ImportError(f"libodd.so.7\nis not there, and {name} wants it")

    monkeypatch.setattr(importlib, "import_module", broken)
    found = doctor.examine()
    assert found["machine"]["ONNX Runtime has"] == "not known: libodd.so.7 is not there, and onnxruntime wants it"
    assert found["used"]["an export runs on"].startswith("not known: libodd.so.7")


def test_cards_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Card:
        name, total_memory, major, minor = "H100", 80 * 2**30, 9, 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Card)
    card = "H100 (80 GiB, sm_90)"
    assert doctor.examine()["machine"]["GPUs of torch"] == f"{card}, {card}, CUDA {torch.version.cuda}"


GOOD: dict[str, dict[str, str]] = {
    "versions": {"onnxruntime-gpu": "1.31"},
    "machine": {"GPUs of torch": "none (built without CUDA)"},
    "used": {"an export runs on": "CPUExecutionProvider", "Inductor's compiler": "/usr/bin/g++"},
}


@pytest.mark.parametrize(
    ("section", "change", "advice"),
    [
        ("used", {}, ""),
        ("versions", {"onnxruntime": "1.31"}, "onnxruntime-gpu and onnxruntime overwrite each other"),
        ("machine", {"GPUs of torch": "H100"}, "torch has a GPU and exports run on the CPU"),
        ("machine", {"GPUs of torch": "not known: odd"}, ""),
        ("used", {"Inductor's compiler": "g++ is not there"}, "needs a C++ compiler"),
    ],
)
def test_advice(section: str, change: dict[str, str], advice: str) -> None:
    told = doctor.advice({**GOOD, section: {**GOOD[section], **change}})
    assert len(told) == bool(advice)
    assert all(advice in sentence for sentence in told)


def test_a_compiler_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert doctor.examine()["used"]["Inductor's compiler"] == "no-such-compiler is not there"
    monkeypatch.setenv("CXX", sys.executable)
    assert doctor.examine()["used"]["Inductor's compiler"] == sys.executable
