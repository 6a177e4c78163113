"""Checks of what a sample shows: does a row depend on its company, are the statistics those of such data?

Two vectors of statistics are told apart by the median over the channels of

    z = |mean_running - mean_data| / std_data        and of        l = |ln(var_running / var_data)|

since a single channel may be odd in a healthy network, and half of them may not. Both have the error of the sample,
which is that of its N rows (the positions of a row are no further rows), measured on the rows themselves. A median of
|error| exceeds three standard errors once in 370 times even where all channels move together. The error of few rows is
itself uncertain, and counts 1 + 6 / (N - 1) times: Student's t asks for no more from N = 5 on, and hardly more at 4. On
top of it a healthy network may differ by

    z: 0.25     three standard errors of a moving average with momentum m = 0.1 over batches of B = 8 rows: it averages
                (2 - m) / m = 19 batches, so 3 * sqrt(m / ((2 - m) * B)) = 0.243; more where m is larger or B smaller
    l: ln 2     a variance that is off by a factor of two, which changes the scale by sqrt(2)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from export.audit.facts import USUAL_MOMENTUM, Array, Facts, NormFacts, Seen
from export.audit.finding import Found, count, subject_of, verb

LEAST_Z = 0.25
LEAST_LOG_RATIO = math.log(2)
STANDARD_ERRORS = 3.0
FEWEST_ROWS = 4
"""Fewer say nothing about a mean and its error."""
USUAL_BATCH = 8
SAME = 0.25
"""How near statistics must be to those of transformed data, in standard deviations and in ln(std), for a
transform to be named."""
SCALES: Mapping[float, str] = {
    255.0: "multiplied by 255: the network learned on 0 to 1 and is given 0 to 255",
    1 / 255.0: "divided by 255: the network learned on 0 to 255 and is given 0 to 1",
    1000.0: "multiplied by 1000: another unit, such as g for kg",
    1 / 1000.0: "divided by 1000: another unit, such as kg for g",
    100.0: "multiplied by 100: percent for shares",
    1 / 100.0: "divided by 100: shares for percent",
}
MUCH_PADDING = 0.05


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Pair:
    """A layer's own statistics beside those of the sample; without the channels that do not vary."""

    norm: NormFacts
    seen: Seen
    mean_C: Array
    std_C: Array
    data_mean_C: Array
    data_std_C: Array

    @property
    def z_C(self) -> Array:
        return np.asarray(np.abs(self.mean_C - self.data_mean_C) / self.data_std_C)

    @property
    def log_ratio_C(self) -> Array:
        return np.asarray(2 * np.abs(np.log(self.std_C / self.data_std_C)))


def _pairs(facts: Facts) -> Iterator[_Pair]:
    for seen in facts.observed.seen if facts.observed else ():
        norm = facts.norm(seen.layer)
        if norm is None or norm.mean_C is None or norm.var_C is None or norm.lazy or norm.initial:
            continue
        if norm.mean_C.shape != seen.mean_C.shape or norm.var_C.shape != seen.var_C.shape:
            continue
        with np.errstate(invalid="ignore"):
            usable_C = np.isfinite(norm.mean_C) & np.isfinite(norm.var_C) & (norm.var_C > 0)
            # beside a mean that large, the variance is rounding
            usable_C &= seen.var_C > (1e-6 * seen.mean_C) ** 2
        if usable_C.any() and seen.rows > 1:
            yield _Pair(
                norm=norm,
                seen=seen,
                mean_C=norm.mean_C[usable_C],
                std_C=np.sqrt(norm.var_C[usable_C]),
                data_mean_C=seen.mean_C[usable_C],
                data_std_C=np.sqrt(seen.var_C[usable_C]),
            )


def row_depends_on_company(facts: Facts) -> Iterator[Found]:
    if facts.observed is None:
        return
    company = facts.observed.company
    first = facts.norms[:1]
    layers = tuple(norm.layer for norm in first)
    if company.failure:
        yield Found(
            severity="error",
            layers=layers,
            message=f"in eval mode the network does not answer {count(company.rows, 'row')}: {company.failure}",
        )
    elif company.rows:
        why = "what stands beside a row matters" if company.neighbours else "the number of rows matters"
        yield Found(
            severity="error",
            layers=layers,
            message=f"in eval mode the answer for row 0 moves by {company.difference:.3g} (largest output "
            f"{company.largest:.3g}) between {count(1, 'row')} and {count(company.rows, 'row')}: {why}",
        )


