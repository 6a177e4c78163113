"""Checks of numbers: running statistics, gamma and beta, eps and momentum, counters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from export.audit.facts import USUAL_EPS, USUAL_MOMENTUM, Array, Facts, NormFacts, canonical
from export.audit.finding import Found, count, names, subject, verb

MOST_INITIAL_WEIGHT = 0.01
"""How much of the initial 0 and 1 running statistics may still hold: at 1 % a mean is off by 1 % of itself."""
KERAS_MOMENTUM = 0.9
"""From here on a momentum is a number from a framework where it weighs the old value: as PyTorch's it would keep the
last batch only."""
USUAL_EPS_VALUES = (1e-5, 1e-3)
"""PyTorch's and ONNX's default; Keras's."""
EPS_MATTERS_BELOW_VAR = 1e-2
"""Below this variance 1e-3 in place of 1e-5 moves the output's scale by 4.6 % or more:
sqrt((1e-2 + 1e-5) / (1e-2 + 1e-3)) = 0.954."""
EXTREME_GAIN = 1e3
"""Three times what a variance of 0 gives with gamma 1 and eps 1e-5 (316): rounding of 1e-7 becomes 1e-4."""
PRUNED_GAMMA = 1e-6
HALF_MAX = 65504.0
"""The largest float16."""
HALF_MIN = 6e-8
"""About the smallest float16 above 0 (2**-24)."""


def never_updated(facts: Facts) -> Iterator[Found]:
    reached = None if facts.observed is None else {seen.layer for seen in facts.observed.seen}
    unused = [norm for norm in facts.norms if norm.initial and reached is not None and norm.layer not in reached]
    if unused:
        yield Found(
            severity="info",
            layers=names(unused),
            message=f"{subject(unused, facts)} {verb(unused, 'has', 'have')} mean 0 and variance 1 in every channel, "
            f"and {verb(unused, 'is', 'are')} never called on these rows: no answer depends on them",
        )
    initial = [norm for norm in facts.norms if norm.initial and norm not in unused]
    if not initial:
        return
    counts = {norm.num_batches_tracked for norm in initial}
    counted = ""
    if counts == {0}:
        counted = " and num_batches_tracked 0"
    elif len(counts) == 1 and None not in counts:
        counted = f", although num_batches_tracked is {counts.pop()}"
    yield Found(
        severity="error",
        layers=names(initial),
        message=f"{subject(initial, facts)} {verb(initial, 'has', 'have')} mean 0 and variance 1 in every channel"
        f"{counted}: the running statistics were never updated, or never loaded",
    )


def not_converged(facts: Facts) -> Iterator[Found]:
    early = [
        (norm, weight) for norm in facts.measured if (weight := _initial_weight(norm, facts)) > MOST_INITIAL_WEIGHT
    ]
    if not early:
        return
    norm, weight = max(early, key=lambda pair: pair[1])
    assumed = "" if isinstance(norm.momentum, float) else ", if its momentum was 0.1"
    norms = [norm for norm, _ in early]
    yield Found(
        severity="warning",
        layers=names(norms),
        message=f"{subject(norms, facts)} still {verb(norms, 'holds', 'hold')} up to r = {weight:.2%} of the initial "
        f"mean 0 and variance 1 ('{norm.layer}' after {count(norm.num_batches_tracked or 0, 'batch')}{assumed}); "
        "unless they were measured at once (update_bn); exact statistics of the training data cure it, and mean / "
        "(1 - r), (var - r) / (1 - r) where momentum never changed",
    )


def _initial_weight(norm: NormFacts, facts: Facts) -> float:
    """The share of mean 0 and variance 1 in the running statistics; 0 where they cannot have come from there."""
    n = norm.num_batches_tracked
    if not n or norm.initial or norm.momentum == "cumulative" or norm.layer in facts.settled or norm.handmade:
        return 0.0
    if norm.momentum is None and n == 1 and any((other.num_batches_tracked or 0) > 1 for other in facts.norms):
        return 0.0  # measured at once: the cumulative average of one batch
    momentum = USUAL_MOMENTUM if norm.momentum is None else norm.momentum
    weight = (1 - momentum) ** n
    below_what_is_left = norm.var_C is not None and bool((norm.var_C < weight * (1 - 1e-5)).any())
    return 0.0 if below_what_is_left else float(weight)  # a moving average that began at 1 cannot be below r


