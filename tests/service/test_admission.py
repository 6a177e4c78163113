"""What is served was admitted, and each door refuses what it is there for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from service import bundle as bundles
from service.admission import Admitted, admit, admit_with, check_independence, reference_answers
from service.bundle import MODEL_FILE, Bundle, Passport
from service.errors import AdmissionRefused
from service.numerics import largest_difference
from service.runtime import place
from tests import graphs
from tests.bundles import mixing_contents, probabilities, table_contents, table_passport, write_table_bundle
from tests.fakes import FakeRuntime


def plain(model: onnx.ModelProto) -> Bundle:
    contents = {MODEL_FILE: model.SerializeToString()}
    return Bundle(name="m", version="1", folder=Path(), contents=contents, passport=None)


def with_passport(change: Callable[[dict[str, bytes], Passport], Passport] = lambda _, passport: passport) -> Bundle:
    contents = table_contents()
    passport = change(contents, table_passport(contents, name="table", version="1"))
    return Bundle(name="table", version="1", folder=Path(), contents=contents, passport=passport)


def admitted(bundle: Bundle) -> Admitted:
    return admit(bundle, place("cpu"), threads=1, max_batch_rows=16)


def refusal(bundle: Bundle) -> AdmissionRefused:
    with pytest.raises(AdmissionRefused) as caught:
        admitted(bundle)
    return caught.value


def test_a_healthy_bundle_passes_all_doors() -> None:
    """The passport's promise is replayed and measured, not believed."""
    passed = admitted(with_passport())
    (figure,) = passed.golden
    assert passed.golden_rows == 12
    assert 0 < figure.difference <= figure.bound  # float32 against rounded float64: not the same bits, but near
    assert passed.independence.batch_sizes == (1, 2, 3, 7, 16)
    assert len(passed.batchnorms) == 1


def test_a_plain_onnx_file_passes_without_golden_samples() -> None:
    """Admission knows less about it and says so, but structure and independence always run."""
    passed = admitted(plain(graphs.batchnorm_model()))
    assert passed.golden == ()
    assert passed.golden_rows == 0
    x = np.array([[4.0, -2.5, 41.0]], dtype=np.float32)
    # one rounding each for subtraction, two products, square root, quotient and sum, on |gamma||mean|/std up to 300
    np.testing.assert_allclose(passed.runtime.run([x])[0], graphs.batchnorm_answer(x), rtol=0, atol=6 * 2**-24 * 300)


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (graphs.batchnorm_model(training=True), "'norm' is in training mode (training_mode=1)"),
        (graphs.batchnorm_model(opset=9, extra_outputs=("m", "v", "sm", "sv")), "outputs beyond Y (m, v, sm, sv)"),
        (graphs.batch_statistics_model(), "'norm' has no constant running_mean"),
        (graphs.batchnorm_model(var=np.array([0.05, -0.02, 0.09], np.float32)), "negative running_var (-0.02)"),
        (graphs.batchnorm_model(var=np.array([0.05, np.inf, 0.09], np.float32)), "running_var that is not finite"),
        (graphs.batchnorm_model(mean=np.array([np.nan, 0, 1], np.float32)), "running_mean that is not finite"),
        (graphs.dropout_model(training=True), "Dropout 'drop' is in training mode"),
    ],
)
def test_structure_refuses_what_is_not_frozen(model: onnx.ModelProto, sentence: str) -> None:
    """A file whose answers would depend on the batch, or be constant or NaN, is refused by reading it."""
    refused = refusal(plain(model))
    assert refused.door == "structure"
    assert sentence in str(refused)
    assert ("`evalmode calibrate`" if "running_var" in sentence or "finite" in sentence else ".eval()") in str(refused)


def test_structure_refuses_what_is_not_a_model(tmp_path: Path) -> None:
    """Bytes that are not ONNX are a sentence, not a traceback."""
    file = tmp_path / "model.onnx"
    file.write_bytes(b"not a model at all")
    with pytest.raises(AdmissionRefused, match="not an ONNX model"):
        bundles.read_plain(file)


def test_a_dropout_in_eval_mode_is_fine() -> None:
    assert admitted(plain(graphs.dropout_model(training=False))).independence.kind == "exact"


def test_digest_refuses_one_flipped_bit() -> None:
    """A bundle that was damaged on its way is refused, even where the damage would not show in the golden samples."""
    whole = with_passport()
    damaged = bytearray(whole.contents[MODEL_FILE])
    damaged[-200] ^= 1
    refused = refusal(replace(whole, contents={**whole.contents, MODEL_FILE: bytes(damaged)}))
    assert refused.door in ("digest", "structure")
    output = "test_data_set_0/output_0.pb"
    damaged = bytearray(whole.contents[output])
    damaged[-1] ^= 1
    refused = refusal(replace(whole, contents={**whole.contents, output: bytes(damaged)}))
    assert refused.door == "digest"
    assert f"'{output}'" in str(refused)


