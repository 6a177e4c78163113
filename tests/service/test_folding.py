"""The graph that serves has its BatchNorm folded only where that is shown to be the same function."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper

from service import folding
from service.admission import admit
from service.bundle import Bundle, read, read_plain
from service.cli import run
from service.errors import AdmissionRefused
from service.folding import Trial, folded_if_same, trials
from service.graph.fold import Folded, fold
from service.numerics import rounding_bounds
from service.runtime import OnnxRuntime, place
from tests.graphs import BETA, EPS, GAMMA, MEAN, VAR, batchnorm_answer, batchnorm_model, model

CREDIT = Path(__file__).parents[2] / "models" / "credit" / "1"
W = np.array([[2.0, -1.0, 0.5], [0.3, 4.0, -2.0], [1.5, 0.7, 3.0]], dtype=np.float32)
BIAS = np.array([-3.0, 7.0, 11.0], dtype=np.float32)


def dense_model() -> onnx.ModelProto:
    """y = BatchNormalization(x W + b) for x: float32[batch, 3]."""
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["h"], name="dense"),
        helper.make_node("BatchNormalization", ["h", "gamma", "beta", "mean", "var"], ["y"], epsilon=EPS, name="norm"),
    ]
    return model(nodes, {"w": W, "b": BIAS, "gamma": GAMMA, "beta": BETA, "mean": MEAN, "var": VAR})


def plain_bundle(tmp_path: Path, graph: onnx.ModelProto) -> Bundle:
    onnx.save_model(graph, tmp_path / "net.onnx")
    return read_plain(tmp_path / "net.onnx")


def on_cpu(content: bytes) -> OnnxRuntime:
    return OnnxRuntime(content, place("cpu"), threads=1)


def test_what_serves_is_folded_and_answers_the_same(tmp_path: Path) -> None:
    """No BatchNormalization is left in it, and the passport's layers are still those of the file."""
    admitted = admit(plain_bundle(tmp_path, dense_model()), place("cpu"))
    assert [(found.layer, found.into, found.side) for found in admitted.folds] == [("norm", "dense", "before")]
    assert [norm.layer for norm in admitted.batchnorms] == ["norm"]
    x = np.array([[1.0, -2.0, 9.0], [0.5, 3.0, -4.0]], dtype=np.float32)
    np.testing.assert_allclose(admitted.runtime.run([x])[0], batchnorm_answer(x @ W + BIAS), rtol=1e-5)


def test_the_shipped_model_is_folded_whole_within_its_golden_tolerance() -> None:
    """The first layer stands over raw columns, the second before an activation, the third behind the first."""
    admitted = admit(read(CREDIT, name="credit", version="1"), place("cpu"))
    assert all(found.into for found in admitted.folds)
    assert len(admitted.folds) == 3
    assert all(figure.difference <= figure.bound for figure in admitted.golden)


