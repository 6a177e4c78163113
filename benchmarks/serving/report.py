"""What people read: tables of every workload, the bars, how each server was run, and what was left out and why.

One text is both the report in the repository and what the terminal shows.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.serving.bars import verdicts
from benchmarks.serving.installing import EVALMODE
from benchmarks.serving.servers import ECHO, NEAR, SERVERS, Server
from benchmarks.serving.summary import Figure, Summary
from benchmarks.serving.wire import Wire
from benchmarks.serving.workloads import SAME_ANSWER

PACKAGES = {  # the package whose version a peer's own is
    "echo": "uvicorn", EVALMODE: "evalmode", "fastapi": "fastapi", "litserve": "litserve", "bentoml": "bentoml",
    "mlserver": "mlserver", "mosec": "mosec", "ray": "ray", "triton": "nvidia-pytriton",
}  # fmt: skip
IN_PROCESS = "`session.run`, no server"
OPENING = f"""\
Claimed are the shares of what a bare echo does, driven just before and just after: the median of the rounds, with the
least and the most. Two servers are compared by their shares. The echo's own row tells how exact that is.
Absolute figures belong to this machine. Every server runs the same ONNX file with one worker, and before it was timed
its answers to every sample were onnxruntime's, within {SAME_ANSWER:g} of the row's largest number. wrk sends different
samples in turn (64 rows, 8 images). A cell with an answer other than 2xx or a socket error is invalid and shown as
such; nothing is retried. A percentile stands only where enough answers came for it. The bare echo is the limit of HTTP,
`session.run` that of computing."""
SESSIONS = """\
Sessions do not spin. They have one thread, and for images as many as evalmode takes by itself. The versions of every
package are in [serving.json](serving.json); each server's file is in `benchmarks/serving/peers/`."""


def report(summary: Summary) -> str:
    """The report in Markdown."""
    return "\n".join(
        [*_opening(summary), *_bars(summary), *_workloads(summary), *_how(summary), *_left_out(summary), ""]
    )


def rounds_said(about: dict[str, Any]) -> str:
    """How many there were, and for whom fewer."""
    rounds, far = about["settings"]["rounds"], about["settings"].get("far_rounds")
    fewer = f" ({far} for the peers that are not near: all but {', '.join(NEAR)})" if far and far < rounds else ""
    return f"{rounds} alternating rounds{fewer}"


def bars_table(summary: Summary) -> list[str]:
    peers = [server.name for server in SERVERS if server.name not in (ECHO, EVALMODE)]
    found = [(it.bar, it.found, it.word) for it in verdicts(summary, peers)]
    return table(["bar", "median (least to most)", ""], found)