def test_digest_refuses_a_file_the_passport_does_not_know() -> None:
    without = with_passport(
        lambda _, passport: passport.model_copy(
            update={"files": {path: said for path, said in passport.files.items() if path != MODEL_FILE}}
        )
    )
    assert refusal(without).door == "digest"


def test_golden_refuses_other_outputs() -> None:
    """A network that answers otherwise than PyTorch did, by more than float error, is refused with both figures."""

    def with_other_outputs(contents: dict[str, bytes], passport: Passport) -> Passport:
        golden = Bundle(name="", version="", folder=Path(), contents=contents, passport=None)
        wrong = [probabilities(*golden.golden("input")).astype(np.float32) + np.float32(1e-4)]
        contents |= bundles.golden_files(golden.golden("input"), wrong)
        return table_passport(contents, name="table", version="1")

    refused = refusal(with_passport(with_other_outputs))
    assert refused.door == "golden"
    assert "is 0.0001 away from what PyTorch gave" in str(refused)


def test_golden_refuses_a_promise_without_samples() -> None:
    whole = with_passport()
    lost = {path: content for path, content in whole.contents.items() if not path.endswith("output_0.pb")}
    files = {path: said for path, said in whole.passport.files.items() if path in lost} if whole.passport else {}
    assert whole.passport is not None
    stripped = replace(whole, contents=lost, passport=whole.passport.model_copy(update={"files": files}))
    assert refusal(stripped).door == "golden"


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (graphs.mixing_model(), "the network mixes the rows of a batch"),
        (graphs.size_model(), "in a batch of 2 than in one of 1; rounding explains at most"),
        (graphs.random_model(), "is random: equal runs gave two answers"),
    ],
)
def test_independence_refuses_without_knowing_the_cause(model: onnx.ModelProto, sentence: str) -> None:
    """No BatchNormalization in sight, and still: a row's answer may depend on nothing but the row."""
    refused = refusal(plain(model))
    assert refused.door == "independence"
    assert sentence in str(refused)