def unlike_the_data(facts: Facts) -> Iterator[Found]:
    unlike: list[tuple[_Pair, float, float]] = []
    for pair in _pairs(facts):
        z, log_ratio = float(np.median(pair.z_C)), float(np.median(pair.log_ratio_C))
        if pair.seen.rows < FEWEST_ROWS:
            continue
        z_error, log_error = _errors(pair.seen)
        least_z = max(LEAST_Z, _moving_average_error(pair.norm, facts))
        if z > least_z + STANDARD_ERRORS * z_error or log_ratio > LEAST_LOG_RATIO + STANDARD_ERRORS * log_error:
            unlike.append((pair, z, log_ratio))
    if unlike:
        pair, z, log_ratio = unlike[0]
        ratio = float(np.median((pair.std_C / pair.data_std_C) ** 2))
        layers = tuple(pair.norm.layer for pair, _, _ in unlike)
        yield Found(
            severity="warning",
            layers=layers,
            message=f"{subject_of(layers, len(facts.norms))} {verb(layers, 'has', 'have')} statistics unlike those of "
            f"{pair.seen.rows} rows: in '{pair.norm.layer}' the mean is {z:.3g} standard deviations away and the "
            f"variance {ratio:.3g} times theirs (medians over the channels)",
        )


def _errors(seen: Seen) -> tuple[float, float]:
    """The standard errors of z and of ln(var), medians over the channels, enlarged for few rows."""
    varies_C = seen.var_C > 0
    std_C = np.sqrt(seen.var_C[varies_C])
    few_rows = 1 + 6 / (seen.rows - 1)
    of_mean = float(np.median(seen.mean_error_C[varies_C] / std_C))
    of_var = float(np.median(seen.var_error_C[varies_C] / std_C**2))
    if seen.values_per_row == 1 or of_mean**2 * seen.rows > 0.5:
        of_var = max(of_var, math.sqrt(2 / (seen.rows - 1)))  # what differs between rows, differs by this at least
    return few_rows * of_mean, few_rows * of_var


def _moving_average_error(norm: NormFacts, facts: Facts) -> float:
    """Three standard errors of the running mean, in standard deviations."""
    if norm.momentum == "cumulative" or norm.layer in facts.settled:
        return 0.0
    momentum = USUAL_MOMENTUM if norm.momentum is None else norm.momentum
    return STANDARD_ERRORS * math.sqrt(momentum / (max(2 - momentum, 1.0) * (facts.batch_size or USUAL_BATCH)))


# Preprocessing


def preprocessing_differs(facts: Facts) -> Iterator[Found]:
    first = next(_pairs(facts), None)
    if first is None or facts.observed is None or first.seen is not facts.observed.seen[0]:
        return
    said = _transform(first)
    if said:
        z = float(np.median(first.z_C))
        yield Found(
            severity="warning",
            layers=(first.norm.layer,),
            message=f"the first norm layer '{first.norm.layer}' looks as if its input were {said} (mean "
            f"{z:.3g} standard deviations away as it is, median over {count(len(first.z_C), 'channel')})",
        )


