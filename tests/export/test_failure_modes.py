"""Where today's usual tool goes wrong, ours is right or refuses: the failure modes of BatchNorm, side by side.

Each test does first what people do, with the library they do it with, and shows that the answer is wrong and that
nobody says so; then what evalmode does. F numbers are those of docs/rules/README.md. What the usual recalibration gets
wrong (F3, F7, F10, F14) stands in test_calibration.py, the wrong recipe of insertion in test_insertion.py.
"""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import reference
from onnxscript import optimizer
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_linear_bn_eval
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.data import DataLoader, TensorDataset

from export.audit import Finding, audit_module, audit_onnx, audit_state
from export.calibration import applied, calibrate
from export.conversion import convert
from export.diagnosis import diagnose
from export.exporting import export_model
from export.loading import load, read_state
from service.admission import check_structure
from service.bundle import read_plain
from service.errors import AdmissionRefused, Refused, WrongCall
from service.graph.fold import fold
from service.graph.freeze import freeze
from service.repository import load as load_repository
from service.runtime import place
from service.settings import Settings
from tests.export.zoo import rows, settled
from tests.graphs import MEAN, batchnorm_answer, batchnorm_model

pytestmark = pytest.mark.filterwarnings("ignore")  # the usual tools warn of many things, though not of these

X = rows(16, 5)


def small(*, dropout: float = 0.0) -> nn.Module:
    """Linear, BatchNorm, ReLU, perhaps Dropout, Linear; with statistics in which every term matters."""
    network = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(dropout), nn.Linear(6, 3))
    return settled(network, X)


def by_torchscript(network: nn.Module, x: Tensor = X, **options: Any) -> onnx.ModelProto:
    file: Any = io.BytesIO()  # which the exporter takes, whatever its annotation says
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network, (x,), file, dynamo=False, input_names=["x"], output_names=["y"],
            dynamic_axes={"x": {0: "batch"}, "y": {0: "batch"}}, **options,
        )  # fmt: skip
    return onnx.load_model_from_string(file.getvalue())


def by_dynamo(network: nn.Module, x: Tensor = X, **options: Any) -> onnx.ModelProto:
    batch = torch.export.Dim("batch", min=1)
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            network, (x,), dynamo=True, input_names=["x"], output_names=["y"], dynamic_shapes=({0: batch},),
            verbose=False, **options,
        )  # fmt: skip
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    return model


def in_training(network: nn.Module) -> onnx.ModelProto:
    return by_torchscript(network, training=torch.onnx.TrainingMode.TRAINING, do_constant_folding=False)


