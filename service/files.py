"""Files that appear whole or not at all: written beside their place, flushed to disk, then renamed into it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """Write `content` to `path`, replacing what is there; after a crash either the old or the new file is there.

    Raises:
        OSError: the disk is full or the folder is not writable; `path` is then unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(beside, 0o644)  # mkstemp makes it 0600, and another user serves it
        os.replace(beside, path)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `path` when the block ends well and vanishes when it does not.

    The name starts with a dot while it is being filled, so a repository that is watching does not see it.

    Raises:
        FileExistsError: `path` is already there; a version is never overwritten.
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
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        with suppress(OSError):
            path.parent.rmdir()  # where nothing else is in it
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