def same_weights_other_statistics(facts: Facts) -> Iterator[Found]:
    reference = {canonical(norm.layer): norm for norm in facts.reference or ()}
    moved: list[NormFacts] = []
    largest = 0.0
    for norm in facts.measured:
        other = reference.get(canonical(norm.layer))
        if other is None or not _same_affine(norm, other) or other.mean_C is None or other.var_C is None:
            continue
        assert norm.mean_C is not None
        assert norm.var_C is not None
        if norm.mean_C.shape != other.mean_C.shape:
            continue
        if not (np.array_equal(norm.mean_C, other.mean_C) and np.array_equal(norm.var_C, other.var_C)):
            moved.append(norm)
            std_C = np.sqrt(np.maximum(other.var_C, 0) + USUAL_EPS)
            largest = max(largest, float(np.max(np.abs(norm.mean_C - other.mean_C) / std_C)))
    if moved:
        yield Found(
            severity="warning",
            layers=names(moved),
            message=f"{subject(moved, facts)} {verb(moved, 'has', 'have')} gamma and beta of the reference bit for "
            f"bit, but other running statistics (means up to {largest:.3g} standard deviations away): frozen by name, "
            "updated by forwards in training mode",
        )


def _same_affine(one: NormFacts, other: NormFacts) -> bool:
    vectors = ((one.gamma_C, other.gamma_C), (one.beta_C, other.beta_C))
    return all(mine is not None and theirs is not None and np.array_equal(mine, theirs) for mine, theirs in vectors)


def frozen_in_name(facts: Facts) -> Iterator[Found]:
    frozen = [norm for norm in facts.norms if norm.affine_frozen and norm.num_batches_tracked and not norm.handmade]
    if not frozen or not facts.trainable:
        return
    learning = {
        norm.num_batches_tracked for norm in facts.norms if not norm.affine_frozen and norm.gamma_C is not None
    } | ({facts.steps} if facts.steps else set())
    moving = [norm for norm in frozen if norm.num_batches_tracked in learning and norm.layer not in facts.settled]
    if moving:
        yield Found(
            severity="warning",
            layers=names(moving),
            message=f"{subject(moving, facts)} {verb(moving, 'has', 'have')} gamma and beta with requires_grad=False, "
            f"but counted {count(moving[0].num_batches_tracked or 0, 'training batch')} like the layers that learn: "
            "its running statistics moved",
        )


def counts_disagree(facts: Facts) -> Iterator[Found]:
    counted = [norm for norm in facts.norms if _counts(norm, facts)]
    if counted:
        yield from _unequal(counted, facts)
        if facts.steps:
            yield from _unlike_steps(counted, facts.steps, facts)


def _counts(norm: NormFacts, facts: Facts) -> bool:
    """Its counter tells of training: it is there, and the statistics are a moving average."""
    n = norm.num_batches_tracked
    measured_at_once = norm.momentum is None and n == 1
    return bool(n) and norm.momentum != "cumulative" and norm.layer not in facts.settled and not measured_at_once


def _unequal(counted: Sequence[NormFacts], facts: Facts) -> Iterator[Found]:
    usual, _ = Counter(norm.num_batches_tracked or 0 for norm in counted).most_common(1)[0]
    others = [norm for norm in counted if norm.num_batches_tracked != usual]
    if others:
        n = others[0].num_batches_tracked or 0
        # A head that was put on later has another count, and so has a layer that is called twice in a forward. Twice as
        # many without being called twice is what activation checkpointing does.
        calls = Counter(seen.layer for seen in facts.observed.seen) if facts.observed else Counter[str]()
        twice = (2 * usual, usual / 2)
        doubled = any(
            norm.num_batches_tracked in twice and not norm.affine_frozen and calls[norm.layer] < 2 for norm in others
        )
        yield Found(
            severity="warning" if doubled else "info",
            layers=names(others),
            message=f"{subject(others, facts)} counted another number of training batches than the rest: "
            f"'{others[0].layer}' {n}, the others {usual}, a ratio of {n / usual:.3g}",
        )