def test_independence_notices_one_bit() -> None:
    """Beside other neighbours at the same size a row must keep its bits; a tolerance there would hide leaks."""

    class Leaky:
        inputs = admitted(plain(graphs.batchnorm_model())).runtime.inputs
        outputs = admitted(plain(graphs.batchnorm_model())).runtime.outputs
        provider = "leaky"
        threads = 1

        def stop(self) -> None:
            pass

        def run(self, tensors: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
            return [tensors[0] + np.float32(2e-7) * tensors[0].sum()]

    rows = [np.linspace(1, 2, 24, dtype=np.float32).reshape(8, 3)]
    reference = reference_answers(Leaky(), rows, 1)
    with pytest.raises(AdmissionRefused, match="mixes the rows"):
        check_independence(Leaky(), rows, reference, batch_sizes=(1, 2, 3), bounds=[1.0])


def test_independence_sees_a_leak_from_a_single_row() -> None:
    """A network in which only the last row of a batch reaches the first is caught: every place is a subject."""

    class LastReachesFirst:
        inputs = admitted(plain(graphs.batchnorm_model())).runtime.inputs
        outputs = admitted(plain(graphs.batchnorm_model())).runtime.outputs
        provider = "leaky"
        threads = 1

        def stop(self) -> None:
            pass

        def run(self, tensors: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
            y = tensors[0].copy()
            y[0] += np.float32(1e-6) * (y[-1] if len(y) > 1 else 0)
            return [y]

    rows = [np.linspace(1, 2, 24, dtype=np.float32).reshape(8, 3)]
    reference = reference_answers(LastReachesFirst(), rows, 1)
    with pytest.raises(AdmissionRefused, match="mixes the rows"):
        check_independence(LastReachesFirst(), rows, reference, batch_sizes=(1, 2, 3, 7), bounds=[1.0])


@pytest.mark.parametrize(("by", "kind"), [(0.0, "exact"), (2.0**-23, "bounded")])
def test_rounding_otherwise_in_company_is_admitted_with_its_figure(by: float, kind: str) -> None:

    class RoundsOtherwise:
        inputs = FakeRuntime.inputs
        outputs = FakeRuntime.outputs
        provider = "rounding"
        threads = 1

        def stop(self) -> None:
            pass

        def run(self, tensors: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
            return [tensors[0] * np.float32(1 if len(tensors[0]) == 1 else 1 + by)]

    passed = admit_with(plain(graphs.batchnorm_model()), lambda _: RoundsOtherwise(), max_batch_rows=16)
    assert passed.independence.kind == kind
    assert (passed.independence.bound > 0) == (kind == "bounded")


def test_one_golden_sample_gets_made_up_neighbours() -> None:
    """With nothing but copies of one row beside it, a mixing network would pass."""

    def with_one_sample(contents: dict[str, bytes], _: Passport) -> Passport:
        contents |= mixing_contents()
        return table_passport(contents, name="table", version="1")

    assert "mixes the rows" in str(refusal(with_passport(with_one_sample)))


def test_an_index_outside_the_table_does_not_stop_admission() -> None:
    """Made-up rows for integer inputs are small, so that a lookup of at least two entries takes them."""
    assert admitted(plain(graphs.embedding_model())).independence.kind == "exact"


def without_inputs() -> onnx.ModelProto:
    model = graphs.model([onnx.helper.make_node("Identity", ["w"], ["y"])], {"w": np.ones((2, 3), np.float32)})
    del model.graph.input[:]
    return model


def with_fixed_beside_any() -> onnx.ModelProto:
    model = graphs.model([onnx.helper.make_node("Add", ["x", "z"], ["y"])], {})
    model.graph.input.append(onnx.helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, [1, 3]))
    return model


def relu(x: Sequence[Any], y: Sequence[Any]) -> onnx.ModelProto:
    return graphs.model([onnx.helper.make_node("Relu", ["x"], ["y"])], {}, x=(onnx.TensorProto.FLOAT, x), y=y)


@pytest.mark.parametrize("rows", [1, 4])
def test_a_fixed_batch_is_admitted_at_that_size(rows: int) -> None:
    """Many exporters write the batch of their sample into the graph; it is served in batches of just that length."""
    passed = admitted(plain(relu([rows, 3], [rows, 3])))
    assert passed.independence.batch_sizes == (rows,)


def test_weights_that_are_inputs_too_are_constants_here() -> None:
    """Old exporters list them; to onnxruntime they are then inputs that anybody may override."""
    model = graphs.batchnorm_model()
    for name in ("gamma", "beta", "mean", "var"):
        model.graph.input.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [3]))
    passed = admitted(plain(model))
    assert [spec.name for spec in passed.runtime.inputs] == ["x"]
    assert passed.independence.kind == "exact"


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (relu([], []), "input 'x' is a scalar"),
        (without_inputs(), "no inputs"),
        (graphs.model([onnx.helper.make_node("ReduceSum", ["x"], ["y"], keepdims=0)], {}, y=[]), "no batch axis"),
        (with_fixed_beside_any(), "the first axis of every input is the batch"),
    ],
)
def test_a_model_without_rows_is_refused(model: onnx.ModelProto, sentence: str) -> None:
    """With a sentence, not with whatever breaks first."""
    assert sentence in str(refusal(plain(model)))


def test_the_passport_must_describe_this_graph() -> None:
    """A model that was replaced by another with other inputs is not served under the old signature."""

    def with_other_model(contents: dict[str, bytes], _: Passport) -> Passport:
        contents[MODEL_FILE] = graphs.batchnorm_model().SerializeToString()
        return table_passport(contents, name="table", version="1")

    assert "but the graph has (x: FP32[-1, 3])" in str(refusal(with_passport(with_other_model)))


def test_reading_a_bundle_from_disk_is_the_same(tmp_path: Path) -> None:
    folder = write_table_bundle(tmp_path)
    passed = admitted(bundles.read(folder, name="table", version="1"))
    assert passed.signature.features is not None


@pytest.mark.parametrize(
    ("one", "other", "difference"),
    [([1.0, 2.0], [1.0, 2.5], 0.5), ([np.nan], [np.nan], 0.0), ([np.nan], [1.0], np.inf), ([np.inf], [np.inf], 0.0)],
)
def test_largest_difference_counts_what_is_not_finite(one: list[float], other: list[float], difference: float) -> None:
    """NaN beside a number is infinitely far, and never passes for small because it compares false."""
    assert largest_difference(np.array(one), np.array(other)) == difference


def test_a_slow_model_gets_small_batches_but_never_fewer_than_independence_needs() -> None:
    """A batch that takes long is made of 8 rows only; without a limit the clock decides nothing."""
    read = bundles.read(Path(__file__).parents[2] / "models" / "credit" / "1", name="credit", version="1")
    assert admit(read, place("cpu"), longest_run_s=1e-9).max_batch_rows == 8
    assert admit(read, place("cpu"), longest_run_s=float("inf")).max_batch_rows == 64
