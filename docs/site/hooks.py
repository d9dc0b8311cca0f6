"""What the site needs that is not in docs/: pages and files of the checkout's root, and the package as it is installed.

Links in README.md and in docs/ are those of the checkout, so that they lead somewhere on any host of it. Here each is
turned into the site's: README.md is its first page. A file that is linked and is no page is copied.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mkdocs.plugins import event_priority
from pymdownx.slugs import slugify

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

__all__ = ["PAGES", "on_config", "on_files", "on_page_markdown", "rewritten"]

ROOT = Path(__file__).parents[2]
PAGES = {
    "index.md": "README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
}
"""Pages of the site that are files of the root."""
_FOLDERS = {"examples": "examples.md", "docs": "index.md"}
_LINK = re.compile(r"(?P<before>\]\()(?P<target>(?!\w+:|#|/)[^)\s]+)(?P<after>\))")
_FENCE = re.compile(r"^ *```.*?^ *```[^\n]*$", flags=re.DOTALL | re.MULTILINE)
_NAME = re.compile(r"(?<![`\[])`(?P<name>flora_fx(?:\.\w+)+)(?P<call>\([^`]*\))?`(?![`\]])")


@event_priority(100)  # before mkdocstrings, which passes over folders that are not there yet
def on_config(config: MkDocsConfig) -> None:
    """Headings get the anchors that hosts of Git give them, and the package's folders one place to be read in."""
    config.mdx_configs["toc"]["slugify"] = slugify(case="lower")
    place = ROOT / "build" / "api" / "flora_fx"
    shutil.rmtree(place, ignore_errors=True)
    for source, target in (
        (ROOT / "flora_fx", place),
        (ROOT / "passes", place / "passes"),
        (ROOT / "export", place / "export"),
    ):
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the root's pages, and each file outside of docs/ that a page links."""
    from mkdocs.structure.files import File

    for page, source in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    pages = [*(ROOT / source for source in PAGES.values()), *(ROOT / "docs").rglob("*.md")]
    linked = {
        file
        for page in pages
        for file in _linked_files(page.read_text(encoding="utf-8"), page.parent)
        if file.is_file() and ROOT in file.parents and _uri(file) is None
    }
    for file in sorted(linked):
        files.append(File.generated(config, file.relative_to(ROOT).as_posix(), abs_src_path=str(file)))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn the checkout's links into the site's, and names of the API in inline code into links."""
    uri = page.file.src_uri
    text = rewritten(markdown, uri)
    return text if uri.startswith("api/") else _outside_of_blocks(text, _linked_names(config))


def rewritten(markdown: str, uri: str) -> str:
    """A page's text with the site's links.

    Args:
        markdown: of the page.
        uri: of the page in the site.

    >>> rewritten("[a](docs/fusing.md#how) [b](CHANGELOG.md) [c](https://x)", "index.md")
    '[a](fusing.md#how) [b](changelog.md) [c](https://x)'
    >>> rewritten("[a](../CONTRIBUTING.md) [b](../examples)", "trust.md")
    '[a](contributing.md) [b](examples.md)'
    """
    folder = (ROOT / PAGES[uri]).parent if uri in PAGES else (ROOT / "docs" / uri).parent

    def moved(match: re.Match[str]) -> str:
        path, _, heading = match["target"].partition("#")
        file = Path(os.path.normpath(folder / path))
        if not file.exists() or ROOT not in file.parents:
            return match[0]  # the strict build tells
        target = _uri(file) or file.relative_to(ROOT).as_posix()
        there = os.path.relpath(target, Path(uri).parent)
        return f"{match['before']}{there}{'#' if heading else ''}{heading}{match['after']}"

    return _outside_of_blocks(markdown, lambda text: _LINK.sub(moved, text))


def _uri(file: Path) -> str | None:
    """The page or the file of docs/ that a file of the checkout is in the site; None if it is neither."""
    for page, source in PAGES.items():
        if file == ROOT / source:
            return page
    if file.is_dir():
        return _FOLDERS.get(file.relative_to(ROOT).as_posix())
    docs = ROOT / "docs"
    return file.relative_to(docs).as_posix() if docs in file.parents else None


def _linked_files(markdown: str, folder: Path) -> list[Path]:
    targets = [match["target"].partition("#")[0] for match in _LINK.finditer(_FENCE.sub("", markdown))]
    return [Path(os.path.normpath(folder / target)) for target in targets]


def _outside_of_blocks(markdown: str, change: Callable[[str], str]) -> str:
    """The text with what stands between code blocks changed."""
    parts, end = [], 0
    for block in _FENCE.finditer(markdown):
        parts += [change(markdown[end : block.start()]), block[0]]
        end = block.end()
    return "".join([*parts, change(markdown[end:])])


def _linked_names(config: MkDocsConfig) -> Callable[[str], str]:
    """Writes a link to the reference around each name that it has."""
    pages = sorted((Path(config.docs_dir) / "api").glob("*.md"))
    known = {name for page in pages for name in re.findall(r"^::: (\S+)", page.read_text(encoding="utf-8"), re.M)}

    def linked(match: re.Match[str]) -> str:
        name = match["name"]
        return f"[{match[0]}][{name}]" if name in known else match[0]

    def change(text: str) -> str:
        return "\n".join(line if line.startswith("#") else _NAME.sub(linked, line) for line in text.split("\n"))

    return change
