"""Every architecture is exported, equals PyTorch, and is folded wherever a layer can take its BatchNorm up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from torch import Tensor, nn

from export.exporting import export_model
from export.parity import measure, refusal
from service.admission import admit
from service.bundle import read
from service.graph.fold import Fold, fold
from service.runtime import place
from tests.export import healthy, zoo

Made = Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]

WEIGHTED = {"Conv", "ConvTranspose", "Gemm", "MatMul"}

Converts = Callable[[], onnx.ModelProto]


def trained_by_name(name: str) -> Converts:
    return lambda: healthy.converted(name).model


def settled_by_name(name: str) -> Converts:
    return lambda: zoo.converted(name).model


NETWORKS: dict[str, tuple[Made, Converts]] = {
    **{f"trained {name}": (make, trained_by_name(name)) for name, make in healthy.HEALTHY.items()},
    **{name: (make, settled_by_name(name)) for name, make in zoo.ZOO.items()},
}
SLOW = {"dense, wide", "dense, deep", "dense, large values", "dense, tiny values", "attention", "other norms"}
CASES = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in NETWORKS]


def must_fold(model: onnx.ModelProto) -> set[str]:
    """BatchNorm layers behind a layer with weights that nobody else listens to, or in front of a dense one."""
    made = {output: node for node in model.graph.node for output in node.output}
    takers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            takers.setdefault(name, []).append(node)
    found = set()
    for node in model.graph.node:
        if node.op_type == "BatchNormalization":
            before, after = made.get(node.input[0]), takers.get(node.output[0], [])
            behind = before is not None and before.op_type in WEIGHTED and len(takers[node.input[0]]) == 1
            if behind or [taker.op_type for taker in after] in (["Gemm"], ["MatMul"]):
                found.add(node.name.removesuffix("/BatchNormalization"))
    return found


@pytest.mark.parametrize("name", CASES)
def test_the_folded_graph_is_the_network_within_its_tolerance(name: str) -> None:
    """At batch 1, 2, 3 and all rows, at each optimisation level, like the graph that it was made of."""
    make, converted = NETWORKS[name]
    network, inputs = make()
    folded = fold(converted())
    outputs = [value.name for value in folded.model.graph.output]
    assert refusal(measure(network, folded.model, inputs, outputs)) is None
    kept = {found.layer: found for found in folded.folds if not found.into}
    left = must_fold(converted()) & set(kept)
    assert all(loses_accuracy(kept[layer]) for layer in left), kept


def loses_accuracy(found: Fold) -> bool:
    """The one reason to leave a foldable layer alone: raw columns with |mean| far above their standard deviation."""
    return "rounding would grow" in str(found.kept_because)


def test_most_of_the_zoo_must_fold() -> None:
    """The rule above is not empty."""
    assert sum(len(must_fold(converted())) for _, converted in list(NETWORKS.values())[:9]) >= 15


@pytest.mark.slow
@pytest.mark.parametrize("name", healthy.HEALTHY)
def test_every_trained_network_makes_the_whole_way(name: str, tmp_path: Path) -> None:
    """Audit, parity, admission, report; and the service admits what was written."""
    network, inputs = healthy.HEALTHY[name]()
    exported = export_model(network, list(inputs), name="net", models=tmp_path)
    assert not [finding for finding in exported.findings if finding.severity != "info"]
    admitted = admit(read(exported.folder, name="net", version="1"), place("cpu"))
    assert admitted.independence == exported.passport.independence
    page = exported.report.read_text(encoding="utf-8")
    assert "net/1 is served as it was evaluated" in page
    assert all(layer.layer in page for layer in exported.passport.batchnorm)
