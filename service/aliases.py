"""Aliases: names for live versions, such as `stable`, that a client asks for in place of a number.

Rule 1: when an alias is set, its version is live; nothing that is live goes while an alias names it.
Rule 2: an alias is no integer and no version's name, so that none is taken for the other.
Rule 3: who names no version gets `stable`, where it is set, and otherwise the newest.
Rule 4: they are kept in `aliases.json` in the model's folder, whole or not at all, and read at the start. Where nothing
        can be written they hold as long as the service runs.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from service.errors import BadRequest, UnknownAlias, UnknownVersion, WrongCall, clipped
from service.files import write_whole
from service.misfit import first_misfit
from service.places import NAME_PATTERN, Layout, find

FILE = "aliases.json"
STABLE = "stable"
LONGEST = 64

Aliases = Mapping[str, str]
"""Versions by alias."""

_ALIASES = TypeAdapter(dict[str, str])
_log = logging.getLogger(__name__)


def changed(aliases: Aliases, *, model: str, alias: str, version: str | None, live: Collection[str]) -> dict[str, str]:
    """The same with `alias` set to `version`, or without it.

    Args:
        version: None takes the alias away.
        live: the versions of the model that are.

    Raises:
        BadRequest: it cannot be an alias.
        UnknownVersion: that is not live.
        UnknownAlias: what is to be taken away is not set.
    """
    if version is None:
        if alias not in aliases:
            raise UnknownAlias(model=model, alias=alias, aliases=aliases)
        return {name: version for name, version in aliases.items() if name != alias}
    if not NAME_PATTERN.fullmatch(alias) or alias.isdecimal() or len(alias) > LONGEST:
        raise BadRequest(
            f"'{clipped(alias)}' cannot be an alias; use up to {LONGEST} letters, digits, '_', '-' and '.', not "
            "starting with '.' or '-', and not a number, which is a version"
        )
    if alias in live:
        raise BadRequest(f"'{alias}' is a version of model '{model}', so it cannot be an alias; choose another name")
    if version not in live:
        raise UnknownVersion(model=model, version=version, serving=live)
    return {**aliases, alias: version}


def folder_of(path: Path, model: str, *, called: str = "", kind: Layout | None = None) -> Path | None:
    """The model's folder under what is served; None where that is one bundle or one file, with no other versions."""
    try:
        found = find(path, model, called=called, kind=kind)
    except (WrongCall, OSError):
        return None
    return next((version.path.parent for version in found if version.path != path), None)


def read(folder: Path) -> dict[str, str]:
    """The aliases that are kept in a model's folder.

    Raises:
        WrongCall: they cannot be read. To go on without them would send callers to other versions.
    """
    try:
        return _ALIASES.validate_json((folder / FILE).read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValidationError) as error:
        why = error.strerror if isinstance(error, OSError) else first_misfit(error).why
        raise WrongCall(
            f"'{folder / FILE}' does not tell the aliases of model '{folder.name}': {why}; it takes an object of "
            "versions by alias. Repair it, or remove it to serve without"
        ) from error


def keep(folder: Path | None, aliases: Aliases) -> bool:
    """Write them into a model's folder; whether that could be done."""
    if folder is None:
        return False
    file = folder / FILE
    try:
        write_whole(file, json.dumps(dict(sorted(aliases.items())), indent=2).encode() + b"\n")
    except OSError as error:
        _log.warning(
            "aliases of model '%s' hold until the service ends: '%s' cannot be written: %s",
            folder.name,
            file,
            error.strerror or error,
        )
        return False
    return True
