"""The picture in the README: requests per second by server as shares of the bare echo, at 1 and at 32 connections."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from benchmarks.serving.installing import EVALMODE
from benchmarks.serving.servers import ECHO, SERVERS
from benchmarks.serving.summary import Spread, Summary

WORKLOAD = "dense"
CONNECTIONS = (1, 32)
WIDTH_INCH, ROW_INCH, AROUND_INCH = 8.0, 0.27, 1.75
INK, GREY, OWN, PEER, LIMIT = "#1f2328", "#59636e", "#0b6bcb", "#aeb8c4", "#e4e8ec"


def draw(summary: Summary, file: Path) -> bool:
    """Write the chart; False when there is nothing to draw."""
    bars = shares(summary)
    if not bars:
        return False
    with mpl.rc_context({"svg.hashsalt": "evalmode", "font.family": "DejaVu Sans", "font.size": 9}):
        margins = ConstrainedLayoutEngine(rect=(0.015, 0.02, 0.97, 0.95), h_pad=0.12)
        size = WIDTH_INCH, AROUND_INCH + ROW_INCH * len(bars)
        figure = Figure(figsize=size, facecolor="white", layout=margins)
        figure.suptitle(
            "One sample a request: requests per second, as a share of a bare echo", fontsize=12, fontweight="bold",
            color=INK,
        )  # fmt: skip
        panels = figure.subplots(1, len(CONNECTIONS), sharey=True)
        for axes, connections in zip(panels, CONNECTIONS, strict=True):
            ratios = {title: by[connections] for title, by in bars.items() if connections in by}
            _panel(axes, connections, ratios, list(bars))
        figure.supxlabel(_below(summary), fontsize=7.5, color=GREY)
        figure.savefig(file, format="svg", metadata={"Date": None})
    return True


def shares(summary: Summary) -> dict[str, dict[int, Spread]]:
    """For each server that has a figure, by its title, the share of the echo beside it; the best last."""
    found = {}
    for server in SERVERS:
        ratios = {count: summary.share(WORKLOAD, server.name, count) for count in CONNECTIONS}
        if known := {count: ratio for count, ratio in ratios.items() if ratio}:
            found[server.title] = known
    return dict(sorted(found.items(), key=lambda it: it[1][max(it[1])].median))


def _panel(axes: Axes, connections: int, ratios: dict[str, Spread], titles: list[str]) -> None:
    places = [titles.index(title) for title in ratios]
    medians = [ratio.median for ratio in ratios.values()]
    beyond = [[it.median - it.least for it in ratios.values()], [it.most - it.median for it in ratios.values()]]
    axes.barh(places, medians, height=0.72, color=[_colour(title) for title in ratios])
    axes.errorbar(medians, places, xerr=beyond, fmt="none", ecolor=GREY, elinewidth=0.8, capsize=1.5)
    for place, (title, ratio) in zip(places, ratios.items(), strict=True):
        weight = "bold" if title == EVALMODE else "normal"
        axes.text(ratio.most + 0.02, place, f"{ratio.median:.2f}", va="center", color=INK, fontweight=weight)
    axes.set_title(f"{connections} connection{'' if connections == 1 else 's'}", fontsize=10, color=INK)
    axes.set_xlim(0, max(1.15, *(it.most + 0.15 for it in ratios.values())))
    axes.set_yticks(range(len(titles)), titles, color=INK)
    for label in axes.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() == EVALMODE else "normal")
    axes.set_xticks([0, 0.5, 1])
    axes.tick_params(length=0, labelcolor=INK)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.spines["left"].set_color(PEER)
    axes.grid(axis="x", color=LIMIT)
    axes.set_axisbelow(True)


def _colour(title: str) -> str:
    limit = next(server.title for server in SERVERS if server.name == ECHO)
    return {EVALMODE: OWN, limit: LIMIT}.get(title, PEER)


def _below(summary: Summary) -> str:
    about = summary.measured.about
    counts = sorted({len(summary.runs(WORKLOAD, server.name)) for server in SERVERS} - {0})
    rounds = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    return (
        f"Dense network 30-200-100-2 with BatchNorm, JSON, one worker each. Median of {rounds} alternating "
        f"rounds; lines: least and most.\nwrk on the same machine: {about['cpu']}, {about['cpus']} CPUs. "
        f"{about['date'][:10]}. More to the right is better."
    )
