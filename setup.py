"""What pyproject.toml cannot say: README.md as it is shown where the checkout's files are not, as on PyPI."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from setuptools import setup

__all__ = ["described"]


def described(readme: str, project: Mapping[str, Any]) -> str:
    """The text with its links into the checkout led to the repository of the release, or left out where none is named.

    Args:
        readme: in Markdown.
        project: the table of pyproject.toml; ``urls`` may name a ``Repository``.

    >>> described("[a](docs/a.md#b), [c](https://d)", {"version": "1.2"})
    'a, [c](https://d)'
    >>> described("[a](docs/a.md#b)", {"version": "1.2", "urls": {"Repository": "https://host/us/it"}})
    '[a](https://host/us/it/blob/v1.2/docs/a.md#b)'
    """
    repository = project.get("urls", {}).get("Repository")
    leads = rf"[\1]({repository}/blob/v{project['version']}/\2)" if repository else r"\1"
    return re.sub(r"\[([^\]]*)\]\((?!\w+:|#)([^)\s]+)\)", leads, readme)


if __name__ == "__main__":
    root = Path(__file__).parent
    setup(
        long_description=described(
            (root / "README.md").read_text(encoding="utf-8"),
            tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"],
        ),
        long_description_content_type="text/markdown",
    )