def onnx_answers(model: onnx.ModelProto, x: Tensor, *, level: str = "ORT_ENABLE_ALL") -> NDArray[np.float32]:
    """As anybody would run it: onnxruntime with its defaults."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    answer: NDArray[np.float32] = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    return answer


def torch_answers(network: nn.Module, x: Tensor = X) -> NDArray[np.float32]:
    with torch.no_grad():
        answer: NDArray[np.float32] = network(x).numpy()
    return answer


def far(one: NDArray[Any], other: NDArray[Any]) -> float:
    return float(np.abs(one - other).max())


def rules(findings: Sequence[Finding], *, at_least: str = "warning") -> set[str]:
    severities = {"error"} if at_least == "error" else {"error", "warning"}
    return {finding.rule for finding in findings if finding.severity in severities}


# Fact 1: the default exporter removes BatchNorm


def test_the_default_exporter_hides_batchnorm_and_ours_keeps_it() -> None:
    """What is folded into its neighbours cannot be audited; we keep the nodes and fold when the model is loaded."""
    usual = by_dynamo(small())
    assert not [node for node in usual.graph.node if node.op_type == "BatchNormalization"]
    ours = convert(small(), [X], input_names=["x"], output_names=["y"])
    assert [layer.layer for layer in ours.layers] == ["1"]


# Facts 2 and 3, F2, F14: a network in training mode is exported with live dropout


def test_a_network_in_training_mode_is_exported_with_live_dropout_by_the_usual_tool(tmp_path: Path) -> None:
    """Fact 3: BatchNorm uses its running statistics, Dropout drops: two equal requests get two answers."""
    network = small(dropout=0.5).train()
    usual = by_dynamo(network, optimize=False)
    assert far(*(onnx_answers(usual, X, level="ORT_DISABLE_ALL") for _ in range(2))) > 0.1
    assert "BN005" in rules(audit_onnx(usual), at_least="error")
    with pytest.raises(AdmissionRefused, match=r"Dropout .* is in training mode"):
        check_structure(usual)
    exported = export_model(network, {"x": X}, name="net", models=tmp_path)  # ours exports eval mode, and says so
    ours = onnx.load_model(exported.folder / "model.onnx")
    np.testing.assert_allclose(onnx_answers(ours, X), torch_answers(network.eval()), rtol=1e-4, atol=1e-5)


# Fact 5, F2: onnxruntime runs training mode on a CPU without a word


def test_one_sample_in_training_mode_is_answered_with_a_constant(tmp_path: Path) -> None:
    """Any single request gets beta, whatever it asked; our service refuses the file, and freeze rescues it."""
    model = batchnorm_model(training=True)
    one, other = torch.tensor([[5.0, -3.0, 40.0]]), torch.tensor([[-700.0, 90.0, 3.0]])
    assert far(onnx_answers(model, one), onnx_answers(model, other)) < 1e-3
    onnx.checker.check_model(model, full_check=True)  # a valid file
    assert rules(audit_onnx(model), at_least="error") == {"BN001"}
    onnx.save_model(model, tmp_path / "net.onnx")
    served = load_repository(tmp_path / "net.onnx", place("cpu"), Settings())
    assert not served.ready
    assert "is in training mode" in served.entries[0].reason
    frozen = freeze(model).model
    np.testing.assert_allclose(onnx_answers(frozen, other), batchnorm_answer(other.numpy()), rtol=1e-5)


# Fact 6, F5: exporting in training mode changes the network that is exported


def test_exporting_must_not_train_the_network(tmp_path: Path) -> None:
    """The usual trace moves the running statistics by one step of its dummy input, and exports what it moved."""
    network = small()
    norm = network.get_submodule("1")
    before = copy.deepcopy(network.state_dict())
    in_training(network)
    assert norm.num_batches_tracked == 1
    assert not torch.equal(network.state_dict()["1.running_mean"], before["1.running_mean"])

    network = small()
    network.get_submodule("0").train()
    modes = [part.training for part in network.modules()]
    export_model(network, {"x": X}, name="net", models=tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert [part.training for part in network.modules()] == modes


# Fact 9: the reference evaluator is no oracle at opsets 9 to 13


def test_the_reference_evaluator_blends_in_the_batch() -> None:
    """momentum, which inference ignores, mixes the batch's statistics in; onnxruntime and our oracle do not."""
    x = torch.tensor(MEAN) + rows(8, 3, mean=0.0, std=3.0)
    model = batchnorm_model(opset=9)
    (usual, *_) = list[Any](reference.ReferenceEvaluator(model).run(None, {"x": x.numpy()}))
    wanted = batchnorm_answer(x.numpy())
    assert far(usual, wanted) > 0.05
    assert far(onnx_answers(model, x), wanted) < 1e-4
    assert "BN031" in {finding.rule for finding in audit_onnx(model)}


# Fact 10: an optimiser that changes what a graph means


def test_onnxscripts_optimiser_silently_freezes_a_graph_in_training_mode() -> None:
    """It folds with the running statistics and drops the mode; ours refuses to fold what is not frozen."""
    network = small()
    training = in_training(network)
    before = onnx_answers(training, X)
    optimised = optimizer.optimize(training)
    assert far(onnx_answers(optimised, X), before) > 0.1
    found = fold(training)
    assert [layer.into for layer in found.folds] == [None]
    assert "training mode" in str(found.folds[0].kept_because)
    assert far(onnx_answers(found.model, X), before) < 1e-5


# F2: the reference was in train mode


