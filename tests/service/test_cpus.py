"""Quotas are found where Linux keeps them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from service import groups as control_groups
from service.cpus import usable_cpus


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with eight CPUs and no limits yet."""
    monkeypatch.setattr(control_groups, "GROUPS", tmp_path)
    monkeypatch.setattr(control_groups, "OWN_GROUP", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    (tmp_path / "own").write_text("0::/\n")
    return tmp_path


def limit(group: Path, said: str) -> None:
    group.mkdir(parents=True, exist_ok=True)
    (group / "cpu.max").write_text(said)


@pytest.mark.parametrize(
    ("said", "count"),
    [
        ("max 100000\n", 8),
        ("200000 100000\n", 2),
        ("150000 100000\n", 2),
        ("10000 100000\n", 1),
        ("1600000 100000\n", 8),
        ("nonsense", 8),
    ],
)
def test_the_quota_of_a_container(groups: Path, said: str, count: int) -> None:
    """A part of a CPU is one thread; more than there is changes nothing."""
    limit(groups, said)
    assert usable_cpus() == count


@pytest.mark.parametrize(("own", "above"), [("max 100000", "300000 100000"), ("300000 100000", "500000 100000")])
def test_the_least_of_the_groups_above_counts(groups: Path, own: str, above: str) -> None:
    """As under systemd, whose limits stand above the process."""
    (groups / "own").write_text("1:name=systemd:/elsewhere\n0::/system.slice/evalmode.service\n")
    limit(groups / "system.slice", above)
    limit(groups / "system.slice" / "evalmode.service", own)
    assert usable_cpus() == 3


def test_groups_that_are_out_of_sight_limit_nothing(groups: Path) -> None:
    (groups / "own").write_text("0::/../../kubepods/pod7\n")
    assert usable_cpus() == 8
    (groups / "own").unlink()
    assert usable_cpus() == 8


@pytest.mark.parametrize(("quota_us", "count"), [("-1", 8), ("250000", 3)])
def test_version_1_of_control_groups(groups: Path, quota_us: str, count: int) -> None:
    (groups / "cpu").mkdir()
    (groups / "cpu" / "cpu.cfs_quota_us").write_text(quota_us)
    (groups / "cpu" / "cpu.cfs_period_us").write_text("100000")
    assert usable_cpus() == count
