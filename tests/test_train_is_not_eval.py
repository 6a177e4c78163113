"""Train mode and eval mode are two functions, and what is exported and served is the second one.

For dense and for convolutional networks, with BatchNorm before and after the activation. The numbers are such that the
two differ by far more than float error: variances near eps, means far from 0, gamma away from 1.
"""

from __future__ import annotations

import asyncio
import copy
import json
import shlex
from pathlib import Path

import httpx
import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from torch import Tensor, nn

from export import batchnorm
from export.conversion import convert
from export.rounding import analyse
from service.admission import admit
from service.bundle import MODEL_FILE, Bundle
from service.errors import AdmissionRefused, Refused
from service.numerics import largest_difference
from service.runtime import OnnxRuntime, place
from tests import graphs
from tests.conftest import Serve

EPS = 0.03
MOMENTUM = 0.3
ROWS = 8
FAR_MORE = 1000
"""Train mode differs from eval mode by at least this many times what rounding explains."""


def dense(order: str) -> nn.Module:
    norm = nn.BatchNorm1d(7, eps=EPS, momentum=MOMENTUM)
    middle = [norm, nn.ReLU()] if order == "before" else [nn.ReLU(), norm]
    return nn.Sequential(
        nn.BatchNorm1d(5, eps=EPS, momentum=MOMENTUM, affine=False), nn.Linear(5, 7), *middle, nn.Linear(7, 3)
    )


def convolutional(order: str) -> nn.Module:
    norm = nn.BatchNorm2d(4, eps=EPS, momentum=MOMENTUM)
    middle = [norm, nn.ReLU()] if order == "before" else [nn.ReLU(), norm]
    return nn.Sequential(nn.Conv2d(2, 4, 3), *middle, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


KINDS = [(kind, order) for kind in ("dense", "convolutional") for order in ("before", "after")]


@pytest.fixture(scope="module", params=KINDS, ids=["-".join(kind) for kind in KINDS])
def network(request: pytest.FixtureRequest) -> nn.Module:
    """A network whose BatchNorm layers have learned something, in eval mode."""
    kind, order = request.param
    torch.manual_seed(17)
    built = dense(order) if kind == "dense" else convolutional(order)
    for part in built.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d) and part.affine:
            nn.init.uniform_(part.weight, 1.5, 2.5)
            nn.init.uniform_(part.bias, -2, 2)
    built.train()
    for seed in range(20):
        built(rows_for(built, seed=seed))
    return built.eval()


@pytest.fixture(scope="module")
def model(network: nn.Module) -> onnx.ModelProto:
    """The network as it is exported."""
    return exported(network)


def rows_for(network: nn.Module, *, seed: int = 99, count: int = ROWS) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    first = next(part for part in network.modules() if isinstance(part, nn.Linear | nn.Conv2d))
    shape = (count, 5) if isinstance(first, nn.Linear) else (count, 2, 6, 5)
    of_the_batch = torch.rand(2, generator=generator)  # batches differ, as they do for whoever calls
    return (0.3 + of_the_batch[0]) * torch.randn(shape, generator=generator) + 2 + 2 * of_the_batch[1]


def answered(network: nn.Module, x: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    with torch.no_grad():
        return network(x).numpy()  # type: ignore[no-any-return]


def in_train_mode(network: nn.Module) -> nn.Module:
    return copy.deepcopy(network).train()


def rounding(network: nn.Module, x: Tensor) -> float:
    """How far two float32 computations of the network may lie apart."""
    return 2 * analyse(network, [x]).bounds[0]


def exported(network: nn.Module) -> onnx.ModelProto:
    return convert(network, [rows_for(network)], input_names=["x"], output_names=["y"]).model


def running(model: onnx.ModelProto) -> OnnxRuntime:
    return OnnxRuntime(model.SerializeToString(), place("cpu"), threads=1)


def norms(network: nn.Module) -> dict[str, nn.BatchNorm1d | nn.BatchNorm2d]:
    return {path: part for path, part in network.named_modules() if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d)}


