"""Checks of structure: what stands beside BatchNorm, what takes its place, and what the code does around it."""

from __future__ import annotations

from collections.abc import Iterator

from export.audit.facts import Facts
from export.audit.finding import Found, count, names, subject, verb


def dropout_before(facts: Facts) -> Iterator[Found]:
    for severity, pairs in (
        ("warning", [pair for pair in facts.dropouts_before if not pair.between]),
        ("info", [pair for pair in facts.dropouts_before if pair.between]),
    ):
        if not pairs:
            continue
        layers = tuple(dict.fromkeys(pair.norm for pair in pairs))
        first = pairs[0]
        p = "" if first.p is None else f" (p={first.p:g})"
        way = f"with {' and '.join(first.between)} between" if first.between else "directly"
        by = ""
        if first.p and first.p < 1 and not first.between:
            by = f", by a factor of 1 + {first.p / (1 - first.p):.3g} E[x^2] / Var[x] in the variance"
        yield Found(
            severity="warning" if severity == "warning" else "info",
            layers=layers,
            message=f"Dropout '{first.dropout}'{p} stands before norm layer '{first.norm}', {way} "
            f"({count(len(layers), 'layer')} in all): its statistics were collected with dropout on and are used with "
            f"dropout off{by}",
        )


def branches_on_rows(facts: Facts) -> Iterator[Found]:
    tried = facts.observed is not None and not facts.observed.company.rows
    for branch in facts.branches:
        yield Found(
            severity="info" if tried else "warning",  # of rows that were tried, none was answered otherwise
            layers=(branch.layer,),
            message=f"the code of '{branch.layer or 'the network'}' ({branch.where}) decides on the number of rows: "
            f"`if {branch.code}`; an export keeps one of the two ways, and one row is not answered as a batch is",
        )


def instance_norm(facts: Facts) -> Iterator[Found]:
    instance = [norm for norm in facts.norms if norm.kind.removeprefix("Lazy").startswith("InstanceNorm")]
    if instance:
        yield Found(
            severity="warning",
            layers=names(instance),
            message=f"{subject(instance, facts)} {verb(instance, 'is', 'are')} {instance[0].kind} with "
            "track_running_stats=True: in eval mode it is a BatchNorm, in training it is not, and what recalibrates "
            "BatchNorm passes it over",
        )


def nothing_to_freeze(facts: Facts) -> Iterator[Found]:
    if facts.norms or facts.folded:
        return
    others = ", ".join(f"{number} {kind}" for kind, number in sorted(facts.other_norms.items()))
    beside = f"; its {others} normalise each row by itself" if others else ""
    yield Found(severity="info", message=f"0 layers have running statistics, so there is nothing to freeze{beside}")


def hand_made(facts: Facts) -> Iterator[Found]:
    made = [norm for norm in facts.norms if norm.handmade]
    zero = [norm for norm in made if norm.eps == 0]
    if made:
        yield Found(
            severity="info",
            layers=names(made),
            message=f"{subject(made, facts)} {verb(made, 'is', 'are')} {made[0].kind}, which has running statistics "
            "but is none of the framework's BatchNorm layers: an ONNX file has arithmetic in its place",
        )
    if zero:
        yield Found(
            severity="warning",
            layers=names(zero),
            message=f"{subject(zero, facts)} ({zero[0].kind}) {verb(zero, 'has', 'have')} eps 0, as FrozenBatchNorm2d "
            "once had: the answers differ from those of the BatchNorm it was made from, whose eps is not 0",
        )


def folded_away(facts: Facts) -> Iterator[Found]:
    if facts.folded:
        layers = tuple(layer for layer, _ in facts.folded)
        yield Found(
            severity="info",
            layers=layers,
            message=f"the exporter folded {count(len(layers), 'BatchNorm')} away, such as the one at '{layers[0]}' "
            f"({facts.folded[0][1]}): {count(len(facts.norms), 'norm layer')} can still be audited; export without "
            "optimisation to see them all",
        )


def quantised(facts: Facts) -> Iterator[Found]:
    live = [norm for norm in facts.norms if norm.quantised == "live"]
    kept = [norm for norm in facts.norms if norm.quantised == "kept"]
    if live:
        yield Found(
            severity="warning",
            layers=names(live),
            message=f"{subject(live, facts)} {verb(live, 'is', 'are')} trained for quantisation with statistics that "
            "still move: freeze them before the last epochs, and before the conversion",
        )
    if kept:
        yield Found(
            severity="info",
            layers=names(kept),
            message=f"{subject(kept, facts)} {verb(kept, 'stands', 'stand')} between quantised operators and "
            f"{verb(kept, 'stays', 'stay')} in float: what follows an activation cannot be folded into the weights",
        )


def features_on_the_wrong_axis(facts: Facts) -> Iterator[Found]:
    for found in facts.features_last:
        shape = f" [{', '.join(map(str, found.shape))}]"
        norm = facts.norm(found.layer)
        channels = norm.channels if norm else 0
        yield Found(
            severity="warning",
            layers=(found.layer,),
            message=f"layer '{found.layer}' takes axis 1 ({count(channels, 'channel')}) for the features, but its input"
            f"{shape} comes from {found.producer}, whose features are on the last axis: positions are normalised in "
            "their place",
        )