def workload_table(summary: Summary, workload: str) -> list[str]:
    """A row for each server and number of connections, and the limits."""
    rows = [
        _row(summary, workload, server, connections)
        for server in _by_throughput(summary, workload)
        for connections in _connections(summary, workload, server)
    ]
    heads = ["server", "connections", "x echo (least to most)", "requests/s", "p50 ms", "p99 ms", "p99.9 ms",
             "CPU s / 1,000", "memory MB", "first answer s"]  # fmt: skip
    return table(heads, [*rows, *_in_process_rows(summary, workload)])


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table whose columns also line up as plain text."""
    widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
    lines = [[*row] for row in (heads, ["-" * width for width in widths], *rows)]
    return [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in lines
    ]


def _opening(summary: Summary) -> Iterator[str]:
    about = summary.measured.about
    yield "# One sample a request: evalmode beside other servers"
    yield ""
    yield f"{about['date']}. {about['cpu']}, {about['cpus']} CPUs; Python {about['python']}; commit {about['commit']}."
    yield (
        f"`python -m benchmarks.serving`: {rounds_said(about)}, "
        f"{about['settings']['seconds']} s a cell, {about['wrk']} with one thread on the same machine, nothing pinned."
    )
    if strangers := summary.strangers_cpus():
        yield f"CPUs busy with neither server nor wrk meanwhile: {strangers}."
    if not about["finished"]:
        yield from ("", "**The run was not finished; this is what it had measured.**")
    yield from ("", "![Requests per second as a share of a bare echo](serving.svg)", "")
    yield OPENING


def _bars(summary: Summary) -> Iterator[str]:
    yield from ("", "## Bars", "")
    yield from bars_table(summary)


def _workloads(summary: Summary) -> Iterator[str]:
    for name, title in summary.measured.about["workloads"].items():
        yield from ("", f"## {name}: {title}", "")
        yield from workload_table(summary, name)


def _row(summary: Summary, workload: str, server: Server, connections: int) -> list[str]:
    def shown(figure: Figure, digits: int, *, requests_needed: int = 1) -> str:
        found = summary.figure(workload, server.name, connections, figure)
        return f"{found.median:,.{digits}f}" if found and fewest >= requests_needed else ""

    cells = summary.cells(workload, server.name, connections).values()
    fewest = min(cell.requests for cell in cells)
    invalid = summary.invalid(workload, server.name, connections)
    share = summary.share(workload, server.name, connections)
    first = summary.first_answer_s(workload, server.name)
    return [
        f"**{server.title}**" if server.name == EVALMODE else server.title,
        str(connections),
        invalid or str(share or ""),
        shown(lambda cell: cell.requests_per_s, 0),
        shown(lambda cell: cell.p50_ms, 2),
        shown(lambda cell: cell.p99_ms, 2, requests_needed=100),
        shown(lambda cell: cell.p999_ms, 2, requests_needed=1000),
        shown(lambda cell: cell.cpu_s_per_1000, 3),
        shown(lambda cell: cell.memory_mb, 0),
        f"{first.median:.2f}" if first else "",
    ]


def _in_process_rows(summary: Summary, workload: str) -> Iterator[list[str]]:
    timed = [it for it in summary.measured.in_process if it.workload == workload]
    for threads in sorted({it.threads for it in timed}):
        of = [it for it in timed if it.threads == threads]
        per_s = statistics.median(it.runs_per_s for it in of)
        p50, p99 = statistics.median(it.p50_ms for it in of), statistics.median(it.p99_ms for it in of)
        name = f"{IN_PROCESS}, {threads} thread{'' if threads == 1 else 's'}"
        yield [name, "", "", f"{per_s:,.0f}", f"{p50:.3f}", f"{p99:.3f}", "", "", "", ""]


def _how(summary: Summary) -> Iterator[str]:
    versions: dict[str, dict[str, str]] = summary.measured.about["versions"]
    yield from ("", "## How each was run", "")
    rows = []
    for server in SERVERS:
        if server.peer in versions:
            package = PACKAGES[server.peer]
            rows.append([server.title, f"{package} {versions[server.peer].get(package, '')}", server.how])
    yield from table(["server", "version", "how"], rows)
    yield from ("", SESSIONS)


def _left_out(summary: Summary) -> Iterator[str]:
    about = summary.measured.about
    rows = [[peer, "everything", reason] for peer, reason in about["not_installed"].items()]
    for workload in about["workloads"]:
        for server in SERVERS:
            asked = server.asked[workload]
            if not isinstance(asked, Wire):
                rows.append([server.title, workload, asked])
            rows += [[server.title, workload, reason] for reason in summary.failures(workload, server.name)]
    if rows:
        yield from ("", "## Left out, and what failed", "")
        yield from table(["server", "workload", "why"], [[cell.replace("|", "/") for cell in row] for row in rows])


def _by_throughput(summary: Summary, workload: str) -> list[Server]:
    """The fastest at most connections first; those without a figure are not here."""

    def key(server: Server) -> float:
        for connections in (32, 8, 1):
            if ratio := summary.figure(workload, server.name, connections, lambda cell: cell.requests_per_s):
                return -ratio.median
        return 0.0

    return sorted((it for it in SERVERS if _connections(summary, workload, it)), key=key)


def _connections(summary: Summary, workload: str, server: Server) -> list[int]:
    return sorted({cell.connections for run in summary.runs(workload, server.name) for cell in run.cells})
