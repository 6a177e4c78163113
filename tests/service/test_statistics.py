"""Counts and durations of a version, and of several processes together."""

from __future__ import annotations

from service.statistics import Statistics, summed


def busy(*batches: int) -> Statistics:
    statistics = Statistics()
    for rows in batches:
        statistics.ran(rows, 2, input_ns=3, infer_ns=50, output_ns=7)
        for _ in range(2):
            statistics.answered(100, 11, "/predict")
    statistics.failed(9)
    return statistics


def test_each_request_of_a_batch_counts_its_computing_as_its_own() -> None:
    said = busy(4, 4, 6).document(name="m", version="1")
    assert (said["inference_count"], said["execution_count"]) == (14, 3)
    assert said["inference_stats"]["compute_infer"] == {"count": 6, "ns": 300}
    assert said["inference_stats"]["success"] == {"count": 6, "ns": 600}
    assert said["inference_stats"]["queue"] == {"count": 6, "ns": 66}
    assert said["inference_stats"]["fail"] == {"count": 1, "ns": 9}
    assert [(batch["batch_size"], batch["compute_infer"]) for batch in said["batch_stats"]] == [
        (4, {"count": 2, "ns": 100}),
        (6, {"count": 1, "ns": 50}),
    ]
    assert said["last_inference"] > 1_700_000_000_000  # milliseconds since 1970


def test_processes_add_up() -> None:
    """As if one process had done it all."""
    one, other = busy(4, 6), busy(6, 8)
    together = busy(4, 6, 6, 8)
    together.failed(9)  # each of the two had one failure
    parts = [one.document(name="m", version="1"), other.document(name="m", version="1")]
    kept = [dict(part) for part in parts]
    (said,) = summed(parts)
    whole = together.document(name="m", version="1")
    assert {**said, "last_inference": 0} == {**whole, "last_inference": 0}
    assert said["last_inference"] == max(part["last_inference"] for part in parts)
    assert parts == kept


def test_versions_stay_apart() -> None:
    documents = [busy(1).document(name=name, version=version) for name, version in (("b", "1"), ("a", "2"), ("a", "1"))]
    assert [(one["name"], one["version"]) for one in summed(documents)] == [("a", "1"), ("a", "2"), ("b", "1")]
