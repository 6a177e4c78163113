"""`evalmode key`: a new API key. It is shown once; what is kept of it goes into the keys file."""

from __future__ import annotations

from pathlib import Path

from service.errors import Refused, WrongCall
from service.files import one_at_a_time, write_whole
from service.keys import Key, made_key, read_keys


def key(
    name: str,
    /,
    *,
    rights: str = "predict",
    file: Path | None = None,
) -> None:
    """Make an API key for 'evalmode serve --keys-file'.

    The key is printed once and kept nowhere; the file has its hash. A service that runs reads the file again by itself,
    so a key is changed by adding a new one, moving its users, and deleting the line of the old one.

    Examples:

        evalmode key shop --file keys.txt
        evalmode key operator --rights manage,metrics --file keys.txt

    Parameters
    ----------
    name
        Whose key it is: letters, digits, dots, hyphens and underscores.
    rights
        One or several of predict, manage and metrics, between commas.
    file
        The keys file, which gets one line more; without it the line is printed.
    """
    secret, made = made_key(name, rights.split(","))
    same = _append(file, made) if file is not None else 0
    print(f"key:     {secret}\nwritten: {file}" if file is not None else f"key:     {secret}\nline:    {made.line}")
    if same:
        print(f"\n'{name}' has {same + 1} keys there now; delete the old line when nobody uses it any more.")
    print("\nThe key is shown this once. Callers send it as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'.")


def _append(file: Path, made: Key) -> int:
    """One line more, in a file that keeps its owner and who may read it; a new one is for its owner alone.

    Returns:
        How many keys there have that name already.
    """
    if not file.parent.is_dir():
        raise WrongCall(f"there is no folder '{file.parent}' for the keys file; make it, or name another file")
    same = 0
    try:
        with one_at_a_time(file.parent):
            before, mode, owner = b"", 0o600, None
            if file.exists():
                same = sum(key.name == made.name for key in read_keys(file))  # one that is wrong is not made longer
                before = file.read_bytes()
                found = file.stat()
                mode, owner = found.st_mode & 0o777, (found.st_uid, found.st_gid)
            if before and not before.endswith(b"\n"):
                before += b"\n"
            write_whole(file, before + made.line.encode() + b"\n", mode=mode, owner=owner)
    except OSError as error:
        raise Refused(
            f"the keys file '{file}' cannot be written: {error.strerror}; it is as it was, and no key was made"
        ) from error
    return same
