"""A small table model and its bundle, written by hand: two continuous and two categorical features, two classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from service import bundle
from service.bundle import MODEL_FILE, GoldenSummary, Passport, Tolerance
from service.signature import (
    CategoricalFeature,
    ClassTarget,
    ContinuousFeature,
    NumberTarget,
    Signature,
    Target,
    TensorSpec,
)

AGE_MEAN, AGE_VAR = 35.0, 130.0
AMOUNT_MEAN, AMOUNT_VAR = 3200.0, 8.0e6
EPS = 0.03
PURPOSES = ("car", "education", "radio/television")
HOUSINGS = ("own", "rent")
SAMPLE: dict[str, Any] = {"age": 41, "amount": 2500.5, "purpose": "education", "housing": "rent"}

_GENERATOR = np.random.default_rng(11)
PURPOSE_TABLE = _GENERATOR.normal(0, 1, (len(PURPOSES) + 1, 2)).astype(np.float32)
HOUSING_TABLE = _GENERATOR.normal(0, 1, (len(HOUSINGS) + 1, 1)).astype(np.float32)
WEIGHT = _GENERATOR.normal(0, 1, (5, 2)).astype(np.float32)
BIAS = np.array([0.3, -0.2], dtype=np.float32)


def logits(continuous: NDArray[Any], categorical: NDArray[Any]) -> NDArray[np.float64]:
    """The network in float64, written apart from the graph."""
    mean, var = np.array([AGE_MEAN, AMOUNT_MEAN]), np.array([AGE_VAR, AMOUNT_VAR])
    standardised = (continuous - mean) / np.sqrt(var + EPS)
    purpose, housing = PURPOSE_TABLE[categorical[:, 0]], HOUSING_TABLE[categorical[:, 1]]
    features = np.concatenate([standardised, purpose, housing], axis=1)
    return np.asarray(features @ WEIGHT.astype(np.float64) + BIAS)


def probabilities(continuous: NDArray[Any], categorical: NDArray[Any]) -> NDArray[np.float64]:
    raised = np.exp(logits(continuous, categorical))
    return np.asarray(raised / raised.sum(axis=1, keepdims=True))


def table_model(*, regression: bool = False) -> onnx.ModelProto:
    constants = {
        "ones": np.ones(2, dtype=np.float32),
        "zeros": np.zeros(2, dtype=np.float32),
        "mean": np.array([AGE_MEAN, AMOUNT_MEAN], dtype=np.float32),
        "var": np.array([AGE_VAR, AMOUNT_VAR], dtype=np.float32),
        "purposes": PURPOSE_TABLE,
        "housings": HOUSING_TABLE,
        "first": np.array(0),
        "second": np.array(1),
        "weight": WEIGHT[:, :1] if regression else WEIGHT,
        "bias": BIAS[:1] if regression else BIAS,
    }
    nodes = [
        helper.make_node("BatchNormalization", ["continuous", "ones", "zeros", "mean", "var"], ["scaled"], epsilon=EPS),
        helper.make_node("Gather", ["categorical", "first"], ["purpose_index"], axis=1),
        helper.make_node("Gather", ["categorical", "second"], ["housing_index"], axis=1),
        helper.make_node("Gather", ["purposes", "purpose_index"], ["purpose"]),
        helper.make_node("Gather", ["housings", "housing_index"], ["housing"]),
        helper.make_node("Concat", ["scaled", "purpose", "housing"], ["features"], axis=1),
        helper.make_node("Gemm", ["features", "weight", "bias"], ["value" if regression else "logits"]),
    ]
    output, width = "value", 1
    if not regression:
        nodes.append(helper.make_node("Softmax", ["logits"], ["probabilities"]))
        output, width = "probabilities", 2
    graph = helper.make_graph(
        nodes,
        "table",
        [
            helper.make_tensor_value_info("continuous", TensorProto.FLOAT, ["batch", 2]),
            helper.make_tensor_value_info("categorical", TensorProto.INT64, ["batch", 2]),
        ],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["batch", width])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


def signature(*, regression: bool = False) -> Signature:
    target: Target = (
        NumberTarget(name="rate", unit="%") if regression else ClassTarget(name="credit", classes=("bad", "good"))
    )
    return Signature(
        inputs=(
            TensorSpec(name="continuous", datatype="FP32", shape=(-1, 2)),
            TensorSpec(name="categorical", datatype="INT64", shape=(-1, 2)),
        ),
        outputs=(
            TensorSpec(name="value", datatype="FP32", shape=(-1, 1))
            if regression
            else TensorSpec(name="probabilities", datatype="FP32", shape=(-1, 2)),
        ),
        features=(
            ContinuousFeature(name="age", unit="years", minimum=18, maximum=75, example=41),
            CategoricalFeature(name="purpose", categories=PURPOSES, example="education"),
            ContinuousFeature(name="amount", minimum=250, maximum=18424, missing=AMOUNT_MEAN, example=2500.5),
            CategoricalFeature(name="housing", categories=HOUSINGS, example="rent"),
        ),
        target=target,
    )


def golden_rows(count: int = 12) -> list[NDArray[Any]]:
    generator = np.random.default_rng(5)
    continuous = np.stack([generator.uniform(18, 75, count), generator.uniform(250, 18424, count)], axis=1)
    categorical = np.stack([generator.integers(0, 4, count), generator.integers(0, 3, count)], axis=1)
    return [continuous.astype(np.float32), categorical.astype(np.int64)]


def table_contents(*, regression: bool = False) -> dict[str, bytes]:
    """Every file of the bundle but the passport. The golden outputs are the float64 network's, rounded once."""
    rows = golden_rows()
    outputs = logits(*rows)[:, :1] if regression else probabilities(*rows)
    model_bytes = table_model(regression=regression).SerializeToString()
    return {MODEL_FILE: model_bytes, **bundle.golden_files(rows, [outputs.astype(np.float32)])}


