"""Whether a server answers right, before anything is timed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import httpx

from benchmarks.serving.wire import Request, numbers
from benchmarks.serving.workloads import Workload

AT_ONCE = 8
"""Samples in flight while answers are compared, so that a server which batches does batch."""
TIMEOUT_S = 20


class WrongAnswer(Exception):
    """A server's answer is not onnxruntime's."""


class Client:
    """Asks one server."""

    def __init__(self, url: str, workload: Workload, requests: list[Request], *, echo: bool = False) -> None:
        """
        Args:
            echo: the server answers a constant, which is right about the first sample alone.
        """
        self._url = url
        self._workload = workload
        self._requests = requests[:1] if echo else requests
        self._http = httpx.Client(timeout=TIMEOUT_S, trust_env=False)

    def first_wrong(self) -> str | None:
        """What is wrong with the answer to the first sample; None when the server is up and right."""
        try:
            return self._wrong(0)
        except httpx.TransportError as error:
            return f"no answer: {error}"

    def check_all(self) -> None:
        """Every sample, several at a time.

        Raises:
            WrongAnswer: which sample, and what came.
        """
        with ThreadPoolExecutor(AT_ONCE) as pool:
            try:
                wrong = next((it for it in pool.map(self._wrong, range(len(self._requests))) if it), None)
            except httpx.TransportError as error:
                wrong = f"no answer: {error}"
        if wrong:
            raise WrongAnswer(wrong)

    def close(self) -> None:
        self._http.close()

    def _wrong(self, i: int) -> str | None:
        """What is wrong with the answer to sample i."""
        request = self._requests[i]
        response = self._http.post(self._url, content=request.body, headers=dict(request.headers))
        if response.status_code != 200:
            return f"sample {i}: {response.status_code} {response.text[:200]}"
        try:
            same = self._workload.same(i, numbers(response))
        except (ValueError, TypeError) as error:
            return f"sample {i}: {error}"
        return (
            None if same else f"sample {i}: {response.text[:200]}, where onnxruntime has {self._workload.expected[i]}"
        )
