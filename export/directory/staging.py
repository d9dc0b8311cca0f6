"""Write a directory in one step: at every moment the old one, the new one, or none is there, never half of one."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flora_fx.errors import ExportError

__all__ = ["check_place", "staged"]

_ELSEWHERE = "choose another place"
_FULL = "free some space there, or choose another place"
_REMEDIES = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: "it does not take files so large (see ulimit -f)",
    errno.EROFS: _ELSEWHERE,
    errno.EACCES: _ELSEWHERE,
    errno.EPERM: _ELSEWHERE,
    errno.EIO: "its disk or network fails",
}
"""What a user can do about errors of the file system; all others are errors of the program."""


def check_place(directory: Path, *, overwrite: bool, marker: str) -> None:
    """Refuse a place that must not be written to.

    Args:
        directory: where to write.
        overwrite: whether an earlier export may be replaced.
        marker: the file that every export has; a directory without it is someone else's.

    Raises:
        ExportError: it exists and ``overwrite`` is False, or it is not an export.
    """
    if not directory.exists() and not directory.is_symlink():
        return
    if not directory.is_dir() or directory.is_symlink():
        raise ExportError(f"{directory} exists and is not a directory; choose another place")
    if not overwrite:
        raise ExportError(f"{directory} exists; choose another place, or pass overwrite=True to replace an export")
    if not (directory / marker).is_file():
        raise ExportError(
            f"{directory} has no {marker}, so it is not an export of flora_fx and is not overwritten; "
            "choose another place, or delete it yourself"
        )


@contextmanager
def staged(directory: Path, *, overwrite: bool, marker: str) -> Iterator[Path]:
    """A temporary sibling of ``directory`` that takes its place when the block ends, and goes if the block fails.

    Args:
        directory, overwrite, marker: as for `check_place`, which is asked before and after the block.

    Yields:
        the empty sibling.

    Raises:
        ExportError: see `check_place`; or the file system refuses, for it is full, say.

    Siblings that killed processes left behind are removed; a process that still writes to one holds a lock on it.

    >>> with tempfile.TemporaryDirectory() as root:
    ...     with staged(Path(root, "a"), overwrite=False, marker="mark") as place:
    ...         _ = (place / "mark").write_text("whole")
    ...     os.listdir(root)
    ['a']
    """
    check_place(directory, overwrite=overwrite, marker=marker)
    made: list[Path] = []
    staging: Path | None = None
    lock: int | None = None
    try:
        _remove_abandoned(directory)
        while staging is None or not staging.is_dir():  # another process may remove it before it is locked
            if lock is not None:
                os.close(lock)
            staging = _open_staging(directory, made)
            lock = _lock(staging, wait=True)
        staging.chmod(0o777 & ~_umask())  # mkdtemp makes it private
        yield staging
        _sync(staging)
        check_place(directory, overwrite=overwrite, marker=marker)
        _put(staging, directory)
    except BaseException as error:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):  # someone else's files may be in it by now
                parent.rmdir()
        if (number := _number(error)) in _REMEDIES:
            reason, remedy = os.strerror(number), _REMEDIES[number]
            raise ExportError(f"{directory} could not be written ({reason}); {remedy}") from error
        raise
    finally:
        if lock is not None:
            os.close(lock)
    _sync_one(directory.parent)


def _number(error: BaseException) -> int:
    """The number of an error of the operating system, also of one that comes through a library in Rust; 0 for none."""
    if isinstance(error, OSError):
        return error.errno or 0
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else 0


def _remove_abandoned(directory: Path) -> None:
    for place in directory.parent.glob(f".{glob.escape(directory.name)}.*.partial"):
        lock = _lock(place, wait=False)
        if lock is not None:
            shutil.rmtree(place, ignore_errors=True)
            os.close(lock)


def _lock(place: Path, *, wait: bool) -> int | None:
    """A handle that locks a directory until it is closed, or its process ends; None where it cannot be had."""
    if sys.platform == "win32":
        return None
    import fcntl

    handle: int | None = None
    try:
        handle = os.open(place, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:  # another one's, or gone, or the file system has no locks
        if handle is not None:
            os.close(handle)
        return None
    return handle


def _open_staging(directory: Path, made: list[Path]) -> Path:
    """An empty sibling; the parents that had to be made are put into ``made``, innermost first."""
    parent = directory.parent
    missing = [path for path in (parent, *parent.parents) if not path.exists()]
    try:
        for path in reversed(missing):
            path.mkdir(exist_ok=True)
            made.insert(0, path)
        return Path(tempfile.mkdtemp(prefix=f".{directory.name}.", suffix=".partial", dir=parent))
    except OSError as error:
        raise ExportError(f"{parent} cannot be written to ({error.strerror}); choose another place") from error


def _put(new: Path, place: Path) -> None:
    if not place.exists():
        new.rename(place)
        return
    if _exchange(new, place):
        shutil.rmtree(new, ignore_errors=True)  # it holds the old one now
        return
    # No exchange on this system: for a moment the old one is only there under another name.
    old = Path(tempfile.mkdtemp(prefix=f".{place.name}.", suffix=".old", dir=place.parent))
    place.rename(old / "export")
    try:
        new.rename(place)
    except BaseException:
        (old / "export").rename(place)
        old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step (Linux's renameat2); False where there is no such thing."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    at_cwd, rename_exchange = -100, 2
    done: int = renameat2(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), rename_exchange)
    return done == 0


def _sync(directory: Path) -> None:
    for path in sorted(directory.rglob("*")):
        _sync_one(path)
    _sync_one(directory)


def _sync_one(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no directories
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
