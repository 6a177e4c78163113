"""The limit: reads the body and answers a constant, with the size and the headers of evalmode's own answer."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import uvicorn

CONSTANT = json.loads(Path(os.environ["BENCH_CONSTANT"]).read_text(encoding="utf-8"))
BODY = bytes.fromhex(CONSTANT["body"])
HEADERS = [(name.encode(), value.encode()) for name, value in CONSTANT["headers"].items()]


async def app(scope: Any, receive: Any, send: Any) -> None:
    more = True
    while more:
        more = (await receive()).get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
    await send({"type": "http.response.body", "body": BODY})


if __name__ == "__main__":
    uvicorn.run(app, port=int(os.environ["BENCH_PORT"]), lifespan="off", access_log=False, log_level="warning",
                server_header=False)  # fmt: skip
