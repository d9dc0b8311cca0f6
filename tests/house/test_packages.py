"""What a wheel is made of: every folder of the package, and nothing of `benchmarks/`."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import flora_fx
from flora_fx.checkout import checkout

pytestmark = pytest.mark.skipif(checkout() is None, reason="`make compat` looks into the wheel itself")

ROOT = Path(flora_fx.__file__).parents[1]
OWN = ("flora_fx", "passes", "export")
"""The folders that are installed: the last two inside of the first."""


def modules() -> list[str]:
    """Every file of the package, as the wheel calls it."""
    found = [path.relative_to(ROOT) for folder in OWN for path in (ROOT / folder).rglob("*.py")]
    return sorted((path if path.parts[0] == "flora_fx" else "flora_fx" / path).as_posix() for path in found)


def test_every_folder_is_a_package_that_setuptools_is_told_of() -> None:
    told = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {Path(module).parent.as_posix().replace("/", ".") for module in modules()}
    assert sorted(told["packages"]) == sorted(folders)
    assert told["package-dir"] == {"flora_fx": "flora_fx", "flora_fx.passes": "passes", "flora_fx.export": "export"}
    assert all((path.parent / "__init__.py").is_file() for folder in OWN for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.slow  # pip fetches setuptools
def test_the_wheel_holds_the_package_and_no_benchmarks(tmp_path: Path) -> None:
    source = tmp_path / "source"  # setuptools leaves its own files where it builds
    source.mkdir()
    for name in (*OWN, "benchmarks", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path)]
    subprocess.run([*pip, str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        names = files.namelist()
    assert sorted(name for name in names if name.endswith(".py")) == modules()
    assert "flora_fx/py.typed" in names
