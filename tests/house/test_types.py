"""What README and the pages under docs/ show passes mypy --strict, as a user's own code would."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from flora_fx.checkout import checkout

pytestmark = pytest.mark.skipif(checkout() is None, reason="passes/ and export/ lie elsewhere in an installation")

ROOT = Path(__file__).parents[2]


def checked(folder: Path) -> str:
    """What mypy says of the files in a folder, beside the package as it is installed."""
    package = folder / "flora_fx"
    package.mkdir()
    for source in [*(ROOT / "flora_fx").iterdir(), ROOT / "passes", ROOT / "export"]:
        (package / source.name).symlink_to(source)
    options = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache")]
    files = sorted(path.name for path in folder.glob("*.py"))
    command = [sys.executable, "-m", "mypy", *options, *files]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False).stdout


def test_the_blocks_of_all_pages_are_typed(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    count = 0
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        count += len(blocks)
        if blocks:
            name = re.sub(r"\W", "_", page.stem)
            (tmp_path / f"page_{name}.py").write_text("\n".join(blocks), encoding="utf-8")
    assert count > 20
    (tmp_path / "page_wrong.py").write_text("import flora_fx\n\nflora_fx.fuse(1)\n", encoding="utf-8")
    *errors, last = checked(tmp_path).strip().splitlines()
    assert [line for line in errors if line.startswith("page_") and not line.startswith("page_wrong.py")] == []
    assert "page_wrong.py:3: error: No overload variant" in "\n".join(errors), last
