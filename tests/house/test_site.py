"""The site lists every page and every public name, and is built without a warning."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
FACES = (
    "flora_fx",
    "flora_fx.adapters",
    "flora_fx.backend",
    "flora_fx.checkpoint",
    "flora_fx.quantized",
    "flora_fx.export",
)


def configuration() -> dict[str, Any]:
    yaml = pytest.importorskip("yaml")
    found: dict[str, Any] = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    return found


def leaves(nav: Any) -> list[str]:
    """The pages of a navigation, in order."""
    if isinstance(nav, str):
        return [nav]
    return [page for part in (nav.values() if isinstance(nav, dict) else nav) for page in leaves(part)]


def of_the_site(name: str) -> ModuleType:
    """A file of docs/site, which is no package."""
    spec = importlib.util.spec_from_file_location(f"site_{name}", DOCS / "site" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_page_is_in_the_navigation_once() -> None:
    listed = leaves(configuration()["nav"])
    beside = {"index.md", "changelog.md", "contributing.md", "security.md"}  # README.md and others of the root
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert sorted(listed) == sorted(pages | beside), "a line in nav of mkdocs.yml for each page"


def test_the_reference_has_every_public_name_once() -> None:
    named = [
        name for page in (DOCS / "api").glob("*.md") for name in re.findall(r"^::: (\S+)$", page.read_text(), re.M)
    ]
    public = {f"{face}.{name}" for face in FACES for name in importlib.import_module(face).__all__}
    public.remove("flora_fx.checkpoint.CheckpointNotFoundError")  # flora_fx's own, shown there
    assert sorted(named) == sorted(public), "a line `::: name` in a page of docs/api/ for each name"


def test_links_of_the_checkout_become_the_sites() -> None:
    pytest.importorskip("pymdownx")
    hooks = of_the_site("hooks")
    assert doctest.testmod(hooks).attempted >= 2
    assert doctest.testmod(hooks).failed == 0
    assert hooks.rewritten("[a](../benchmarks/results/x.svg)", "benchmarks.md") == "[a](../benchmarks/results/x.svg)"
    assert hooks.rewritten("[a](../versions.md#numbers)", "api/index.md") == "[a](../versions.md#numbers)"
    assert hooks.rewritten("```\n[a](docs/fusing.md)\n```", "index.md") == "```\n[a](docs/fusing.md)\n```"


def test_doctests_become_code_blocks() -> None:
    pytest.importorskip("griffe")
    module = of_the_site("docstrings")
    assert module.fenced("Args:\n    x: one.\n\n    >>> f(1)\n    2") == (
        "Args:\n    x: one.\n\n    ```pycon\n    >>> f(1)\n    2\n    ```"
    )


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    pytest.importorskip("material")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    pages = ("index.html", "trust.html", "api/flora_fx.html")
    start, trust, reference = ((tmp_path / "site" / page).read_text(encoding="utf-8") for page in pages)
    assert 'href="training.html"' in start  # of README.md, where it is docs/training.md
    assert 'href="api/flora_fx.html#flora_fx.verify"' in trust  # of a name in inline code
    assert 'id="flora_fx.fuse"' in reference
    assert "no second copy of the base" in reference  # a docstring's words
    assert (tmp_path / "site" / "examples" / "tour.ipynb").is_file()
    assert not (tmp_path / "site" / "site" / "hooks.py").exists()
