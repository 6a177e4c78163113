"""`report.html`: the whole export on one page, for somebody who did not run it.

One file: no script, no font, no picture from elsewhere; light and dark, desktop and phone. The page says in this order
whether the model can be served, how its layers look, how near it is to PyTorch, whether rows disturb each other, what
train mode would have done, what the running statistics cost, what the audit found, and where the model comes from.

Statistics are drawn: a line for each channel on an axis that all layers share, so that a layer unlike the others shows.
The template draws, this module says where: positions are percentages of the strip, computed here and tested.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from export.audit import Finding
from export.gap import Gap
from service.bundle import LayerSummary, ParityFigure, Passport
from service.graph.fold import Fold

MOST_LINES = 160
"""Lines in one strip: a layer of more channels is drawn by that many quantiles of them."""

_SEVERITIES = ("error", "warning", "info")


@dataclass(frozen=True, slots=True, kw_only=True)
class Strip:
    """One line for each channel, on an axis from 0 to 100."""

    positions: tuple[float, ...]
    label: str
    """The range in figures."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """What a strip's 0 to 100 stands for."""

    title: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    """Positions with what to write there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A BatchNorm layer as drawn."""

    summary: LayerSummary
    strips: tuple[Strip, ...]
    fold: Fold | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A figure beside its limit, both on one logarithmic axis."""

    name: str
    figure: str
    limit: str
    position: float
    limit_position: float
    passed: bool


def render(
    passport: Passport,
    *,
    layers: Mapping[str, nn.Module],
    folds: Sequence[Fold],
    findings: Sequence[Finding],
    gap: Gap | None,
) -> str:
    """The page.

    Args:
        passport: as it is written, with its independence.
        layers: the BatchNorm modules of `passport.batchnorm` by path; not changed.
        folds: what becomes of each layer in the graph that serves.
    """
    axes, rows = _drawn(passport, layers, folds)
    figures = passport.parity
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("export", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters["figure"] = figure
    return environment.get_template("report.html.jinja").render(
        passport=passport,
        verdict=_verdict(passport, findings, gap),
        warned=_warned(findings, gap),
        sentences=_sentences(passport, findings, gap),
        axes=axes,
        rows=rows,
        bars=_bars(figures),
        divergence=_divergence(passport),
        gap=gap,
        gap_bars=_gap_bars(gap),
        metric_names=list(gap.variants[0].metrics) if gap else [],
        findings=sorted(findings, key=lambda finding: _SEVERITIES.index(finding.severity)),
        provenance=[(key, _said(value)) for key, value in passport.provenance.items() if value not in ({}, [], None)],
    )


def figure(value: float) -> str:
    """A number with three digits, for people.

    >>> [figure(value) for value in (0.0, 1.234e-7, 0.0123, 1234567.0)]
    ['0', '1.23e-07', '0.0123', '1.23e+06']
    """
    return f"{value:.3g}".replace("-", "\u2212") if value < 0 else f"{value:.3g}"


# What it says


def _warned(findings: Sequence[Finding], gap: Gap | None) -> bool:
    return any(finding.severity == "warning" for finding in findings) or (gap is not None and gap.verdict != "fine")


def _verdict(passport: Passport, findings: Sequence[Finding], gap: Gap | None) -> str:
    said = f"{passport.name}/{passport.version} is served as it was evaluated"
    return f"{said}, with a warning" if _warned(findings, gap) else said


def _sentences(passport: Passport, findings: Sequence[Finding], gap: Gap | None) -> list[str]:
    """The verdict's reasons, each with its figure."""
    layers = len(passport.batchnorm)
    said = [
        f"{'Both' if layers == 2 else f'All {layers}'} BatchNorm layers are frozen: they use constants of the graph, "
        "bit for bit the network's."
        if layers > 1
        else "Its BatchNorm layer is frozen: it uses constants of the graph, bit for bit the network's."
        if layers
        else "The network has no BatchNorm: there is nothing to freeze."
    ]
    onnx = [found for found in passport.parity if ", ONNX" in found.name]
    if onnx:
        worst = max(onnx, key=lambda found: found.difference / found.bound if found.bound else 0.0)
        said.append(
            f"The ONNX model is within {figure(worst.difference)} of PyTorch in eval mode, where the rounding of this "
            f"network explains up to {figure(worst.bound)}."
        )
    if passport.independence is not None:
        sizes = ", ".join(map(str, passport.independence.batch_sizes))
        bits = (
            "in any bit"
            if passport.independence.kind == "exact"
            else f"beyond rounding ({figure(passport.independence.bound)})"
        )
        said.append(f"A row's answer does not depend on the rows beside it {bits}: tried in batches of {sizes}.")
    for name, moved in _moved(passport).items():
        said.append(f"In train mode '{name}' would be off by up to {figure(moved)}: that is what is prevented here.")
    if gap is not None:
        said.append(f"The running statistics are judged {gap.verdict} on {gap.rows} rows: {gap.sentence}.")
    warnings = [finding for finding in findings if finding.severity == "warning"]
    if warnings:
        things = "one thing" if len(warnings) == 1 else f"{len(warnings)} things"
        said.append(f"The audit warns of {things}; see its findings below.")
    return said


def _moved(passport: Passport) -> dict[str, float]:
    found = passport.provenance.get("train_eval_divergence")
    return {name: value for name, value in found.items() if isinstance(value, float)} if isinstance(found, dict) else {}


def _said(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False)


# What it draws