def test_a_comparison_with_a_network_in_train_mode_blames_the_wrong_side() -> None:
    """The most frequent report: 'ONNX differs from PyTorch'. The file is right."""
    network = small()
    model = convert(network, [X], input_names=["x"], output_names=["y"]).model
    network.train()
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(onnx_answers(model, X), torch_answers(copy.deepcopy(network)), rtol=1e-3)
    assert diagnose(network, model, [X]).verdict == "the reference was in train mode"


# F3: never updated, not converged


def test_load_state_dict_without_strict_leaves_statistics_that_were_never_learned(tmp_path: Path) -> None:
    """Mean 0 and variance 1 and no exception; ours names the keys, and the audit sees the network itself."""
    state = {key: value for key, value in small().state_dict().items() if "running" not in key}
    fresh = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.0), nn.Linear(6, 3)).eval()
    fresh.load_state_dict(state, strict=False)
    assert far(torch_answers(fresh), torch_answers(small())) > 0.1
    torch.save(state, tmp_path / "net.pt")
    with pytest.raises(WrongCall, match=r"lacks running statistics, '1.running_mean', '1.running_var'"):
        load(fresh, read_state(tmp_path / "net.pt"))
    assert "BN003" in rules(audit_module(fresh), at_least="error")
    with pytest.raises(Refused, match="BN003"):
        export_model(fresh, {"x": X}, name="net", models=tmp_path / "models")


def test_averages_that_have_not_converged_are_undone_exactly() -> None:
    """After 20 steps 12 % of mean 0 and variance 1 are left, and PyTorch serves them; we say so, and calibrate."""
    norm, x = nn.BatchNorm1d(5), rows(256, 5)
    network = nn.Sequential(norm).train()
    for _ in range(20):
        network(x)
    assert norm.running_var is not None
    usual = float(norm.running_var.mean() / x.var(0).mean())
    assert usual > 2
    findings = audit_module(network.eval())
    assert "BN004" in rules(findings)
    assert any("12.16%" in finding.message for finding in findings)
    (layer,) = calibrate(network, [x]).layers
    np.testing.assert_allclose(layer.var_C, x.double().var(0, correction=0), rtol=1e-12)


# F4: frozen in name only


def test_requires_grad_false_does_not_freeze_the_statistics() -> None:
    """Nor does no_grad; the signature is: gamma and beta as they were, statistics not."""
    pretrained = small()
    network = copy.deepcopy(pretrained).requires_grad_(False).train()
    network.get_submodule("4").requires_grad_(True)
    with torch.no_grad():
        network(rows(64, 5, mean=9.0))
    assert far(torch_answers(network.eval()), torch_answers(pretrained)) > 0.1
    found = audit_module(network, reference=pretrained.state_dict())
    assert "BN006" in rules(found)
    assert "BN006" in rules(audit_state(network.state_dict(), reference=pretrained.state_dict()))
    assert "BN006" not in rules(audit_module(pretrained, reference=pretrained.state_dict()))


# F5: forwards that were not training


def test_activation_checkpointing_counts_every_batch_twice() -> None:
    """The effective momentum is nearly doubled; the counts of the layers disagree, and that is what shows."""
    from torch.utils.checkpoint import checkpoint

    first, second = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6)), nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
    network = nn.Sequential(first, second).train()
    for step in range(30):
        x = rows(32, 5, seed=step).requires_grad_(True)
        second(checkpoint(first, x, use_reentrant=True)).sum().backward()
    findings = audit_module(network.eval(), steps=30)
    assert "BN008" in rules(findings)
    assert any("60" in finding.message for finding in findings if finding.rule == "BN008")


# F6: no running statistics


def test_a_graph_that_computes_its_statistics_looks_frozen(tmp_path: Path) -> None:
    """No attribute says so; one row then answers beta. Ours looks at where inputs 3 and 4 come from."""
    network = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, 3)).eval()
    usual = by_dynamo(network, optimize=False)
    (node,) = [node for node in usual.graph.node if node.op_type == "BatchNormalization"]
    assert "training_mode" not in {a.name for a in node.attribute if a.i}
    one, other = (onnx_answers(usual, X[i : i + 1]) for i in (0, 1))
    assert far(one, other) < 1e-5
    assert "BN002" in rules(audit_onnx(usual), at_least="error")
    assert "BN002" in rules(audit_module(network), at_least="error")
    with pytest.raises(AdmissionRefused, match="no constant running_mean"):
        check_structure(usual)
    with pytest.raises(Refused, match=r"no constant|never learned"):
        freeze(usual)
    with pytest.raises(Refused, match="BN002"):
        export_model(network, {"x": X}, name="net", models=tmp_path)
    calm = applied(network, calibrate(network, [X]))  # the way out
    assert not rules(audit_module(calm, settled=frozenset({"1"})))


