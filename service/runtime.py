"""The seam to the engine that computes: `Runtime`, and onnxruntime behind it.

The only file that imports onnxruntime. What is loaded here is loaded as it will serve: the same execution provider, the
same optimised graph, the same threads; admission tests exactly this object.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, final

from numpy.typing import NDArray
from onnx import TensorProto, helper

from service.cpus import usable_cpus
from service.errors import AdmissionRefused, DeviceUnavailable, RowsRejected, WrongCall, first_line
from service.numerics import made_up_rows
from service.settings import Device
from service.signature import Datatype, TensorSpec

# Official builds of onnxruntime from 1.29 on report usage by default (its docs/Privacy.md); said before the import.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
try:
    import onnxruntime
    from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, RuntimeException
except ModuleNotFoundError as missing:
    raise WrongCall(
        "onnxruntime is not installed; pip install 'evalmode[service]', or 'evalmode[gpu]' for NVIDIA GPUs"
    ) from missing

Optimisation = Literal["none", "basic", "extended", "all"]
"""How far onnxruntime rewrites a graph when it loads it; models are served at `all`, its default."""

_OPTIMISATIONS: dict[Optimisation, Any] = {
    "none": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}

CPU_PROVIDER = "CPUExecutionProvider"
CUDA_PROVIDER = "CUDAExecutionProvider"

SHORT_RUN_S = 0.001
"""A row that takes less runs on one thread: handing parts of it to others costs as much as they save."""

_DATATYPES: dict[str, Datatype] = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(string)": "BYTES",
}


class Runtime(Protocol):
    """A loaded model. Calls may come from any thread, one at a time."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]: ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]: ...

    @property
    def provider(self) -> str:
        """The execution provider that really runs the model."""
        ...

    @property
    def threads(self) -> int:
        """Threads inside one run."""
        ...

    def run(self, tensors: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        """One array per output, in order.

        Args:
            tensors: one array per input, in order, with the batch axis first; not changed.

        Raises:
            RowsRejected: a value in them is one that the graph cannot take, such as an index outside a table.
        """
        ...

    def stop(self) -> None:
        """End the run that is under way, if there is one and it can be; from any thread. It raises then."""
        ...


@dataclass(frozen=True, slots=True)
class Placement:
    """Where models run, and why there."""

    provider: str
    why: str
    gpu_memory_limit_bytes: int = 0
    """For each model; 0 is no limit."""
    cpus: int = 0
    """The most CPUs of one run; 0 is all that this process may use."""

    @property
    def provider_options(self) -> dict[str, str]:
        if self.provider != CUDA_PROVIDER:
            return {}
        options = {
            # on by default: it rounds float32 to 11 bits in matrix products, which golden samples would not pass
            "use_tf32": "0",
            # the arena takes what is needed and not the next power of two, so that a limit can be used to its end
            "arena_extend_strategy": "kSameAsRequested",
        }
        if self.gpu_memory_limit_bytes:
            options["gpu_mem_limit"] = str(self.gpu_memory_limit_bytes)
        return options


def place(device: Device, *, gpu_memory_limit_bytes: int = 0, cpus: int = 0) -> Placement:
    """Decide where models run.

    Raises:
        DeviceUnavailable: `cuda` was asked for and cannot be had; the sentence says what is missing.
    """
    if device == "cpu":
        return Placement(CPU_PROVIDER, "asked for by --device cpu", cpus=cpus)
    missing = _missing_for_cuda()
    if device == "cuda":
        if missing:
            raise DeviceUnavailable(f"--device cuda: {missing}")
        return Placement(CUDA_PROVIDER, "asked for by --device cuda", gpu_memory_limit_bytes, cpus)
    if missing:
        return Placement(CPU_PROVIDER, f"no usable GPU: {missing}", cpus=cpus)
    return Placement(CUDA_PROVIDER, "a usable GPU was found", gpu_memory_limit_bytes, cpus)


def _missing_for_cuda() -> str | None:
    if CUDA_PROVIDER not in onnxruntime.get_available_providers():
        return (
            f"the installed onnxruntime {onnxruntime.__version__} is built without CUDA; "
            "install evalmode[gpu] in place of onnxruntime"
        )
    onnxruntime.preload_dlls()  # finds the CUDA and cuDNN libraries of NVIDIA's Python packages
    try:
        session = onnxruntime.InferenceSession(_hand_through(), _session_options(threads=1), providers=[CUDA_PROVIDER])
    except Exception as error:  # whatever the driver or a missing library raises is the answer here
        return f"onnxruntime cannot start CUDA: {first_line(error)}"
    if session.get_providers()[0] != CUDA_PROVIDER:  # it falls back to the CPU without an error
        return "onnxruntime found no CUDA device it can use; check `nvidia-smi`, and that CUDA and cuDNN are installed"
    return None


@final
class Deadline:
    """Once it has passed, no runtime that was given it runs any more; a run that is under way ends."""

    def __init__(self) -> None:
        self.options = onnxruntime.RunOptions()
        self.passed = False
        self._lifted = False
        self._lock = threading.Lock()

    def end(self) -> None:
        """It passes now, unless it was lifted; from any thread."""
        with self._lock:
            self.passed = not self._lifted
            self.options.terminate = self.passed

    def lift(self) -> None:
        """It never passes from now on: what was to be done is done.

        Raises:
            AdmissionRefused: it has passed.
        """
        with self._lock:
            self._lifted = True
        self.check()

    def check(self) -> None:
        """
        Raises:
            AdmissionRefused: it has passed.
        """
        if self.passed:
            raise AdmissionRefused(
                "structure", "it did not come to an end; where it only takes long, raise EVALMODE_ADMISSION_LIMIT_S"
            )


@final
class OnnxRuntime:
    """A model in an onnxruntime session."""

    def __init__(
        self,
        model: bytes,
        placement: Placement,
        *,
        threads: int = 0,
        optimisation: Optimisation = "all",
        deadline: Deadline | None = None,
    ) -> None:
        """Load a model.

        Args:
            model: a serialised ModelProto with its weights inside.
            threads: for one run; 0 is one for a model whose run is short, else what this process may use.

        Raises:
            AdmissionRefused: onnxruntime cannot load it, runs it elsewhere, or its inputs or outputs are not tensors.
        """
        self._threads = threads or 1
        self._deadline = deadline or Deadline()
        self._stopped = False
        self._session = _session(model, placement, self._threads, optimisation)
        self._provider: str = self._session.get_providers()[0]
        if self._provider != placement.provider:
            raise AdmissionRefused(
                "structure", f"it was to run on {placement.provider}, but onnxruntime put it on {self._provider}"
            )
        self._inputs = tuple(_spec(value, "input") for value in self._session.get_inputs())
        self._outputs = tuple(_spec(value, "output") for value in self._session.get_outputs())
        self._input_names = [spec.name for spec in self._inputs]
        self._output_names = [spec.name for spec in self._outputs]
        most = placement.cpus or usable_cpus()
        if not threads and most > 1 and not self._is_short():
            self._threads = most
            self._session = _session(model, placement, self._threads, optimisation)
        # with outputs bound to the CPU, a result comes from the GPU in one copy
        self._bound = self._provider == CUDA_PROVIDER and not any(
            spec.datatype == "BYTES" for spec in (*self._inputs, *self._outputs)
        )

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._outputs

    @property
    def provider(self) -> str:
        return self._provider

    @property
    def threads(self) -> int:
        return self._threads

    def run(self, tensors: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        if self._stopped and not self._deadline.passed:  # that was another run
            self._stopped = self._deadline.options.terminate = False
        try:
            if self._bound:
                return self._run_bound(tensors)
            outputs: list[NDArray[Any]] = self._session.run(
                self._output_names, dict(zip(self._input_names, tensors, strict=True)), self._deadline.options
            )
        except (InvalidArgument, Fail, RuntimeException) as error:
            self._deadline.check()
            if self._stopped or "memory" in str(error):  # of the machine, or of the GPU
                raise
            raise RowsRejected(first_line(error)) from error
        return outputs

    def stop(self) -> None:
        self._stopped = self._deadline.options.terminate = True

    def _run_bound(self, tensors: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        binding = self._session.io_binding()
        for name, array in zip(self._input_names, tensors, strict=True):
            binding.bind_cpu_input(name, array)
        for name in self._output_names:
            binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(binding, self._deadline.options)
        outputs: list[NDArray[Any]] = binding.copy_outputs_to_cpu()
        return outputs

    def _is_short(self) -> bool:
        """Whether one row takes less than `SHORT_RUN_S`, on one thread."""
        row = made_up_rows(self._inputs, count=1)
        feeds = dict(zip(self._input_names, row, strict=True))
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            try:
                self._session.run(self._output_names, feeds, self._deadline.options)
            except Exception:  # made-up values that the graph cannot take tell nothing
                return False
            seconds.append(time.perf_counter() - start)
        return min(seconds) < SHORT_RUN_S


def _session(model: bytes, placement: Placement, threads: int, optimisation: Optimisation) -> Any:
    options = _session_options(threads)
    options.graph_optimization_level = _OPTIMISATIONS[optimisation]
    try:
        return onnxruntime.InferenceSession(
            model, options, providers=[(placement.provider, placement.provider_options)]
        )
    except Exception as error:  # onnxruntime raises a class of its own for each status
        raise AdmissionRefused("structure", f"onnxruntime cannot load it: {first_line(error)}") from error


def _session_options(threads: int) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # waiting threads of onnxruntime spin by default and take the CPU from everything else in the container
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # a tensor that names a file reaches none: the engine would look for it in the working directory
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
    options.log_severity_level = 4  # fatal only: an error is raised, and said in a sentence
    return options


def _spec(value: Any, kind: str) -> TensorSpec:
    datatype = _DATATYPES.get(value.type)
    if datatype is None:
        raise AdmissionRefused("structure", f"{kind} '{value.name}' is a {value.type}, which cannot be sent over HTTP")
    shape = tuple(axis if isinstance(axis, int) else -1 for axis in value.shape)
    return TensorSpec(name=value.name, datatype=datatype, shape=shape)


def _hand_through() -> bytes:
    """The smallest model there is, to see whether a provider starts: y = x."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "hand_through", [x], [y])
    opset = helper.make_opsetid("", 17)
    return bytes(helper.make_model(graph, opset_imports=[opset], ir_version=10).SerializeToString())
