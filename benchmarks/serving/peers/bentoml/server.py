"""BentoML: one worker, metrics and access log off; with batching, its adaptive batching of up to 32 rows."""

from pathlib import Path
from typing import Annotated, Any

import bentoml
import numpy as np
from bentoml.validators import DType
from network import BATCHING, MAX_BATCH_SIZE, WORKLOAD, Network, stacked
from pydantic import create_model

QUIET = {"metrics": {"enabled": False}, "logging": {"access": {"enabled": False}}}
MAX_LATENCY_MS = 10_000
Tensor = Annotated[np.ndarray, DType("float32")]

network = Network()
if WORKLOAD == "credit":
    types: dict[str, Any] = {it["name"]: (float if it["kind"] == "continuous" else str, ...) for it in network.features}
    Sample = create_model("Sample", **types)


def batched(**options: Any) -> Any:
    return bentoml.api(batchable=True, max_batch_size=MAX_BATCH_SIZE, max_latency_ms=MAX_LATENCY_MS, **options)


@bentoml.service(workers=1, **QUIET)
class Service:
    if WORKLOAD == "credit" and BATCHING:

        @batched()
        def predict(self, batch: list[Sample]) -> list[dict[str, Any]]:
            answered = network.run(stacked([network.tensors(sample.model_dump()) for sample in batch]))
            return [network.answer(row) for row in answered]

    elif WORKLOAD == "credit":

        @bentoml.api
        async def predict(self, sample: Sample, /) -> dict[str, Any]:
            return network.answer(network.run(network.tensors(sample.model_dump()))[0])

    elif WORKLOAD == "image-binary":

        @bentoml.api
        def predict(self, image: Path, /) -> list[float]:
            return network.run(network.tensors(image.read_bytes()))[0].tolist()

    elif BATCHING:

        @batched()
        def predict(self, batch: Tensor) -> Tensor:
            return network.run({"x": batch.reshape(-1, *network.shape)})

    else:

        @bentoml.api
        async def predict(self, x: list[float]) -> list[float]:
            return network.run(network.tensors(x))[0].tolist()
