"""What wheel and sdist are made of: every folder of the package, and nothing of `benchmarks/`; and that they run."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

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


def described() -> Callable[[str, Mapping[str, Any]], str]:
    """setup.py's function, which no package holds."""
    pytest.importorskip("setuptools")
    return runpy.run_path(str(ROOT / "setup.py"), run_name="setup")["described"]  # type: ignore[no-any-return]


def test_the_readme_has_no_link_that_leads_nowhere_on_pypi() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    inside = re.findall(r"\]\((?!https://)([^)]+)\)", readme)
    assert len(inside) > 20
    assert re.findall(r"\]\((?!https://)[^)]+\)", described()(readme, project)) == []
    urls = {"urls": {"Repository": "https://host/us/it"}}
    led = re.findall(r"\]\(https://host/us/it/blob/v0/([^)]+)\)", described()(readme, {"version": "0", **urls}))
    assert led == inside


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist of a copy of the checkout, and the wheel that is built from that sdist."""
    pytest.importorskip("build")
    place = tmp_path_factory.mktemp("built")
    source = place / "source"  # setuptools leaves its own files where it builds
    source.mkdir()
    for name in (*OWN, "benchmarks", "tests", "docs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    subprocess.run([sys.executable, "-m", "build", "--outdir", str(place), str(source)], check=True)
    return place


@pytest.mark.slow  # pip fetches setuptools
def test_the_wheel_holds_the_package_and_no_benchmarks(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        names = files.namelist()
        (metadata,) = (files.read(name).decode() for name in names if name.endswith(".dist-info/METADATA"))
    assert sorted(name for name in names if name.endswith(".py")) == modules()
    assert "flora_fx/py.typed" in names
    assert "Description-Content-Type: text/markdown" in metadata
    assert "For those who serve or train LoRA adapters" in metadata
    assert "](docs/" not in metadata


@pytest.mark.slow  # pip fetches setuptools
def test_the_sdist_holds_what_the_wheel_is_made_of_and_no_folder_of_tests(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    assert {"pyproject.toml", "setup.py", "README.md", "LICENSE", "flora_fx/py.typed"} < names
    found = {name for name in names if name.endswith(".py") and name.partition("/")[0] in OWN}
    assert sorted(name if name.startswith("flora_fx/") else f"flora_fx/{name}" for name in found) == modules()
    assert not [name for name in names if name.startswith("benchmarks/")]


@pytest.mark.slow  # a fresh environment, which borrows torch from this one
def test_what_is_installed_fuses_and_has_its_command(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", "--no-deps", str(wheel)], check=True)
    inside = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    borrowed = [path for path in sys.path if path.endswith("site-packages")]
    Path(inside, "borrowed.pth").write_text("\n".join(borrowed), encoding="utf-8")
    program = (
        "import flora_fx, torch\n"
        f"assert flora_fx.__file__.startswith({inside!r}), flora_fx.__file__\n"
        "model, x = torch.nn.Linear(3, 2), torch.ones(4, 3)\n"
        "print(flora_fx.report(flora_fx.fuse(flora_fx.capture(model, x))))\n"
        "from torch._dynamo import list_backends\n"
        "assert 'flora' in list_backends()\n"
    )
    done = subprocess.run([str(python), "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, "0 adapters fused" in done.stdout) == (0, True), done.stderr
    command = [str(tmp_path / "venv" / "bin" / "flora-fx"), "--version"]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert said.strip() == f"flora-fx {flora_fx.__version__}"
