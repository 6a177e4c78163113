"""FastAPI with pydantic models in and out, `async def`, the network called in the route."""

from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from network import PORT, WORKLOAD, Network
from pydantic import BaseModel, create_model

app = FastAPI()
network = Network()


class Row(BaseModel):
    x: list[float]


class Answer(BaseModel):
    y: list[float]


class Label(BaseModel):
    label: str
    probabilities: dict[str, float]


if WORKLOAD == "credit":
    types: dict[str, Any] = {it["name"]: (float if it["kind"] == "continuous" else str, ...) for it in network.features}
    Sample = create_model("Sample", **types)

    @app.post("/predict")
    async def predict_sample(sample: Sample) -> Label:
        return Label(**network.answer(network.run(network.tensors(sample.model_dump()))[0]))
elif WORKLOAD == "image-binary":

    @app.post("/predict")
    async def predict_bytes(request: Request) -> Answer:
        return Answer(**network.answer(network.run(network.tensors(await request.body()))[0]))
else:

    @app.post("/predict")
    async def predict(row: Row) -> Answer:
        return Answer(**network.answer(network.run(network.tensors(row.x))[0]))


if __name__ == "__main__":
    uvicorn.run(app, port=PORT, access_log=False, log_level="warning")
