"""What is at a path, placed, admitted and said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from service.cpus import usable_cpus
from service.errors import Refused
from service.places import Found, Layout, find, layout_at, misplaced
from service.printed import tell, tell_begun
from service.repository import Repository, load
from service.runtime import Placement, place
from service.settings import Settings
from service.stdout import say


def loaded(
    path: Path, settings: Settings, begin: Callable[[Found], None] = lambda _: None, kind: Layout | None = None
) -> Repository:
    """What is at `path`, admitted and said.

    Args:
        begin: is called with each version before it is read.
        kind: what `path` was when the service started; None: what it is now.

    Raises:
        WrongCall: there is nothing to serve at `path`.
        Refused: the device cannot be had, or no model was admitted.
    """
    kind = kind or layout_at(path)
    find(path, called=settings.name, kind=kind)  # a wrong path is said before anything is begun
    placement = placed(settings)
    say(f"models run on {placement.provider} ({placement.why})")

    def tell_and_begin(found: Found) -> None:
        tell_begun(found, settings)
        begin(found)

    repository = load(path, placement, settings, begin=tell_and_begin, tell=tell, kind=kind)
    for one in misplaced(path, called=settings.name, kind=kind):
        say(f"  {one.place}  NOT SERVED  {one.reason}")
    if not repository.lives:
        raise Refused(f"no model under '{path}' was admitted, so there is nothing to serve")
    return repository


def placed(settings: Settings) -> Placement:
    """Where models run, with this process's share of the CPUs."""
    return place(
        settings.device,
        gpu_memory_limit_bytes=settings.gpu_memory_limit_bytes,
        cpus=max(1, usable_cpus() // settings.workers),
    )
