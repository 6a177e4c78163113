"""The audit: every way in which BatchNorm goes wrong that a machine can see, in torch and in ONNX.

What is audited becomes facts (`from_module`, `from_state`, `from_onnx`), rules make findings of the facts (`rules`),
and `rendering` shows them. Facts, rules and ONNX files need no torch. Each rule has a page in `docs/rules`.

    F1   one value per channel in training             BN022
    F2   training mode exported or served              BN001, BN019, BN031
    F3   statistics new, not converged, stale          BN003, BN004, BN020
    F4   frozen layers that are not frozen             BN006, BN007, BN028
    F5   statistics polluted by other forwards         BN008
    F6   no running statistics                         BN002, BN019
    F7   averaged weights                              BN009, BN020
    F8   eps and momentum of another convention        BN010, BN011
    F9   code that branches on the batch size          BN018, BN019
    F10  several processes                             BN006, BN020, BN032
    F11  not finite, variance 0, dead channels         BN012, BN013, BN014, BN015
    F12  half precision                                BN016
    F13  padding, and features on the wrong axis       BN023, BN024
    F14  dropout beside BatchNorm                      BN005, BN017
    F15  what tools do to BatchNorm                    BN028, BN029, BN031
    F16  data unlike those of the training             BN020, BN021
    F17  gradient accumulation                         BN008
    F18  quantisation                                  BN030
    F19  lazy layers, InstanceNorm, other norms        BN025, BN026, BN027

What no file or network tells by itself, and why:

    F2   a reference answer that was computed in training mode: it takes the answer, `evalmode compare` has it
    F3   why statistics are off (noise, a high learning rate, sorted batches): the same numbers come from each
    F5   a few stray forwards, without the number of steps: they count like training
    F7   whether statistics measured anew are better: only validation data can say
    F8   eps and momentum of a bare state: they are in the code
    F10  what the other processes saw, without one of their checkpoints
    F15  a tool that computed wrongly: the golden samples show it, at export and at admission
    F16  resolution and domain, without data of the kind that is served
    F17  without the number of steps: every layer counts alike
    F18  the range of weights that were folded for int8
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from export.audit.facts import Facts, NormFacts
from export.audit.finding import Finding, Rule, Severity
from export.audit.rules import RULES, findings

if TYPE_CHECKING:
    import onnx
    from torch import Tensor, nn

__all__ = ["RULES", "Finding", "Rule", "Severity", "audit_module", "audit_onnx", "audit_state"]


def audit_module(
    module: nn.Module,
    inputs: Sequence[Tensor] | None = None,
    *,
    steps: int | None = None,
    training_rows: int | None = None,
    batch_size: int | None = None,
    reference: Mapping[str, Tensor] | None = None,
    settled: frozenset[str] = frozenset(),
) -> tuple[Finding, ...]:
    """Audit a network in the state in which it is given.

    Args:
        module: not changed, bit for bit.
        inputs: sample rows for each argument of `forward`; not changed. Without them, what only a run
            shows is left out.
        steps: optimizer steps of the training.
        training_rows, batch_size: of the training.
        reference: the state of the network it was made from, or another process's state of it.
        settled: layers whose statistics were measured exactly, by calibration or insertion.

    Returns:
        The findings, the gravest first.

    Raises:
        Refused: the network cannot be copied, or fails on the inputs.
    """
    from export.audit.from_module import read_module  # torch: ONNX files are audited without it

    facts = read_module(module, inputs)
    return _judged(facts, steps, training_rows, batch_size, reference, settled)


def audit_state(
    state: Mapping[str, Tensor],
    *,
    steps: int | None = None,
    training_rows: int | None = None,
    batch_size: int | None = None,
    reference: Mapping[str, Tensor] | None = None,
    settled: frozenset[str] = frozenset(),
) -> tuple[Finding, ...]:
    """Audit a bare state: tensors by key. See `audit_module` for the arguments."""
    from export.audit.from_state import read_state

    return _judged(read_state(state), steps, training_rows, batch_size, reference, settled)


def audit_onnx(
    model: onnx.ModelProto,
    inputs: Sequence[Tensor] | None = None,
    *,
    reference: Mapping[str, Tensor] | None = None,
    settled: frozenset[str] = frozenset(),
) -> tuple[Finding, ...]:
    """Audit an ONNX model with its weights inside; torch is needed for `inputs` and `reference` only.

    Args:
        inputs: sample rows for each input of the graph, in its order. See `audit_module` for the others.
    """
    from export.audit.from_onnx import read_onnx

    facts = read_onnx(model)
    if inputs:
        from export.audit.probe_onnx import probe_onnx

        facts = replace(facts, observed=probe_onnx(model, inputs))
    return _judged(facts, None, None, None, reference, settled)


def _judged(
    facts: Facts,
    steps: int | None,
    training_rows: int | None,
    batch_size: int | None,
    reference: Mapping[str, Tensor] | None,
    settled: frozenset[str],
) -> tuple[Finding, ...]:
    return findings(
        replace(
            facts,
            steps=steps,
            training_rows=training_rows,
            batch_size=batch_size,
            reference=None if reference is None else _layers(reference),
            settled=settled,
        )
    )


def _layers(state: Mapping[str, Tensor]) -> tuple[NormFacts, ...]:
    from export.audit.from_state import read_state

    return read_state(state).norms