def test_a_fold_that_is_wrong_is_not_served(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Were there a fault in the folding, the model would be served as it came, and say why."""

    def wrong(graph: onnx.ModelProto) -> Folded:
        found = fold(graph)
        found.model.graph.initializer[-1].raw_data = (np.array(BIAS) * 1.01).tobytes()
        return found

    monkeypatch.setattr(folding, "fold", wrong)
    admitted = admit(plain_bundle(tmp_path, dense_model()), place("cpu"))
    (found,) = admitted.folds
    assert found.into is None
    assert found.kept_because is not None
    assert found.kept_because.startswith("folded, output 'y' would move by")
    x = np.array([[1.0, -2.0, 9.0]], dtype=np.float32)
    np.testing.assert_allclose(admitted.runtime.run([x])[0], batchnorm_answer(x @ W + BIAS), rtol=1e-5)


def test_a_folded_graph_that_does_not_load_is_not_served() -> None:
    """Whatever the engine says of it, the model as it came is there."""
    graph = dense_model()

    def refuses(content: bytes) -> OnnxRuntime:
        raise AdmissionRefused("structure", "onnxruntime cannot load it: no such kernel")

    plain = on_cpu(graph.SerializeToString())
    served = folded_if_same(graph, plain, refuses, [])
    assert served.runtime is plain
    assert served.folds[0].kept_because is not None
    assert "no such kernel" in served.folds[0].kept_because


def test_nothing_to_fold_loads_the_model_once() -> None:
    loads: list[bytes] = []

    def counted(content: bytes) -> OnnxRuntime:
        loads.append(content)
        return on_cpu(content)

    graph = batchnorm_model()
    plain = on_cpu(graph.SerializeToString())
    served = folded_if_same(graph, plain, counted, [])
    assert (served.runtime is plain, loads) == (True, [])
    assert served.folds[0].kept_because


def test_golden_samples_are_held_to_the_passports_tolerance() -> None:
    """And made-up rows to what the lengths of the sums explain."""
    bundle = read(CREDIT, name="credit", version="1")
    golden, noise = trials(bundle, on_cpu(bundle.model.SerializeToString()))
    assert bundle.passport is not None
    assert bundle.passport.golden is not None
    assert golden.allowed == [bundle.passport.golden.tolerances["probabilities"].absolute]
    assert len(golden.rows[0]) == bundle.passport.golden.rows
    assert noise.allowed is None


class Answers:
    """A runtime that gives one array, whatever it is asked."""

    def __init__(self, like: OnnxRuntime, answer: NDArray[Any]) -> None:
        self.inputs, self.outputs, self._answer = like.inputs, like.outputs, answer
        self.provider, self.threads = like.provider, like.threads

    def stop(self) -> None:
        pass

    def run(self, tensors: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        return [self._answer]


@pytest.mark.parametrize(("moved", "folded"), [(0.0, True), (2e-3, False), (np.inf, False), (np.nan, False)])
def test_what_is_allowed_is_what_decides(moved: float, folded: bool) -> None:
    graph = dense_model()
    like = on_cpu(graph.SerializeToString())
    right = np.array([[1.0, 2.0, 3.0]], dtype=np.float32)
    trial = Trial(rows=[right], allowed=[1e-3])
    served = folded_if_same(graph, Answers(like, right), lambda _: Answers(like, right + np.float32(moved)), [trial])
    assert all(bool(found.into) == folded for found in served.folds)
    assert dataclasses.is_dataclass(served)


def test_a_certificate_says_something_in_half_precision_too() -> None:
    """Without golden samples at most half of the digits may differ, however long the sums are."""
    like = on_cpu(dense_model().SerializeToString())
    answers = [np.array([[200.0, -3.0, np.inf]], dtype=np.float16)]
    half = [spec.model_copy(update={"datatype": "FP16"}) for spec in like.outputs]
    (bound,) = rounding_bounds(dense_model(), half, answers)
    assert 0 < bound <= 0.012 * 200  # sqrt(2**-11) / 2


def test_rows_that_overflow_decide_nothing() -> None:
    """Made-up rows may, in either graph; the finite answers are compared all the same."""
    graph = dense_model()
    like = on_cpu(graph.SerializeToString())
    answer = np.array([[1.0, np.nan, np.inf]], dtype=np.float32)
    served = folded_if_same(graph, Answers(like, answer), lambda _: Answers(like, answer), [Trial(rows=[answer])])
    assert all(found.into for found in served.folds)


# The verbs


def test_fold_writes_a_file_and_says_what_became_of_each_layer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["fold", str(CREDIT), str(tmp_path / "folded.onnx")]) == 0
    printed = capsys.readouterr().out
    assert "blocks.0.norm: folded into blocks.0.linear" in printed
    assert "folded 3 of 3 BatchNorm layers" in printed
    graph = onnx.load_model(tmp_path / "folded.onnx")
    assert "BatchNormalization" not in {node.op_type for node in graph.graph.node}


def test_fold_keeps_what_it_cannot_fold_and_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save_model(batchnorm_model(), tmp_path / "net.onnx")
    assert run(["fold", str(tmp_path / "net.onnx"), str(tmp_path / "out.onnx")]) == 0
    assert "norm: kept: " in capsys.readouterr().out


def test_freeze_rescues_and_says_what_proves_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save_model(batchnorm_model(training=True), tmp_path / "net.onnx")
    assert run(["freeze", str(tmp_path / "net.onnx"), str(tmp_path / "out.onnx")]) == 0
    printed = capsys.readouterr().out
    assert "norm: 3 channels, frozen; its variances prove 38 updates or more" in printed  # 0.9**37 > 0.02 >= 0.9**38
    (norm,) = admit(read_plain(tmp_path / "out.onnx"), place("cpu")).batchnorms
    assert norm.faults == ()


@pytest.mark.parametrize("verb", ["fold", "freeze"])
@pytest.mark.parametrize(
    ("model_file", "out", "code", "sentence"),
    [
        ("nowhere.onnx", "out.onnx", 2, "nowhere.onnx' is not there"),
        (".", "out.onnx", 2, "holds no model.onnx"),
        ("net.onnx", "net.onnx", 2, "already there and is not replaced"),
        ("noise.onnx", "out.onnx", 1, "9 bytes cannot be parsed"),
        ("net.onnx", "file/out.onnx", 1, "Not a directory|File exists"),
    ],
)
def test_wrong_calls_leave_nothing(
    verb: str, model_file: str, out: str, code: int, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnx.save_model(batchnorm_model(training=verb == "freeze"), tmp_path / "net.onnx")
    (tmp_path / "noise.onnx").write_bytes(b"\xff\xff\xff noise")
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.iterdir())
    assert run([verb, str(tmp_path / model_file), str(tmp_path / out)]) == code
    import re

    assert re.search(sentence, capsys.readouterr().err)
    assert sorted(tmp_path.iterdir()) == before


def test_fold_refuses_what_is_not_frozen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save_model(batchnorm_model(training=True), tmp_path / "net.onnx")
    assert run(["fold", str(tmp_path / "net.onnx"), str(tmp_path / "out.onnx")]) == 1
    assert "is in training mode" in capsys.readouterr().err
    assert not (tmp_path / "out.onnx").exists()
