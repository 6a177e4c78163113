"""What is made of the turns in which a service sees and those in which it is blind."""

from __future__ import annotations

import pytest

from benchmarks.seeing.seeing import share


def test_a_machine_that_becomes_slower_changes_nothing() -> None:
    """Each turn of seeing is compared with what lies around it: here it costs a tenth, and the machine gets slower."""
    instants, rate = [(5, 7, 3)], 8_000.0
    for turn in range(41):
        clock_ns, cpu_ns, predictions = instants[-1]
        took = int(rate * 1000 * (0.9 if turn % 2 else 1.0))
        instants.append((clock_ns + 10**12, cpu_ns + 9 * 10**11, predictions + took))
        rate *= 0.98
    found = share(instants)
    assert found.median == pytest.approx(0.9, abs=1e-4)
    assert found.error == pytest.approx(0.0, abs=1e-4)
    assert 9e8 / 8e6 < found.cpu_us < 9e8 / 8e6 / 0.98**41 / 0.9
