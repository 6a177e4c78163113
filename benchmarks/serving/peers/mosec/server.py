"""mosec: one worker; with batching, 32 rows or 1 ms, the least it can wait."""

from typing import Any

from mosec import Server, Worker
from network import BATCHING, MAX_BATCH_SIZE, WORKLOAD, Network, stacked

LEAST_WAIT_MS = 1


class Answering(Worker):
    def __init__(self) -> None:
        super().__init__()
        self.network = Network()

    def deserialize(self, data: bytes) -> Any:
        return data if WORKLOAD == "image-binary" else super().deserialize(data)

    def forward(self, data: Any) -> Any:
        if not BATCHING:
            return self.network.answer(self.network.run(self.network.tensors(data))[0])
        answered = self.network.run(stacked([self.network.tensors(request) for request in data]))
        return [self.network.answer(row) for row in answered]


if __name__ == "__main__":
    server = Server()
    if BATCHING:
        server.append_worker(Answering, num=1, max_batch_size=MAX_BATCH_SIZE, max_wait_time=LEAST_WAIT_MS)
    else:
        server.append_worker(Answering, num=1)
    server.run()
