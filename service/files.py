"""Files that appear whole or not at all: written beside their place, flushed to disk, then renamed into it."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import final

if sys.platform != "win32":
    import fcntl

Mark = tuple[int, int, int, int] | None
"""Of a file: inode, times of change of its content and of itself, size; None if it cannot be looked at."""


def write_whole(path: Path, content: bytes, *, mode: int = 0o644, owner: tuple[int, int] | None = None) -> None:
    """Write `content` to `path`, replacing what is there; after a crash either the old or the new file is there.

    Args:
        mode: who may read it; by default everybody, as another user serves it.
        owner: user and group, as numbers, that it is given to before it appears, if we may; None is who writes it.

    Raises:
        OSError: the disk is full or the folder is not writable; `path` is then unchanged. It names `path`.
    """
    try:
        _write_beside(path, content, mode, owner)
    except OSError as error:
        raise _of(path, error) from error


def _write_beside(path: Path, content: bytes, mode: int, owner: tuple[int, int] | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if owner is not None and hasattr(os, "chown"):
            with suppress(PermissionError):  # only root can give a file to another
                os.chown(beside, *owner)
        os.chmod(beside, mode)  # mkstemp makes it 0600
        os.replace(beside, path)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """A block that no other process is in for the same folder; where folders can be locked.

    Raises:
        OSError: there is no such folder.
    """
    if sys.platform == "win32":
        yield
        return
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with suppress(OSError):  # some network file systems lock no folders
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `path` when the block ends well and vanishes when it does not.

    The name starts with a dot while it is being filled, so a repository that is watching does not see it.

    Raises:
        FileExistsError: `path` is already there; a version is never overwritten.
        OSError: what was written into it could not be; it names `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield beside
        os.chmod(beside, 0o755)
        for file in sorted(beside.rglob("*")):
            if file.is_file():
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
        try:
            os.rename(beside, path)  # onto a folder that holds something it fails
        except OSError as error:
            if path.exists():
                raise FileExistsError(f"{path} is already there; a version is never overwritten") from error
            raise
    except BaseException as error:
        shutil.rmtree(beside, ignore_errors=True)
        with suppress(OSError):
            path.parent.rmdir()  # where nothing else is in it
        if isinstance(error, OSError) and error.strerror and str(error.filename or beside).startswith(str(beside)):
            raise _of(path, error) from error
        raise
    _sync_folder(path.parent)


@final
class Watched:
    """Files that others may change.

    They count as read only when whoever reads them says so: a read that failed is tried again, also of the same files.
    """

    def __init__(self, *paths: Path) -> None:
        self._paths = paths
        self._found: tuple[Mark, ...] = ()
        self._read: tuple[Mark, ...] = ()
        self._failure: tuple[tuple[Mark, ...], str] | None = None

    def changed(self) -> bool:
        """Whether they are other ones than were read last; to be asked before they are read."""
        self._found = tuple(map(_look, self._paths))
        return self._found != self._read

    def was_read(self) -> None:
        """What was found when `changed` was asked last."""
        self._read, self._failure = self._found, None

    def failed(self, why: str) -> bool:
        """Whether that is news: the same of the same files need not be said again."""
        before, self._failure = self._failure, (self._found, why)
        return self._failure != before


def _look(path: Path) -> Mark:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size


def _of(path: Path, error: OSError) -> OSError:
    """The same of the place that was meant: the one beside it is gone, and its name says nothing to anybody."""
    return OSError(error.errno, error.strerror, str(path))


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
