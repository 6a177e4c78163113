"""Head and body of an answer leave in one write, and the application knows who else is there."""

from __future__ import annotations

from typing import Any

import pytest

from service.connection import Wire


class FakeTransport:
    """Notes what is written, and closes for good."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.closed = False

    def write(self, data: bytes) -> None:
        assert not self.closed
        self.sent.append(data)

    def writelines(self, data: list[bytes]) -> None:
        self.write(b"".join(data))

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def get_extra_info(self, name: str) -> str:
        return f"the {name}"


def wire(requests: Any = ()) -> tuple[Wire, FakeTransport]:
    transport = FakeTransport()
    return Wire(transport, requests), transport  # type: ignore[arg-type]


def test_what_is_held_back_is_sent_at_once_and_in_order() -> None:
    one, transport = wire()
    one.write(b"100 Continue;")
    one.cork()
    one.write(b"head;")
    one.write(b"body")
    assert transport.sent == [b"100 Continue;"]
    one.uncork()
    one.write(b"next")
    assert transport.sent == [b"100 Continue;", b"head;body", b"next"]


def test_nothing_is_lost_when_the_connection_closes_in_between() -> None:
    """uvicorn closes a connection that is not kept alive before the application has returned."""
    one, transport = wire()
    one.cork()
    one.write(b"answer")
    one.close()
    one.uncork()
    assert (transport.sent, one.is_closing()) == ([b"answer"], True)


@pytest.mark.parametrize(("requests", "alone"), [((), True), (("this",), True), (("this", "other"), False)])
def test_who_is_alone(requests: tuple[str, ...], alone: bool) -> None:
    assert wire(requests)[0].alone is alone


def test_everything_else_is_the_transports_own() -> None:
    assert wire()[0].get_extra_info("peername") == "the peername"
