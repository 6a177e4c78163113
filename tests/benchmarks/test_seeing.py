"""What is made of the turns in which a service sees and those in which it is blind."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.seeing.seeing import share


def test_a_machine_that_becomes_slower_changes_nothing() -> None:
    """Each turn of seeing is compared with what lies around it: here it costs a tenth, and the machine gets slower."""
    instants, rate = [(7, 3)], 8_000.0
    for turn in range(41):
        cpu_ns, predictions = instants[-1]
        took = int(rate * 1000 * (0.9 if turn % 2 else 1.0))
        instants.append((cpu_ns + 3 * 10**11, predictions + took))
        rate *= 0.98
    found = share(instants)
    assert found.median == pytest.approx(0.9, abs=1e-4)
    assert found.error == pytest.approx(0.0, abs=1e-4)
    assert 3e8 / 8e6 < found.cpu_us < 3e8 / 8e6 / 0.98**41 / 0.9


def test_a_machine_that_is_not_quiet_leaves_an_error() -> None:
    """As large as the spread of the turns over the root of their number has it, by the theory of the median."""
    generator = np.random.default_rng(3)
    rates = np.where(np.arange(801) % 2, 0.95, 1.0) * np.exp(generator.normal(0, 0.1, 801)) * 10**7
    predictions = np.concatenate([[0], np.cumsum(rates.astype(np.int64))])
    found = share([(turn * 10**9, int(sum_)) for turn, sum_ in enumerate(predictions)])
    of_one = 0.95 * 0.1 * np.sqrt(1.5)  # a turn over the root of two
    assert found.error == pytest.approx(1.2533 * of_one / np.sqrt(400), rel=0.3)
    assert found.median == pytest.approx(0.95, abs=4 * found.error)