def test_in_train_mode_an_answer_depends_on_its_batch(network: nn.Module) -> None:
    """The same row beside other rows is another answer: this must never be served."""
    x, others = rows_for(network), rows_for(network, seed=100)
    others[0] = x[0]
    difference = largest_difference(answered(in_train_mode(network), x)[0], answered(in_train_mode(network), others)[0])
    assert difference > FAR_MORE * rounding(network, x)


def test_in_eval_mode_it_does_not(network: nn.Module) -> None:
    """Not in a bit on the neighbours' contents, and by rounding at most on how many there are."""
    x, others = rows_for(network), rows_for(network, seed=100)
    others[0] = x[0]
    assert answered(network, x)[0].tobytes() == answered(network, others)[0].tobytes()
    for count in (1, 2, 3, ROWS):
        assert largest_difference(answered(network, x[:count])[0], answered(network, x)[0]) <= rounding(network, x)


def test_in_train_mode_a_single_row_is_refused_by_torch() -> None:
    """One value per channel has no variance; a convolution's row has its pixels, but not if they are pooled to one."""
    row = torch.full((1, 5), 3.0)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        dense("before").train()(row)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(2)).train()(torch.ones(1, 2, 6, 5))


def test_in_train_mode_a_single_row_collapses_to_beta_in_onnxruntime() -> None:
    """What torch refuses a CPU runs without a word, and whatever the row, the answer is beta."""
    runtime = running(graphs.batchnorm_model(training=True))
    for row in ([[4.0, -2.5, 41.0]], [[-900.0, 17.0, 0.0]]):
        answer = runtime.run([np.array(row, dtype=np.float32)])[0][0]
        # x - mean(x) is 0, computed as x * scale - mean * scale, scale = gamma / sqrt(0 + eps): a few roundings of it
        scaled = np.abs(graphs.GAMMA * np.array(row[0])) / np.sqrt(graphs.EPS)
        np.testing.assert_array_less(np.abs(answer - graphs.BETA), 4 * 2.0**-24 * (scaled + 4))
    frozen = running(graphs.batchnorm_model())
    assert np.abs(frozen.run([np.array([[4.0, -2.5, 41.0]], dtype=np.float32)])[0][0] - graphs.BETA).min() > 0.5


def test_in_training_running_statistics_move_by_exactly_the_formula(network: nn.Module) -> None:
    """Every layer's, with the oracle's update from what the layer really saw."""
    training = in_train_mode(network).double()
    seen: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float64]]] = {}
    for path, norm in norms(training).items():
        norm.register_forward_pre_hook(lambda _, inputs, path=path: seen.update({path: inputs[0].detach().numpy()}))
    before = {
        path: batchnorm.RunningStatistics(
            mean_C=norm.running_mean.numpy(),  # type: ignore[union-attr]
            var_C=norm.running_var.numpy(),  # type: ignore[union-attr]
            num_batches_tracked=int(norm.num_batches_tracked),  # type: ignore[arg-type]
        )
        for path, norm in norms(training).items()
    }
    training(rows_for(network, seed=5).double())
    assert len(seen) == len(norms(network))
    for path, norm in norms(training).items():
        rule = batchnorm.PyTorchMomentum(momentum=MOMENTUM)
        wanted = batchnorm.updated(before[path], batchnorm.batch_statistics(seen[path]), rule)
        # sums of at most 160 float64 terms of magnitude below 10: 160 * 10 roundings of 2^-53
        np.testing.assert_allclose(norm.running_mean, wanted.mean_C, rtol=0, atol=1600 * 2**-53)  # type: ignore[arg-type]
        np.testing.assert_allclose(norm.running_var, wanted.var_C, rtol=0, atol=16000 * 2**-53)  # type: ignore[arg-type]
        assert int(norm.num_batches_tracked) == wanted.num_batches_tracked == 21  # type: ignore[arg-type]
        assert np.abs(wanted.var_C - before[path].var_C).min() > 1e-5  # they did move


