"""How much memory is free is what Linux says, in a container and outside of one."""

from __future__ import annotations

from pathlib import Path

import pytest

from service import groups as control_groups
from service import limits
from service.app import create_app
from service.limits import free_memory_bytes, held_at_most, machine_memory_bytes
from service.repository import load
from service.runtime import place
from service.settings import Settings
from tests.bundles import write_table_bundle

MIB = 2**20

MEMINFO = """\
MemTotal:       16384000 kB
MemFree:          812340 kB
MemAvailable:    8388608 kB
Buffers:          123456 kB
"""
"""A machine with 8 GiB that can be had."""


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Without limits yet."""
    monkeypatch.setattr(control_groups, "GROUPS", tmp_path)
    monkeypatch.setattr(control_groups, "OWN_GROUP", tmp_path / "own")
    monkeypatch.setattr(limits, "MEMINFO", tmp_path / "meminfo")
    (tmp_path / "own").write_text("0::/\n")
    (tmp_path / "meminfo").write_text(MEMINFO)
    return tmp_path


def put(group: Path, *, most: str, used_mib: int, inactive_file_mib: int = 0, slab_mib: int = 0) -> None:
    group.mkdir(parents=True, exist_ok=True)
    (group / "memory.max").write_text(f"{most}\n")
    (group / "memory.current").write_text(f"{used_mib * MIB}\n")
    (group / "memory.stat").write_text(
        f"anon {150 * MIB}\nfile {700 * MIB}\nkernel {9 * MIB}\ninactive_anon {100 * MIB}\n"
        f"inactive_file {inactive_file_mib * MIB}\nactive_file {70 * MIB}\n"
        f"slab_reclaimable {slab_mib * MIB}\nslab_unreclaimable {MIB}\nslab {MIB}\n"
    )


def test_without_a_limit_it_is_what_the_machine_has(groups: Path) -> None:
    put(groups, most="max", used_mib=900)
    assert free_memory_bytes() == 8388608 * 1024


def test_files_that_were_read_take_nothing_from_a_container(groups: Path) -> None:
    """Reading models fills the cache up to the limit, and the system takes it back for whoever asks."""
    put(groups, most=str(1024 * MIB), used_mib=1000, inactive_file_mib=600, slab_mib=20)
    assert free_memory_bytes() == (1024 - 1000 + 600 + 20) * MIB
    assert machine_memory_bytes() == 1024 * MIB


@pytest.mark.parametrize(("workers", "mib"), [(1, 64), (2, 32)])
def test_what_clients_sent_takes_an_eighth_of_a_small_container(
    groups: Path, tmp_path: Path, workers: int, mib: int
) -> None:
    """Of the default of 256 MiB, in all processes together, for what waits; and as much for what is read."""
    put(groups, most=str(512 * MIB), used_mib=100)
    write_table_bundle(tmp_path / "models")
    settings = Settings(workers=workers, body_limit_bytes=MIB)
    repository = load(tmp_path / "models", place("cpu"), settings)
    assert repository.only().coalescer._max_waiting_bytes == mib * MIB
    assert create_app(repository, settings).bodies.max_bytes == mib * MIB
    assert held_at_most(10 * MIB, processes=workers) == 10 * MIB


def test_it_is_never_less_than_nothing_nor_more_than_the_limit(groups: Path) -> None:
    put(groups, most=str(1024 * MIB), used_mib=1100)
    assert free_memory_bytes() == 0
    put(groups, most=str(1024 * MIB), used_mib=100, inactive_file_mib=200)
    assert free_memory_bytes() == 1024 * MIB


def test_the_least_of_the_groups_above_counts(groups: Path) -> None:
    """As under systemd, whose limits stand above the process."""
    (groups / "own").write_text("0::/system.slice/evalmode.service\n")
    put(groups / "system.slice", most=str(512 * MIB), used_mib=412)
    put(groups / "system.slice" / "evalmode.service", most=str(1024 * MIB), used_mib=100)
    assert free_memory_bytes() == 100 * MIB


def test_version_1_of_control_groups(groups: Path) -> None:
    """Without a limit it says a number that no machine has."""
    folder = groups / "memory"
    folder.mkdir()
    (folder / "memory.limit_in_bytes").write_text(f"{1024 * MIB}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{900 * MIB}\n")
    (folder / "memory.stat").write_text(
        f"cache {500 * MIB}\nrss {300 * MIB}\ninactive_file {MIB}\ntotal_inactive_file {400 * MIB}\n"
    )
    assert free_memory_bytes() == (1024 - 900 + 400) * MIB
    assert machine_memory_bytes() == 1024 * MIB
    (folder / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert free_memory_bytes() == 8388608 * 1024


def test_what_is_unreadable_bounds_nothing(groups: Path) -> None:
    put(groups, most="nonsense", used_mib=1)
    (groups / "memory.stat").write_text("inactive_file\n\n")
    assert free_memory_bytes() == 8388608 * 1024
