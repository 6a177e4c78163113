"""Ray Serve: one deployment with one replica, dashboard off; with batching, `serve.batch` of 32 rows or 2 ms."""

import signal
from typing import Any

import ray
from network import BATCH_WAIT_S, BATCHING, MAX_BATCH_SIZE, PORT, WORKLOAD, Network, stacked
from ray import serve
from starlette.requests import Request

MAX_ONGOING_REQUESTS = 256


@serve.deployment(max_ongoing_requests=MAX_ONGOING_REQUESTS)
class Answering:
    def __init__(self) -> None:
        self.network = Network()

    async def __call__(self, request: Request) -> Any:
        sent = await (request.body() if WORKLOAD == "image-binary" else request.json())
        tensors = self.network.tensors(sent)
        return await self.many(tensors) if BATCHING else self.network.answer(self.network.run(tensors)[0])

    @serve.batch(max_batch_size=MAX_BATCH_SIZE, batch_wait_timeout_s=BATCH_WAIT_S)
    async def many(self, several: list[Any]) -> list[Any]:
        return [self.network.answer(row) for row in self.network.run(stacked(several))]


if __name__ == "__main__":
    ray.init(include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    serve.run(Answering.bind(), logging_config={"enable_access_log": False})
    signal.sigwait({signal.SIGINT, signal.SIGTERM})
    ray.shutdown()