# F7: averaged weights


def test_averaged_weights_keep_the_statistics_of_other_weights() -> None:
    """AveragedModel copies the buffers of the network that it averages; the audit knows one by its keys."""
    network = small().train()
    averaged = AveragedModel(network)
    optimizer_ = torch.optim.SGD(network.parameters(), lr=0.2)
    for step in range(12):
        network(rows(32, 5, seed=step)).square().mean().backward()
        optimizer_.step()
        optimizer_.zero_grad()
        averaged.update_parameters(network)
    assert torch.equal(averaged.module.state_dict()["1.running_mean"], network.state_dict()["1.running_mean"])
    assert "BN009" in rules(audit_state(averaged.state_dict()))
    assert "BN009" in rules(audit_module(averaged.eval()))
    data = torch.cat([rows(32, 5, seed=step) for step in range(12)])
    (layer,) = calibrate(averaged, [data]).layers
    assert layer.mean_shift > 0.2


def test_update_bn_that_is_interrupted_leaves_a_broken_network() -> None:
    """Momentum None and training mode stay behind, without a trace in the next checkpoint; ours touches nothing."""

    class Broken(TensorDataset):
        def __getitem__(self, index: int) -> tuple[Tensor, ...]:
            if index == 9:
                raise OSError("disk")
            return (self.tensors[0][index],)

    network = small()
    with pytest.raises(OSError, match="disk"):
        update_bn(DataLoader(Broken(X), batch_size=4), network)
    assert network.training
    assert network.get_submodule("1").momentum is None
    network = small()
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(Refused):
        calibrate(network, [rows(9, 4)])
    assert not network.training
    assert network.get_submodule("1").momentum == 0.1
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


# F8: conventions


def test_a_momentum_from_keras_means_the_opposite() -> None:
    """0.99 is the weight of the old value there and of the new batch here: the last batch is all that is left."""
    norm = nn.BatchNorm1d(5, momentum=0.99).train()
    for mean in (3.0, 3.0, 3.0, 9.0):
        norm(rows(64, 5, mean=mean))
    assert norm.running_mean is not None
    assert float(norm.running_mean.mean()) > 8.5
    assert "BN010" in rules(audit_module(nn.Sequential(norm).eval()))


def test_another_eps_is_named_as_the_reason() -> None:
    """A network ported with eps 1e-5 in place of Keras's 1e-3: loads without a word, answers otherwise."""
    network = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6, eps=1e-3), nn.Linear(6, 3))
    settled(network, rows(16, 5, std=0.01))
    network[1].eps = 1e-3  # type: ignore[assignment]
    model = convert(network.eval(), [X], input_names=["x"], output_names=["y"]).model
    ported = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).eval()
    ported.load_state_dict(network.state_dict())
    assert far(torch_answers(ported), onnx_answers(model, X)) > 0.1
    found = diagnose(ported, model, [X])
    assert found.verdict == "eps differs"
    assert "eps 1e-05 in the network and 0.001 in the file" in found.sentence


# F9: code that branches on the batch size


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.head(self.norm(x) if x.shape[0] != 1 else x)
        return answer


def test_code_that_skips_batchnorm_for_one_row(tmp_path: Path) -> None:
    """Exported without a word by either exporter; ours finds it in the code, by trying, and at parity."""
    network = settled(Branches(), X)
    usual = by_dynamo(network, optimize=False)
    assert far(onnx_answers(usual, X[:1]), torch_answers(network, X[:1])) > 0.1
    assert {"BN018", "BN019"} <= rules(audit_module(network, [X]))
    with pytest.raises(Refused, match=r"BN019: .*between 1 row and 2 rows: the number of rows matters"):
        export_model(network, {"x": X}, name="net", models=tmp_path)
    assert not any(tmp_path.iterdir())


