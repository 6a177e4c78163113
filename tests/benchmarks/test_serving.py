"""What the benchmark of the servers concludes, from figures made up here; nothing is started or timed."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import numpy as np
import pytest

from benchmarks.serving import chart, report
from benchmarks.serving.bars import Verdict, verdicts
from benchmarks.serving.load import WrkFailed, parsed
from benchmarks.serving.measuring import Settings, steps, turned
from benchmarks.serving.records import Cell, InProcess, Measured, Run
from benchmarks.serving.servers import NEAR, SERVERS
from benchmarks.serving.summary import Spread, Summary, requests_per_s
from benchmarks.serving.wire import Wire, constant, numbers, request
from benchmarks.serving.workloads import ALL_CONNECTIONS, SAME_ANSWER, Workload

ABOUT = {
    "date": "2026-11-21 12:00 UTC", "finished": True, "cpu": "a CPU", "cpus": 2, "python": "3.11", "commit": "abc",
    "wrk": "wrk 4", "settings": {"rounds": 2, "seconds": 3}, "workloads": {"dense": "a dense network"},
    "versions": {"echo": {"uvicorn": "1"}, "evalmode": {"evalmode": "2"}}, "not_installed": {"ray": "no | wheel"},
}  # fmt: skip

DENSE = Workload(
    name="dense", title="", network=Path("none.onnx"), samples=[], expected=[], wire=Wire.V2,
    connections=ALL_CONNECTIONS, crowd=True,
)  # fmt: skip


def cell(
    connections: int,
    per_s: float,
    *,
    echo: float | None = 1000,
    p50_ms: float = 1.0,
    p99_ms: float = 2.0,
    errors: int = 0,
) -> Cell:
    return Cell(
        connections=connections, requests=int(per_s * 3), requests_per_s=per_s, echo_per_s=echo, p50_ms=p50_ms,
        p99_ms=p99_ms, p999_ms=3.0, cpu_s_per_1000=0.1, memory_mb=50.0, strangers_cpus=0.1, errors=errors,
    )  # fmt: skip


def run(server: str, round_number: int, *cells: Cell, workload: str = "dense", failure: str | None = None) -> Run:
    return Run(
        workload=workload, round=round_number, server=server, first_answer_s=0.5, cells=cells, failure=failure
    )  # fmt: skip


def summary(*runs: Run, in_process: tuple[InProcess, ...] = ()) -> Summary:
    return Summary(Measured(about=dict(ABOUT), runs=list(runs), in_process=list(in_process)))


def verdict(of: Summary, start: str, *, peers: tuple[str, ...] = ()) -> Verdict:
    return next(it for it in verdicts(of, peers) if it.bar.startswith(start))


def test_what_wrk_counted_is_its_last_line_of_json() -> None:
    counts = {"requests": 600, "duration_us": 3_000_000, "p50_us": 250, "p99_us": 1500, "p999_us": 4000, "non_2xx": 2,
              "socket_errors": 1}  # fmt: skip
    load = parsed(f"Running 3s test\n  600 requests in 3.00s\n{json.dumps(counts)}\n", cpu_s=1.5)
    assert (load.requests_per_s, load.p50_ms, load.p99_ms, load.p999_ms) == (200, 0.25, 1.5, 4.0)
    assert (load.non_2xx, load.socket_errors) == (2, 1)


def test_wrk_without_a_count_is_a_failure() -> None:
    with pytest.raises(WrkFailed, match="unable to connect"):
        parsed("unable to connect to 127.0.0.1:1 Connection refused\n", cpu_s=0)


def test_the_order_turns() -> None:
    first = [turned(SERVERS, i)[0] for i in range(len(SERVERS))]
    assert first == SERVERS
    assert sorted(it.name for it in turned(SERVERS, 3)) == sorted(it.name for it in SERVERS)


def test_a_ratio_is_taken_at_the_same_speed_of_the_machine() -> None:
    """A machine that was half as fast for one of the two, or in a whole round, changes no ratio."""
    of = summary(
        run("fastapi", 0, cell(32, 250, echo=1000)), run("evalmode", 0, cell(32, 750, echo=1000)),
        run("fastapi", 1, cell(32, 125, echo=500)), run("evalmode", 1, cell(32, 875, echo=1000)),
        run("fastapi", 2, cell(32, 50, echo=200)), run("evalmode", 2, cell(32, 162.5, echo=200)),
    )  # fmt: skip
    assert of.ratio("dense", "evalmode", "fastapi", 32) == Spread(3.25, 3.0, 3.5, 3)
    assert of.share("dense", "evalmode", 32) == Spread(0.8125, 0.75, 0.875, 3)


def test_where_the_echo_failed_there_is_no_share_and_the_cell_stays() -> None:
    of = summary(run("evalmode", 0, cell(32, 750, echo=None)), run("evalmode", 1, cell(32, 500)))
    assert of.share("dense", "evalmode", 32) == Spread(0.5, 0.5, 0.5, 1)
    assert of.figure("dense", "evalmode", 32, requests_per_s) == Spread(625, 500, 750, 2)


def test_the_far_ones_have_fewer_rounds() -> None:
    plan = list(steps(DENSE, SERVERS, Settings(rounds=3, far_rounds=1, seconds=1)))
    assert [server for number, server in plan if number == 0] == SERVERS
    assert {server.name for number, server in plan if number > 0} == set(NEAR)
    assert len(plan) == len(SERVERS) + 2 * len(NEAR)
    assert len(list(steps(DENSE, SERVERS, Settings(rounds=3, seconds=1)))) == 3 * len(SERVERS)


def test_the_crowd_comes_right_after_what_it_is_held_against() -> None:
    evalmode = next(server for server in SERVERS if server.name == "evalmode")
    settings = Settings(rounds=1, seconds=1)
    assert settings.connections_of(DENSE, evalmode) == (1, 8, 128, 32, 1024)
    assert settings.connections_of(DENSE, SERVERS[0]) == (1, 8, 32, 128)


def test_a_round_that_one_side_missed_does_not_count() -> None:
    of = summary(run("ray", 0, cell(1, 100)), run("ray", 1, cell(1, 100)), run("evalmode", 1, cell(1, 50)))
    assert of.ratio("dense", "evalmode", "ray", 1) == Spread(0.5, 0.5, 0.5, 1)


@pytest.mark.parametrize("bad", [cell(32, 900, errors=1), cell(32, 0)], ids=["an error", "no answer at all"])
def test_an_invalid_round_takes_the_figure_of_its_cell(bad: Cell) -> None:
    of = summary(run("echo", 0, cell(32, 1000)), run("evalmode", 0, cell(32, 700)), run("evalmode", 1, bad))
    assert of.figure("dense", "evalmode", 32, requests_per_s) is None
    assert of.ratio("dense", "evalmode", "echo", 32) is None
    assert of.growth("dense", "evalmode", 32, 32, requests_per_s) is None
    assert "invalid in 1 of 2" in report.report(of)
    assert verdict(of, "dense, 32 connections: at least 0.60").met is None


@pytest.mark.parametrize(
    ("per_s", "word"), [(600.0, "met"), (599.9, "NOT MET")], ids=["exactly on the bar", "not rounded up to it"]
)
def test_a_bar_is_met_from_its_figure_on(per_s: float, word: str) -> None:
    of = summary(run("echo", 0, cell(32, 1000)), run("evalmode", 0, cell(32, per_s)))
    assert verdict(of, "dense, 32 connections: at least 0.60").word == word


def test_the_nearest_peer_decides_whether_all_are_behind() -> None:
    of = summary(
        run("evalmode", 0, cell(32, 900)), run("mosec", 0, cell(32, 300)), run("mosec-batching", 0, cell(32, 1000))
    )
    found = verdict(of, "dense, 32 connections: ahead", peers=("mosec", "mosec-batching", "ray"))
    assert found.met is False
    assert "0.90 (0.90 to 0.90) x mosec-batching" in found.found
    assert "without a figure: ray" in found.found


def test_an_image_is_held_against_the_fastest_run_in_process() -> None:
    alone = tuple(
        InProcess(workload="image-binary", round=0, threads=threads, runs_per_s=1, p50_ms=p50_ms, p99_ms=9)
        for threads, p50_ms in ((1, 5.0), (2, 3.0))
    )
    of = summary(
        run("evalmode", 0, cell(1, 200, p50_ms=4.4), workload="image-binary"),
        run("echo", 0, cell(1, 900, p50_ms=1.1), workload="image-binary"),
        in_process=alone,
    )
    beyond, transported = of.beyond_in_process_ms("image-binary", "evalmode"), of.beyond_echo_ms(
        "image-binary", "evalmode", "echo"
    )  # fmt: skip
    assert beyond is not None
    assert transported is not None
    assert (beyond.median, transported.median) == pytest.approx((1.4, 0.3))
    assert verdict(of, "image-binary").met is True


def test_the_crowd_may_wait_as_long_as_it_is_larger() -> None:
    def crowd(p99_ms: float, per_s: float) -> Summary:
        return summary(run("evalmode", 0, cell(32, 1000, p99_ms=5), cell(1024, per_s, p99_ms=p99_ms)))

    assert verdict(crowd(160, 800), "dense, 1024 connections: p99").met is True
    assert verdict(crowd(161, 800), "dense, 1024 connections: p99").met is False
    assert verdict(crowd(161, 799), "dense, 1024 connections: throughput").met is False


def test_what_was_measured_comes_back_from_its_file(tmp_path: Path) -> None:
    measured = summary(run("echo", 0, cell(1, 10)), run("ray", 0, failure="DidNotStart: no")).measured
    measured.save(tmp_path / "results" / "serving.json")
    assert Measured.load(tmp_path / "results" / "serving.json") == measured
    assert [it.name for it in (tmp_path / "results").iterdir()] == ["serving.json"]


def test_the_report_says_what_was_left_out_and_why() -> None:
    text = report.report(summary(run("echo", 0, cell(1, 10)), run("litserve", 0, failure="WrongAnswer: sample 3")))
    assert "| ray" in text
    assert "no / wheel" in text  # a bar would end the table's cell
    assert "WrongAnswer: sample 3" in text


def test_the_chart_has_each_server_and_nothing_of_the_day(tmp_path: Path) -> None:
    of = summary(
        *(run(name, 0, cell(1, per_s), cell(32, per_s)) for name, per_s in (("echo", 9), ("evalmode", 6), ("mosec", 3)))
    )
    assert list(chart.shares(of)) == ["mosec", "evalmode", "bare echo"]
    assert chart.draw(of, tmp_path / "a.svg")
    assert chart.draw(of, tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert not chart.draw(summary(), tmp_path / "c.svg")


X = np.array([0.1, -2.5, 3.0], dtype=np.float32)
Y = np.array([0.25, -1.5], dtype=np.float32)


@pytest.mark.parametrize("wire", [Wire.V2, Wire.NAMED, Wire.BINARY])
def test_the_echo_answers_as_evalmode_does(wire: Wire) -> None:
    said = constant(wire, "dense", Y)
    body = bytes.fromhex(said["body"])
    assert said["headers"]["content-length"] == str(len(body))
    assert numbers(httpx.Response(200, content=body, headers=said["headers"])).tolist() == Y.tolist()


@pytest.mark.parametrize(
    "answer",
    [{"y": [0.25, -1.5]}, [0.25, -1.5], [[0.25, -1.5]], {"outputs": [{"data": [[0.25, -1.5]]}]},
     {"label": "good", "probabilities": {"bad": 0.25, "good": -1.5}}, [{"probabilities": {"bad": 0.25, "good": -1.5}}]],
)  # fmt: skip
def test_every_servers_answer_is_read(answer: object) -> None:
    assert numbers(httpx.Response(200, json=answer)).tolist() == Y.tolist()


def test_an_answer_without_numbers_is_refused() -> None:
    with pytest.raises(ValueError, match="no numbers"):
        numbers(httpx.Response(200, json={"detail": "oops"}))


def test_a_binary_request_is_a_header_and_the_tensors_bytes() -> None:
    sent = request(Wire.BINARY, X)
    end = int(sent.headers["Inference-Header-Content-Length"])
    (tensor,) = json.loads(sent.body[:end])["inputs"]
    assert tensor["shape"] == [1, 3]
    assert tensor["parameters"]["binary_data_size"] == len(sent.body) - end
    assert np.frombuffer(sent.body[end:], dtype="<f4").tolist() == X.tolist()


@pytest.mark.parametrize(
    ("answered", "same"),
    [([0.25, -1.5], True), ([0.25 + 1.4 * SAME_ANSWER, -1.5], True), ([0.25 + 1.6 * SAME_ANSWER, -1.5], False),
     ([float("nan"), -1.5], False), ([-1.5, 0.25], False), ([0.25], False)],
)  # fmt: skip
def test_answers_are_the_same_within_the_rounding_of_the_row(answered: list[float], same: bool) -> None:
    workload = Workload(
        name="dense", title="", network=Path("none.onnx"), samples=[{"x": X}], expected=[Y], wire=Wire.V2,
        connections=(1,),
    )  # fmt: skip
    assert workload.same(0, np.array(answered)) is same