def _transform(pair: _Pair) -> str:
    """What was done to the data, if it is one of the known things; the fewest words that make them match."""
    z_error, log_error = _errors(pair.seen)
    near = SAME + STANDARD_ERRORS * max(z_error, log_error)

    def apart(mean_C: Array, std_C: Array) -> Array:
        """How far the layer's statistics are from these, by channel."""
        return np.maximum(np.abs(pair.mean_C - mean_C) / std_C, np.abs(np.log(pair.std_C / std_C)))

    as_it_is_C = apart(pair.data_mean_C, pair.data_std_C)
    for scale, said in SCALES.items():
        scaled_C = apart(pair.data_mean_C / scale, pair.data_std_C / scale)
        if np.median(as_it_is_C) > 2 * near and np.median(scaled_C) < near:
            return said
        # single columns in another unit: only where a channel is a column of the input
        odd_C = (as_it_is_C > 2 * near) & (scaled_C < near)
        if pair.seen.raw and odd_C.any() and (as_it_is_C < near).sum() + odd_C.sum() == odd_C.size:
            return f"{said} (in {count(int(odd_C.sum()), 'column')}, the first of them {int(np.argmax(odd_C))})"
    if not pair.seen.raw or np.median(as_it_is_C) <= 2 * near:
        return _permuted(pair, as_it_is_C, near) if pair.seen.raw else ""
    standard_C = apart(np.zeros_like(pair.mean_C), np.ones_like(pair.std_C))
    is_standard_C = np.maximum(np.abs(pair.data_mean_C), np.abs(np.log(pair.data_std_C)))
    if np.median(is_standard_C) < near:
        return "standardised already: its mean is 0 and its standard deviation 1, and the layer learned on raw values"
    if np.median(standard_C) < near:
        return "not standardised: the layer learned on values with mean 0 and standard deviation 1"
    return _permuted(pair, as_it_is_C, near)


def _permuted(pair: _Pair, as_it_is_C: Array, near: float) -> str:
    """Columns in another order: each moved column matches exactly one other."""
    moved = np.flatnonzero(as_it_is_C > 2 * near)
    if len(moved) < 2 or len(moved) > 512:
        return ""
    mean_M, std_M = pair.mean_C[moved], pair.std_C[moved]
    data_mean_M, data_std_M = pair.data_mean_C[moved], pair.data_std_C[moved]
    apart_MM = np.maximum(
        np.abs(mean_M[:, None] - data_mean_M[None]) / data_std_M[None],
        np.abs(np.log(std_M[:, None] / data_std_M[None])),
    )
    order = np.argmin(apart_MM, axis=1)
    if len(set(order.tolist())) < len(moved) or apart_MM[np.arange(len(moved)), order].max() > near:
        return ""
    pairs = ", ".join(f"{moved[i]} is now at {moved[j]}" for i, j in list(enumerate(order))[:4])
    return f"in another order: {count(len(moved), 'column')} moved ({pairs}{', ...' if len(moved) > 4 else ''})"


# Shapes


def one_value_per_channel(facts: Facts) -> Iterator[Found]:
    seen = {found.layer: found for found in facts.observed.seen} if facts.observed else {}
    norms = [norm for norm in facts.norms if not norm.handmade]
    single = [
        norm.layer
        for norm in norms
        if (
            seen[norm.layer].values_per_row == 1 if norm.layer in seen else "1d" in norm.kind and facts.observed is None
        )
    ]
    if not single:
        return
    rows, batch = facts.training_rows, facts.batch_size
    if rows and batch and (rows % batch == 1 or batch == 1):
        yield Found(
            severity="warning",
            layers=tuple(single),
            message=f"{rows} training rows in batches of {batch} leave a last batch of 1, from which "
            f"{subject_of(single, len(facts.norms))} may get a single value per channel: training stops with 'Expected "
            "more than 1 value per channel'",
        )
    elif facts.observed is not None:
        yield Found(
            severity="info",
            layers=tuple(single),
            message=f"{subject_of(single, len(facts.norms))} {verb(single, 'gets', 'get')} 1 value per channel from a "
            "row: training needs batches of 2 rows at least, the last one included",
        )


def padding_counted(facts: Facts) -> Iterator[Found]:
    padded = [seen for seen in facts.observed.seen if seen.padded_share] if facts.observed else []
    if padded:
        share = max(seen.padded_share for seen in padded)
        layers = tuple(seen.layer for seen in padded)
        yield Found(
            severity="warning" if share > MUCH_PADDING else "info",
            layers=layers,
            message=f"{share:.1%} of the positions that {subject_of(layers, len(facts.norms))} "
            f"{verb(layers, 'normalises', 'normalise')} are trailing zeros, as many as each row's length leaves: "
            "padding is counted into mean and variance",
        )
