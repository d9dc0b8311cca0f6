"""The two texts of the demo, which every Python brings along: prose for the base, verse for the adapter."""

from __future__ import annotations

import codecs
import contextlib
import importlib
import io

__all__ = ["prose", "zen"]

_PLAIN = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "…": "...", "–": "-", "—": "-"})


def prose() -> str:
    """The paragraphs of the language reference that `help()` shows: about 220,000 characters.

    Grammars, listings and tables are indented there and left out: a small model learns to write sentences
    from sentences alone, and writes grammar rules when it has seen some.

    >>> "The assert statement" in prose() or "Assert statements" in prose()
    True
    """
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    text = "\n\n".join(topics[name] for name in sorted(topics)).translate(_PLAIN)
    paragraphs = (paragraph for paragraph in text.split("\n\n") if not paragraph.startswith(" "))
    sentences = (" ".join(paragraph.split()) for paragraph in paragraphs if "\n " not in paragraph)
    return "\n\n".join(sentence for sentence in sentences if len(sentence) > 60)


def zen() -> str:
    """The Zen of Python without its title: 19 aphorisms, one or two lines each.

    >>> print(zen().splitlines()[0])
    Beautiful is better than ugly.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # `this` prints itself when it is first imported
        ciphered: str = importlib.import_module("this").s
    return codecs.decode(ciphered, "rot13").split("\n\n", maxsplit=1)[1] + "\n"