def test_in_eval_mode_they_stand_still(network: nn.Module) -> None:
    """No forward pass changes a bit of the network."""
    before = {name: value.clone() for name, value in network.state_dict().items()}
    for seed in range(5):
        answered(network, rows_for(network, seed=seed))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_while_serving_they_stand_still(network: nn.Module, model: onnx.ModelProto) -> None:
    """After any number of other rows, the first row still has its first answer."""
    runtime = running(model)
    x = rows_for(network).numpy()
    first = runtime.run([x])[0]
    for seed in range(100):
        runtime.run([rows_for(network, seed=seed).numpy() * 10])
    assert runtime.run([x])[0].tobytes() == first.tobytes()


def test_the_onnx_model_is_eval_mode_and_not_train_mode(network: nn.Module, model: onnx.ModelProto) -> None:
    """Equal to the one within rounding; from the other it differs by far more than that."""
    x = rows_for(network)
    runtime = running(model)
    served = runtime.run([x.numpy()])[0]
    bound = rounding(network, x)
    assert largest_difference(served, answered(network, x)) <= bound
    assert largest_difference(served, answered(in_train_mode(network), x)) > FAR_MORE * bound


def test_a_module_left_in_train_mode_anywhere_is_refused_by_export(network: nn.Module) -> None:
    """Wherever it hides, with a root that says eval: the usual check looks at the root only."""
    paths = [path for path, _ in network.named_modules() if path]
    assert len(paths) >= 5
    for path in paths:
        left = copy.deepcopy(network)
        left.get_submodule(path).train()
        assert not left.training
        with pytest.raises(Refused, match=rf"in training mode: '{path}'"):
            exported(left)
    with pytest.raises(Refused, match="in training mode: 'the network itself'"):
        exported(in_train_mode(network))


def test_a_training_mode_file_is_refused_by_the_service(network: nn.Module, model: onnx.ModelProto) -> None:
    """The exported model is admitted; the same with one node switched to training_mode=1 is not."""
    served = admit(bundle_of(model), place("cpu"), threads=1)
    assert len(served.batchnorms) == len(norms(network))
    for i, node in enumerate(model.graph.node):
        if node.op_type == "BatchNormalization":
            switched = copy.deepcopy(model)
            switched.graph.node[i].attribute.append(helper.make_attribute("training_mode", 1))
            switched.graph.node[i].output.extend(["mean_out", "var_out"])
            with pytest.raises(AdmissionRefused, match="is in training mode") as caught:
                admit(bundle_of(switched), place("cpu"), threads=1)
            assert caught.value.door == "structure"


def bundle_of(model: onnx.ModelProto) -> Bundle:
    contents = {MODEL_FILE: model.SerializeToString()}
    return Bundle(name="m", version="1", folder=Path(), contents=contents, passport=None)


@pytest.mark.e2e
def test_the_same_row_has_the_same_bits_alone_and_among_64_others(serve: Serve) -> None:
    """Whoever else calls at the same moment does not change an answer, in any bit: the promise of the whole project."""
    serving = serve(Path(__file__).parents[1] / "models")
    (call,) = [line for line in serving.printed.splitlines() if line.startswith("curl")]
    example = json.loads(shlex.split(call)[-1])
    numbers = [name for name, value in example.items() if isinstance(value, int | float)]
    samples = [{**example, **{name: example[name] * (1 + i / 50) for name in numbers}} for i in range(65)]
    url = f"{serving.address}/predict"

    async def scenario() -> None:
        limits = httpx.Limits(max_connections=65)
        async with httpx.AsyncClient(limits=limits, timeout=30) as client:
            alone = [(await client.post(url, json=sample)).content for sample in samples]
            assert len(set(alone)) > 60  # the samples do get different answers
            for _ in range(5):
                together = await asyncio.gather(*(client.post(url, json=sample) for sample in samples))
                assert [response.content for response in together] == alone

    asyncio.run(scenario())
