"""Is a file what was saved? Where its SHA-256 was written down, it is compared.

Safetensors have a header that says how long a file is, and no checksum: a bit that flipped loads without a word. Two
places say what a file should be: ``SHA256SUMS`` beside it, as ``sha256sum * > SHA256SUMS`` writes it, and the cache of
the Hub, which names a large file by its SHA-256.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from .errors import AdapterError

__all__ = ["SUMS", "check_sum", "recorded_sum", "sha256"]

SUMS = "SHA256SUMS"
_LINE = re.compile(r"(?P<digest>[0-9a-fA-F]{64}) [ *](?P<name>.+)")
_BLOB = re.compile(r"[0-9a-f]{64}")


def check_sum(path: Path) -> None:
    """Compare a file with what was written down of it, if anything was; 1.5 GB/s (2 CPU cores, one of them used).

    Raises:
        AdapterError: it is another file, or what was written down cannot be read.
    """
    known = recorded_sum(path)
    if known is not None and sha256(path) != known:
        raise AdapterError(
            f"{path} is not the file that was saved (its SHA-256 is not the one recorded for it); copy or download it "
            f"again, or write {SUMS} anew if it was changed on purpose"
        )


def recorded_sum(path: Path) -> str | None:
    """The SHA-256 that was written down of a file, in hexadecimal; None where none was.

    Raises:
        AdapterError: `SUMS` is cut off or something else.
    """
    sums = path.parent / SUMS
    if sums.is_file():
        for number, line in enumerate(sums.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            match = _LINE.fullmatch(line)
            if match is None:
                raise AdapterError(
                    f"line {number} of {sums} is no SHA-256 and file name; write it again with sha256sum, or delete it"
                )
            if match["name"].removeprefix("./") == path.name:
                return match["digest"].lower()
    blob = path.resolve()
    return blob.name if path.is_symlink() and blob.parent.name == "blobs" and _BLOB.fullmatch(blob.name) else None


def sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as place:
    ...     _ = Path(place, "empty").write_bytes(b"")
    ...     print(sha256(Path(place, "empty"))[:8])
    e3b0c442
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
