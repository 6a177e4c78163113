"""Checks of modes: what is in training mode, what has no statistics, what draws at random."""

from __future__ import annotations

from collections.abc import Iterator

from export.audit.facts import Facts, canonical
from export.audit.finding import Found, count, names, subject, verb

BLENDING_OPSETS = range(9, 14)
"""In these the reference evaluator of the `onnx` package blends batch statistics in: its operator reads the attribute
`momentum`, whose default is 0.9, as a request for training."""


def training_mode(facts: Facts) -> Iterator[Found]:
    if facts.source == "onnx":
        training = [norm for norm in facts.norms if norm.training]
        if training:
            yield Found(
                severity="error",
                layers=names(training),
                message=f"{subject(training, facts)} {verb(training, 'is', 'are')} in training mode in the file: every "
                "answer would be normalised with the statistics of its batch",
            )
        return
    live = {dropout.layer for dropout in facts.live_dropouts}  # those are a rule of their own
    parts = [(path, kind) for path, kind in facts.training if path not in live]
    if not parts and not facts.root_training:
        return
    root = "the network itself is in training mode" if facts.root_training else ""
    shown = ", ".join(f"'{path}' ({kind})" for path, kind in parts[:3]) + (", ..." if len(parts) > 3 else "")
    parts_said = f"{count(len(parts), 'module')} whose mode matters: {shown}" if parts else ""
    said = f"{root}, with {parts_said}" if root and parts_said else root or f"in training mode: {parts_said}"
    yield Found(severity="error", layers=tuple(path for path, _ in parts), message=said)


def no_statistics(facts: Facts) -> Iterator[Found]:
    for norm in facts.norms:
        missing = [
            name for name, values in (("running_mean", norm.mean_C), ("running_var", norm.var_C)) if values is None
        ]
        if norm.lazy or not missing:
            continue
        why = "the graph computes it from the batch" if norm.computed else "it is not kept (track_running_stats=False)"
        yield Found(
            severity="error",
            layers=(norm.layer,),
            message=f"{subject([norm], facts)} has no {' and no '.join(missing)}: {why}, so that in eval mode too it "
            "normalises with the statistics of each batch, and one row of a table is answered with beta",
        )
    toggled = [norm for norm in facts.measured if norm.tracks is False]
    if toggled:
        yield Found(
            severity="warning",
            layers=names(toggled),
            message=f"{subject(toggled, facts)} {verb(toggled, 'has', 'have')} running statistics but "
            "track_running_stats=False: eval mode uses them, and training no longer updates them",
        )
    if facts.reference is not None and facts.source != "onnx":
        own = {canonical(norm.layer) for norm in facts.norms}
        lost = tuple(norm.layer for norm in facts.reference if canonical(norm.layer) not in own)
        if lost:
            yield Found(
                severity="warning",
                layers=lost,
                message=f"the reference has running statistics for {count(len(facts.reference), 'layer')}, and "
                f"{len(lost)} of them, such as '{lost[0]}', {verb(lost, 'is', 'are')} not in what is audited",
            )


def live_dropout(facts: Facts) -> Iterator[Found]:
    for dropout in facts.live_dropouts:
        p = "" if dropout.p is None else f" (p={dropout.p:g})"
        yield Found(
            severity="error",
            layers=(dropout.layer,),
            message=f"Dropout '{dropout.layer}'{p} is live although the network is in eval mode, so that its answers "
            f"are random: {dropout.why}",
        )


def not_materialised(facts: Facts) -> Iterator[Found]:
    lazy = [norm for norm in facts.norms if norm.lazy]
    if lazy:
        yield Found(
            severity="error",
            layers=names(lazy),
            message=f"{subject(lazy, facts)} {verb(lazy, 'has', 'have')} no shape or no numbers yet (lazy, or on the "
            "meta device): the first forward makes a lazy layer with mean 0 and variance 1, not what it learned",
        )


def reference_evaluator(facts: Facts) -> Iterator[Found]:
    if facts.norms and facts.opset in BLENDING_OPSETS:
        yield Found(
            severity="info",
            message=f"the file is written in opset {facts.opset} with {count(len(facts.norms), 'BatchNormalization')}: "
            "for opsets 9 to 13 the reference evaluator of the onnx package blends in the statistics of the batch, so "
            "it cannot judge this file; an engine can",
        )


def shared_between_processes(facts: Facts) -> Iterator[Found]:
    synced = [norm for norm in facts.norms if norm.synced]
    if synced:
        yield Found(
            severity="info",
            layers=names(synced),
            message=f"{subject(synced, facts)} {verb(synced, 'is', 'are')} SyncBatchNorm: in eval mode it is a plain "
            "BatchNorm",
        )
    if facts.prefix and facts.norms:
        yield Found(
            severity="info",
            layers=names(facts.norms),
            message=f"every key begins with '{facts.prefix}', so the network was trained in several processes, and "
            f"unless they were synchronised the statistics of {count(len(facts.norms), 'layer')} are those of one "
            "process's share of the rows",
        )