# F11: values that are not finite


@pytest.mark.parametrize("value", [torch.inf, torch.nan, -1.0])
def test_a_variance_that_is_none(value: float, tmp_path: Path) -> None:
    """Infinity silently answers beta; NaN and negative ones answer NaN. Nothing of it is exported."""
    network = small()
    network.get_buffer("1.running_var")[2] = value
    usual = onnx_answers(by_dynamo(network, optimize=False), X)
    assert np.isnan(usual).any() or far(usual, torch_answers(small())) > 0.1
    assert "BN012" in rules(audit_module(network), at_least="error")
    with pytest.raises(Refused, match="BN012"):
        export_model(network, {"x": X}, name="net", models=tmp_path)


# F12: half precision


def test_half_precision_overflows_a_variance_to_infinity(tmp_path: Path) -> None:
    """65,504 is the largest float16: the channel then answers beta, and nobody hears of it."""
    network: nn.Module = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3)).eval()
    x = rows(64, 5, mean=900.0, std=400.0)
    network = applied(network, calibrate(network, [x]))
    half = copy.deepcopy(network).half()
    assert torch.isinf(half.get_buffer("0.running_var")).all()
    answers = torch_answers(half, x.half())
    assert far(answers[:1], answers[1:]) == 0.0
    assert "BN012" in rules(audit_module(half), at_least="error")
    with pytest.raises(Refused, match="BN012"):
        export_model(half, {"x": x.half()}, name="net", models=tmp_path)


def test_folding_in_half_precision_is_computed_in_double() -> None:
    """Folded in float16 by the usual tool, the weights carry its rounding twice; ours rounds once."""
    torch.manual_seed(4)
    linear, norm = nn.Linear(40, 30), nn.BatchNorm1d(30)
    network = settled(nn.Sequential(linear, norm), rows(64, 40)).half()
    exact = copy.deepcopy(network).double()
    x = rows(64, 40).half()
    with torch.no_grad():
        wanted = exact(x.double()).numpy()
        usual = fuse_linear_bn_eval(network[0], network[1]).double()(x.double()).numpy()  # type: ignore[index]
    folded = fold(convert(network, [x], input_names=["x"], output_names=["y"]).model).model
    weights = [onnx.numpy_helper.to_array(t).astype(np.float64) for t in folded.graph.initializer]
    (matrix,) = [w for w in weights if w.ndim == 2]
    (bias,) = [w for w in weights if w.ndim == 1]
    ours = x.double().numpy() @ (matrix.T if matrix.shape == (30, 40) else matrix) + bias
    assert np.abs(ours - wanted).mean() < np.abs(usual - wanted).mean()


# F14: dropout before BatchNorm


def test_statistics_gathered_behind_dropout_are_too_wide() -> None:
    """Training scales what it keeps, so the variance that is stored is not the one that inference meets."""
    norm, x = nn.BatchNorm1d(5, momentum=None), rows(4000, 5)
    network = nn.Sequential(nn.Dropout(0.5), norm).train()
    network(x)
    assert norm.running_var is not None
    ratio = float((norm.running_var / x.var(0)).mean())
    expected = float((1 + 1 * (x.square().mean(0) / x.var(0))).mean())  # 1 + p / (1 - p) * E[x^2] / Var[x]
    assert ratio == pytest.approx(expected, rel=0.1)
    assert ratio > 100
    assert {"BN017", "BN020"} <= rules(audit_module(network.eval(), [x]))
    (layer,) = calibrate(network, [x]).layers
    np.testing.assert_allclose(layer.var_C, x.double().var(0, correction=0), rtol=1e-12)


def test_a_plain_file_in_training_mode_is_read_and_refused(tmp_path: Path) -> None:
    """The whole way: what the usual exporter wrote in training mode never answers a request."""
    onnx.save_model(in_training(small()), tmp_path / "net.onnx")
    with pytest.raises(AdmissionRefused, match="structure door"):
        check_structure(read_plain(tmp_path / "net.onnx").model)
