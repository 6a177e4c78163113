"""What is made of the turns in which a service sees and those in which it is blind."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.seeing.seeing import STRETCH, sees, share

STRETCHES = 50
SEEING = np.array([sees(turn) for turn in range(STRETCHES * STRETCH)])


def instants(rates: np.ndarray, cpu_ns: float = 1e11) -> list[tuple[int, int]]:
    """Of turns with so many predictions each, blind first; what was before them does not count."""
    return [(7 + round(turn * cpu_ns), 3 + round(sum_)) for turn, sum_ in enumerate(np.cumsum([0, *rates]))]


def test_a_machine_that_becomes_slower_changes_nothing() -> None:
    """Here it costs a tenth, and the machine gets slower by half while that is measured."""
    turn = np.arange(STRETCHES * STRETCH)
    found = share(instants(np.where(SEEING, 0.9, 1.0) * 8e6 * 0.5 ** (turn / len(turn))))
    assert found.share == pytest.approx(0.9, abs=5e-4)
    assert found.error < 5e-4
    assert 1e8 / 8e6 < found.cpu_us < 1e8 / 4e6


def test_of_two_turns_one_sees() -> None:
    """And as often the first as the second, as far as chance has it."""
    assert (SEEING[::2] ^ SEEING[1::2]).all()
    assert 0.45 < SEEING[::2].mean() < 0.55


def test_what_happens_once_in_a_while_counts() -> None:
    """A median over turns would not know of it: a scrape takes half of one turn in 40."""
    rates = np.full(STRETCHES * STRETCH, 1e6)
    rates[np.flatnonzero(SEEING)[:: STRETCH // 2]] /= 2
    assert share(instants(rates)).share == pytest.approx(1 - 0.5 / (STRETCH / 2), abs=1e-6)


def test_a_machine_that_is_not_quiet_leaves_an_error() -> None:
    """As large as the spread of the turns over the root of their number has it, for blind and seeing turns together."""
    turns = STRETCHES * STRETCH
    noise = np.random.default_rng(3).normal(0, 0.1, turns)
    found = share(instants(np.where(SEEING, 0.95, 1.0) * (1 + noise) * 1e6))
    assert found.error == pytest.approx(0.95 * 0.1 * np.sqrt(2) / np.sqrt(turns / 2), rel=0.3)
    assert found.share == pytest.approx(0.95, abs=4 * found.error)
