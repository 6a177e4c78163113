"""Findings as a table for people, as JSON for programs, and as SARIF 2.1.0 for code scanning.

Source: OASIS, "Static Analysis Results Interchange Format (SARIF) Version 2.1.0".
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from json import dumps
from typing import IO, Any

from export.audit.finding import SEVERITIES, Finding, Severity, help_page
from export.audit.rules import RULES

_LEVELS: dict[Severity, str] = {"error": "error", "warning": "warning", "info": "note"}
_STYLES: dict[Severity, str] = {"error": "bold red", "warning": "yellow", "info": "dim"}
_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"


def json(findings: Sequence[Finding]) -> str:
    """`{"findings": [{"rule", "severity", "layer", "layers", "message", "help"}], "counts": {"error": 0, ...}}`."""
    return _written(
        {
            "findings": [
                {
                    "rule": finding.rule,
                    "severity": finding.severity,
                    "layer": finding.layer,
                    "layers": list(finding.layers),
                    "message": finding.message,
                    "help": finding.help,
                }
                for finding in findings
            ],
            "counts": counts(findings),
        }
    )


def counts(findings: Sequence[Finding]) -> dict[Severity, int]:
    """How many findings there are of each severity."""
    return {severity: sum(finding.severity == severity for finding in findings) for severity in SEVERITIES}


def sarif(findings: Sequence[Finding], *, target: str) -> str:
    """One run of SARIF.

    Args:
        target: what was audited, as whoever reads the results finds it: a path, or `module:callable`.
    """
    indices = {rule.id: index for index, rule in enumerate(RULES)}
    results: list[dict[str, Any]] = [
        {
            "ruleId": finding.rule,
            "ruleIndex": indices[finding.rule],
            "level": _LEVELS[finding.severity],
            "message": {"text": finding.message},
            "locations": [
                {
                    "physicalLocation": {"artifactLocation": {"uri": target}},
                    "logicalLocations": [
                        {"fullyQualifiedName": layer, "kind": "module"} for layer in finding.layers or (finding.layer,)
                    ],
                }
            ],
        }
        for finding in findings
    ]
    driver = {"name": "evalmode", "version": _version(), "rules": [_descriptor(rule.id) for rule in RULES]}
    return _written(
        {"$schema": _SCHEMA, "version": "2.1.0", "runs": [{"tool": {"driver": driver}, "results": results}]}
    )


def _descriptor(rule_id: str) -> dict[str, Any]:
    rule = next(rule for rule in RULES if rule.id == rule_id)
    return {
        "id": rule.id,
        "shortDescription": {"text": rule.title},
        "helpUri": help_page(rule.id),
        "defaultConfiguration": {"level": _LEVELS[rule.severity]},
    }


def table(findings: Sequence[Finding], *, file: IO[str]) -> None:
    """Print the findings for people, the gravest first, and a line that sums them up."""
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ModuleNotFoundError:  # ONNX files are audited where only the service is installed
        for finding in findings:
            print(f"{finding.severity}: {finding.rule}: {finding.message}", file=file)
        print(summary(findings), file=file)
        return

    console = Console(file=file, highlight=False)
    if findings:
        grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for heading in ("rule", "severity", "layer", "finding"):
            grid.add_column(heading, overflow="fold", header_style="bold")
        for finding in sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity)):
            style = _STYLES[finding.severity]
            quiet = style if finding.severity == "info" else ""
            # text, not markup: layers and code have brackets in them
            grid.add_row(
                Text(finding.rule, style=style),
                Text(finding.severity, style=style),
                Text(finding.layer, style=quiet),
                Text(finding.message, style=quiet),
            )
        console.print(grid)
    console.print(Text(summary(findings)))


def summary(findings: Sequence[Finding]) -> str:
    """`2 errors, 1 warning, 0 infos; docs/rules has a page for each rule`, or that there are none."""
    if not findings:
        return "no findings"
    said = ", ".join(
        f"{number} {severity}{'' if number == 1 else 's'}" for severity, number in counts(findings).items()
    )
    return f"{said}; docs/rules has a page for each rule"


def _version() -> str:
    try:
        return version("evalmode")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "0"


def _written(document: dict[str, Any]) -> str:
    return dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
