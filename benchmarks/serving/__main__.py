"""`python -m benchmarks.serving`: install, check, drive, report."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter
from rich.console import Console

from benchmarks.environment import environment
from benchmarks.serving import chart, report
from benchmarks.serving.beside import echo_beside
from benchmarks.serving.installing import EVALMODE, CannotInstall, installed, versions
from benchmarks.serving.measuring import Settings, measured_in_process, measured_run, now, steps
from benchmarks.serving.records import Measured
from benchmarks.serving.servers import ECHO, NEAR, SERVERS, Server
from benchmarks.serving.summary import Summary
from benchmarks.serving.workloads import ALL_CONNECTIONS, WORKLOADS, Workload

RESULTS = Path(__file__).parents[1] / "results"
FILES_NEEDED = 4096
QUICK_CONNECTIONS = (1, 32)

app = App(
    name="python -m benchmarks.serving",
    help="How fast is one sample answered, beside other servers, on this machine?",
    help_epilogue="""
```
python -m benchmarks.serving                                  # everything; about 90 minutes
python -m benchmarks.serving --quick                          # a look: 1 round of 1 s, 1 and 32 connections
python -m benchmarks.serving --workloads dense --peers fastapi,triton
python -m benchmarks.serving show                             # the report and the chart again, from serving.json
```
""",
    help_format="markdown",
)
console = Console(highlight=False, soft_wrap=True)

_ALWAYS = (ECHO, EVALMODE)
_PEERS = list(dict.fromkeys(server.peer for server in SERVERS if server.peer not in _ALWAYS))


@app.default
def bench(
    *,
    peers: Annotated[str | None, Parameter(help=f"Some of {','.join(_PEERS)}; default: all.")] = None,
    workloads: Annotated[str | None, Parameter(help=f"Some of {','.join(WORKLOADS)}; default: all.")] = None,
    rounds: Annotated[int, Parameter(help="Rounds; every server has its turn in each.")] = 5,
    far_rounds: Annotated[
        int | None, Parameter(help=f"Fewer rounds for all servers but {', '.join(NEAR)}; default: as many.")
    ] = None,
    seconds: Annotated[int, Parameter(help="Seconds that a cell is measured for, after a warm-up of one.")] = 3,
    quick: Annotated[bool, Parameter(negative="", help="One round of one second at 1 and 32 connections.")] = False,
    full: Annotated[bool, Parameter(negative="", help="Images at 32 and 128 connections too.")] = False,
    out: Annotated[Path, Parameter(help="Where serving.json, serving.md and serving.svg go.")] = RESULTS,
) -> None:
    """Install each server, hold its answers against onnxruntime's, drive it with wrk, and write the report.

    The bare echo and evalmode always take part. What is measured is saved at once: after Ctrl-C there is a report of
    what there is.
    """
    if shutil.which("wrk") is None:
        sys.exit("wrk is not installed; Debian and Ubuntu have it: apt-get install wrk")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is stopped
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(FILES_NEEDED, limit), limit))  # for wrk's many connections
    chosen = [WORKLOADS[name]() for name in _chosen(workloads, list(WORKLOADS), "workload")]
    named = _chosen(peers, _PEERS, "peer")
    settings = Settings(
        rounds=1 if quick else rounds,
        far_rounds=far_rounds,
        seconds=1 if quick else seconds,
        connections=QUICK_CONNECTIONS if quick else ALL_CONNECTIONS if full else None,
    )
    measured = Measured(about={})
    programs = _environments([*_ALWAYS, *named], measured)
    measured.about |= _about(settings, chosen)
    try:
        _measure(measured, chosen, [it for it in SERVERS if it.peer in programs], programs, settings, out)
        measured.about["finished"] = True
    except KeyboardInterrupt:
        console.print("interrupted; this is what there is")
    finally:
        measured.save(out / "serving.json")
    show(out=out)


@app.command
def show(*, out: Path = RESULTS) -> None:
    """Print tables and bars from serving.json, and write serving.md and serving.svg anew."""
    measured = Measured.load(out / "serving.json")
    summary = Summary(measured)
    (out / "serving.md").write_text(report.report(summary), encoding="utf-8")
    drawn = chart.draw(summary, out / "serving.svg")
    for workload in measured.about["workloads"]:
        console.print(f"\n[bold]{workload}[/bold]", *report.workload_table(summary, workload), sep="\n")
    console.print("\n[bold]bars[/bold]", *report.bars_table(summary), sep="\n")
    console.print(f"\nwritten: {out / 'serving.json'}, serving.md" + (", serving.svg" if drawn else ""))
    print(json.dumps({name: value for name, value in measured.about.items() if name != "versions"}))


def _measure(
    measured: Measured,
    workloads: list[Workload],
    servers: list[Server],
    programs: dict[str, Path],
    settings: Settings,
    out: Path,
) -> None:
    plan = {workload.name: list(steps(workload, servers, settings)) for workload in workloads}
    began, done, total = time.perf_counter(), 0, sum(map(len, plan.values()))
    for workload in workloads:
        with echo_beside(workload, programs=programs[ECHO]) as echo:
            for round_number, server in plan[workload.name]:
                left = (time.perf_counter() - began) / done * (total - done) if done else None
                remaining = f"about {left / 60:.0f} min left" if left else ""
                console.print(
                    f"[bold]{workload.name}, round {round_number + 1} of {settings.rounds}, {server.title}[/bold]"
                    f"  ({done + 1} of {total}; {remaining})"
                )
                if server.name == EVALMODE:  # which is held against it
                    measured.in_process += measured_in_process(workload, round_number, settings.seconds)
                measured.runs.append(
                    measured_run(
                        workload,
                        round_number,
                        server,
                        programs=programs[server.peer],
                        echo=echo,
                        settings=settings,
                        tell=console.print,
                    )
                )
                measured.save(out / "serving.json")
                done += 1


def _environments(peers: list[str], measured: Measured) -> dict[str, Path]:
    """Each peer's programs; one that cannot be installed is told and left out."""
    programs = {}
    measured.about |= {"versions": {}, "not_installed": {}}
    for peer in peers:
        console.print(f"environment of {peer} …")
        try:
            programs[peer] = installed(peer)
            measured.about["versions"][peer] = versions(programs[peer])
        except CannotInstall as reason:
            console.print(f"  cannot be installed: {reason}")
            measured.about["not_installed"][peer] = str(reason)
    return programs


def _about(settings: Settings, workloads: list[Workload]) -> dict[str, object]:
    wrk = subprocess.run(["wrk", "--version"], capture_output=True, text=True, check=False).stdout.split("[")[0].strip()
    return {
        "date": now(),
        "finished": False,
        "settings": {
            "rounds": settings.rounds,
            "far_rounds": settings.far_rounds,
            "seconds": settings.seconds,
            "connections": settings.connections,
        },
        "workloads": {workload.name: workload.title for workload in workloads},
        "wrk": wrk,
        **environment(),
    }


def _chosen(names: str | None, known: list[str], kind: str) -> list[str]:
    if names is None:
        return known
    chosen = names.split(",")
    if unknown := [name for name in chosen if name not in known]:
        sys.exit(f"no {kind} '{unknown[0]}'; there are {', '.join(known)}")
    return chosen


if __name__ == "__main__":
    app()