def _unlike_steps(counted: Sequence[NormFacts], steps: int, facts: Facts) -> Iterator[Found]:
    unlike = [norm for norm in counted if norm.num_batches_tracked != steps and not norm.affine_frozen]
    if not unlike:
        return
    n = unlike[0].num_batches_tracked or 0
    if n == 2 * steps:
        why = (
            "twice for each step: activation checkpointing runs a layer twice, and so does gradient accumulation over 2"
        )
    elif n % steps == 0:
        why = f"{n // steps} times for each step: gradient accumulation, whose batches are smaller than the optimizer's"
    elif n > steps:
        why = f"{n - steps} more than steps: forwards in training mode that were no training"
    else:
        why = f"{steps - n} fewer than steps: for a part of the training it was frozen or not called"
    yield Found(
        severity="warning",
        layers=names(unlike),
        message=f"{subject(unlike, facts)} {verb(unlike, 'was', 'were')} updated {n} times in {steps} steps: {why}",
    )


def momentum_convention(facts: Facts) -> Iterator[Found]:
    numbers = [(norm, norm.momentum) for norm in facts.norms if isinstance(norm.momentum, float) and not norm.lazy]
    keras = [(norm, momentum) for norm, momentum in numbers if momentum >= KERAS_MOMENTUM - 1e-6]
    never = [(norm, momentum) for norm, momentum in numbers if momentum == 0]
    for wrong, why in (
        (keras, "the running statistics are those of the last batch or two; in PyTorch it weighs the new batch"),
        (never, "the running statistics are never updated"),
    ):
        if wrong:
            norms = [norm for norm, _ in wrong]
            momentum = wrong[0][1]
            meant = f" (Keras's {momentum:g} is {1 - momentum:.3g} there)" if 0 < momentum < 1 else ""
            yield Found(
                severity="info" if facts.source == "onnx" else "warning",
                layers=names(norms),
                message=f"{subject(norms, facts)} {verb(norms, 'has', 'have')} momentum {momentum:g}: {why}{meant}",
            )


def eps_convention(facts: Facts) -> Iterator[Found]:
    known = [(norm, norm.eps) for norm in facts.norms if norm.eps is not None and not norm.handmade]
    zero = [norm for norm, eps in known if eps <= 0]
    if zero:
        empty = sum(_channels(norm.var_C == 0) for norm in zero if norm.var_C is not None)
        divided = f", and {count(empty, 'channel')} with variance 0 would be divided by 0" if empty else ""
        yield Found(
            severity="error" if empty else "warning",
            layers=names(zero),
            message=f"{subject(zero, facts)} {verb(zero, 'has', 'have')} eps {zero[0].eps:g}{divided}: a channel "
            "without variance has no finite answer, and some frameworks refuse it",
        )
    values = sorted({float(f"{eps:.6g}") for _, eps in known if eps > 0})
    unusual = [
        eps for eps in values if not any(np.isclose(eps, usual, rtol=1e-5, atol=0) for usual in USUAL_EPS_VALUES)
    ]
    if len(values) > 1 or unusual:
        near = [norm for norm, eps in known if eps > 0]
        small = sum(_channels(norm.var_C < EPS_MATTERS_BELOW_VAR) for norm in near if norm.var_C is not None)
        said = ", ".join(f"{eps:g}" for eps in values[:4]) + (", ..." if len(values) > 4 else "")
        total = sum(norm.channels for norm in near)
        layer = next(norm for norm, eps in known if eps > 0 and (not unusual or np.isclose(eps, unusual[0], rtol=1e-5)))
        yield Found(
            severity="info",
            layers=(layer.layer,),
            message=f"eps is {said} (such as in '{layer.layer}'; PyTorch's default is 1e-05, Keras's 0.001); confusing "
            f"those would move {small} of {total} channels by 4.6 % or more",
        )


def _channels(which_C: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]) -> int:
    return int(np.count_nonzero(which_C))


def not_finite(facts: Facts) -> Iterator[Found]:
    for norm in facts.norms:
        vectors = {
            "running_mean": norm.mean_C,
            "running_var": norm.var_C,
            "gamma": norm.gamma_C,
            "beta": norm.beta_C,
        }
        wrong = [f"{name} {said}" for name, values_C in vectors.items() if (said := _not_finite(name, values_C))]
        if wrong:
            yield Found(
                severity="error",
                layers=(norm.layer,),
                message=f"layer '{norm.layer}' with {count(norm.channels, 'channel')}: {'; '.join(wrong)}; NaN spreads "
                "to every answer, an infinite variance silently answers beta",
            )


