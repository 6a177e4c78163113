"""The engine is told what it must not do by itself."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
import time
import warnings

import numpy as np
import onnx
import pytest

from service.cpus import usable_cpus
from service.errors import AdmissionRefused, RowsRejected
from service.runtime import CPU_PROVIDER, CUDA_PROVIDER, OnnxRuntime, Placement, place
from tests import graphs

has_gpu = place("auto").provider == CUDA_PROVIDER


def runtime(placement: Placement | None = None) -> OnnxRuntime:
    return OnnxRuntime(graphs.batchnorm_model().SerializeToString(), placement or place("cpu"), threads=1)


def test_telemetry_is_off_before_the_engine_is_imported() -> None:
    """Official builds report by default, and read the variable when they are loaded."""
    program = """
import os, sys
class Watch:
    def find_spec(self, name, *_):
        if name == "onnxruntime":
            print(os.environ.get("ORT_DISABLE_TELEMETRY"))
sys.meta_path.insert(0, Watch())
os.environ.pop("ORT_DISABLE_TELEMETRY", None)
import service.runtime
"""
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50, check=True)
    assert said.stdout.split() == ["1"]


def test_waiting_threads_do_not_spin() -> None:
    """They would take the CPU from everything else in the container."""
    options = runtime()._session.get_session_options()
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


@pytest.mark.skipif(has_gpu, reason="here onnxruntime can use a GPU")
def test_another_provider_than_the_one_asked_for_is_refused() -> None:
    """onnxruntime falls back to the CPU with a warning; here that is a refusal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(AdmissionRefused, match="to run on CUDAExecutionProvider, but onnxruntime put it on CPU"):
            runtime(Placement(provider=CUDA_PROVIDER, why="a test"))


@pytest.mark.gpu
@pytest.mark.skipif(not has_gpu, reason="onnxruntime can use no GPU here")
def test_a_gpu_computes_as_a_cpu_does() -> None:
    """Float32 all the way: with TF32 the difference would be a thousand times this."""
    x = np.random.default_rng(3).normal(4, 1, (64, 3)).astype(np.float32)
    on_gpu, on_cpu = runtime(place("cuda")).run([x])[0], runtime().run([x])[0]
    np.testing.assert_allclose(on_gpu, on_cpu, rtol=0, atol=8 * 2**-24 * 300)


def test_the_provider_is_the_one_that_runs() -> None:
    assert runtime().provider == CPU_PROVIDER


def test_a_value_the_graph_cannot_take_is_told_from_a_failure() -> None:
    lookup = OnnxRuntime(graphs.embedding_model().SerializeToString(), place("cpu"), threads=1)
    with pytest.raises(RowsRejected, match="indices element out of data bounds"):
        lookup.run([np.array([[7]], dtype=np.int64)])


def test_a_short_model_runs_on_one_thread_and_a_long_one_on_all() -> None:
    """Handing parts of a short run to other threads costs as much as they save."""
    assert OnnxRuntime(graphs.batchnorm_model().SerializeToString(), place("cpu")).threads == 1
    weight = np.random.default_rng(1).normal(0, 0.01, (3000, 3000)).astype(np.float32)
    nodes = [onnx.helper.make_node("MatMul", ["x", "w"], ["h"]), onnx.helper.make_node("MatMul", ["h", "w"], ["y"])]
    long = graphs.model(nodes, {"w": weight}, x=(onnx.TensorProto.FLOAT, ["batch", 3000]), y=["batch", 3000])
    assert OnnxRuntime(long.SerializeToString(), place("cpu")).threads == usable_cpus()
    assert OnnxRuntime(long.SerializeToString(), place("cpu"), threads=1).threads == 1


def test_bound_outputs_are_the_same_outputs() -> None:
    """The way that a GPU takes, on a CPU: bit for bit the same."""
    x = np.random.default_rng(3).normal(4, 1, (5, 3)).astype(np.float32)
    one = runtime()
    np.testing.assert_array_equal(one._run_bound([x])[0], one.run([x])[0])


def test_the_memory_of_a_gpu_can_be_limited() -> None:
    options = Placement(CUDA_PROVIDER, "a test", gpu_memory_limit_bytes=2**30).provider_options
    assert (options["gpu_mem_limit"], options["use_tf32"]) == (str(2**30), "0")
    assert "gpu_mem_limit" not in Placement(CUDA_PROVIDER, "a test").provider_options
    assert Placement(CPU_PROVIDER, "a test", gpu_memory_limit_bytes=2**30).provider_options == {}


def test_shapes_that_do_not_fit_each_other_are_the_callers() -> None:
    """With axes of any length only the engine sees that two of them should be equal."""
    open_ended = graphs.model(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])],
        {"w": np.ones((3, 2), np.float32)},
        x=(onnx.TensorProto.FLOAT, ["batch", "width"]),
        y=["batch", 2],
    )
    one = OnnxRuntime(open_ended.SerializeToString(), place("cpu"), threads=1)
    with pytest.raises(RowsRejected, match="cannot take these values"):
        one.run([np.ones((1, 4), np.float32)])


def test_at_least_one_cpu_is_usable() -> None:
    assert usable_cpus() >= 1


def test_a_run_that_is_under_way_can_be_ended_and_the_next_is_not() -> None:
    """Nobody is told that the values were wrong: they were not."""
    names = ["x", *[f"t{i}" for i in range(2000)], "y"]
    nodes = [onnx.helper.make_node("Sin", [a], [b]) for a, b in itertools.pairwise(names)]
    shape = ["batch", 8]
    long = OnnxRuntime(
        graphs.model(nodes, {}, x=(onnx.TensorProto.FLOAT, shape), y=shape).SerializeToString(), place("cpu"), threads=1
    )
    x = np.ones((500_000, 8), np.float32)
    stop = threading.Timer(0.1, long.stop)
    stop.start()
    start_s = time.perf_counter()
    with pytest.raises(Exception, match="terminate") as ended:
        long.run([x])
    assert not isinstance(ended.value, RowsRejected)
    assert time.perf_counter() - start_s < 10
    assert long.run([x[:1]])[0].shape == (1, 8)
