"""LitServe: one worker; with batching, 32 rows or 2 ms."""

from typing import Annotated, Any

import litserve as ls
from fastapi import Body
from network import BATCH_WAIT_S, BATCHING, MAX_BATCH_SIZE, PORT, WORKLOAD, Network, Tensors, stacked
from starlette.requests import Request

Taken = Annotated[bytes, Body()] if WORKLOAD == "image-binary" else Request


class Api(ls.LitAPI):
    def setup(self, device: str) -> None:
        self.network = Network()

    def decode_request(self, request: Taken) -> Tensors:
        return self.network.tensors(request)

    def batch(self, inputs: list[Tensors]) -> Tensors:
        return stacked(inputs)

    def predict(self, x: Tensors) -> Any:
        return self.network.run(x)

    def unbatch(self, output: Any) -> list[Any]:
        return list(output)

    def encode_response(self, output: Any) -> dict[str, Any]:
        return self.network.answer(output if BATCHING else output[0])


if __name__ == "__main__":
    api = Api(max_batch_size=MAX_BATCH_SIZE, batch_timeout=BATCH_WAIT_S) if BATCHING else Api()
    server = ls.LitServer(api, accelerator="cpu", workers_per_device=1)
    server.run(host="127.0.0.1", port=PORT, log_level="warning", access_log=False, generate_client_file=False)