def mixing_table_model() -> onnx.ModelProto:
    """The table model, its logits shifted by how far their mean over the batch is from the first row's."""
    model = table_model()
    softmax = model.graph.node.pop()
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([0]), "zeroth"))
    model.graph.node.extend(
        [
            helper.make_node("ReduceMean", ["logits"], ["batch_mean"], axes=[0], keepdims=1),
            helper.make_node("Gather", ["logits", "zeroth"], ["row"], axis=0),
            helper.make_node("Sub", ["batch_mean", "row"], ["leak"]),
            helper.make_node("Add", ["logits", "leak"], ["mixed"]),
            helper.make_node("Softmax", ["mixed"], list(softmax.output)),
        ]
    )
    return model


def mixing_contents() -> dict[str, bytes]:
    """The same as `table_contents`, but rows change each other's answers, which the only golden sample cannot show."""
    row = [tensor[:1] for tensor in golden_rows()]
    golden = bundle.golden_files(row, [probabilities(*row).astype(np.float32)])
    return {MODEL_FILE: mixing_table_model().SerializeToString(), **golden}


def table_passport(contents: dict[str, bytes], *, name: str, version: str, regression: bool = False) -> Passport:
    # five-term dot products of numbers below 8 in float32: 8 roundings of 2^-24 of a sum of magnitude below 40
    tolerance = Tolerance(absolute=8 * 2.0**-24 * 40)
    return Passport(
        name=name,
        version=version,
        signature=signature(regression=regression),
        files={path: bundle.digest(content) for path, content in contents.items()},
        batchnorm=(),
        golden=GoldenSummary(
            rows=12, source="made by hand", tolerances={"value" if regression else "probabilities": tolerance}
        ),
    )


def write_table_bundle(models: Path, *, name: str = "table", version: str = "1", regression: bool = False) -> Path:
    """A bundle that passes admission, at models/name/version."""
    contents = table_contents(regression=regression)
    folder = models / name / version
    bundle.write(
        folder, passport=table_passport(contents, name=name, version=version, regression=regression), contents=contents
    )
    return folder
