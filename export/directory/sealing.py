"""Checksums of large files, and their way to the disk, while something else is done."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from flora_fx.checksums import sha256

__all__ = ["Sealing"]


class Sealing:
    """Files that are written, and not changed any more.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as place, Sealing() as sealing:
    ...     _ = Path(place, "empty").write_bytes(b"")
    ...     sealing.begin(Path(place, "empty"))
    ...     print(sealing.sha256(Path(place, "empty"))[:8])
    e3b0c442
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=2)
        self._digests: dict[Path, Future[str]] = {}
        self._synced: list[Future[None]] = []

    def __enter__(self) -> Sealing:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def begin(self, path: Path) -> None:
        """A file is as it shall be."""
        self._digests[path] = self._pool.submit(sha256, path)
        self._synced.append(self._pool.submit(_sync, path))

    def sha256(self, path: Path) -> str:
        """Of a file, whether it was begun or not.

        Raises:
            OSError: it could not be written to the disk, or read.
        """
        for synced in self._synced:
            synced.result()
        return self._digests[path].result() if path in self._digests else sha256(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