def _drawn(
    passport: Passport, layers: Mapping[str, nn.Module], folds: Sequence[Fold]
) -> tuple[tuple[Axis, ...], list[Row]]:
    """The three strips of every layer, on axes that all share."""
    measured = {summary.layer: _values(layers[summary.layer]) for summary in passport.batchnorm}
    std, mean, gain = ([values[i] for values in measured.values()] for i in range(3))
    axes = (
        _log_axis("standard deviation", std),
        _linear_axis("mean, in standard deviations", mean),
        _log_axis("gain |gamma| / std", gain),
    )
    folded = {fold.layer: fold for fold in folds}
    rows = [
        Row(
            summary=summary,
            strips=(
                _strip(np.log10(measured[summary.layer][0]), axes[0], logarithmic=True),
                _strip(measured[summary.layer][1], axes[1]),
                _strip(np.log10(measured[summary.layer][2]), axes[2], logarithmic=True),
            ),
            fold=folded.get(summary.layer),
        )
        for summary in passport.batchnorm
    ]
    return axes, rows


_SMALLEST = 1e-12
"""What a logarithm is taken of where a variance or gamma is 0."""


def _values(module: nn.Module) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Per channel: the standard deviation, the mean in standard deviations, and the gain; eps included."""
    assert isinstance(module, _BatchNorm)
    assert module.running_mean is not None
    assert module.running_var is not None
    mean_C, var_C = (v.detach().cpu().double().numpy() for v in (module.running_mean, module.running_var))
    std_C = np.sqrt(var_C + module.eps)
    gamma_C = module.weight.detach().cpu().double().abs().numpy() if module.affine else np.ones_like(std_C)
    return np.maximum(std_C, _SMALLEST), mean_C / np.maximum(std_C, _SMALLEST), np.maximum(gamma_C / std_C, _SMALLEST)


def _log_axis(title: str, values: Sequence[NDArray[np.float64]]) -> Axis:
    exponents = np.log10(np.concatenate(values)) if values else np.zeros(1)
    low, high = math.floor(exponents.min()), math.ceil(exponents.max())
    high = max(high, low + 1)
    step = max(1, math.ceil((high - low) / 5))
    ticks = [(100 * (e - low) / (high - low), f"{10.0**e:g}") for e in range(low, high + 1, step)]
    return Axis(title=title, low=low, high=high, ticks=tuple(ticks))


def _linear_axis(title: str, values: Sequence[NDArray[np.float64]]) -> Axis:
    reach = max(float(np.abs(np.concatenate(values)).max()) if values else 0.0, 1.0)
    ticks = ((0.0, f"−{reach:.3g}"), (50.0, "0"), (100.0, f"{reach:.3g}"))
    return Axis(title=title, low=-reach, high=reach, ticks=ticks)


def _strip(values: NDArray[np.float64], axis: Axis, *, logarithmic: bool = False) -> Strip:
    ordered = np.sort(values)
    lowest, highest = (10.0 ** float(v) if logarithmic else float(v) for v in (ordered[0], ordered[-1]))
    if len(ordered) > MOST_LINES:
        ordered = np.quantile(ordered, np.linspace(0, 1, MOST_LINES))
    positions = 100 * (ordered - axis.low) / (axis.high - axis.low)
    label = figure(lowest) if lowest == highest else f"{figure(lowest)} to {figure(highest)}"
    return Strip(positions=tuple(round(float(p), 1) for p in positions), label=label)


def _bars(figures: Sequence[ParityFigure]) -> list[Bar]:
    """Parity: how much of what rounding explains was used; a logarithmic axis of four decades below the limit."""
    return [
        Bar(
            name=found.name,
            figure=figure(found.difference),
            limit=figure(found.bound),
            position=_decades(found.difference, found.bound),
            limit_position=80.0,
            passed=found.difference <= found.bound,
        )
        for found in figures
    ]


def _decades(value: float, limit: float) -> float:
    """Where a figure stands when its limit stands at 80 and each 20 to the left is a tenth.

    >>> [_decades(value, 1e-6) for value in (1e-6, 1e-8, 0.0, 1e-2)]
    [80.0, 40.0, 0.0, 100.0]
    """
    if value <= 0 or limit <= 0:
        return 0.0
    return round(min(max(80 + 20 * math.log10(value / limit), 0.0), 100.0), 1)


def _divergence(passport: Passport) -> list[Bar]:
    """Train mode beside the tolerance, each output on a logarithmic axis from the tolerance's tenth upwards."""
    bars = []
    tolerances = passport.golden.tolerances if passport.golden else {}
    for name, moved in _moved(passport).items():
        limit = tolerances[name].absolute if name in tolerances else 0.0
        decades = max(math.log10(moved / limit), 0.0) if moved > 0 and limit > 0 else 0.0
        bars.append(
            Bar(
                name=name,
                figure=figure(moved),
                limit=figure(limit),
                position=round(10 + 90 * decades / max(decades, 6.0), 1),
                limit_position=10.0,
                passed=True,
            )
        )
    return bars


def _gap_bars(gap: Gap | None) -> list[Bar]:
    """The divergence of each layer, the worst first, beside what is noticeable."""
    if gap is None:
        return []
    from export.gap import NOTICEABLE

    ranked = sorted(gap.layers, key=lambda layer: layer.divergence, reverse=True)
    largest = max((layer.divergence for layer in ranked), default=0.0)
    scale = max(largest, 2 * NOTICEABLE)
    return [
        Bar(
            name=layer.layer,
            figure=figure(layer.divergence),
            limit=figure(NOTICEABLE),
            position=round(100 * layer.divergence / scale, 1),
            limit_position=round(100 * NOTICEABLE / scale, 1),
            passed=layer.divergence <= NOTICEABLE,
        )
        for layer in ranked[:12]
    ]
