"""Every rule, in the order of its id. An id is never given twice, and what it means never changes."""

from __future__ import annotations

from export.audit import activations, modes, statistics, structure
from export.audit.facts import Facts
from export.audit.finding import SEVERITIES, Check, Finding, Rule, Severity


def _rule(number: int, severity: Severity, check: Check, title: str) -> Rule:
    return Rule(id=f"BN{number:03}", title=title, severity=severity, check=check)


RULES: tuple[Rule, ...] = (
    _rule(1, "error", modes.training_mode, "In training mode"),
    _rule(2, "error", modes.no_statistics, "No running statistics"),
    _rule(3, "error", statistics.never_updated, "Running statistics were never updated"),
    _rule(4, "warning", statistics.not_converged, "Running statistics have not converged"),
    _rule(5, "error", modes.live_dropout, "Dropout is live in eval mode"),
    _rule(6, "warning", statistics.same_weights_other_statistics, "Same weights, other statistics"),
    _rule(7, "warning", statistics.frozen_in_name, "Frozen in name only"),
    _rule(8, "warning", statistics.counts_disagree, "Counts of training batches disagree"),
    _rule(9, "warning", statistics.averaged_weights, "Averaged weights with statistics of others"),
    _rule(10, "warning", statistics.momentum_convention, "Momentum of another convention"),
    _rule(11, "error", statistics.eps_convention, "Eps is 0, unusual or mixed"),
    _rule(12, "error", statistics.not_finite, "Not finite, or a negative variance"),
    _rule(13, "info", statistics.eps_dominates, "Eps dominates the variance"),
    _rule(14, "warning", statistics.extreme_gain, "Extreme gain"),
    _rule(15, "info", statistics.pruned_channels, "Pruned channels"),
    _rule(16, "error", statistics.half_precision, "Statistics in half precision"),
    _rule(17, "warning", structure.dropout_before, "Dropout before BatchNorm"),
    _rule(18, "warning", structure.branches_on_rows, "Code branches on the number of rows"),
    _rule(19, "error", activations.row_depends_on_company, "A row depends on its company"),
    _rule(20, "warning", activations.unlike_the_data, "Statistics unlike the data"),
    _rule(21, "warning", activations.preprocessing_differs, "Preprocessing differs"),
    _rule(22, "warning", activations.one_value_per_channel, "One value per channel in training"),
    _rule(23, "warning", structure.features_on_the_wrong_axis, "Features on the wrong axis"),
    _rule(24, "warning", activations.padding_counted, "Padding is counted"),
    _rule(25, "error", modes.not_materialised, "A lazy layer without a shape"),
    _rule(26, "warning", structure.instance_norm, "InstanceNorm with running statistics"),
    _rule(27, "info", structure.nothing_to_freeze, "Nothing to freeze"),
    _rule(28, "warning", structure.hand_made, "A hand-made BatchNorm"),
    _rule(29, "info", structure.folded_away, "BatchNorm was folded away"),
    _rule(30, "warning", structure.quantised, "BatchNorm beside quantisation"),
    _rule(31, "info", modes.reference_evaluator, "Opset that the reference evaluator gets wrong"),
    _rule(32, "info", modes.shared_between_processes, "Trained in several processes"),
)


def findings(facts: Facts) -> tuple[Finding, ...]:
    """What every rule finds, the gravest first."""
    found = [finding for rule in RULES for finding in rule.findings(facts)]
    return tuple(sorted(found, key=lambda finding: (SEVERITIES.index(finding.severity), finding.rule)))
