"""What a notebook shows of an object that is a cell's last line."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

__all__ = ["Picture", "as_html"]


@dataclass(frozen=True, repr=False)
class Picture:
    """An SVG that a notebook shows as a picture.

    Attributes:
        svg: its text, which ``str`` returns.

    >>> Picture('<svg xmlns="http://www.w3.org/2000/svg"/>')
    Picture(SVG, 41 characters)
    """

    svg: str

    def __repr__(self) -> str:
        return f"Picture(SVG, {len(self.svg):,} characters)"

    def __str__(self) -> str:
        return self.svg

    def _repr_svg_(self) -> str:
        return self.svg


def as_html(text: str, picture: str = "") -> str:
    """Text as it is printed, in the notebook's own colours, and a picture below that is as wide as the page at most.

    Args:
        text: with lines and columns.
        picture: an SVG; none by default.

    >>> as_html("1 < 2")
    '<pre>1 &lt; 2</pre>'
    """
    below = f'<div style="max-width: 100%; overflow-x: auto">{picture}</div>' if picture else ""
    return f"<pre>{escape(text)}</pre>{below}"