def _not_finite(name: str, values_C: Array | None) -> str:
    if values_C is None:
        return ""
    found = [("NaN", _channels(np.isnan(values_C))), ("infinite", _channels(np.isinf(values_C)))]
    if name == "running_var":
        found.append(("negative", _channels(values_C < 0)))
    return ", ".join(f"is {what} in {count(number, 'channel')}" for what, number in found if number)


def eps_dominates(facts: Facts) -> Iterator[Found]:
    small: list[NormFacts] = []
    channels = dead = 0
    for norm in facts.measured:
        assert norm.mean_C is not None
        assert norm.var_C is not None
        eps = USUAL_EPS if norm.eps is None else norm.eps
        below_C = (norm.var_C >= 0) & (norm.var_C < eps) & ~_pruned(norm)
        if below_C.any():
            small.append(norm)
            channels += _channels(below_C)
            dead += _channels(below_C & (np.abs(norm.mean_C) < np.sqrt(eps)))
    if small:
        yield Found(
            severity="info",
            layers=names(small),
            message=f"{subject(small, facts)} {verb(small, 'has', 'have')} {count(channels, 'channel')} with a "
            f"variance below eps, {dead} of them dead (mean near 0 as well): eps and not the data "
            "decides how large they are",
        )


def _pruned(norm: NormFacts) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    if norm.gamma_C is None:
        return np.zeros(norm.channels, dtype=bool)
    return np.abs(norm.gamma_C) < PRUNED_GAMMA


def extreme_gain(facts: Facts) -> Iterator[Found]:
    for norm in facts.measured:
        assert norm.var_C is not None
        eps = USUAL_EPS if norm.eps is None else norm.eps
        gamma_C = np.ones(norm.channels) if norm.gamma_C is None else norm.gamma_C
        with np.errstate(divide="ignore", invalid="ignore"):
            gain_C = np.nan_to_num(np.abs(gamma_C) / np.sqrt(norm.var_C + eps), nan=0.0)
        if (gain_C > EXTREME_GAIN).any():
            worst = int(np.argmax(gain_C))
            yield Found(
                severity="warning",
                layers=(norm.layer,),
                message=f"layer '{norm.layer}' multiplies {count(_channels(gain_C > EXTREME_GAIN), 'channel')} by more "
                f"than {EXTREME_GAIN:g} (channel {worst} by {gain_C[worst]:.3g}, running_var "
                f"{norm.var_C[worst]:.3g}): the least deviation from the training data explodes",
            )


def pruned_channels(facts: Facts) -> Iterator[Found]:
    pruned = [norm for norm in facts.norms if norm.gamma_C is not None and _pruned(norm).any()]
    if pruned:
        channels = sum(_channels(_pruned(norm)) for norm in pruned)
        total = sum(norm.channels for norm in pruned)
        yield Found(
            severity="info",
            layers=names(pruned),
            message=f"{subject(pruned, facts)} {verb(pruned, 'has', 'have')} {channels} of {total} channels with "
            f"|gamma| below {PRUNED_GAMMA:g}: whatever goes in, beta comes out",
        )


def half_precision(facts: Facts) -> Iterator[Found]:
    stored = [norm for norm in facts.measured if norm.dtype in ("float16", "bfloat16")]
    if stored:
        yield Found(
            severity="warning",
            layers=names(stored),
            message=f"{subject(stored, facts)} {verb(stored, 'stores', 'store')} running statistics in "
            f"{stored[0].dtype}: 3 decimal digits or fewer, and a moving average that stops moving",
        )
    for norm in facts.measured:
        if "float16" not in (norm.dtype, norm.weights_dtype):
            continue
        assert norm.var_C is not None
        high, low = _channels(norm.var_C > HALF_MAX), _channels((norm.var_C >= 0) & (norm.var_C < HALF_MIN))
        if high or low:
            yield Found(
                severity="error" if high else "warning",
                layers=(norm.layer,),
                message=f"layer '{norm.layer}' computes in float16, where a running_var above {HALF_MAX:g} is infinite "
                f"({count(high, 'channel')}) and one below {HALF_MIN:g} is 0 ({count(low, 'channel')})",
            )


def averaged_weights(facts: Facts) -> Iterator[Found]:
    if facts.averaged and any(norm.layer not in facts.settled for norm in facts.norms):
        yield Found(
            severity="warning",
            layers=names(facts.norms),
            message=f"the weights are an average ({facts.averaged}), and the running statistics of "
            f"{count(len(facts.norms), 'layer')} belong to the networks it was made of, not to the average",
        )
