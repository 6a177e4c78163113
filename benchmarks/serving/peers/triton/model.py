"""Triton's Python backend: onnxruntime inside it, one run for all the requests of a batch."""

import os
import sys
from typing import Any

sys.path.extend(os.environ["PYTHONPATH"].split(os.pathsep))  # the backend's interpreter does not read it

import numpy as np
import triton_python_backend_utils as pb_utils
from network import Network


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        self.network = Network()

    def execute(self, requests: list[Any]) -> list[Any]:
        inputs = [pb_utils.get_input_tensor_by_name(request, "x").as_numpy() for request in requests]
        answered = self.network.run({"x": np.concatenate(inputs) if len(inputs) > 1 else inputs[0]})
        ends = np.cumsum([len(x) for x in inputs])[:-1]
        return [pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor("y", y)]) for y in np.split(answered, ends)]
